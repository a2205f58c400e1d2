"""The other way round: the fewest milliseconds above a floor of accuracy.

Shared weights say nothing about the accuracy that a network has once it is trained, so the floor is held against
*trained* networks. Evolution finds the front of shared-weight loss against time; along it, accuracy grows with time but
for noise, so the fastest network that keeps the floor is found by bisection, with log2(front) trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hwsearch.errors import AnswerIsNo

if TYPE_CHECKING:
    from hwsearch.search.evolution import Candidate
    from hwsearch.train.task import Evaluation

#: Trains a choice as the winner would be and evaluates it on held-out examples.
TrainAndJudge = Callable[["Candidate"], "Evaluation"]


@dataclass(frozen=True)
class FloorTrial:
    """A network of the front as trained: its held-out metric, and whether that keeps the floor."""

    candidate: Candidate
    metric: float
    keeps: bool


def front(candidates: Sequence[Candidate], use: Sequence[float]) -> list[Candidate]:
    """The candidates that no other one beats in loss and time both, fastest first.

    Args:
        use: one share of the budget for each candidate, the measure of time over all limits.
    """
    order = sorted(range(len(candidates)), key=lambda at: (use[at], candidates[at].loss, candidates[at].choice.widths))
    found: list[Candidate] = []
    for at in order:
        if not found or candidates[at].loss < found[-1].loss:
            found.append(candidates[at])
    return found


def fastest_above(
    ranked: Sequence[Candidate], judge: TrainAndJudge, floor: float, *, higher_is_better: bool = True
) -> tuple[Candidate, list[FloorTrial]]:
    """The fastest candidate of a front that keeps the floor, and all that were trained on the way.

    Args:
        ranked: the front, fastest first.
        judge: must give the same answer for the same candidate.
        floor: the metric to keep (a ceiling, where a smaller metric is better).

    Raises:
        AnswerIsNo: not even the slowest one keeps it; the message has its metric.
    """
    trials: list[FloorTrial] = []

    def keeps(at: int) -> bool:
        metric = judge(ranked[at]).metric
        good = metric >= floor if higher_is_better else metric <= floor
        trials.append(FloorTrial(ranked[at], metric, good))
        return good

    low, high = 0, len(ranked) - 1
    if not ranked or not keeps(high):
        reached = f"the slowest candidate reaches {trials[-1].metric:.4g}" if trials else "nothing was found"
        raise AnswerIsNo(
            f"no network keeps the floor of {floor:g} on held-out examples: {reached}; lower the floor, train for "
            "longer, or give a larger network"
        )
    while low < high:
        middle = (low + high) // 2
        if keeps(middle):
            high = middle
        else:
            low = middle + 1
    return ranked[high], trials
