"""Where a campaign goes on: towards kernels that the predictor gets wrong, the same way after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwsearch.device.spec import Device
from hwsearch.errors import InputError
from hwsearch.latency.active import FIRST, Need, round_start
from hwsearch.latency.journal import Journal
from hwsearch.latency.profile import BLOCK, JOURNAL, profile
from hwsearch.latency.sample import SamplingPlan


@pytest.fixture(scope="module")
def need(campaign: Any) -> Need:
    return Need.of(campaign.table.networks)


def test_candidates_for_a_place_differ_and_the_first_is_the_plans_own() -> None:
    plan = SamplingPlan(seed=3)
    ids = [plan.network(7, number).id for number in range(4)]
    assert len(set(ids)) == 4
    assert ids[0] == plan.network(7).id
    assert plan.network(7, 2).id == SamplingPlan(seed=3).network(7, 2).id


def test_unknown_sizes_and_badly_told_kernels_score_higher(campaign: Any, need: Need) -> None:
    kernels = campaign.table.networks[0].kernels
    far = [replace(kernel, in_channels=kernel.in_channels * 8) for kernel in kernels]
    worst = max(need.errors, key=lambda kind: need.errors[kind])
    family, op, _ = worst.split("|")
    bad = [k for n in campaign.table.networks for k in n.kernels if (k.family, k.op) == (family, op)]
    usual, further, worse = need.scores([kernels, far, bad])
    assert 0 < usual < 1
    assert 0 < need.mape < 0.2
    assert further > usual
    assert worse > usual
    assert need.scores([bad])[0] == pytest.approx(worse), "each by itself"


def test_fits_are_ever_rarer() -> None:
    starts = [round_start(step) for step in range(200)]
    assert starts == sorted(starts)
    assert all(start <= step for step, start in enumerate(starts))
    assert [start for start in sorted(set(starts))][:4] == [0, 4, 6, 9]
    assert len(set(starts)) < 12


@pytest.mark.slow
def test_a_campaign_chooses_and_chooses_alike_when_it_was_interrupted(tmp_path: Path) -> None:
    networks = BLOCK * (FIRST + 1)
    whole = Device(name="simulated", runtime="simulated", home=tmp_path / "whole")
    table = profile(whole, minutes=600, networks=networks)
    with Journal(whole.table_folder / JOURNAL) as journal:
        chosen = journal.chosen(SamplingPlan().key)
    assert set(chosen) == set(range(BLOCK * FIRST, networks))
    assert any(chosen.values()), "no candidate was ever preferred to the plan's own"
    assert not any(number for place, number in chosen.items() if place // 2 % 2 == 0)

    class Stop(Exception):
        pass

    def stop(done: int, spent: float, budget: float, message: str) -> None:
        if done > BLOCK * FIRST + 3:
            assert "error" in message
            raise Stop

    broken = replace(whole, home=tmp_path / "broken")
    with pytest.raises(Stop):
        profile(broken, minutes=600, networks=networks, progress=stop)
    assert profile(broken, minutes=600, networks=networks) == table


@pytest.mark.slow
def test_a_campaign_stops_at_its_target(tmp_path: Path) -> None:
    device = Device(name="simulated", runtime="simulated", home=tmp_path)
    told: list[str] = []
    table = profile(
        device, minutes=600, networks=BLOCK * (FIRST + 2), target=0.5, progress=lambda *facts: told.append(facts[3])
    )
    assert len(table.networks) == BLOCK * FIRST
    assert "target 50.0%" in told[-1]


@pytest.mark.parametrize("target", [0, 1, -0.1, "4", True, float("nan")])
def test_a_senseless_target(target: Any) -> None:
    with pytest.raises(InputError, match="target"):
        profile("simulated", target=target)
