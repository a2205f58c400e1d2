"""``Budget``: milliseconds that a network must keep, on one device or on several.

Searchers never touch a device. They see a ``Budget``: it predicts the time of whole populations, says which choices
keep every limit, and moves any choice into the budget. Time is *not* monotone in width (a narrower layer can take a
slower kernel), so nothing here relies on "wider is slower": a choice is feasible only when its own prediction is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hwsearch.errors import InfeasibleBudgetError, InputError
from hwsearch.search.grid import WidthGrid, Widths

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace

Floats = NDArray[np.float64]

#: Probability of keeping a limit that is only predicted.
DEFAULT_QUANTILE = 0.95


@runtime_checkable
class Latency(Protocol):
    """What a limit needs: predicted milliseconds of a population. ``hwsearch.NetworkLatency`` is one.

    A latency may also offer ``interval(choices, level) -> (low_ms, high_ms)``, needed for ``Limit.quantile`` above 0.5,
    and ``corrected(factor)``, the same latency with every time multiplied.
    """

    def evaluate(self, choices: Widths) -> Floats:
        """Milliseconds (N,) of choices (N, G)."""


@dataclass(frozen=True)
class ScaledLatency:
    """A latency times a constant: how a measurement on the device corrects a prediction."""

    latency: Any
    factor: float

    def evaluate(self, choices: Widths) -> Floats:
        """Corrected milliseconds (N,)."""
        return np.asarray(self.latency.evaluate(choices), dtype=np.float64) * self.factor

    def interval(self, choices: Widths, level: float) -> tuple[Floats, Floats]:
        """Corrected (low_ms, high_ms), each (N,)."""
        low, high = self.latency.interval(choices, level)
        return np.asarray(low) * self.factor, np.asarray(high) * self.factor


@dataclass(frozen=True)
class MegaMacs:
    """Millions of multiply-accumulates in the place of milliseconds: the constraint of the papers, for comparison.

    Example:
        >>> Limit(MegaMacs(space), max_ms=305.0, name="MMACs")                        # doctest: +SKIP
    """

    space: WidthSpace

    def evaluate(self, choices: Widths) -> Floats:
        """Millions of multiply-accumulates (N,); exact."""
        return np.asarray(self.space.macs_array(choices), dtype=np.float64) / 1e6


@dataclass(frozen=True)
class Limit:
    """At most ``max_ms`` milliseconds on one device.

    Args:
        latency: predicts milliseconds, see ``Latency``.
        max_ms: the limit, a finite positive number of milliseconds.
        quantile: the share of networks like this one whose time would be at or below the number compared with
            ``max_ms``, which is the probability of keeping the limit: 0.5 compares the prediction itself, 0.95 the
            upper side of its interval (one-sided). None: 0.95 where the latency offers an interval and nothing
            measures; 0.5 otherwise, since a measurement corrects the prediction and decides.
        name: the device's name, for messages.
        measure: milliseconds of one choice *measured* on the device; None where only predictions are wanted.

    Raises:
        InputError: a value cannot be used; the message names it.
    """

    latency: Any
    max_ms: float
    quantile: float | None = None
    name: str = "device"
    measure: Callable[[WidthChoice], float] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_ms", checked_ms(self.max_ms, "the budget (max_ms)"))
        if not callable(getattr(self.latency, "evaluate", None)):
            raise InputError(
                f"a limit needs a latency with an evaluate(choices) method, not {type(self.latency).__name__}: "
                "give a NetworkLatency"
            )
        if self.quantile is None:
            unsure = self.measure is None and callable(getattr(self.latency, "interval", None))
            object.__setattr__(self, "quantile", DEFAULT_QUANTILE if unsure else 0.5)
        if not isinstance(self.quantile, (int, float)) or not 0.5 <= self.quantile < 1:
            raise InputError(f"quantile is {self.quantile!r}: give a number from 0.5 up to, not including, 1")
        if self.quantile > 0.5 and not callable(getattr(self.latency, "interval", None)):
            raise InputError(
                f"quantile {self.quantile:g} needs a latency with an interval(choices, level) method, which "
                f"{type(self.latency).__name__} lacks: use quantile 0.5"
            )

    def evaluate(self, choices: Widths) -> Floats:
        """Milliseconds (N,) that are compared with ``max_ms``: the prediction at ``quantile``."""
        if len(choices) == 0:
            return np.zeros(0)
        # A two-sided interval of level 2q - 1 leaves 1 - q above its upper end: that end is the one-sided q bound.
        assert self.quantile is not None  # settled when the limit was made
        times = (
            self.latency.evaluate(choices)
            if self.quantile == 0.5
            else self.latency.interval(choices, 2 * self.quantile - 1)[1]
        )
        return np.asarray(times, dtype=np.float64)

    def corrected(self, factor: float) -> Limit:
        """The same limit with every predicted time multiplied by ``factor`` (measured over predicted)."""
        make = getattr(self.latency, "corrected", None)
        return replace(self, latency=make(factor) if callable(make) else ScaledLatency(self.latency, factor))


class Reach(NamedTuple):
    """Milliseconds that a space can reach, on the limit that binds."""

    smallest_ms: float
    largest_ms: float


@dataclass(frozen=True)
class Budget:
    """All limits together, and how full the budget should be used.

    Args:
        limits: one or more limits; a choice must keep them all.
        floor: ``repair`` aims at [floor, 1] times the budget: a network far below it wastes accuracy.

    Example:
        >>> import numpy as np
        >>> class PerChannel:
        ...     def evaluate(self, choices):
        ...         return choices.sum(axis=1) * 0.1
        >>> budget = Budget([Limit(PerChannel(), max_ms=3.0)])
        >>> budget.feasible(np.array([[10, 20], [20, 20]])).tolist()
        [True, False]
    """

    limits: Sequence[Limit]
    floor: float = 0.95
    _known: dict[tuple[Any, float], tuple[Widths, float]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        limits = (self.limits,) if isinstance(self.limits, Limit) else tuple(self.limits)
        if not limits or not all(isinstance(limit, Limit) for limit in limits):
            raise InputError("a budget needs at least one Limit(latency, max_ms)")
        if not isinstance(self.floor, (int, float)) or not 0 <= self.floor < 1:
            raise InputError(f"the budget's floor is {self.floor!r}: give a share from 0 up to, not including, 1")
        object.__setattr__(self, "limits", limits)

    def evaluate(self, choices: Widths) -> Floats:
        """Milliseconds (N, L) of choices (N, G) on every limit, at that limit's quantile."""
        rows = np.asarray(choices, dtype=np.int64)
        if len(rows) == 0:
            return np.zeros((0, len(self.limits)))
        if all(getattr(limit.latency, "by_look_up", False) for limit in self.limits):
            # Finding equal rows takes longer than looking them up again.
            return np.stack([limit.evaluate(rows) for limit in self.limits], axis=1)
        unique, inverse = np.unique(rows, axis=0, return_inverse=True)
        times = np.stack([limit.evaluate(unique) for limit in self.limits], axis=1)
        return np.asarray(times[inverse.reshape(-1)], dtype=np.float64)

    def use(self, choices: Widths) -> Floats:
        """How much of the budget each choice uses, (N,): the largest share over the limits; up to 1 is feasible."""
        return self.use_of(self.evaluate(choices))

    def use_of(self, ms: Floats) -> Floats:
        """The same from milliseconds (N, L) that are already known. A prediction that is not a number never fits."""
        shares = np.asarray(ms, dtype=np.float64) / np.asarray([limit.max_ms for limit in self.limits])
        return np.asarray(np.where(np.isfinite(shares), shares, np.inf).max(axis=1, initial=0.0), dtype=np.float64)

    def feasible(self, choices: Widths) -> NDArray[np.bool_]:
        """True (N,) where every limit is kept."""
        return np.asarray(self.use(choices) <= 1.0)

    def violation(self, choices: Widths) -> Floats:
        """By how much the worst limit is missed, as a share of it, (N,); 0 where the budget is kept."""
        return np.maximum(self.use(choices) - 1.0, 0.0)

    def corrected(self, factors: Sequence[float]) -> Budget:
        """The same limits with predicted times multiplied by one factor per limit."""
        return Budget([limit.corrected(f) for limit, f in zip(self.limits, factors, strict=True)], floor=self.floor)

    def smallest_choice(self, space: WidthSpace, *, enough: float = 0.0) -> tuple[Widths, float]:
        """The choice (G,) that uses least of the budget, and that use.

        All-minimum comes first; a search over one group at a time follows, because a narrower width can be slower.
        It stops early once the use is at most ``enough``.
        """
        grid = WidthGrid.of(space)
        # Kept by ``enough`` too: what a search gets must not depend on what was asked before, or resuming would differ.
        if (grid.key, enough) in self._known:
            return self._known[grid.key, enough]
        best = grid.smallest
        use, improved = float(self.use(best[None])[0]), True
        while improved and use > enough:
            before = use
            for g, allowed in enumerate(grid.allowed):
                tries = np.repeat(best[None], len(few := _few(allowed)), axis=0)
                tries[:, g] = few
                uses = self.use(tries)
                at = int(np.argmin(uses))
                if uses[at] < use:
                    best, use = tries[at], float(uses[at])
            improved = use < before
        self._known[grid.key, enough] = (best, use)
        return best, use

    def reachable(self, space: WidthSpace) -> Reach:
        """The smallest milliseconds that the space reaches, and the full network's, on the limit that binds there."""
        best, _ = self.smallest_choice(space)
        ms = self.evaluate(np.stack([best, WidthGrid.of(space).full]))
        limit = int(np.argmax(ms[0] / np.asarray([limit.max_ms for limit in self.limits])))
        return Reach(float(ms[0, limit]), float(ms[1, limit]))

    def check_reachable(self, space: WidthSpace) -> None:
        """Refuse a budget that no network of the space can keep, before anything is trained.

        Raises:
            InfeasibleBudgetError: with the smallest reachable milliseconds.
        """
        best, use = self.smallest_choice(space, enough=1.0)
        if use <= 1.0:
            return
        ms = self.evaluate(best[None])[0]
        at = int(np.argmax(ms / np.asarray([limit.max_ms for limit in self.limits])))
        if not math.isfinite(use):
            raise InfeasibleBudgetError(
                f"no network of this width space has a finite predicted time on {self.limits[at].name}: "
                "profile the device and fit its predictor again",
                smallest_ms=math.inf,
            )
        raise InfeasibleBudgetError(
            f"no network of this width space keeps {self.limits[at].max_ms:g} ms on {self.limits[at].name}: "
            f"the smallest reachable is {ms[at]:.4g} ms; give a budget of at least {_round_up(float(ms[at])):g} ms",
            smallest_ms=float(ms[at]),
        )

    def repair(self, space: WidthSpace, choices: Widths, rng: np.random.Generator) -> Widths:
        """Move every choice into [floor, 1] times the budget, changing it as little as that needs.

        Args:
            space: the allowed widths.
            choices: (N, G) widths; widths that are not allowed are first moved to the nearest allowed.
            rng: draws the order of the steps; the same generator state gives the same result.

        Returns:
            (N, G) int64. Every row keeps the budget whenever the space can (``check_reachable``), and lies above the
            floor where a step of the space is small enough. Where the full network keeps the budget, the floor is void.
        """
        from hwsearch.search.repair import repair

        return repair(self, space, choices, rng)


def checked_ms(value: object, what: str) -> float:
    """``value`` as milliseconds.

    Raises:
        InputError: it is not a finite positive number; the message names ``what``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputError(f"{what} is {value!r}: give a number of milliseconds, such as 3.0")
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise InputError(f"{what} is {number:g} ms: give a finite number of milliseconds above 0")
    return number


def _few(allowed: NDArray[np.int64], most: int = 24) -> NDArray[np.int64]:
    """At most ``most`` of the allowed widths: the narrow third of that, then evenly spaced ones up to full width."""
    if len(allowed) <= most:
        return allowed
    head = most // 3
    spread = np.linspace(head, len(allowed) - 1, most - head).round().astype(np.int64)
    return np.asarray(allowed[np.concatenate([np.arange(head), spread])], dtype=np.int64)


def _round_up(ms: float) -> float:
    """``ms`` rounded up to three digits, so that the number in a message really is enough."""
    unit = 10.0 ** (math.floor(math.log10(ms)) - 2) if ms > 0 and math.isfinite(ms) else 1.0
    return math.ceil(ms / unit * (1 + 1e-9)) * unit
