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
from numpy.typing import ArrayLike, NDArray

from hwsearch.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hwsearch.graph.capture import Layer, Network
    from hwsearch.graph.dependencies import Unit

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a group lives on one parameter axis: ``positions`` has shape ``(units, elements_per_unit)``.

    ``reads`` is true on the input side of a layer (axis 1 of the convolution that consumes the group) and false where
    the group is produced or passed through (axis 0 of its convolution, batch normalisation, depth-wise layers).
    """

    parameter: str
    axis: int
    positions: IntArray
    reads: bool = False

    @property
    def elements_per_unit(self) -> int:
        """Axis positions that one unit takes."""
        return int(self.positions.shape[1])


@dataclass(frozen=True, eq=False)
class WidthGroup:
    """One width variable.

    ``widths`` are the allowed numbers of kept units, ascending; the last one is ``units``, the full width.
    ``quantum`` is in units. ``layers`` are the layers that the group touches, in execution order. ``neutral`` is
    false when an operation mixes over the channels (layer normalisation, mean over channels), so that dropping even a
    dead unit changes the function.
    """

    name: str
    units: int
    quantum: int
    minimum: int
    slots: tuple[Slot, ...] = field(repr=False)
    layers: tuple[str, ...] = field(repr=False)
    widths: tuple[int, ...] = field(repr=False)
    neutral: bool = True


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


@dataclass(frozen=True, eq=False)
class WidthSpace:
    """All width choices of one network.

    Attributes:
        groups: the width variables, in execution order of the layer that produces them.
        network: the captured network at full width.
        frozen_reasons: ``"parameter axis"`` to the reason why it keeps its size.
        unknown_operations: operations without a rule, as ``name at file.py:12``; what they touch is frozen.
        model: the module that the space was made from, so that searchers need not be handed it again.

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
        groups, names = [], set()
        for unit in found.units:
            group = _group(network, unit, reads, quantum, minimum)
            if group.units < 2:
                for slot in group.slots:
                    reasons[f"{slot.parameter} axis {slot.axis}"] = "all its channels are tied into a single unit"
                continue
            while group.name in names:  # one convolution can feed two groups, each with a part of its channels
                stem, _, number = group.name.partition("#")
                group = replace(group, name=f"{stem}#{int(number or 1) + 1}")
            names.add(group.name)
            groups.append(group)
        space = cls(tuple(groups), network, reasons, found.unknown, model)
        if verify and groups:
            from hwsearch.graph.surgery import freeze_failing

            space = freeze_failing(model, space)
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
            min(group.widths, key=lambda width: (abs(width - ratio * group.units), -width))
            for group in self.groups
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
        for layer in self.network.layers:
            if layer.weight is None or not layer.macs:
                total += layer.macs
            else:
                # MACs of a layer are the positions it visits times the elements of its weight, at any width.
                positions = layer.macs // math.prod(self.network.shapes[layer.weight])
                total += positions * self._elements(layer.weight, rows)
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


def check_settings(quantum: int, minimum: int | float | None) -> None:
    """Refuse a quantum or minimum that makes no sense, with one clear line."""
    if isinstance(quantum, bool) or not isinstance(quantum, int) or quantum < 1:
        raise InputError(f"quantum must be a whole number of channels of at least 1, got {quantum!r}")
    if minimum is None:
        return
    if isinstance(minimum, float) and 0.0 < minimum <= 1.0:
        return
    if isinstance(minimum, int) and not isinstance(minimum, bool) and minimum >= 1:
        return
    raise InputError(f"minimum must be a number of units (1 or more) or a share in (0, 1], got {minimum!r}")


def _main_reason(space: WidthSpace) -> str:
    """The most telling reason why nothing can change: what could be mended before what every network has."""
    reasons = list(space.frozen_reasons.values()) or ["it has no channels"]
    telling = [reason for reason in reasons if "no rule" in reason or "Python code" in reason]
    return (telling or reasons[-1:])[0]


def _group(
    network: Network,
    unit: Unit,
    reads: Mapping[tuple[str, int], bool],
    quantum: int,
    minimum: int | float | None,
) -> WidthGroup:
    slots = tuple(
        Slot(name, axis, positions, reads[name, axis])
        for (name, axis), positions in zip(unit.slots, unit.positions, strict=True)
    )
    units = int(slots[0].positions.shape[0])
    # The quantum is in channels: a unit of several channels (a grouped convolution's) counts for several.
    per_unit = min((slot.elements_per_unit for slot in slots if not slot.reads), default=1)
    step = max(1, quantum // math.gcd(quantum, per_unit))
    lowest = step if minimum is None else math.ceil(minimum * units) if isinstance(minimum, float) else minimum
    lowest = min(max(1, -(-lowest // step) * step), units)
    widths = tuple(sorted({*range(lowest, units + 1, step), units}))
    touched = {slot.parameter for slot in slots}
    layers = dict.fromkeys(layer.name for layer in network.layers if _touches(layer, touched))
    first = next((slot.parameter for slot in slots if not slot.reads), slots[0].parameter)
    name = first.rpartition(".")[0] or first
    return WidthGroup(name, units, step, lowest, slots, tuple(layers), widths, unit.neutral)


def _touches(layer: Layer, parameters: set[str]) -> bool:
    return layer.weight in parameters or any(name.rpartition(".")[0] == layer.name for name in parameters)
