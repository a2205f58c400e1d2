"""A campaign on a board, killed, cut off and resumed, against the unbroken one beside the device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.errors import DeviceUnavailableError
from hwsearch.latency.journal import Journal
from hwsearch.latency.profile import JOURNAL, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "device"))

from loopback import Board, made

FILES = ("manifest.json", "networks.csv", "kernels.csv")
NETWORKS = 19

#: Profiles in a process of its own and kills it, as ``kill -9`` does, once so many networks are reported.
CHILD = """
import os, signal, sys
from hwsearch.device.spec import Device
from hwsearch.latency.profile import profile
def progress(done, spent, budget, message):
    if done >= int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
profile(Device.load(sys.argv[1]), minutes=60, networks=int(sys.argv[3]), progress=progress)
"""


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    (tmp_path / "board").mkdir()
    found = made(tmp_path / "board")
    yield found
    found.stop()


def contents(device: Device) -> dict[str, bytes]:
    return {name: (device.table_folder / name).read_bytes() for name in FILES}


def visits(device: Device) -> set[str]:
    with Journal(device.table_folder / JOURNAL) as journal:
        return {visit.network for visit, _ in journal.measurements()[1]}


@pytest.mark.slow
def test_a_campaign_that_was_killed_and_cut_off_ends_with_the_bytes_of_an_unbroken_one(
    board: Board, tmp_path: Path
) -> None:
    unbroken = Device("board", "simulated", home=tmp_path / "unbroken")
    table = profile(unbroken, minutes=60, networks=NETWORKS)
    device = board.device(ssh=board.settings(patience_s=2.0))
    path = device.save()

    command = [sys.executable, "-c", CHILD, str(path), "5", str(NETWORKS)]
    root = str(Path(__file__).resolve().parents[2])
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": root}, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    kept = visits(device)
    assert 5 <= len(kept) < NETWORKS

    told: list[str] = []

    def cut_off(done: int, spent: float, budget: float, message: str) -> None:
        if not told:
            board.stop()  # in the middle of a step, for longer than the board's patience
        told.append(message)

    with pytest.raises(DeviceUnavailableError, match="no connection"):
        profile(device, minutes=60, networks=NETWORKS, progress=cut_off)
    assert kept <= visits(device)

    board_is_back = threading.Timer(0.5, board.start)
    board_is_back.start()
    board_is_back.join()
    dropped: list[int] = []
    with open_session(device, message=told.append) as session:

        def drop(done: int, spent: float, budget: float, message: str) -> None:
            if not dropped:
                board.drop()
            dropped.append(done)

        found = profile(device, minutes=60, networks=NETWORKS, progress=drop, session=session)
    assert any("trying again" in text for text in told)
    assert found == table
    assert contents(device) == contents(unbroken)
