"""What goes wrong with a board: it costs time, or it is told in one line with a remedy. Nothing finished is lost."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hwsearch.device import ssh as ssh_module
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.device.ssh_settings import SshSettings
from hwsearch.device.stopwatch import Timing
from hwsearch.errors import DeviceUnavailableError, HwsearchError

sys.path.insert(0, str(Path(__file__).parent))

from device_graphs import Graph, residual, separable
from loopback import Board, made

REFERENCE_MS = 0.27
NETWORKS = [(f"network {n}", residual(8 + 4 * n) if n % 2 else separable(8 + 4 * n)) for n in range(8)]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    found = made(tmp_path_factory.mktemp("board"))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def expected() -> dict[str, Timing]:
    """What a device without faults says."""
    with open_session(Device("board", "simulated")) as local:
        return {t.network: t for t in local.time(NETWORKS, reference_ms=REFERENCE_MS, nodes=True)}


class Watched:
    """A session on the board in which something happens at the ``at``-th result, and what it said and did."""

    def __init__(self, device: Device, at: int, happens: Callable[[DeviceSession], None]) -> None:
        self.said: list[str] = []
        self.session = open_session(device, message=self.said.append)
        self.asked: list[int] = []
        self._results, self._at, self._happens = 0, at, happens
        self._attempt, self._progress = self.session._attempt, self.session._transport.progress
        self.session._attempt = self.attempt  # type: ignore[method-assign]
        self.session._transport.progress = self.progress  # type: ignore[method-assign]

    def attempt(self, job: str, folder: Path, networks: list[tuple[str, bytes]], request: dict) -> Iterator:
        self.asked.append(len(networks))
        return self._attempt(job, folder, networks, request)

    def progress(self) -> None:
        self._progress()
        self._results += 1
        if self._results == self._at:
            self._happens(self.session)

    def timings(self) -> tuple[dict[str, Timing], list[str]]:
        errors: list[str] = []
        found = self.session.time(
            NETWORKS, reference_ms=REFERENCE_MS, nodes=True, on_error=lambda name, error: errors.append(str(error))
        )
        return {timing.network: timing for timing in found}, errors


def test_a_dropped_link_costs_what_was_not_told_yet(board: Board, expected: dict[str, Timing]) -> None:
    watched = Watched(board.device(), 3, lambda session: board.drop())
    with watched.session:
        timings, errors = watched.timings()
    assert timings == expected
    assert not errors
    assert len(watched.said) == 1
    assert watched.said[0].startswith("device board: no connection to 127.0.0.1 (")
    assert watched.said[0].endswith("trying again in 0.5 s")
    first, second = watched.asked
    assert first == 8
    assert second <= 5, "the three that were told are not done again, though their files were fetched afterwards"


def test_a_killed_agent_costs_nothing(board: Board, expected: dict[str, Timing]) -> None:
    def kill(session: DeviceSession) -> None:
        assert session.agent_pid is not None
        os.kill(session.agent_pid, signal.SIGKILL)

    watched = Watched(board.device(), 2, kill)
    with watched.session:
        assert watched.timings() == (expected, [])
    assert watched.asked[0] == 8
    assert watched.asked[1] <= 6


def test_a_rebooted_board_is_waited_for_and_set_up_anew(board: Board, expected: dict[str, Timing]) -> None:
    def reboot(session: DeviceSession) -> None:
        agent = session._agent
        assert agent is not None
        board.stop()
        shutil.rmtree(agent.folder)
        shutil.rmtree(board.cache)
        threading.Timer(1.0, board.start).start()

    watched = Watched(board.device(), 4, reboot)
    with watched.session:
        assert watched.timings() == (expected, [])
    assert watched.asked == [8, 8], "the results of before were on the board, and are gone"
    assert len(watched.said) >= 1
    assert "Connection refused" in watched.said[-1] or "no connection" in watched.said[-1]


def test_a_board_that_stays_away_is_told_and_what_is_finished_stays(board: Board) -> None:
    device = board.device(ssh=board.settings(patience_s=1.0))
    watched = Watched(device, 3, lambda session: board.stop())
    found: list[Timing] = []
    try:
        with watched.session, pytest.raises(DeviceUnavailableError, match=r"^device board: no connection") as caught:
            found += watched.session.time(NETWORKS, reference_ms=REFERENCE_MS)  # type: ignore[arg-type]
    finally:
        board.start()
    assert "refused" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert 1 <= len(watched.said) <= 3


def test_an_idle_session_finds_its_way_back(board: Board) -> None:
    with open_session(board.device(), message=lambda text: None) as opened:
        lowered = opened.lower([residual()])
        board.drop()
        time.sleep(0.2)
        assert opened.lower([residual()]) == lowered
        shutil.rmtree(board.cache)  # and somebody cleans up
        assert opened.lower([residual()]) == lowered
        graph = Graph(1, 1, 2, 2)
        graph.node("Relu", "input", "output")
        board.drop()
        values = np.array([[[[-1, 2], [3, -4]]]], np.float32)
        np.testing.assert_array_equal(opened.run(graph.bytes(), {"input": values})["output"], np.maximum(values, 0))


def test_a_network_that_crashes_the_runtime_costs_itself(board: Board) -> None:
    errors: dict[str, str] = {}
    networks = [NETWORKS[0], ("bad", residual()), NETWORKS[1]]
    with open_session(board.device(crash_on="bad")) as opened:
        found = {
            t.network
            for t in opened.time(
                networks, reference_ms=REFERENCE_MS, on_error=lambda name, e: errors.update({name: str(e)})
            )
        }
    assert found == {"network 0", "network 1"}
    assert errors == {"bad": "network 'bad': the agent was killed by SIGKILL"}


def test_an_agent_that_hangs_is_ended_there_too(board: Board) -> None:
    """It would go on holding the board's timing lock."""
    pids: list[int] = []

    def freeze(session: DeviceSession) -> None:
        assert session.agent_pid is not None
        pids.append(session.agent_pid)
        os.kill(pids[0], signal.SIGSTOP)  # it does not even notice that its host has left

    watched = Watched(board.device(), 2, freeze)
    with watched.session:
        watched.session._timeout_s = 8.0
        timings, errors = watched.timings()
        status = Path(f"/proc/{pids[0]}/stat")
        assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
    assert len(timings) >= 7
    assert all("said nothing for 8 s" in error for error in errors)
    assert len(timings) + len(errors) == 8


def test_a_full_disk_is_told_and_mended(board: Board) -> None:
    """No file may grow beyond 100 kB while a marker lies there: the system's own refusal, without filling a disk."""
    marker = board.home / "full"
    python = board.python(f'[ -e {marker} ] && ulimit -f 200\nexec {sys.executable} "$@"')
    settings = board.settings(python=python, folder=str(board.home / "narrow"))
    large = Graph(1, 64, 4, 4)
    large.conv("input", "wide", (64, 128))
    grows = Graph(1, 1, 64, 64)
    grows.conv("input", "many", (1, 32), 1)
    values = {"input": np.ones((1, 1, 64, 64), np.float32)}
    with open_session(board.device(ssh=settings)) as opened:
        marker.touch()
        with pytest.raises(DeviceUnavailableError, match=r"cannot write .*File too large.*make room there") as caught:
            opened.lower([large.bytes()])
        assert str(board.home / "narrow") in str(caught.value)
        with pytest.raises(DeviceUnavailableError, match=r"^device board: the device cannot write .*the disk is full"):
            opened.run(grows.bytes(), values)
        marker.unlink()
        assert opened.lower([large.bytes()])[0][-1].op == "Conv"
        opened.restart()
        assert opened.run(grows.bytes(), values)["many"].shape == (1, 32, 64, 64)


def refusal(settings: SshSettings, board: Board, runtime: str = "simulated") -> str:
    device = Device("board", runtime, transport="ssh", ssh=settings)
    begun = time.monotonic()
    with open_session(device) as opened, pytest.raises(HwsearchError) as caught:
        _ = opened.fingerprint
    assert isinstance(caught.value, DeviceUnavailableError)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("device board: ")
    assert time.monotonic() - begun < 60
    return str(caught.value)


def test_what_cannot_work_is_said_at_once_with_a_remedy(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    (tmp_path / "known").write_text(f"[127.0.0.1]:{board.port} {(tmp_path / 'other.pub').read_text()}")
    known = f"UserKnownHostsFile={tmp_path / 'known'}"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = unused.getsockname()[1]
        assert "Connection refused): is its SSH server running" in refusal(board.settings(port=closed), board)
    options = board.settings().ssh_options
    wrong = refusal(board.settings(ssh_options=(known, *options[1:])), board)
    assert "Host key verification failed" in wrong
    assert "compare the key" in wrong
    wrong = refusal(board.settings(identity=str(tmp_path / "other")), board)
    assert "Permission denied" in wrong
    assert "ssh-copy-id 127.0.0.1" in wrong
    assert "check the name" in refusal(board.settings(host="no-such-board.invalid"), board)
    wrong = refusal(board.settings(python="/nowhere/python3"), board)
    assert "has no '/nowhere/python3'" in wrong
    bare = board.python(f'exec {sys.executable} -I -S "$@"')
    wrong = refusal(board.settings(python=bare), board)
    assert "has no numpy: run `ssh 127.0.0.1" in wrong
    monkeypatch.setattr(ssh_module, "OLDEST_PYTHON", (9, 9))
    assert "install 9.9 or newer there" in refusal(board.settings(), board)


def test_a_runtime_that_is_not_installed_there_is_named(board: Board, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError(\"No module named 'onnxruntime'\")")
    lacking = board.python(f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    wrong = refusal(board.settings(python=lacking), board, "onnxruntime")
    assert "lacks a package: No module named 'onnxruntime'; install it there" in wrong


def test_a_folder_that_cannot_be_written_is_named(board: Board) -> None:
    (board.home / "file").write_text("")
    wrong = refusal(board.settings(folder=str(board.home / "file" / "cache")), board)
    assert f"127.0.0.1 cannot write {board.home / 'file'}" in wrong
    assert 'set folder = "..."' in wrong


def test_without_an_ssh_here_there_is_no_board(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install the OpenSSH client" in refusal(board.settings(), board)


def test_a_board_that_falls_at_every_try_is_given_up(board: Board) -> None:
    """Each time the link is there again, and is lost before any result: that is no accident any more."""
    watched = Watched(board.device(), 0, lambda session: None)
    events, patience = watched.session._events, watched.session._transport._patience  # type: ignore[attr-defined]

    def broken(job: str, request: dict) -> Iterator:
        board.drop()
        return events(job, request)

    watched.session._events = broken  # type: ignore[method-assign, assignment]
    patience.MOST_LOSSES, patience.sleep = 2, lambda _: None
    with watched.session, pytest.raises(DeviceUnavailableError, match="no connection"):
        watched.session.lower([residual()])
    assert len(watched.asked) == 3
