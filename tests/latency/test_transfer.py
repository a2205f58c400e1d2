"""A new device from a few networks and another device's predictor, on simulated devices that differ in everything."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.errors import InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.latency.predictor import LatencyPredictor, OutOfRangeWarning
from hwsearch.latency.profile import current_check
from hwsearch.latency.sample import PlannedNetwork, SamplingPlan
from hwsearch.latency.table import LatencyTable
from hwsearch.latency.training import Rows
from hwsearch.latency.transfer import choose_networks, lower_plan, time_networks, transfer, transfer_device
from hwsearch.latency.transfer_map import fit_map, network_parts, parts_ms

QUICK = {"rounds": 25, "folds": 3}
#: Three times the arithmetic, less bandwidth, slower starts, other blocks than the default.
NEW = {"block": 16, "gmacs": 60.0, "gbytes": 8.0, "node_us": 4.0, "overhead_us": 30.0, "seed": 3}


@dataclass(frozen=True)
class NewDevice:
    """The new device's plan, lowered and timed; the last 40 networks are held out."""

    device: Device
    lowered: list[tuple[PlannedNetwork, tuple[Kernel, ...]]]
    truth: LatencyTable

    @property
    def pool(self) -> list[tuple[PlannedNetwork, tuple[Kernel, ...]]]:
        return self.lowered[:-40]

    def table(self, picked: np.ndarray) -> LatencyTable:
        timed = {network.id: network for network in self.truth.networks}
        return self.truth.with_networks([timed[self.pool[i][0].id] for i in picked])

    def untimed(self, picked: np.ndarray) -> list[tuple[Kernel, ...]]:
        return [kernels for i, (_, kernels) in enumerate(self.pool) if i not in set(picked.tolist())]

    def errors(self, predictor: LatencyPredictor) -> np.ndarray:
        timed = {network.id: network for network in self.truth.networks}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.array([
                predictor.network(kernels).ms / timed[network.id].measured_ms - 1
                for network, kernels in self.lowered[-40:]
            ])  # fmt: skip


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> NewDevice:
    device = Device(name="new", runtime="simulated", home=tmp_path_factory.mktemp("new"), options=NEW)
    with open_session(device) as session:
        lowered = lower_plan(session, SamplingPlan(seed=5), 140)
        reference_ms = current_check(device, session, lambda text: None).reference_ms
        networks = [network for network, _ in lowered]
        truth = time_networks(session, networks, reference_ms=reference_ms, noise_floor=0.01)
    return NewDevice(device, lowered, truth)


def test_parts_are_the_price(campaign: Any, new: NewDevice) -> None:
    source = campaign.predictor
    kernels = new.lowered[0][1]
    split = parts_ms(source, kernels)
    assert (split >= 0).all()
    assert split.sum(axis=1) == pytest.approx(source.calibration_.a * source.model_.ms(kernels))
    assert parts_ms(source, ()).shape == (0, 3)


def test_the_map_finds_the_new_device_s_rates(campaign: Any, new: NewDevice) -> None:
    """The device has 3 times the arithmetic, 0.8 of the bandwidth and 2.7 times the start of a node."""
    rows = Rows.of(new.truth.networks[:20])
    dispatch, moved, arithmetic = fit_map(rows, network_parts([campaign.predictor], rows)).rates[0]
    assert arithmetic == pytest.approx(1 / 3, rel=0.25)
    assert moved == pytest.approx(1.25, rel=0.25)
    assert dispatch == pytest.approx(2.7, rel=0.35)


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 16])
def test_a_transfer_beats_a_fit_from_scratch_while_networks_are_few(campaign: Any, new: NewDevice, count: int) -> None:
    """The same networks for both, two draws of them; sixty more are lowered but not timed."""
    helped, alone = [], []
    for seed in range(2):
        picked = np.random.default_rng(seed).permutation(len(new.pool))[:count]
        found = transfer([campaign.predictor], new.table(picked), untimed=new.untimed(picked)[:60], **QUICK)
        helped.append(np.abs(new.errors(found)).mean())
        alone.append(np.abs(new.errors(LatencyPredictor(**QUICK).fit(new.table(picked)))).mean())
    if count == 4:
        assert np.mean(helped) < 0.9 * np.mean(alone)
    assert np.mean(helped) < 0.25


def test_a_transferred_predictor_is_like_any_other(campaign: Any, new: NewDevice, tmp_path: Path) -> None:
    picked = choose_networks([campaign.predictor], [kernels for _, kernels in new.pool], 6)
    found = transfer([campaign.predictor], new.table(picked), untimed=new.untimed(picked)[:30], **QUICK)
    assert found.device_ == "new"
    assert found.networks_ == 6
    assert len(found.log_errors_) == 6
    found.save(tmp_path)
    again = LatencyPredictor.load(tmp_path, new.truth.fingerprint)
    kernels = new.lowered[-1][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutOfRangeWarning)
        estimate = found.network(kernels)
        assert again.network(kernels) == estimate
    assert estimate.low_ms < estimate.ms < estimate.high_ms
    # Kernels of networks that were only lowered count as known.
    assert found.network(new.untimed(picked)[0]).coverage == 1.0


def test_the_choice_is_the_same_every_time_and_seeds_vary_it(campaign: Any, new: NewDevice) -> None:
    networks = [kernels for _, kernels in new.pool]
    first = choose_networks([campaign.predictor], networks, 8)
    assert len(set(first.tolist())) == 8
    assert first.tolist() == choose_networks([campaign.predictor], networks, 8).tolist()
    assert first.tolist() != choose_networks([campaign.predictor], networks, 8, seed=1).tolist()


def test_a_whole_device_in_one_call(campaign: Any, tmp_path: Path) -> None:
    device = Device(name="other", runtime="simulated", home=tmp_path, options={"gmacs": 40.0})
    told: list[str] = []
    predictor, table = transfer_device(
        device,
        [campaign.predictor],
        networks=5,
        candidates=24,
        progress=lambda done, steps, text: told.append(text),
        **QUICK,
    )
    assert len(table.networks) == 5
    assert predictor.device_ == table.device == "other"
    assert any(text.startswith("timing 5") for text in told)


def test_what_cannot_be_transferred_is_refused(campaign: Any, new: NewDevice) -> None:
    with pytest.raises(InputError, match="no source"):
        transfer([], new.truth)
    with pytest.raises(InputError, match="2 networks; time 3 or more"):
        transfer([campaign.predictor], new.truth.with_networks(new.truth.networks[:2]))
    with pytest.raises(InputError, match="rounds is -1"):
        transfer([campaign.predictor], new.truth, rounds=-1)
