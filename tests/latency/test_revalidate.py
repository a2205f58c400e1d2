"""Does a predictor still hold? On simulated devices that stayed, changed their speed, or got another runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwsearch.device.session import DeviceSession, open_session
from hwsearch.errors import AnswerIsNo, InputError, NoisyDeviceError
from hwsearch.latency import revalidate as module
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.latency.revalidate import accept, revalidate
from hwsearch.latency.table import LatencyTable


@pytest.fixture
def session(campaign: Any, request: pytest.FixtureRequest) -> Iterator[DeviceSession]:
    """The campaign's device with other options."""
    device = replace(campaign.device, options=request.param)
    with open_session(device) as opened:
        yield opened


@pytest.mark.parametrize("session", [{}, {"version": "1.1"}], indirect=True)
def test_the_same_machine_holds(campaign: Any, session: DeviceSession) -> None:
    found = revalidate(campaign.table, session)
    assert found.verdict == "holds"
    assert found.holds
    assert found.networks == 24
    assert found.median_ratio == pytest.approx(1, abs=0.02)
    assert found.factor == found.median_ratio
    assert found.speed == pytest.approx(1, abs=0.15)
    assert found.p95 < 0.06
    assert (found.moved, found.other_kernels, found.failed) == ((), 0, ())
    assert {f.family for f in found.families} >= {"conv", "pointwise", "reorder"}
    assert all(f.ratio == pytest.approx(1, abs=0.08) for f in found.families)
    wanted = ("runtime_version: 1 against 1.1",) if session.device.options else ()
    assert found.differences == wanted


@pytest.mark.parametrize("session", [{"slowdown": 1.6}], indirect=True)
def test_a_machine_at_another_clock_is_shifted_by_a_factor(campaign: Any, session: DeviceSession) -> None:
    found = revalidate(campaign.table, session)
    assert found.verdict == "shifted"
    assert found.median_ratio == pytest.approx(1, abs=0.03), "the canary feels it too"
    assert found.factor == pytest.approx(1.6, rel=0.1)
    assert any("canary takes 1.6" in line or "canary takes 1.5" in line for line in found.messages)
    assert any(line.startswith("cpu: ") for line in found.differences)


@pytest.mark.parametrize("session", [{"gbytes": 3.0}], indirect=True)
def test_a_machine_whose_memory_changed_is_broken_and_the_families_are_named(campaign: Any, session: Any) -> None:
    found = revalidate(campaign.table, session)
    assert found.verdict == "broken"
    assert "reorder" in found.moved
    assert any("reorder" in line for line in found.messages)
    assert any("hwsearch profile --device simulated" in line for line in found.messages)


@pytest.mark.parametrize("session", [{"block": 16}], indirect=True)
def test_another_lowering_is_seen(campaign: Any, session: DeviceSession) -> None:
    assert revalidate(campaign.table, session).other_kernels > 0


@pytest.mark.parametrize("session", [{}], indirect=True)
def test_networks_against_the_canary_are_shifted(campaign: Any, session: DeviceSession) -> None:
    slower = campaign.table.with_networks(n.scaled(1 / 1.2) for n in campaign.table.networks)
    found = revalidate(slower, session)
    assert found.verdict == "shifted"
    assert found.factor == pytest.approx(1.2, rel=0.03)
    assert not found.moved


@pytest.mark.parametrize("session", [{"fail_on": "a"}], indirect=True)
def test_networks_that_no_longer_run_break_it(campaign: Any, session: DeviceSession) -> None:
    found = revalidate(campaign.table, session)
    assert found.verdict == "broken"
    assert found.failed
    assert "no longer run" in found.messages[0]


@pytest.mark.parametrize("session", [{}], indirect=True)
def test_too_few_quiet_moments_are_no_answer(
    campaign: Any, session: DeviceSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(jobs: Any, *, on_error: Any, **_: Any) -> Iterator[Any]:
        for name, _onnx in jobs:
            on_error(name, NoisyDeviceError("busy"))
        return iter(())

    monkeypatch.setattr(session, "time", noisy)
    with pytest.raises(NoisyDeviceError, match="0 of 24 networks found a quiet moment"):
        revalidate(campaign.table, session)


def test_the_sample_is_of_every_source_and_size(campaign: Any) -> None:
    chosen = module._sample(campaign.table, (), 24)
    assert len({network.id for network in chosen}) == 24
    known = {sample.id: sample for sample in campaign.table.networks}
    assert {known[network.id].source for network in chosen} == set(campaign.table.sources)
    times = sorted(known[network.id].measured_ms for network in chosen)
    every = sorted(sample.measured_ms for sample in campaign.table.networks)
    assert times[0] <= every[len(every) // 4]
    assert times[-1] >= every[3 * len(every) // 4]
    assert [n.id for n in chosen] == [n.id for n in module._sample(campaign.table, (), 24)]


def test_a_table_from_elsewhere_cannot_be_made_again(campaign: Any) -> None:
    renamed = campaign.table.with_networks(replace(n, id=f"x{n.id}") for n in campaign.table.networks)
    with pytest.raises(InputError, match=r"only 0 of the 96 networks.*can be made again"):
        revalidate(renamed, campaign.session)
    other_seed = replace(campaign.table, seeds=(7,))
    with pytest.raises(InputError, match="can be made again"):
        revalidate(other_seed, campaign.session)
    assert campaign.table.seeds == (0,)
    assert len(module._sample(replace(campaign.table, seeds=()), (), 24)) == 24, "tables of before: seed 0 is tried"
    with pytest.raises(InputError, match="networks is 3"):
        revalidate(campaign.table, campaign.session, networks=3)


# ---------------------------------------------------------------- accept


@pytest.fixture
def folder(campaign: Any, tmp_path: Path) -> Path:
    campaign.predictor.save(tmp_path / "predictor")
    return tmp_path / "predictor"


@pytest.mark.parametrize("session", [{"version": "1.1"}], indirect=True)
def test_a_predictor_that_holds_is_taken_along_to_the_new_version(
    campaign: Any, session: DeviceSession, folder: Path
) -> None:
    now = session.fingerprint
    with pytest.raises(InputError, match=r"runtime_version '1\.1' instead of '1'"):
        LatencyPredictor.load(folder, now)
    before = json.loads((folder / "manifest.json").read_text())
    outcome = revalidate(campaign.table, session)
    assert "now also used with 1.1" in accept(folder, outcome, now)
    LatencyPredictor.load(folder, now)
    after = json.loads((folder / "manifest.json").read_text())
    assert after.pop("revalidated") == [
        {"from": "1", "to": "1.1", "networks": 24, "median_ratio": outcome.median_ratio, "p95": outcome.p95}
    ]
    after["fingerprint"]["runtime_version"] = "1"
    assert after == before, "one field and nothing else"
    assert "nothing to accept" in accept(folder, outcome, now)


@pytest.mark.parametrize("session", [{"version": "1.1"}], indirect=True)
def test_what_does_not_hold_is_not_accepted(campaign: Any, session: DeviceSession, folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    now = session.fingerprint
    outcome = revalidate(campaign.table, session)
    for changed, fingerprint, words in (
        (replace(outcome, verdict="shifted"), now, "is shifted"),
        (replace(outcome, verdict="broken"), now, "is broken"),
        (replace(outcome, other_kernels=1), now, "other kernels under"),
        (outcome, replace(now, isa="block16"), "isa 'block16' instead of 'block8'"),
        (outcome, replace(now, precision="int8"), "precision 'int8' instead of 'float32'"),
    ):
        with pytest.raises(AnswerIsNo, match=words):
            accept(folder, changed, fingerprint)
    assert (folder / "manifest.json").read_bytes() == before
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="holds no predictor"):
        accept(folder, outcome, now)


def test_a_table_keeps_the_seeds_of_its_plans(campaign: Any, tmp_path: Path) -> None:
    assert campaign.table.seeds == (0,)
    campaign.table.save(tmp_path)
    assert LatencyTable.load(tmp_path).seeds == (0,)
    merged = campaign.table.merge(replace(campaign.table, seeds=(3,)))
    assert merged.seeds == (0, 3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["seeds"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert LatencyTable.load(tmp_path).seeds == ()
