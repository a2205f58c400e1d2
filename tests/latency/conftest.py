"""One small campaign on the simulated device, shared by all tests of this package; helpers are imported by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.latency.profile import profile
from hwsearch.latency.table import LatencyTable

sys.path.insert(0, str(Path(__file__).parent))

QUICK = {"rounds": 25, "folds": 3}


@dataclass(frozen=True)
class Campaign:
    """A profiled simulated device and its predictor."""

    device: Device
    session: DeviceSession
    table: LatencyTable
    predictor: LatencyPredictor


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    home: Path = tmp_path_factory.mktemp("home")
    device = Device(name="simulated", runtime="simulated", home=home)
    with open_session(device) as session:
        table = profile(device, minutes=60, networks=96, session=session)
        yield Campaign(device, session, table, LatencyPredictor(**QUICK).fit(table))
