"""A table under a machine's name: the same measurements, a predictor, a device file that says what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from hwsearch.console import Console
from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.latency.profile import profile
from hwsearch.latency.table import LatencyTable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("publish_table")


def test_a_published_table_is_the_device_s_own_under_another_name(tool: ModuleType, tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    (mine / "devices").mkdir(parents=True)
    (mine / "devices/simulated.toml").write_text((ROOT / "devices/simulated.toml").read_text())
    source = Device.load(mine / "devices/simulated.toml")
    made = profile(source, minutes=60, networks=12, visits=1)
    folder = tool.publish(source, "some-cpu", theirs, Console())
    assert folder == theirs / "latency_tables/some-cpu"
    published = LatencyTable.load(folder)
    assert published.device == "some-cpu"
    assert published.networks == made.networks
    device = Device.load(theirs / "devices/some-cpu.toml")
    assert "simulated" in (theirs / "devices/some-cpu.toml").read_text().splitlines()[1]
    with open_session(device) as session:
        predictor = LatencyPredictor.load(folder / "predictor", session.fingerprint)
    kernels = published.networks[0].kernels
    assert predictor.network(kernels).ms == pytest.approx(published.networks[0].measured_ms, rel=0.2)
    assert (folder / "predictor/card.md").read_text().startswith("# Latency predictor of some-cpu")
