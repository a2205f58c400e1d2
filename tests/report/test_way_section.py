"""The way of a search by gates: its use of the budget and its widths are drawn, and nonsense is left out."""

from __future__ import annotations

from typing import Any

import pytest

from hwsearch.report.page import Page
from hwsearch.report.way_section import way_section

POINTS = [
    {"step": 3, "use": 3.5, "widths": [16, 8], "loss": 0.2},
    {"step": 6, "use": 1.9, "widths": [8, 8], "loss": 0.4},
    {"step": 9, "use": 0.99, "widths": [4, 2], "loss": 0.5},
]


def drawn(points: Any, groups: Any = ("stem", "body")) -> tuple[str, list[dict[str, Any]]]:
    page = Page("run", [])
    return way_section(page, {"groups": groups, "extra": {"trajectory": points}}), list(page.figures.values())


def test_the_budget_s_use_and_each_group_s_share_are_drawn_over_the_steps() -> None:
    shown, (use, widths) = drawn(POINTS, ["stem", "body"])
    assert "The way of the search" in shown
    assert [(line["name"], line["x"], line["y"]) for line in use["data"]] == [("use", [3, 6, 9], [3.5, 1.9, 0.99])]
    (heat,) = widths["data"]
    assert (heat["x"], heat["y"]) == (["3", "6", "9"], ["stem", "body"])
    assert heat["z"] == [[1.0, 0.5, 0.25], [1.0, 1.0, 0.25]]


def test_a_target_is_a_second_line() -> None:
    _, (use, _) = drawn([{**point, "target": 1.0} for point in POINTS], ["stem", "body"])
    assert [line["name"] for line in use["data"]] == ["use", "target"]


@pytest.mark.parametrize(
    "points",
    [
        None,
        [],
        3,
        [POINTS[0]],
        [{"step": "x", "use": 1}] * 3,
        [{"step": 1, "ms": 3}],
        ["?", None],
    ],
)
def test_what_is_no_way_is_left_out(points: Any) -> None:
    assert drawn(points) == ("", [])


@pytest.mark.parametrize("widths", [None, [1], [[], {}], "ab", [0, 0], [float("nan"), 1]])
def test_widths_that_make_no_sense_do_no_harm(widths: Any) -> None:
    shown, figures = drawn([*POINTS, {"step": 12, "use": 0.9, "widths": widths}], ["stem", "body"])
    assert "The way of the search" in shown
    assert 1 <= len(figures) <= 2
