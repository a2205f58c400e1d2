"""Which network a run hands out: the better one on held-out images that keeps every budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from hwsearch.comparison import Compared, DeviceTime, NetworkRow
from hwsearch.config import RunConfig
from hwsearch.delivery import choose
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.result import LimitOutcome, SearchResult

BUDGETS = {"fast": 1.0, "slow": 4.0}


def row(name: str, held_out: float, shares: tuple[float, float], metric: float = 0.5) -> NetworkRow:
    times = tuple(
        DeviceTime(device, 0.9 * budget, 0.8 * budget, budget, share * budget, share * budget, budget)
        for (device, budget), share in zip(BUDGETS.items(), shares, strict=True)
    )
    first = times[0]
    return NetworkRow(
        name, (4, 8), first.predicted_ms, first.measured_ms, first.raw_p50_ms, first.budget_ms, 100, 10, metric, 1.0,
        held_out, first.low_ms, first.high_ms, (), times,
    )  # fmt: skip


def compared(*rows: NetworkRow, higher: bool = True) -> Compared:
    networks = {row.name: nn.Linear(at + 1, 1) for at, row in enumerate(rows)}
    choices = {row.name: WidthChoice((at, at)) for at, row in enumerate(rows)}
    return Compared(rows, "accuracy", higher, networks, choices)


RESULT = SearchResult(
    "cafenet", 0, ("a", "b"), WidthChoice((2, 2)), tuple(LimitOutcome(n, b, 0.9 * b) for n, b in BUDGETS.items()),
    0.4, 0.81, 90, 9, model=nn.Linear(9, 9),
)  # fmt: skip


def ready(search: dict[str, Any] | None = None, **sections: Any) -> Any:
    config = RunConfig.from_dict({
        "device": {"name": "simulated"},
        "model": {"factory": "hwsearch.models.vgg:vgg_small", "input": "1x1x28x28"},
        "search": {"budget": "50%"} | (search or {}),
    } | sections)  # fmt: skip
    return SimpleNamespace(config=config)


def test_uniform_scaling_that_is_better_takes_the_place_of_what_was_found() -> None:
    rows = (row("full", 0.9, (2.0, 2.0)), row("uniform", 0.83, (0.7, 0.9)), row("found", 0.81, (0.97, 0.97)))
    both = compared(*rows)
    delivered = choose(ready(), RESULT, both)
    assert delivered.name == "uniform"
    assert delivered.result.model is both.networks["uniform"]
    assert delivered.result.choice == both.choices["uniform"]
    assert [limit.name for limit in delivered.result.limits] == list(BUDGETS)
    assert [limit.measured_ms for limit in delivered.result.limits] == [pytest.approx(0.7), pytest.approx(3.6)]
    assert delivered.result.metric == 0.83
    assert "0.8300" in delivered.why
    assert "0.8100" in delivered.why


@pytest.mark.parametrize(
    ("held_out", "shares", "settings", "higher"),
    [
        (0.80, (0.7, 0.7), {}, True),  # worse
        (0.81, (0.7, 0.7), {}, True),  # equal: the search's
        (0.83, (0.7, 0.99), {}, True),  # better, but the next reading may break a budget
        (0.83, (0.7, 0.7), {"search": {"floor": 0.8}}, True),  # the fewest milliseconds were asked for
        (0.83, (0.7, 0.7), {"deploy": {"deliver": "found"}}, True),
        # uniform scaling keeps no size budget
        (0.83, (0.7, 0.7), {"search": {"method": "mgas"}, "weights": {"max_parameters": 100}}, True),
        (0.83, (0.7, 0.7), {}, False),  # of a metric where less is better
    ],
)
def test_what_was_found_stays(
    held_out: float, shares: tuple[float, float], settings: dict[str, Any], higher: bool
) -> None:
    # test images, on which uniform scaling is far better, decide nothing
    rows = (row("uniform", held_out, shares, metric=0.99), row("found", 0.81, (0.97, 0.97), metric=0.1))
    delivered = choose(ready(**settings), RESULT, compared(*rows, higher=higher))
    assert (delivered.name, delivered.why) == ("found", "")
    assert delivered.result is RESULT


def test_a_run_without_uniform_scaling_delivers_what_was_found() -> None:
    assert choose(ready(), RESULT, compared(row("found", 0.1, (0.9, 0.9)))).result is RESULT
