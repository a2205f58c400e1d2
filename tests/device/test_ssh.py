"""A board over SSH: the same results as beside it, and what travels, against a real server on the loopback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.errors import DeviceUnavailableError, HwsearchError

sys.path.insert(0, str(Path(__file__).parent))

from device_graphs import residual, separable
from loopback import Board, made

REFERENCE_MS = 0.27
NETWORKS = [("residual", residual()), ("separable", separable()), ("odd", separable(30)), ("small", residual(8))]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    found = made(tmp_path_factory.mktemp("board"))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def session(board: Board) -> Iterator[DeviceSession]:
    with open_session(board.device()) as opened:
        yield opened


def test_a_board_gives_what_the_device_itself_gives(board: Board, session: DeviceSession) -> None:
    beside = Device("board", "simulated")
    with open_session(beside) as local:
        assert session.fingerprint == local.fingerprint
        expected = {t.network: t for t in local.time(NETWORKS, reference_ms=REFERENCE_MS, nodes=True)}
        lowered = local.lower([network for _, network in NETWORKS])
        reference = local.calibrate(1.0)
    found = {t.network: t for t in session.time(NETWORKS, reference_ms=REFERENCE_MS, nodes=True)}
    assert found == expected
    assert session.lower([network for _, network in NETWORKS]) == lowered
    assert session.calibrate(1.0) == reference
    assert session.agent_pid is not None
    assert Path(f"/proc/{session.agent_pid}/cmdline").read_bytes().split(b"\0")[-2].startswith(b"hwsearch-")
