"""The rule of the verdict, and how an error is counted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from hwsearch.deploy.verdict import Numerics, Verdict, compare, judge
from hwsearch.errors import InputError, SchemaError

RIGHT = Numerics(True, 1e-7, 1e-7, 1e-4, 3)
WRONG = Numerics(False, 0.5, 0.3, 1e-4, 3)


@pytest.mark.parametrize(
    ("numerics", "budget", "measured", "raw", "floor", "status", "words"),
    [
        (RIGHT, 2.0, 1.9, 1.9, 0.05, "pass", ()),
        (RIGHT, 2.0, 2.0, 2.0, 0.0, "pass", ()),
        (RIGHT, 2.0, 1.9, 2.1, 0.05, "pass", ()),
        (RIGHT, 2.0, 1.9, 2.11, 0.05, "conditional", ("raw median of 2.11 ms is above 2.1 ms",)),
        (RIGHT, 2.0, 1.9, 2.01, 0.0, "conditional", ("slower now",)),
        (RIGHT, 2.0, 2.01, 1.0, 0.05, "fail", ("measured 2.01 ms is above the budget of 2 ms by 0.5 %",)),
        (RIGHT, 2.0, math.nan, 1.0, 0.05, "fail", ("above the budget",)),
        (RIGHT, 2.0, 1.9, math.nan, 0.05, "conditional", ("raw median",)),
        (WRONG, 2.0, 1.9, 1.9, 0.05, "fail", ("differ from the golden ones by 0.5",)),
        (WRONG, 2.0, 3.0, 3.0, 0.05, "fail", ("differ from", "above the budget")),
        (RIGHT, None, 3.0, 3.0, 0.05, "pass", ()),
        (WRONG, None, 3.0, 3.0, 0.05, "fail", ("differ",)),
    ],
)
def test_the_rule(
    numerics: Numerics, budget: float, measured: float, raw: float, floor: float, status: str, words: tuple[str, ...]
) -> None:
    found, reasons = judge(numerics, budget, measured, raw, floor)
    assert found == status
    assert len(reasons) == len(words)
    for reason, word in zip(reasons, words, strict=True):
        assert word in reason


def array(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float32)


def test_errors_are_the_largest_of_all_cases() -> None:
    found = compare([(array(1, -2), array(1, -2)), (array(4, 0), array(4, 0.001))], relative=1e-3, absolute=0.0)
    assert found.ok
    assert found.max_abs_error == pytest.approx(0.001)
    assert found.max_relative_error == pytest.approx(0.00025)
    assert found.cases == 2
    assert not compare([(array(4, 0), array(4, 0.01))], relative=1e-3, absolute=0.0).ok


def test_one_bad_case_among_good_ones_is_enough() -> None:
    """A small case must not hide behind the larger error that a large case may have."""
    pairs = [(array(1000.0), array(1000.5)), (array(0.001), array(0.101))]
    found = compare(pairs, relative=1e-3, absolute=1e-5)
    assert not found.ok
    assert found.allowed == pytest.approx(1.1e-5)


@pytest.mark.parametrize("got", [array(1, math.nan), array(1, math.inf), array(1), array(1, 2, 3)])
def test_what_is_no_answer_never_passes(got: np.ndarray) -> None:
    found = compare([(array(1, 2), got)], relative=0.1, absolute=1.0)
    assert not found.ok
    assert found.max_abs_error == math.inf


def test_golden_zeros() -> None:
    assert compare([(array(0, 0), array(0, 0))], 1e-4, 1e-5).ok
    assert not compare([(array(0, 0), array(0, 1))], 1e-4, 1e-5).ok


def verdict(numerics: Numerics = RIGHT, status: str = "pass") -> Verdict:
    return Verdict(status, (), ("a note",), "found", "toy", numerics, 2.0, 1.8, 1.9, 1.95, 2.2, 0.01, 40, 0.05)


@pytest.mark.parametrize(("status", "code"), [("pass", 0), ("conditional", 1), ("fail", 1)])
def test_only_a_pass_exits_with_zero(status: str, code: int) -> None:
    assert verdict(status=status).exit_code == code


@pytest.mark.parametrize("numerics", [RIGHT, Numerics(False, math.inf, math.inf, 1e-4, 3)])
def test_it_is_written_and_read_back(numerics: Numerics, tmp_path: Path) -> None:
    verdict(numerics).save(tmp_path / "verdict.json")
    json.loads((tmp_path / "verdict.json").read_text(), parse_constant=pytest.fail)
    assert Verdict.load(tmp_path / "verdict.json") == verdict(numerics)
    assert [p.name for p in tmp_path.iterdir()] == ["verdict.json"]


def test_what_is_no_verdict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    for text in ("", "[]", "{}", '{"schema": "hwsearch.verdict", "version": 1, "status": "maybe"}'):
        path.write_text(text)
        with pytest.raises(SchemaError, match=r"verdict\.json"):
            Verdict.load(path)
    with pytest.raises(SchemaError, match="cannot be read"):
        Verdict.load(tmp_path / "missing.json")
    with pytest.raises(InputError, match="cannot write"):
        verdict().save(tmp_path / "missing" / "verdict.json")
