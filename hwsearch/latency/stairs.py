"""Stairs: milliseconds over the widths of one group, and which widths are worth having.

A runtime pads channels to blocks and picks its kernels by shape, so time is a staircase in width and not even monotone.
``curves`` asks a ``NetworkLatency`` for every width of one group at a time, the other groups fixed; ``kept_widths``
finds the right-hand edges of the stairs. A search cuts its space down to them, an explanation names the nearest ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthGroup, WidthSpace
    from hwsearch.latency.network import NetworkLatency

Floats = NDArray[np.float64]

#: A saving counts only above this share of the group's own range of times.
TOLERANCE = 0.02
#: "Costs no more" means: by no more than this share of the network's time, which no measurement can tell.
SAME = 1e-3
#: A group with more allowed widths is looked at in steps of 2, 4, 8 ...; edges lie on multiples of a block.
_MOST_WIDTHS = 64


@dataclass(frozen=True)
class StairCurve:
    """The network's milliseconds over the widths of one group, the other groups as they are.

    Attributes:
        group: its name.
        layers: those whose output has this group's channels, in execution order; ``touched``: those that read it too.
        width, units: as it is now, and at most.
        widths: the widths looked at, ascending; ``width`` is one of them.
        ms: predicted milliseconds of the whole network at each of them.
    """

    group: str
    layers: tuple[str, ...]
    width: int
    units: int
    widths: tuple[int, ...]
    ms: tuple[float, ...]
    touched: tuple[str, ...] = ()

    @property
    def now_ms(self) -> float:
        """At the present width."""
        return self.at(self.width)

    def at(self, width: int) -> float:
        """Milliseconds at one of ``widths``."""
        return self.ms[self.widths.index(width)]

    @property
    def down(self) -> int | None:
        """The nearest narrower width that is cheaper by more than ``TOLERANCE`` of the curve's range; None: there is
        none."""
        enough = self.now_ms - TOLERANCE * (max(self.ms) - min(self.ms))
        narrower = [w for w, ms in zip(self.widths, self.ms, strict=True) if w < self.width and ms < enough]
        return max(narrower, default=None)

    @property
    def up(self) -> int | None:
        """The widest wider width that costs no more (see ``SAME``); None: every wider one costs more."""
        limit = self.now_ms * (1 + SAME)
        wider = [w for w, ms in zip(self.widths, self.ms, strict=True) if w > self.width and ms <= limit]
        return max(wider, default=None)

    def channels_at(self, width: int | None, channels: int | None) -> int | None:
        """What a layer of so many ``channels`` has at another width: a unit may be several (grouped layers, splits)."""
        if width is None or channels is None or channels % self.width:
            return width
        return width * (channels // self.width)

    @property
    def saved_ms(self) -> float:
        """What ``down`` saves; 0 where there is none."""
        return 0.0 if self.down is None else self.now_ms - self.at(self.down)

    @property
    def edges(self) -> tuple[int, ...]:
        """The right-hand edges of the stairs."""
        kept = kept_widths(np.array(self.ms)[:, None], TOLERANCE)
        return tuple(self.widths[at] for at in kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "group": self.group, "layers": list(self.layers), "touched": list(self.touched),
            "width": self.width, "units": self.units,
            "down": self.down, "saved_ms": self.saved_ms, "up": self.up, "edges": list(self.edges),
            "widths": list(self.widths), "ms": list(self.ms),
        }  # fmt: skip


def curves(
    latency: NetworkLatency, choice: WidthChoice, *, told: Callable[[int, int, str], None] | None = None
) -> tuple[StairCurve, ...]:
    """One curve a group, around one choice.

    Args:
        latency: asked for every width of every group.
        choice: the other groups' widths, and where the network stands.
        told: (groups done, groups, name of the next one).

    Raises:
        InputError: the choice does not belong to the space.
        DeviceJobError: the runtime rejects a candidate.
    """
    latency.space.validate(choice)
    found = []
    for at, group in enumerate(latency.space.groups):
        if told is not None:
            told(at, len(latency.space.groups), group.name)
        widths = looked_at(group, choice.widths[at])
        rows = np.repeat(np.array([choice.widths], dtype=np.int64), len(widths), axis=0)
        rows[:, at] = widths
        ms = latency.evaluate(rows)
        found.append(
            StairCurve(
                group.name, layers_of(latency.space, group), choice.widths[at], group.units, widths,
                tuple(map(float, ms)), layers_of(latency.space, group, readers=True),
            )
        )  # fmt: skip
    return tuple(found)


def layers_of(space: WidthSpace, group: WidthGroup, *, readers: bool = False) -> tuple[str, ...]:
    """The layers whose output has this group's channels, in execution order; with ``readers`` also its readers."""
    made = {slot.parameter for slot in group.slots if readers or not slot.reads}
    weights = [layer.weight for layer in space.network.layers if layer.macs and layer.weight in made]
    # Named by the parameter's owner, as ONNX files name them.
    return tuple(dict.fromkeys(str(weight).rpartition(".")[0] for weight in weights))


def looked_at(group: WidthGroup, width: int) -> tuple[int, ...]:
    """The widths of a curve: all allowed ones, of very many only the multiples of a power of two, and ``width``."""
    widths: Sequence[int] = sorted(group.widths)
    step = 1
    while len(widths) > _MOST_WIDTHS:
        step *= 2
        widths = [w for w in sorted(group.widths) if w % step == 0 or w == group.units]
    return tuple(sorted({*widths, width}))


def kept_widths(times: Floats, tolerance: float) -> list[int]:
    """Positions of the widths worth having, ascending, of times (W, C) by ascending width in C contexts.

    From the widest down: a width stays unless one kept width is no slower than it in every context, up to ``tolerance``
    of the context's range. Comparing with *kept* widths only is what bounds the loss: against any larger width, many
    small steps would fall one by one.
    """
    allowance = tolerance * (times.max(axis=0) - times.min(axis=0))
    kept = [len(times) - 1]
    for at in range(len(times) - 2, -1, -1):
        no_slower = times[kept] <= times[at] + allowance
        if not no_slower.all(axis=1).any():
            kept.append(at)
    return kept[::-1]
