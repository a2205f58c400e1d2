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

from hwsearch.graph.capture import Network, node_shape, op_name, source_line
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
    """Interchangeable classes: ``positions[slot][u]`` are the places of unit ``u`` along the axis ``slots[slot]``.

    ``roots[u]`` is the class itself.
    """

    slots: tuple[tuple[str, int], ...]
    positions: tuple[IntArray, ...]
    neutral: bool
    roots: IntArray


@dataclass(frozen=True, eq=False)
class Product:
    """Activations multiplied with each other: ``macs`` at full width, and the classes along each set of its axes."""

    node: str
    macs: int
    axes: tuple[IntArray, ...]


@dataclass(frozen=True)
class Frozen:
    """A parameter axis that keeps (part of) its size, and why."""

    parameter: str
    axis: int
    elements: int
    reason: str


@dataclass(frozen=True, eq=False)
class Dependencies:
    """What ``extract`` found: units that share a width, frozen axes with reasons, operations without a rule.

    ``unused`` are parameters that the forward never reads; ``products`` multiply activations (attention).
    """

    units: tuple[Unit, ...]
    axes: tuple[AxisClasses, ...]
    frozen: tuple[Frozen, ...]
    unknown: tuple[str, ...]
    unused: tuple[str, ...]
    products: tuple[Product, ...] = ()


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
    kernels = {layer.weight for layer in network.layers if layer.op.startswith("conv") and layer.weight is not None}
    for node in network.program.graph.nodes:
        if node.op == "placeholder":
            environment[node] = _placeholder(network, node, ids, slot_ids, kernels)
            if network.tensor_name(node) is not None:
                context.constant.add(node)
        elif node.op == "output":
            _freeze_outputs(node, environment, ids)
        else:
            sources = node.all_input_nodes
            used |= {name: None for arg in sources if (name := network.tensor_name(arg)) is not None}
            environment[node] = _apply(node, environment, context)
            if sources and context.constant.issuperset(sources):
                context.constant.add(node)
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
        products=tuple(
            Product(node, macs, tuple(classes.roots[factor] for factor in factors))
            for node, macs, factors in context.products
        ),
    )


def _placeholder(
    network: Network, node: fx.Node, ids: Ids, slot_ids: dict[tuple[str, int], IntArray], kernels: set[str]
) -> Any:
    """A parameter's value has one factor per axis longer than 1; an input or constant has none.

    The spatial axes of a convolution's weight never change: they get no ids.
    """
    shape = node_shape(node)
    if shape is None:
        return None
    name = network.tensor_name(node)
    if name is None:
        return Value(shape)
    factors = []
    for axis, size in enumerate(shape):
        if size > 1 and not (name in kernels and axis >= 2):
            if (name, axis) not in slot_ids:
                slot_ids[name, axis] = ids.new(size)
            factors.append(along(slot_ids[name, axis], axis, len(shape)))
    return Value(shape, tuple(factors))


def _freeze_outputs(node: fx.Node, environment: dict[Any, Any], ids: Ids) -> None:
    """What the network returns keeps its size; each of several outputs is named by the line that makes it."""
    for source in node.all_input_nodes:
        for value in values_in(source, environment):
            for factor in value.factors:
                ids.freeze(factor, f"it is the network's output, made at {source_line(source)}")


def _apply(node: fx.Node, environment: dict[Any, Any], context: Context) -> Any:
    """The value of a node by its operation's rule; without a rule, freeze and report."""
    if node.op == "get_attr":
        shape = node_shape(node)
        return None if shape is None else Value(shape)
    found = RULES.get(op_name(node))
    return context.give_up(node, environment) if found is None else found(node, environment, context)


def _bundle(axes: tuple[AxisClasses, ...], classes: Classes, unused: set[str]) -> tuple[Unit, ...]:
    """Classes with the same signature (the same axes, the same number of places on each) become units of one width.

    Everything is laid out as one table of (class, axis, place), sorted: a class is then a run of rows, and classes of
    one signature are runs of one length. Only the loop over classes is Python's.
    """
    free = np.ones(len(classes.roots) + 1, dtype=bool)
    free[list(classes.frozen)] = False
    chosen = [index for index, axis in enumerate(axes) if axis.parameter not in unused]
    if not any(free[axes[index].classes].any() for index in chosen):
        return ()
    root = np.concatenate([axes[index].classes for index in chosen])
    owner = np.repeat(chosen, [len(axes[index].classes) for index in chosen])
    place = np.concatenate([np.arange(len(axes[index].classes)) for index in chosen])
    keep = free[root]
    root, owner, place = root[keep], owner[keep], place[keep]
    order = np.lexsort((place, owner, root))
    root, owner, place = root[order], owner[order].astype(np.int64), place[order].astype(np.int64)
    starts = np.flatnonzero(np.diff(root, prepend=-1))
    bundles: dict[bytes, list[int]] = defaultdict(list)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(root)], strict=True):
        bundles[owner[start:end].tobytes()].append(start)
    units = []
    for key, members in bundles.items():
        hits = np.frombuffer(key, dtype=np.int64)
        firsts = np.asarray(members)[np.argsort(place[members], kind="stable")]
        table = place[firsts[:, None] + np.arange(len(hits))]
        slots, counts = np.unique(hits, return_counts=True)
        positions = tuple(np.ascontiguousarray(part) for part in np.split(table, np.cumsum(counts)[:-1], axis=1))
        roots = root[firsts].astype(np.int64)
        neutral = classes.mixed.keys().isdisjoint(roots.tolist())
        names = tuple((axes[index].parameter, axes[index].axis) for index in slots)
        units.append((int(slots[0]), int(place[firsts[0]]), Unit(names, positions, neutral, roots)))
    return tuple(unit for _, _, unit in sorted(units, key=lambda item: item[:2]))


def _frozen(axes: tuple[AxisClasses, ...], classes: Classes, unused: set[str]) -> tuple[Frozen, ...]:
    found = []
    for axis in axes:
        if axis.parameter in unused:
            found.append(Frozen(axis.parameter, axis.axis, len(axis.classes), "the forward does not use it"))
            continue
        if classes.frozen.keys().isdisjoint(axis.classes.tolist()):
            continue
        reasons = [classes.frozen.get(root) for root in axis.classes.tolist()]
        distinct = dict.fromkeys(r for r in reasons if r is not None and r != KERNEL_EXTENT)
        found += [Frozen(axis.parameter, axis.axis, reasons.count(reason), reason) for reason in distinct]
    return tuple(found)
