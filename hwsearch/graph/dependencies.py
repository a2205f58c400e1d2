"""``extract``: which channels of a network must be kept or dropped together, exactly.

Every index of every parameter axis gets an id; the rules of each operation pass ids along the exported graph and join
those that the operation ties (a residual addition joins both sides, a concatenation lays them end to end, a
depth-wise convolution joins input and output). What is left is grouped: classes of ids that hit the same parameter
axes the same number of times are interchangeable units of one width. An operation without a rule freezes what it
touches and is reported.

Reference: element-id propagation, a generalisation of DepGraph (Fang et al., CVPR 2023), which tracks whole layers.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.graph.capture import Network, node_shape, op_name
from hwsearch.graph.ids import Classes, Ids, IntArray, Value, along
from hwsearch.graph.rules import KERNEL_EXTENT, RULES, Context, values_in

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True, eq=False)
class AxisClasses:
    """One parameter axis: the class of each position, and whether its layer reads the axis (its input side)."""

    parameter: str
    axis: int
    classes: IntArray
    reads: bool


@dataclass(frozen=True, eq=False)
class Unit:
    """Interchangeable classes: ``positions[slot][u]`` are the places of unit ``u`` along the axis ``slots[slot]``."""

    slots: tuple[tuple[str, int], ...]
    positions: tuple[IntArray, ...]
    neutral: bool


@dataclass(frozen=True)
class Frozen:
    """A parameter axis that keeps (part of) its size, and why."""

    parameter: str
    axis: int
    elements: int
    reason: str


@dataclass(frozen=True, eq=False)
class Dependencies:
    """What ``extract`` found: units that share a width, frozen axes with reasons, operations without a rule."""

    units: tuple[Unit, ...]
    axes: tuple[AxisClasses, ...]
    frozen: tuple[Frozen, ...]
    unknown: tuple[str, ...]
    unused: tuple[str, ...]


def extract(network: Network) -> Dependencies:
    """Propagate element ids through the exported graph of ``network``.

    Never fails on an operation it does not know: the channels that meet it are frozen, and ``unknown`` says
    ``operation at file.py:12``. Cost is near-linear in the total length of all parameter axes.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3))
        >>> [unit.slots for unit in extract(capture(model, torch.zeros(1, 3, 8, 8))).units]
        [(('0.weight', 0), ('0.bias', 0), ('1.weight', 1))]
    """
    ids = Ids()
    slot_ids: dict[tuple[str, int], IntArray] = {}
    context = Context(ids=ids)
    environment: dict[Any, Any] = {}
    used: dict[str, None] = {}
    for node in network.program.graph.nodes:
        if node.op == "placeholder":
            environment[node] = _placeholder(network, node, ids, slot_ids)
        elif node.op == "output":
            for value in values_in(node.args, environment):
                for factor in value.factors:
                    ids.freeze(factor, "it is the network's output")
        else:
            used |= {name: None for arg in node.all_input_nodes if (name := network.tensor_name(arg)) is not None}
            environment[node] = _apply(node, environment, context)
    classes = ids.solve()
    order = {name: place for place, name in enumerate(used)}
    in_order = sorted(slot_ids.items(), key=lambda item: order.get(item[0][0], len(order)))
    read = np.zeros(ids.count, dtype=bool)
    for array in context.read:
        read[array] = True
    axes = tuple(
        AxisClasses(name, axis, classes.roots[array], bool(read[array].any())) for (name, axis), array in in_order
    )
    unused = tuple(sorted({name for name, _ in slot_ids} - used.keys()))
    return Dependencies(
        units=_bundle(axes, classes, set(unused)),
        axes=axes,
        frozen=_frozen(axes, classes, set(unused)),
        unknown=tuple(dict.fromkeys(context.unknown)),
        unused=unused,
    )


def _placeholder(network: Network, node: fx.Node, ids: Ids, slot_ids: dict[tuple[str, int], IntArray]) -> Any:
    """A parameter's value has one factor per axis longer than 1; an input or constant has none."""
    shape = node_shape(node)
    if shape is None:
        return None
    name = network.tensor_name(node)
    if name is None:
        return Value(shape)
    factors = []
    for axis, size in enumerate(shape):
        if size > 1:
            if (name, axis) not in slot_ids:
                slot_ids[name, axis] = ids.new(size)
            factors.append(along(slot_ids[name, axis], axis, len(shape)))
    return Value(shape, tuple(factors))


def _apply(node: fx.Node, environment: dict[Any, Any], context: Context) -> Any:
    """The value of a node by its operation's rule; without a rule, freeze and report."""
    if node.op == "get_attr":
        shape = node_shape(node)
        return None if shape is None else Value(shape)
    found = RULES.get(op_name(node))
    return context.give_up(node, environment) if found is None else found(node, environment, context)


def _bundle(axes: tuple[AxisClasses, ...], classes: Classes, unused: set[str]) -> tuple[Unit, ...]:
    """Classes with the same signature (the same axes, the same number of places on each) become units of one width."""
    places: dict[int, list[tuple[int, IntArray]]] = defaultdict(list)
    for index, axis in enumerate(axes):
        if axis.parameter in unused:
            continue
        order = np.argsort(axis.classes, kind="stable")
        roots, starts = np.unique(axis.classes[order], return_index=True)
        for root, positions in zip(roots.tolist(), np.split(order, starts[1:]), strict=True):
            if root not in classes.frozen:
                places[root].append((index, positions))
    bundles: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for root, hits in places.items():
        bundles[tuple((index, len(positions)) for index, positions in hits)].append(root)
    units = []
    for signature, members in bundles.items():
        members.sort(key=lambda root: int(places[root][0][1][0]))
        stacked = tuple(
            np.stack([places[root][slot][1] for root in members]).astype(np.int64) for slot in range(len(signature))
        )
        names = tuple((axes[index].parameter, axes[index].axis) for index, _ in signature)
        units.append(Unit(names, stacked, not any(root in classes.mixed for root in members)))
    return tuple(units)


def _frozen(axes: tuple[AxisClasses, ...], classes: Classes, unused: set[str]) -> tuple[Frozen, ...]:
    found = []
    for axis in axes:
        if axis.parameter in unused:
            found.append(Frozen(axis.parameter, axis.axis, len(axis.classes), "the forward does not use it"))
            continue
        reasons = [classes.frozen.get(root) for root in axis.classes.tolist()]
        distinct = dict.fromkeys(r for r in reasons if r is not None and r != KERNEL_EXTENT)
        found += [Frozen(axis.parameter, axis.axis, reasons.count(reason), reason) for reason in distinct]
    return tuple(found)
