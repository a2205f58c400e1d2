"""The life-cycle: refuse early, one process a folder, continue after a real kill, the same result byte for byte."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwsearch.errors import InfeasibleBudgetError, InputError, InternalError, SchemaError
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.evolution import Candidate, EvolutionSettings, evolve
from hwsearch.search.journal import write_atomic
from hwsearch.search.result import LimitOutcome, SearchResult
from hwsearch.search.run_folder import RunFolder, open_run
from hwsearch.search.searcher import Searcher, limit_outcomes
from hwsearch.search.settle import settle


def result_of(candidate: Candidate, **values: Any) -> SearchResult:
    standard: dict[str, Any] = {
        "method": "toy",
        "seed": 0,
        "groups": ("a", "b"),
        "choice": candidate.choice,
        "limits": (LimitOutcome("box", 2.0, 1.9, 1.8, 2.1, 1.95, 1.02),),
        "loss": candidate.loss,
        "metric": 0.9,
        "macs": 10,
        "parameters": 20,
        "candidates": (candidate,),
        "extra": {"steps": 3},
    }
    return SearchResult(**(standard | values))


class Nearest(Searcher):
    """The smallest searcher there can be: evolution under the toy score."""

    method = "nearest"
    trained = 0

    def __init__(self, *arguments: Any, score: Any, power: float = 1.0, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self.score, self.power = score, power

    def _settings(self) -> Mapping[str, Any]:
        return {"power": self.power}

    def _search(self, run: RunFolder, train: Any, valid: Any, progress: Any) -> SearchResult:
        Nearest.trained += 1
        settings = EvolutionSettings(population=6, generations=3)

        def propose(budget: Any, seeds: Any) -> Any:
            losses = run.state / "losses.jsonl"
            found = evolve(self.space, budget, self.score, settings, self.seed, losses, progress, initial=seeds)
            return found.candidates

        settled = settle(self.space, self.budget, propose, journal=run.state / "readings.jsonl")
        best = settled.candidate
        limits = limit_outcomes(self.budget, best, settled)
        groups = tuple(group.name for group in self.space.groups)
        return SearchResult(
            self.method, self.seed, groups, best.choice, limits, best.loss, None, 1, 2, tuple(propose(self.budget, ()))
        )


def test_a_result_reads_back_as_it_was_written(tmp_path: Path) -> None:
    candidate = Candidate(WidthChoice((3, 4)), 0.1 + 0.2, (1 / 3,))
    lost = Candidate(WidthChoice((1, 2)), math.inf, (0.5,))
    result = result_of(candidate, candidates=(candidate, lost), model=object())
    result.save(tmp_path / "result.json")
    assert SearchResult.load(tmp_path / "result.json") == result
    assert result.predicted_ms == 1.9
    assert result.measured_ms == 1.95
    assert result.budget_ms == 2.0
    assert result.interval == (1.8, 2.1)
    text = (tmp_path / "result.json").read_text()
    assert "0.30000000000000004" in text
    assert "Infinity" not in text
    assert list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "not JSON"), ("[]", "version None"), ('{"schema": "hwsearch.search_result", "version": 9}', "version 9"),
     ('{"schema": "hwsearch.search_result", "version": 1}', "damaged")],
)  # fmt: skip
def test_a_damaged_result_is_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(SchemaError, match=match):
        SearchResult.load(tmp_path / "result.json")
    with pytest.raises(InputError, match="cannot read"):
        SearchResult.load(tmp_path / "missing.json")


def test_the_same_search_gives_the_same_bytes(toy: Any, tmp_path: Path) -> None:
    space = toy.space()
    for name in ("one", "two"):
        Nearest(space, toy.budget(space, 0.5), score=toy.score, folder=tmp_path / name).search(None, None)
    one, two = ((tmp_path / name / "result.json").read_bytes() for name in ("one", "two"))
    assert one == two
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"config.json", "events.jsonl", "lock", "result.json", "state"}
    # Searching again in a finished folder changes nothing.
    Nearest(space, toy.budget(space, 0.5), score=None, folder=tmp_path / "one").search(None, None)
    assert (tmp_path / "one" / "result.json").read_bytes() == one
    kinds = [event["event"] for event in RunFolder(tmp_path / "one").events()]
    assert kinds == ["search_started", "search_finished"] * 2


def test_a_search_needs_no_folder(toy: Any) -> None:
    space = toy.space()
    result = Nearest(space, toy.budget(space, 0.5), score=toy.score).search(None, None)
    assert result.predicted_ms <= result.budget_ms
    assert result.interval is not None


def test_an_infeasible_budget_is_refused_before_anything_happens(toy: Any, tmp_path: Path) -> None:
    space = toy.space()
    before = Nearest.trained
    with pytest.raises(InfeasibleBudgetError):
        Nearest(space, toy.budget(space, 0.001), score=toy.score, folder=tmp_path / "run").search(None, None)
    assert Nearest.trained == before
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_search_is_refused_and_the_field_is_named(toy: Any, tmp_path: Path) -> None:
    space = toy.space()

    def search(**changes: Any) -> None:
        arguments: dict[str, Any] = {"score": toy.score, "folder": tmp_path / "run"} | changes
        share = arguments.pop("share", 0.5)
        Nearest(arguments.pop("space", space), toy.budget(space, share), **arguments).search(None, None)

    search()
    for changes, field in (
        ({"seed": 1}, "seed = 0, this command says 1"),
        ({"power": 2.0}, r"settings.power = 1.0, this command says 2.0"),
        ({"share": 0.4}, "budget.limits = "),
        ({"space": toy.space(step=4)}, "space = "),
    ):
        with pytest.raises(InputError, match=field) as caught:
            search(**changes)
        assert "\n" not in str(caught.value)
    search()


def test_two_processes_cannot_work_in_one_folder(toy: Any, tmp_path: Path) -> None:
    space = toy.space()
    with open_run(tmp_path / "run", {"seed": 0}) as run:
        with (
            pytest.raises(InputError, match=f"pid {os.getpid()}.* is working in the run folder"),
            open_run(tmp_path / "run", {"seed": 0}),
        ):
            pass
        # A search may work in the folder that its caller holds open.
        result = Nearest(space, toy.budget(space, 0.5), score=toy.score, folder=run).search(None, None)
        assert SearchResult.load(run.result_path) == result
        assert (run.state / "nearest.json").exists()
    with open_run(tmp_path / "run", {"seed": 0}) as again:
        assert again.resumed


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the run folder"), open_run(tmp_path / "file" / "run", {}):
        pass
    with pytest.raises(InputError, match="cannot write"):
        write_atomic(tmp_path / "file" / "x.json", "{}")


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"schema": "hwsearch.run", "version": 2}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(SchemaError, match="another run name"), open_run(tmp_path, {}):
            pass


def test_events_survive_a_torn_line(tmp_path: Path) -> None:
    with open_run(tmp_path, {}) as run:
        run.event("one", steps=3)
        with (tmp_path / "events.jsonl").open("ab") as file:
            file.write(b'{"event": "to')
        run.event("two")
        assert [event["event"] for event in run.events()] == ["one", "two"]
        assert run.events()[0]["steps"] == 3


def test_a_searcher_that_returns_nonsense_is_a_bug(toy: Any) -> None:
    class Broken(Nearest):
        def _search(self, *arguments: Any) -> Any:
            return None

    space = toy.space()
    with pytest.raises(InternalError, match="Broken"):
        Broken(space, toy.budget(space, 0.5), score=toy.score).search(None, None)
    with pytest.raises(InputError, match="seed is -1"):
        Nearest(space, toy.budget(space, 0.5), score=toy.score, seed=-1)


CHILD = """
    import importlib.util, os, signal, sys
    import numpy as np

    def load(name, path):
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    folder, tests, kill_at, kill_in = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    Toy = load("toy", tests + "/conftest.py").Toy
    Nearest = load("nearest", tests + "/test_searcher.py").Nearest
    space, calls = Toy.space(), {"score": 0, "measure": 0}

    def count(where):
        calls[where] += 1
        if where == kill_in and calls[where] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def score(choices):
        count("score")
        return Toy.score(choices)

    def measure(choice):
        count("measure")
        return float(Toy.Staircase().evaluate(np.asarray([choice.widths]))[0] * 1.13)

    Nearest(space, Toy.budget(space, 0.5, measure=measure), score=score, folder=folder).search(None, None)
    print(calls["score"], calls["measure"])
"""


def child(folder: Path, kill_at: int, kill_in: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": str(here.parent.parent)}
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), str(here), str(kill_at), kill_in]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_search_that_was_really_killed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = child(tmp_path / "whole", 0, "")
    assert whole.returncode == 0, whole.stderr
    scored, measured = (int(number) for number in whole.stdout.split())
    folder = tmp_path / "killed"
    for kill_at, kill_in in ((7, "score"), (1, "measure"), (2, "measure"), (2, "score")):
        done = child(folder, kill_at, kill_in)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (folder / "result.json").exists()
    last = child(folder, 0, "")
    assert last.returncode == 0, last.stderr
    for name in ("result.json", "config.json", "state/losses.jsonl", "state/readings.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    # Nothing that was finished was done again: the killed runs' work is missing from the last one's counts.
    assert int(last.stdout.split()[0]) < scored
    assert int(last.stdout.split()[1]) < measured
    assert np.isfinite(SearchResult.load(folder / "result.json").loss)
