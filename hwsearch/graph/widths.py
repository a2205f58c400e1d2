"""``WidthSpace``: the widths that a network can take, one variable per group of channels that must agree.

A *unit* is the smallest thing that can be dropped: one channel, or every channel that the graph ties to it (the same
channel on both sides of a residual addition, the ``H*W`` features that a flattened channel becomes). A *group* is a
set of interchangeable units; its width is how many of them are kept. MACs and parameters are closed forms of the
widths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hwsearch.errors import InputError
from hwsearch.graph.foldable import (
    FoldingBlock,
    folded_network,
    folding_blocks,
    moved_products,
    with_folded,
    without_inner,
)
from hwsearch.graph.groups import IntArray, Slot, WidthGroup, check_settings, make_group

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hwsearch.graph.capture import Network
    from hwsearch.graph.dependencies import Product

__all__ = ["IntArray", "Slot", "WidthChoice", "WidthGroup", "WidthRow", "WidthSpace", "check_settings"]


@dataclass(frozen=True, order=True)
class WidthChoice:
    """Kept units per group, in the order of ``WidthSpace.groups``."""

    widths: tuple[int, ...]


class WidthRow(NamedTuple):
    """One line of ``WidthSpace.table``: a group in words."""

    name: str
    units: int
    smallest: int
    steps: int
    layers: str


@dataclass(frozen=True)
class WidthProduct:
    """MACs of one layer without a weight: the product of its ``axes`` times ``rest``.

    Each axis is ``(size at full width, ((group name, positions that one unit takes), ...))``.
    """

    layer: int
    rest: int
    axes: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]


@dataclass(frozen=True, eq=False)
class WidthSpace:
    """All width choices of one network.

    Attributes:
        groups: the width variables, in execution order of the layer that produces them.
        network: the captured network at full width.
        frozen_reasons: ``"parameter axis"`` to the reason why it keeps its size.
        unknown_operations: operations without a rule, as ``name at file.py:12``; what they touch is frozen.
        model: the module that the space was made from, so that searchers need not be handed it again.
        products: layers that multiply activations (attention), whose MACs follow widths without any weight.

    Example:
        >>> space = WidthSpace.from_model(vgg_small(), torch.zeros(1, 1, 28, 28), quantum=8)
        >>> space.uniform(0.5).widths
        (16, 16, 32, 32, 64, 64)
    """

    groups: tuple[WidthGroup, ...]
    network: Network = field(repr=False)
    frozen_reasons: Mapping[str, str] = field(repr=False, default_factory=dict)
    unknown_operations: tuple[str, ...] = ()
    model: nn.Module | None = field(repr=False, default=None)
    products: tuple[WidthProduct, ...] = field(repr=False, default=())

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        example_input: Tensor,
        *,
        quantum: int = 1,
        minimum: int | float | None = None,
        verify: bool = True,
    ) -> WidthSpace:
        """Capture ``model``, extract its dependencies and build the space.

        Blocks of branches (``ODBB``) are seen as what they fold into, see ``hwsearch.graph.foldable``.

        Args:
            quantum: allowed widths are multiples of this many channels (and always the full width). A group whose
                units are several channels each (grouped convolutions) needs fewer units for it.
            minimum: smallest width: units when an int, a share of the full width when a float in (0, 1]; None means one
                quantum.
            verify: shrink a copy with random weights and compare it with the full network whose dropped units are
                dead; a group that fails (its size is written in the model's Python code) is frozen with that reason.

        Raises:
            InputError: a bad quantum or minimum, or a model in which no width can change.
            UnsupportedModelError: the model cannot be captured.
        """
        from hwsearch.graph.capture import capture
        from hwsearch.graph.dependencies import extract

        check_settings(quantum, minimum)
        network = capture(model, example_input)
        found = extract(network)
        reasons = {f"{item.parameter} axis {item.axis}": item.reason for item in found.frozen}
        reads = {(axis.parameter, axis.axis): axis.reads for axis in found.axes}
        groups, names, group_of = [], set(), {}
        for unit in found.units:
            group = make_group(network, unit, reads, quantum, minimum)
            if group.units < 2:
                for slot in group.slots:
                    reasons[f"{slot.parameter} axis {slot.axis}"] = "all its channels are tied into a single unit"
                continue
            while group.name in names:  # one convolution can feed two groups, each with a part of its channels
                stem, _, number = group.name.partition("#")
                group = replace(group, name=f"{stem}#{int(number or 1) + 1}")
            names.add(group.name)
            groups.append(group)
            group_of.update(dict.fromkeys(unit.roots.tolist(), group))
        products = _products(network, found.products, group_of)
        blocks = folding_blocks(model)
        if blocks:
            groups, inner = without_inner(groups, blocks)
            reasons |= dict.fromkeys(inner, "it lies inside a branch, which the folded layer has none of")
        space = cls(tuple(groups), network, reasons, found.unknown, model, products)
        if verify and groups:
            from hwsearch.graph.verification import freeze_failing

            space = freeze_failing(model, space)
        if blocks:
            space = _seen_folded(space, folded_network(model, example_input, blocks), blocks)
        if not space.groups:
            raise InputError(f"no width of {type(model).__name__} can change: {_main_reason(space)}")
        return space

    def full(self) -> WidthChoice:
        """Every unit kept: the network as it came."""
        return WidthChoice(tuple(group.units for group in self.groups))

    def smallest(self) -> WidthChoice:
        """The smallest allowed width everywhere."""
        return WidthChoice(tuple(group.widths[0] for group in self.groups))

    def uniform(self, ratio: float) -> WidthChoice:
        """Every group scaled by ``ratio`` and rounded to its nearest allowed width (the larger one when halfway).

        Raises:
            InputError: the ratio is not in (0, 1].
        """
        if not 0.0 < ratio <= 1.0:
            raise InputError(f"a width ratio must be in (0, 1], got {ratio!r}")
        picked = (
            min(group.widths, key=lambda width: (abs(width - ratio * group.units), -width)) for group in self.groups
        )
        return WidthChoice(tuple(picked))

    def sample(self, rng: np.random.Generator) -> WidthChoice:
        """Every group's width drawn uniformly from its allowed widths."""
        return WidthChoice(tuple(int(rng.choice(group.widths)) for group in self.groups))

    def choice_array(self, choices: Iterable[WidthChoice]) -> IntArray:
        """Choices as an int64 array of shape ``(N, groups)``."""
        rows = [choice.widths for choice in choices]
        return np.asarray(rows, dtype=np.int64).reshape(len(rows), len(self.groups))

    def choices(self, array: ArrayLike) -> list[WidthChoice]:
        """The rows of an int array of shape ``(N, groups)`` as choices, each checked."""
        rows = [WidthChoice(tuple(int(width) for width in row)) for row in np.atleast_2d(np.asarray(array))]
        for row in rows:
            self.validate(row)
        return rows

    def validate(self, choice: WidthChoice) -> None:
        """Check that a choice belongs to this space.

        Raises:
            InputError: naming the group, its width and the nearest allowed widths.
        """
        if len(choice.widths) != len(self.groups):
            raise InputError(f"a choice for this network needs {len(self.groups)} widths, got {len(choice.widths)}")
        for group, width in zip(self.groups, choice.widths, strict=True):
            if width not in self._allowed[group.name]:
                near = sorted(sorted(group.widths, key=lambda w: abs(w - width))[:4])
                raise InputError(f"group {group.name} cannot be {width} wide; the nearest allowed widths are {near}")

    def restrict(self, widths: Mapping[str, Sequence[int]]) -> WidthSpace:
        """The same space with fewer allowed widths in some groups; the full width always stays allowed.

        Raises:
            InputError: an unknown group, or a width outside 1 to the group's units.
        """
        unknown = sorted(widths.keys() - {group.name for group in self.groups})
        if unknown:
            raise InputError(f"no group named {unknown[0]!r}; the groups are {', '.join(g.name for g in self.groups)}")
        groups = []
        for group in self.groups:
            if group.name in widths:
                chosen = sorted({*(int(width) for width in widths[group.name]), group.units})
                if chosen[0] < 1 or chosen[-1] > group.units:
                    raise InputError(f"group {group.name} takes widths from 1 to {group.units}, got {chosen}")
                group = replace(group, widths=tuple(chosen), minimum=chosen[0])
            groups.append(group)
        return replace(self, groups=tuple(groups))

    def macs(self, choice: WidthChoice) -> int:
        """Multiply-accumulates of the network at ``choice``, at the captured input shape; exact."""
        return int(self.macs_array(self.choice_array([choice]))[0])

    def parameters(self, choice: WidthChoice) -> int:
        """Trainable elements of the network at ``choice``; exact."""
        return int(self.parameters_array(self.choice_array([choice]))[0])

    def macs_array(self, array: ArrayLike) -> IntArray:
        """``macs`` of every row of a width array of shape ``(N, groups)``, as int64 of shape ``(N,)``."""
        rows = np.asarray(array, dtype=np.int64)
        total = np.zeros(len(rows), dtype=np.int64)
        moving = {product.layer for product in self.products}
        for index, layer in enumerate(self.network.layers):
            if index in moving:
                continue
            if layer.weight is None or not layer.macs:
                total += layer.macs
            else:
                # MACs of a layer are the positions it visits times the elements of its weight, at any width.
                positions = layer.macs // math.prod(self.network.shapes[layer.weight])
                total += positions * self._elements(layer.weight, rows)
        columns = {group.name: index for index, group in enumerate(self.groups)}
        for product in self.products:
            macs = np.full(len(rows), product.rest, dtype=np.int64)
            for size, terms in product.axes:
                dropped = np.zeros(len(rows), dtype=np.int64)
                for name, per_unit in terms:
                    if name in columns:  # a frozen group keeps all its units
                        dropped += per_unit * (self.groups[columns[name]].units - rows[:, columns[name]])
                macs *= size - dropped
            total += macs
        return total

    def parameters_array(self, array: ArrayLike) -> IntArray:
        """``parameters`` of every row of a width array of shape ``(N, groups)``, as int64 of shape ``(N,)``."""
        rows = np.asarray(array, dtype=np.int64)
        total = np.zeros(len(rows), dtype=np.int64)
        for name in self.network.trainable:
            total += self._elements(name, rows)
        return total

    def axis_sizes(self, parameter: str, choice: WidthChoice) -> tuple[int, ...]:
        """The shape that a parameter has at ``choice``."""
        shape = list(self.network.shapes[parameter])
        for axis, index, per_unit in self._shrinkage.get(parameter, ()):
            shape[axis] -= per_unit * (self.groups[index].units - choice.widths[index])
        return tuple(shape)

    @cached_property
    def log10_size(self) -> float:
        """Decimal logarithm of the number of choices."""
        return sum(math.log10(len(group.widths)) for group in self.groups)

    def table(self) -> tuple[WidthRow, ...]:
        """One row per group, for printing."""
        return tuple(
            WidthRow(group.name, group.units, group.widths[0], len(group.widths), " ".join(group.layers))
            for group in self.groups
        )

    @cached_property
    def _allowed(self) -> dict[str, frozenset[int]]:
        return {group.name: frozenset(group.widths) for group in self.groups}

    @cached_property
    def _shrinkage(self) -> dict[str, list[tuple[int, int, int]]]:
        """Per parameter: ``(axis, group index, positions that one unit takes)``."""
        found: dict[str, list[tuple[int, int, int]]] = {}
        for index, group in enumerate(self.groups):
            for slot in group.slots:
                found.setdefault(slot.parameter, []).append((slot.axis, index, slot.elements_per_unit))
        return found

    def _elements(self, parameter: str, rows: IntArray) -> IntArray:
        """Elements of a parameter for every row of widths."""
        shape = self.network.shapes[parameter]
        sizes = [np.full(len(rows), size, dtype=np.int64) for size in shape]
        for axis, index, per_unit in self._shrinkage.get(parameter, ()):
            sizes[axis] -= per_unit * (self.groups[index].units - rows[:, index])
        return math.prod(sizes, start=np.ones(len(rows), dtype=np.int64))


def _products(
    network: Network, products: Iterable[Product], group_of: Mapping[int, WidthGroup]
) -> tuple[WidthProduct, ...]:
    """Products of activations that some group narrows; one layer may be several (attention multiplies twice)."""
    layer_of = {node: index for index, node in enumerate(network.nodes)}
    touched = {product.node for product in products for axis in product.axes for root in axis if int(root) in group_of}
    found = []
    for product in products:
        if product.node in layer_of and product.node in touched:
            axes, rest = [], product.macs
            for roots in product.axes:
                counts: dict[str, int] = {}
                for root in roots.tolist():
                    if root in group_of:
                        counts[group_of[root].name] = counts.get(group_of[root].name, 0) + 1
                units = {group.name: group.units for group in group_of.values()}
                axes.append((len(roots), tuple((name, count // units[name]) for name, count in counts.items())))
                rest //= len(roots)
            found.append(WidthProduct(layer_of[product.node], rest, tuple(axes)))
    return tuple(found)


def _seen_folded(space: WidthSpace, network: Network, blocks: dict[str, FoldingBlock]) -> WidthSpace:
    """The space of an unfolded network with the layers, costs and parameter names of the folded one as well."""
    groups = with_folded(space.groups, network, blocks)
    renamed = {old.name: new.name for old, new in zip(space.groups, groups, strict=True)}
    products = moved_products(space.products, space.network, network, renamed)
    network = replace(network, shapes={**space.network.shapes, **network.shapes})  # slots name tensors of both
    return replace(space, groups=groups, network=network, products=products)


def _main_reason(space: WidthSpace) -> str:
    """The most telling reason why nothing can change: what could be mended before what every network has."""
    reasons = list(space.frozen_reasons.values()) or ["it has no channels"]
    telling = [reason for reason in reasons if "no rule" in reason or "Python code" in reason]
    return (telling or reasons[-1:])[0]
