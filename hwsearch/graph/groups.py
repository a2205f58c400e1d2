"""``WidthGroup``: one width variable of a network: its units, the widths it may take, every place that it touches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hwsearch.errors import InputError

if TYPE_CHECKING:
    from hwsearch.graph.capture import Network
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

    @property
    def channels_per_unit(self) -> int:
        """Channels that one unit is where the group is produced: several behind a grouped convolution."""
        return min((slot.elements_per_unit for slot in self.slots if not slot.reads), default=1)

    def with_widths(self, quantum: int, minimum: int | float | None) -> WidthGroup:
        """The same group with the widths that a quantum in channels and a minimum in units (or a share) leave it."""
        # A unit of several channels (a grouped convolution's) counts for several: least common multiple of both.
        step = max(1, quantum // math.gcd(quantum, self.channels_per_unit))
        lowest = step if minimum is None else minimum
        if isinstance(lowest, float):
            lowest = math.ceil(lowest * self.units)
        lowest = min(max(1, -(-lowest // step) * step), self.units)
        widths = tuple(sorted({*range(lowest, self.units + 1, step), self.units}))
        return replace(self, quantum=step, minimum=lowest, widths=widths)


def make_group(
    network: Network,
    unit: Unit,
    reads: Mapping[tuple[str, int], bool],
    quantum: int,
    minimum: int | float | None,
) -> WidthGroup:
    """The group of a bundle of interchangeable units, named after the first layer that produces it."""
    slots = tuple(
        Slot(name, axis, positions, reads[name, axis])
        for (name, axis), positions in zip(unit.slots, unit.positions, strict=True)
    )
    touched = {slot.parameter for slot in slots}
    layers = touched_layers(network, touched)
    first = next((slot.parameter for slot in slots if not slot.reads), slots[0].parameter)
    units = int(slots[0].positions.shape[0])
    group = WidthGroup(first.rpartition(".")[0] or first, units, 1, 1, slots, layers, (units,), unit.neutral)
    return group.with_widths(quantum, minimum)


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


def touched_layers(network: Network, parameters: Iterable[str]) -> tuple[str, ...]:
    """The layers that own, or have beside their weight, one of these parameters: each once, in execution order."""
    found: set[int] = set()
    for name in parameters:
        found.update(network.places.get(name, ()))
        found.update(network.places.get(f"{name.rpartition('.')[0]}.", ()))
    return tuple(dict.fromkeys(network.layers[place].name for place in sorted(found)))
