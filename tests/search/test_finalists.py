"""Finalists: a short training decides, is never repeated, and the candidates are unlike each other. And the floor."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwsearch.errors import AnswerIsNo, InputError
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.evolution import Candidate
from hwsearch.search.finalists import Finalists, unlike
from hwsearch.search.floor import fastest_above, front
from hwsearch.train.task import Evaluation


def candidate(*widths: int, loss: float = 1.0, ms: float = 1.0) -> Candidate:
    return Candidate(WidthChoice(widths), loss, (ms,))


def test_the_short_training_decides_and_is_done_once(tmp_path: Path) -> None:
    asked: list[tuple[int, ...]] = []

    def train(widths: tuple[int, ...]) -> float:
        asked.append(widths)
        return float(sum(widths))

    path = tmp_path / "finalists.jsonl"
    made = Finalists(train, path, {"context": "a"})
    ranked = made.ranked([candidate(3, 4, loss=0.1), candidate(1, 2, loss=0.9)])
    assert [c.choice.widths for c in ranked] == [(1, 2), (3, 4)]
    assert [c.loss for c in ranked] == [3.0, 7.0]
    made.ranked([candidate(1, 2)])
    assert asked == [(3, 4), (1, 2)]
    again = Finalists(train, path, {"context": "a"})
    assert again.ranked([candidate(3, 4), candidate(1, 2)]) == [candidate(1, 2, loss=3.0), candidate(3, 4, loss=7.0)]
    assert len(asked) == 2
    with pytest.raises(InputError, match="belongs to another search"):
        Finalists(train, path, {"context": "b"})


def test_finalists_are_unlike_each_other() -> None:
    full = (32, 32)
    ranked = [candidate(16, 16), candidate(16, 17), candidate(8, 24), candidate(24, 8)]
    chosen = unlike(ranked, 2, full)
    assert [c.choice.widths for c in chosen] == [(16, 16), (8, 24)]
    assert [c.choice.widths for c in unlike(ranked, 2, full, taken=[candidate(8, 24)])] == [(16, 16), (24, 8)]
    # too few that differ: the next best, but none twice
    assert [c.choice.widths for c in unlike(ranked[:2], 2, full)] == [(16, 16), (16, 17)]
    assert unlike(ranked[:1], 2, full, taken=ranked[:1]) == []


def test_the_front_is_what_nothing_beats() -> None:
    rows = [candidate(1, loss=3.0), candidate(2, loss=2.0), candidate(3, loss=2.5), candidate(4, loss=1.0)]
    assert [c.choice.widths for c in front(rows, [0.1, 0.2, 0.3, 0.4])] == [(1,), (2,), (4,)]


@pytest.mark.parametrize(("floor", "widths", "trained"), [(0.1, 1, 5), (0.55, 6, 5), (0.95, 10, 5)])
def test_the_fastest_above_the_floor_is_found_by_bisection(floor: float, widths: int, trained: int) -> None:
    rows = [candidate(width) for width in range(1, 11)]

    def judge(one: Candidate) -> Evaluation:
        return Evaluation(0.0, one.choice.widths[0] / 10, 100)

    found, trials = fastest_above(rows, judge, floor)
    assert found.choice.widths == (widths,)
    assert len(trials) <= trained
    assert all(trial.keeps == (trial.metric >= floor) for trial in trials)


def test_a_floor_that_nothing_keeps_is_a_clear_no() -> None:
    with pytest.raises(AnswerIsNo, match=r"reaches 0\.5"):
        fastest_above([candidate(5)], lambda one: Evaluation(0.0, 0.5, 1), 0.9)
    # where smaller is better the floor is a ceiling
    found, _ = fastest_above([candidate(1)], lambda one: Evaluation(0.0, 0.5, 1), 0.9, higher_is_better=False)
    assert found.choice.widths == (1,)
