"""Evolution: better than its baselines, never outside the budget, and the same whether it was killed or not."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwsearch.errors import AnswerIsNo, InfeasibleBudgetError, InputError, SchemaError
from hwsearch.graph.widths import WidthChoice
from hwsearch.search import baselines
from hwsearch.search.evolution import EvolutionSettings, evolve
from hwsearch.search.genetic import mutate
from hwsearch.search.journal import Journal
from hwsearch.search.scores import Scores

SMALL = EvolutionSettings(population=8, generations=5)


class Asked:
    """Counts and checks what evolution wants scored."""

    def __init__(self, toy: Any, budget: Any, stop_after: int | None = None) -> None:
        self.toy, self.budget, self.stop_after = toy, budget, stop_after
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, choices: np.ndarray) -> np.ndarray:
        if self.stop_after is not None and len(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        assert choices.dtype == np.int64
        assert self.budget.feasible(choices).all(), "a choice outside the budget was scored"
        self.seen += [tuple(row) for row in choices.tolist()]
        return self.toy.score(choices)


def test_every_scored_choice_keeps_the_budget_and_is_scored_once(toy: Any) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5, toy.Staircase(bump=2))
    score = Asked(toy, budget)
    result = evolve(space, budget, score, SMALL, seed=3)
    assert len(score.seen) == len(set(score.seen)) == len(result.candidates) == 40
    assert result.best == result.candidates[0]
    losses = [c.loss for c in result.candidates]
    assert losses == sorted(losses)
    assert all(c.ms[0] <= budget.limits[0].max_ms for c in result.candidates)
    assert result.best.predicted_ms == budget.evaluate(np.asarray([result.best.choice.widths]))[0, 0]


def test_no_generation_is_spent_on_what_was_scored_before(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    plain = Scores.__call__

    def watched(self: Scores, choices: np.ndarray, report: Any) -> list[float]:
        asked.extend(tuple(row) for row in choices.tolist())
        return plain(self, choices, report)

    monkeypatch.setattr(Scores, "__call__", watched)
    space = toy.space([[8, 16, 24, 32]] * 4)
    evolve(space, toy.budget(space, 1.0), toy.score, EvolutionSettings(population=6, generations=25), seed=0)
    assert len(asked) == len(set(asked)) >= 140


def test_mutation_moves_at_least_one_width_and_stays_inside() -> None:
    top = np.asarray([0, 1, 3, 15])
    rows = np.random.default_rng(0).integers(0, top + 1, size=(400, 4))
    for chance in (None, 1e-6, 1.0):
        moved = mutate(rows, top, chance, 0.15, np.random.default_rng(1))
        assert ((moved >= 0) & (moved <= top)).all()
        assert (moved != rows).any(axis=1).all()
        assert (moved[:, 0] == 0).all()
    nothing = np.zeros((3, 2), dtype=np.int64)
    np.testing.assert_array_equal(mutate(nothing, np.asarray([0, 0]), None, 0.15, np.random.default_rng(1)), nothing)


def test_it_beats_uniform_and_random(toy: Any) -> None:
    space = toy.space(groups=10, units=64, step=8)
    budget = toy.budget(space, 0.4)
    found = evolve(space, budget, toy.score, EvolutionSettings(population=12, generations=12), seed=0)
    uniform = toy.score(np.asarray([baselines.uniform(space, budget).candidate.choice.widths]))[0]
    drawn = baselines.random(space, budget, np.random.default_rng(0), count=len(found.candidates))
    best_drawn = toy.score(np.asarray([c.choice.widths for c in drawn])).min()
    assert found.best.loss < uniform
    assert found.best.loss < best_drawn


def test_seeds_decide_and_nothing_else_does(toy: Any) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5)
    first = evolve(space, budget, toy.score, SMALL, seed=1)
    # Neither the state of the global generators nor what they drew before may matter ...
    np.random.seed(123)
    random.seed(5)
    before = (np.random.get_state()[1].tolist(), random.getstate())
    assert evolve(space, budget, toy.score, SMALL, seed=1) == first
    # ... and they are left as they were.
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before
    assert evolve(space, budget, toy.score, SMALL, seed=2) != first


def test_choices_to_start_from_are_repaired_and_scored_first(toy: Any) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5)
    good = evolve(space, budget, toy.score, EvolutionSettings(population=16, generations=10), seed=0).best
    score = Asked(toy, budget)
    result = evolve(space, budget, score, SMALL, seed=9, initial=[good.choice, space.full()])
    assert score.seen[0] == good.choice.widths
    assert result.best.loss <= good.loss


def test_where_the_full_network_fits_it_is_tried(toy: Any) -> None:
    space = toy.space()
    result = evolve(space, toy.budget(space, 1.1), toy.score, SMALL, seed=0)
    assert result.best.choice == space.full()


def test_two_objectives_and_a_cap_on_evaluations(toy: Any) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5)
    both = EvolutionSettings(population=8, generations=5, minimise_ms=True, evaluations=21, score_batch=4)
    reports: list[tuple[int, int, str]] = []
    result = evolve(space, budget, toy.score, both, seed=0, progress=lambda *report: reports.append(report))
    assert len(result.candidates) == 21
    assert [done for done, _, _ in reports] == sorted(done for done, _, _ in reports)
    assert reports[-1][:2] == (21, 21)


def test_a_space_that_is_used_up_ends_the_search(toy: Any) -> None:
    space = toy.space([[8, 16], [8, 16], [32]])
    budget = toy.budget(space, 1.0)
    result = evolve(space, budget, toy.score, SMALL, seed=0)
    assert {c.choice.widths for c in result.candidates} == {(a, b, 32) for a in (8, 16) for b in (8, 16)}
    alone = toy.space([[32], [32]])
    only = evolve(alone, toy.budget(alone, 1.0), toy.score, SMALL, seed=0)
    assert only.best.choice == WidthChoice((32, 32))


def test_an_unreachable_budget_is_refused_before_anything_is_scored(toy: Any) -> None:
    space = toy.space()
    score = Asked(toy, toy.budget(space, 0.5))
    with pytest.raises(InfeasibleBudgetError):
        evolve(space, toy.budget(space, 0.001), score, SMALL)
    assert score.seen == []


def test_losses_that_are_not_finite(toy: Any, tmp_path: Path) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5)

    def sometimes(choices: np.ndarray) -> np.ndarray:
        return np.where(choices[:, 0] > 16, np.nan, toy.score(choices))

    result = evolve(space, budget, sometimes, SMALL, seed=0, journal=tmp_path / "losses.jsonl")
    assert math.isfinite(result.best.loss)
    assert any(math.isinf(c.loss) for c in result.candidates)
    assert evolve(space, budget, sometimes, SMALL, seed=0, journal=tmp_path / "losses.jsonl") == result
    with pytest.raises(AnswerIsNo, match="finite loss"):
        evolve(space, budget, lambda c: np.full(len(c), np.inf), SMALL, seed=0)


@pytest.mark.parametrize("killed_after", [0, 1, 7, 8, 23, 39])
@pytest.mark.parametrize("torn", [b"", b'{"widths": [4, 4', b'{"loss": 0.1, "widths": [4]}'])
def test_a_killed_search_continues_to_the_same_end(toy: Any, tmp_path: Path, killed_after: int, torn: bytes) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5)
    whole = evolve(space, budget, toy.score, SMALL, seed=4)
    path = tmp_path / "losses.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evolve(space, budget, Asked(toy, budget, stop_after=killed_after), SMALL, seed=4, journal=path)
    with path.open("ab") as file:
        file.write(torn)
    rest = Asked(toy, budget)
    assert evolve(space, budget, rest, SMALL, seed=4, journal=path) == whole
    assert len(rest.seen) == 40 - killed_after, "a finished evaluation was asked for again"
    lines = path.read_text().splitlines()
    assert len(lines) == 41
    assert all(json.loads(line) for line in lines)


def test_a_torn_header_starts_afresh(toy: Any, tmp_path: Path) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5)
    path = tmp_path / "losses.jsonl"
    path.write_text('{"context": "", "sch')
    assert len(evolve(space, budget, toy.score, SMALL, journal=path).candidates) == 40


def test_one_journal_serves_searches_under_several_budgets(toy: Any, tmp_path: Path) -> None:
    space = toy.space()
    path = tmp_path / "losses.jsonl"
    tight, wide = toy.budget(space, 0.50), toy.budget(space, 0.51)
    first = evolve(space, wide, toy.score, SMALL, journal=path)
    second = evolve(space, tight, toy.score, SMALL, journal=path, initial=[first.best.choice])
    again = Asked(toy, wide)
    assert evolve(space, wide, again, SMALL, journal=path) == first
    assert evolve(space, tight, again, SMALL, journal=path, initial=[first.best.choice]) == second
    assert again.seen == []


def test_a_journal_of_another_search_is_refused(toy: Any, tmp_path: Path) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5)
    path = tmp_path / "losses.jsonl"
    evolve(space, budget, toy.score, SMALL, seed=0, journal=path, context="weights 1")
    before = path.read_bytes()
    other = toy.space(step=4)
    for match, arguments in {
        "its seed is 0, this one's is 1": (space, SMALL, 1, "weights 1"),
        "its space is": (other, SMALL, 0, "weights 1"),
        "its settings.population is 8, this one's is 9": (space, EvolutionSettings(9, 5), 0, "weights 1"),
        "its context is weights 1, this one's is weights 2": (space, SMALL, 0, "weights 2"),
    }.items():
        where, settings, seed, context = arguments
        with pytest.raises(InputError, match=match):
            evolve(where, toy.budget(where, 0.5), toy.score, settings, seed, path, context=context)
    assert path.read_bytes() == before


def test_damage_inside_a_journal_is_reported_with_its_line(toy: Any, tmp_path: Path) -> None:
    space = toy.space()
    budget = toy.budget(space, 0.5)
    path = tmp_path / "losses.jsonl"
    evolve(space, budget, toy.score, SMALL, journal=path)
    lines = path.read_text().splitlines()
    lines[5] = lines[5][:10]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SchemaError, match="line 6 is damaged"):
        evolve(space, budget, toy.score, SMALL, journal=path)
    lines[5] = '{"loss": "low", "widths": [1]}'
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SchemaError, match="damaged record"):
        evolve(space, budget, toy.score, SMALL, journal=path)


@pytest.mark.parametrize(("field", "value"), [("schema", "other.losses"), ("version", 0)])
def test_a_journal_of_another_release_is_refused_in_one_line(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "losses.jsonl"
    Journal(path, {"schema": "hwsearch.losses", "version": 1, "seed": 0} | {field: value}).open()
    with pytest.raises(SchemaError, match=f"another release of hwsearch \\({field}") as caught:
        Journal(path, {"schema": "hwsearch.losses", "version": 1, "seed": 0}).open()
    assert str(path) in str(caught.value)


def test_losses_are_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    values = np.random.default_rng(0).normal(size=50) * 10.0 ** np.arange(-25, 25)
    rows = np.arange(50, dtype=np.int64)[:, None]
    written = Scores(lambda c: values[c[:, 0]], 7, path, {"seed": 0})(rows)
    read = Scores(lambda c: pytest.fail("asked again"), 7, path, {"seed": 0})(rows)
    assert read == written == values.tolist()


def test_a_journal_in_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        Journal(tmp_path / "file" / "losses.jsonl", {}).open()


@pytest.mark.parametrize(
    ("field", "value"),
    [("population", 1), ("generations", 0), ("population", 2.5), ("evaluations", 0), ("mutation", 0.0), ("step", 0.0),
     ("score_batch", True)],
)  # fmt: skip
def test_wrong_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        EvolutionSettings(**{field: value})
