"""``settle``: measure the best candidates on the device, correct the prediction, and search again until one fits.

A predictor is a few per cent wrong about any one network, and a budget is a promise about measured milliseconds. So the
best candidates are timed on the device, measured over predicted becomes a correction of the limit, and the search is
repeated with cached losses, which costs predictions only. What was measured goes to a journal: a resumed run asks the
device for nothing twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hwsearch.errors import AnswerIsNo, InfeasibleBudgetError, InputError, SchemaError
from hwsearch.search.budget import Budget, checked_ms
from hwsearch.search.evolution import Candidate, Progress
from hwsearch.search.journal import Journal
from hwsearch.train import processes

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace

#: A corrected budget and choices worth starting from -> candidates that keep that budget, best first.
Propose = Callable[[Budget, Sequence["WidthChoice"]], Sequence[Candidate]]
#: A choice -> measured milliseconds: one number for one limit, or one per limit in the budget's order.
Measure = Callable[["WidthChoice"], "float | Sequence[float]"]

_SEEDS = 8  # choices of one round that the next may start from
_TRUST = (0.25, 4.0)  # a correction outside this is a wrong predictor (another device), not an error of one network


@dataclass(frozen=True)
class Trial:
    """One candidate as measured. ``ms`` and ``predicted_ms`` have one entry per limit; ``use`` is the share of the
    budget that was measured, 1.0 at the limit; ``candidate.ms`` is the uncorrected prediction."""

    candidate: Candidate
    measured_ms: tuple[float, ...]
    use: float
    turn: int


@dataclass(frozen=True)
class Settled:
    """The candidate that was settled on.

    ``measured_ms`` is None where nothing could be measured; ``factors`` are the corrections (measured over predicted)
    in force at the end, one per limit; ``within`` says whether the measured use lies in the accepted band (False: it
    keeps the budget but leaves more of it unused than wished, because the space or the rounds gave nothing closer).
    """

    candidate: Candidate
    measured_ms: tuple[float, ...] | None
    factors: tuple[float, ...]
    within: bool
    trials: tuple[Trial, ...] = ()


def settle(
    space: WidthSpace,
    budget: Budget,
    propose: Propose,
    measure: Measure | None = None,
    *,
    rounds: int = 6,
    per_round: int = 2,
    repeats: int = 2,
    accept: tuple[float, float] = (0.955, 0.985),
    margin: float = 0.005,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Settled:
    """Find a candidate whose *measured* time lies in ``accept`` times the budget.

    Args:
        space: where the choices come from.
        budget: the limits as the user gave them.
        propose: searches under a corrected budget, see ``Propose``. It should cache losses.
        measure: times a choice on the device; None: the limits' own ``measure`` where all have one, else nothing is
            measured and the best predicted candidate is returned.
        rounds: how often the correction may be renewed.
        per_round: candidates measured in a round.
        repeats: readings that an accepted candidate must have; their mean decides. One reading near the limit says
            little, and the next one is somebody else's verification.
        accept: the band of measured use. It ends below the limit, because the next reading of an accepted candidate is
            the verification's, and readings differ by a per cent or two.
        margin: share of the budget kept free at both ends of the band when proposing, against the noise of a reading.
        journal: file of finished readings.
        progress: called with (rounds done, rounds at most, text).

    Returns:
        The accepted candidate of least loss; else, after all rounds, the measured one of least loss inside the budget.

    Raises:
        InfeasibleBudgetError: the predicted budget is out of reach before anything was measured.
        AnswerIsNo: nothing that was measured kept the budget.
    """
    if rounds < 1 or per_round < 1 or repeats < 1 or not 0 <= accept[0] < accept[1] <= 1 or not 0 <= margin < 0.2:
        raise InputError(
            f"settle cannot use rounds={rounds}, per_round={per_round}, repeats={repeats}, accept={accept}, "
            f"margin={margin}: give counts of 1 or more, a band inside 0..1 and a margin below 0.2"
        )
    readings = _Readings(budget, measure, journal)
    if not readings.possible:
        candidates = propose(budget, ())
        if not candidates:
            raise _nothing(budget, ())
        return Settled(_plain(budget, candidates[0]), None, (1.0,) * len(budget.limits), within=False)

    trials: dict[tuple[int, ...], Trial] = {}
    factors: tuple[float, ...] = (1.0,) * len(budget.limits)
    seeds: list[WidthChoice] = []
    for turn in range(rounds):
        try:
            ranked = propose(_aim(budget, factors, accept, margin), tuple(seeds))
        except InfeasibleBudgetError:
            if not trials:
                raise
            break
        ranked = sorted(ranked, key=lambda c: _below(budget, factors, c, accept[0]))  # stable: loss still ranks
        fresh = [c for c in ranked if c.choice.widths not in trials][:per_round]
        if not fresh:
            break
        seeds = [c.choice for c in ranked[:_SEEDS]]
        for candidate in fresh:
            trial = _try(budget, readings, _plain(budget, candidate), accept, repeats, turn)
            trials[candidate.choice.widths] = trial
            if progress:
                progress(turn, rounds, f"measured {trial.measured_ms[0]:.4g} ms, {100 * trial.use:.1f} % of the budget")
        good = [t for t in trials.values() if accept[0] <= t.use <= accept[1]]
        if good:
            return _settled(min(good, key=_rank), factors, True, trials.values())
        factors = _factors([t for t in trials.values() if t.turn == turn])
    inside = [t for t in trials.values() if t.use <= 1.0]
    if not inside:
        raise _nothing(budget, tuple(trials.values()))
    return _settled(min(inside, key=_rank), factors, False, trials.values())


def measured_once(budget: Budget, candidate: Candidate, journal: Path | None = None) -> Settled:
    """One candidate with a single reading where the limits can measure: nothing is searched, nothing corrected.

    Raises:
        AnswerIsNo: its measured time misses the budget.
    """
    readings, plain = _Readings(budget, None, journal), _plain(budget, candidate)
    ones = (1.0,) * len(budget.limits)
    if not readings.possible:
        return Settled(plain, None, ones, within=False)
    measured = readings.read(candidate.choice, 0)
    trial = Trial(plain, measured, float(budget.use_of(np.asarray([measured]))[0]), 0)
    if trial.use > 1.0:
        raise _nothing(budget, (trial,))
    return Settled(plain, measured, _factors([trial]), within=False, trials=(trial,))


class _Readings:
    """Measured milliseconds by choice and repeat, journalled."""

    def __init__(self, budget: Budget, measure: Measure | None, path: Path | None) -> None:
        self._budget, self._measure = budget, measure
        self.possible = measure is not None or all(limit.measure is not None for limit in budget.limits)
        limits = [[limit.name, limit.max_ms] for limit in budget.limits]
        header = {"schema": "hwsearch.readings", "version": 1, "limits": limits}
        self._journal = Journal(Path(path), header) if path and self.possible and processes.rank() == 0 else None
        self._known: dict[tuple[int, ...], list[tuple[float, ...]]] = {}
        for record in self._journal.open() if self._journal else ():
            try:
                widths = tuple(int(width) for width in record["widths"])
                ms = tuple(checked_ms(value, "a measured time") for value in record["ms"])
            except (KeyError, TypeError, ValueError, OverflowError, InputError) as error:
                raise SchemaError(f"{path} has a damaged record {record}: delete the file to start again") from error
            self._known.setdefault(widths, []).append(ms)
        self._known = processes.from_first(self._known)

    def read(self, choice: WidthChoice, repeat: int) -> tuple[float, ...]:
        """Reading number ``repeat`` (0 ..) of a choice, one entry per limit."""
        known = self._known.setdefault(choice.widths, [])
        if repeat >= len(known):
            values = processes.from_first(self._timed(choice) if processes.rank() == 0 else [])
            known.append(tuple(checked_ms(value, "a measured time") for value in values))
            if len(known[-1]) != len(self._budget.limits):
                raise InputError(
                    f"measure gave {len(known[-1])} times for a budget of {len(self._budget.limits)} limits"
                )
            if self._journal:
                self._journal.append({"widths": list(choice.widths), "ms": list(known[-1])})
        return known[repeat]

    def _timed(self, choice: WidthChoice) -> list[float]:
        """Milliseconds as the device gives them."""
        raw = (
            self._measure(choice) if self._measure else [limit.measure(choice) for limit in self._budget.limits]  # type: ignore[misc]
        )
        return [raw] if isinstance(raw, (int, float, np.floating)) else list(raw)


def _try(
    budget: Budget, readings: _Readings, candidate: Candidate, accept: tuple[float, float], repeats: int, turn: int
) -> Trial:
    """Measure one candidate; read again only while the mean lies in the band, where a second reading can matter."""
    taken: list[tuple[float, ...]] = []
    while True:
        taken.append(readings.read(candidate.choice, len(taken)))
        mean = tuple(statistics.fmean(values) for values in zip(*taken, strict=True))
        use = float(budget.use_of(np.asarray([mean]))[0])
        if len(taken) >= repeats or not accept[0] <= use <= accept[1]:
            return Trial(candidate, mean, use, turn)


def _aim(budget: Budget, factors: Sequence[float], accept: tuple[float, float], margin: float) -> Budget:
    """The budget to search under: corrected, with ``margin`` left free at both ends of the accepted band."""
    top = accept[1] - margin
    aimed = budget.corrected([factor / top for factor in factors])
    return replace(aimed, floor=min(max((accept[0] + margin) / top, 0.0), 0.995))


def _plain(budget: Budget, candidate: Candidate) -> Candidate:
    """The candidate with the uncorrected prediction."""
    ms = budget.evaluate(np.asarray([candidate.choice.widths], dtype=np.int64))[0]
    return replace(candidate, ms=tuple(ms.tolist()))


def _below(budget: Budget, factors: Sequence[float], candidate: Candidate, floor: float) -> bool:
    """Whether a candidate is expected below the band: measuring it can hardly end the search."""
    plain = np.asarray(_plain(budget, candidate).ms) * np.asarray(factors)
    return bool(budget.use_of(plain[None])[0] < floor)


def _factors(trials: Sequence[Trial]) -> tuple[float, ...]:
    """Measured over predicted per limit, the median over a round; each round's candidates resemble the next one's."""
    ratios = np.asarray([np.asarray(t.measured_ms) / np.asarray(t.candidate.ms) for t in trials])
    return tuple(float(np.clip(ratio, *_TRUST)) for ratio in np.median(ratios, axis=0))


def _rank(trial: Trial) -> tuple[float, float]:
    return (trial.candidate.loss, -trial.use)


def _settled(trial: Trial, factors: tuple[float, ...], within: bool, trials: Iterable[Trial]) -> Settled:
    return Settled(trial.candidate, trial.measured_ms, factors, within, tuple(trials))


def _nothing(budget: Budget, trials: Sequence[Trial]) -> AnswerIsNo:
    """The clear no: what was tried, and what to do."""
    wanted = ", ".join(f"{limit.max_ms:g} ms on {limit.name}" for limit in budget.limits)
    if not trials:
        return AnswerIsNo(f"no candidate keeps {wanted}: give a larger budget or allow narrower widths")
    nearest = min(trials, key=lambda t: t.use)
    predicted, measured = (", ".join(f"{ms:.4g}" for ms in v) for v in (nearest.candidate.ms, nearest.measured_ms))
    return AnswerIsNo(
        f"none of the {len(trials)} measured networks keeps {wanted}: the nearest was predicted at {predicted} ms and "
        f"measured at {measured} ms; check the device, profile it for longer, or give a larger budget"
    )
