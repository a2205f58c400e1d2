"""A board over SSH: the same results as beside it, and what travels, against a real server on the loopback."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hwsearch.device import session as session_module
from hwsearch.device import ssh as ssh_module
from hwsearch.device.payload import Payload, payload
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.device.ssh import SshTransport, _Errand
from hwsearch.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))

from device_graphs import Graph, residual, separable
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


def ours(process: int) -> bool:
    """Whether a process still is an agent."""
    try:
        return b"hwsearch.device.agent" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_board_gives_what_the_device_itself_gives(session: DeviceSession) -> None:
    with open_session(Device("board", "simulated")) as local:
        assert session.fingerprint == local.fingerprint
        expected = {t.network: t for t in local.time(NETWORKS, reference_ms=REFERENCE_MS, nodes=True)}
        lowered = local.lower([network for _, network in NETWORKS])
        reference = local.calibrate(1.0)
    found = {t.network: t for t in session.time(NETWORKS, reference_ms=REFERENCE_MS, nodes=True)}
    assert found == expected
    assert session.lower([network for _, network in NETWORKS]) == lowered
    assert session.calibrate(1.0) == reference


def test_a_network_computes_the_same_there_through_onnx_runtime(board: Board) -> None:
    """Function only: a network is optimised and run, never timed."""
    device = replace(board.device(), runtime="onnxruntime")
    graph = Graph(1, 3, 14, 14)
    graph.node("Relu", graph.conv("input", "stem", (3, 8)), "file")  # a name that np.savez keeps for itself
    values = np.random.default_rng(3).standard_normal((1, 3, 14, 14)).astype(np.float32)
    with open_session(device) as there, open_session(device.where_it_is()) as here:
        expected = here.run(graph.bytes(), {"input": values})
        np.testing.assert_array_equal(there.run(graph.bytes(), {"input": values})["file"], expected["file"])
        assert there.lower([residual()]) == here.lower([residual()])
        assert there.fingerprint == here.fingerprint
        assert there.machine == here.machine


def test_the_host_is_not_held_while_a_board_is_timed(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the lock was taken")

    monkeypatch.setattr(session_module, "timing_lock", refuse)
    device = replace(board.device(), runtime="onnxruntime")
    with open_session(device) as remote, remote.alone():
        pass  # nothing is asked of the board before there is a job
    with open_session(device.where_it_is()) as local, pytest.raises(AssertionError):
        local.alone()


def test_only_what_is_not_there_yet_travels(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    send = _Errand.send
    monkeypatch.setattr(_Errand, "send", lambda errand, data: (sent.append(len(data)), send(errand, data))[1])
    settings = board.settings(folder=str(board.home / "fresh"))
    networks = [network for _, network in NETWORKS]
    with open_session(board.device(ssh=settings)) as opened:
        lowered = opened.lower(networks)
        first, modules = sum(sent), sum(map(len, payload("simulated").files.values()))
        assert first > modules + sum(map(len, networks))
        sent.clear()
        assert opened.lower(networks) == lowered
        assert sum(sent) < 20_000, "only the request for the results"
    changed = dict(payload("simulated").files)
    changed["hwsearch/errors.py"] += b"# another release\n"
    monkeypatch.setattr(ssh_module, "payload", lambda runtime: Payload(changed, "agent-other"))
    sent.clear()
    with open_session(board.device(ssh=settings)) as opened:
        assert opened.lower(networks) == lowered
    assert len(changed["hwsearch/errors.py"]) < sum(sent) < len(changed["hwsearch/errors.py"]) + 60_000
    assert (board.home / "fresh" / "agent-other" / "hwsearch" / "errors.py").read_bytes().endswith(b"release\n")


def test_files_that_were_damaged_on_the_board_are_sent_again(board: Board, tmp_path: Path) -> None:
    transport = SshTransport(board.device(ssh=board.settings(folder=str(board.home / "damaged"))), tmp_path)
    (path,) = transport.place(tmp_path, {"one": b"good" * 100})
    Path(path).write_bytes(bytes(400))  # as a power cut leaves it: of the right size
    assert transport.place(tmp_path, {"two": b"good" * 100}) == [path], "known to be there"
    transport.close()
    again = SshTransport(transport._device, tmp_path)
    assert again.place(tmp_path, {"two": b"good" * 100, "more": b"", "same": b"good" * 100})[::2] == [path, path]
    assert Path(path).read_bytes() == b"good" * 100
    again.close()


def test_files_come_back_whole_and_those_that_are_gone_are_left_out(board: Board, tmp_path: Path) -> None:
    (board.home / "large").write_bytes(bytes(range(256)) * 20_000)
    (board.home / "empty").write_bytes(b"")
    transport = SshTransport(board.device(), tmp_path)
    paths = [str(board.home / name) for name in ("gone", "large", "empty")]
    found = transport.collect(paths, tmp_path)
    assert list(found) == paths[1:]
    assert found[paths[1]].read_bytes() == bytes(range(256)) * 20_000
    assert found[paths[2]].read_bytes() == b""
    transport.close()


def test_a_board_does_not_fill_up(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_module, "KEEP_BYTES", 1000)
    store = board.home / "small" / "store"
    store.mkdir(parents=True)
    for number, age_s in enumerate((9000, 5000, 10)):
        (store / f"old-{number}").write_bytes(bytes(600))
        os.utime(store / f"old-{number}", (time.time() - age_s, time.time() - age_s))
    transport = SshTransport(board.device(ssh=board.settings(folder=str(store.parent))), tmp_path)
    (path,) = transport.place(tmp_path, {"large": bytes(5000)})
    left = {file.name for file in store.iterdir()}
    assert left == {"old-2", Path(path).name}, "what was used just now may be another host's"
    transport.close()


def test_an_alias_of_the_users_ssh_config_is_enough(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"Host kitchen\n  HostName 127.0.0.1\n  Port {board.port}\n  IdentityFile {board.home / 'key'}\n"
        f"  UserKnownHostsFile {board.home / 'known_hosts'}\n  RemoteCommand echo for people\n  RequestTTY force\n"
    )
    # ssh finds its configuration by the user's entry in the password file, so a test has to name another one
    (tmp_path / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    settings = board.settings(host="kitchen", port=None, identity=None, ssh_options=())
    transport = SshTransport(board.device(ssh=settings), tmp_path)
    transport.start(60).close()
    transport.close()


def test_what_a_login_script_prints_does_no_harm(board: Board) -> None:
    chatty = board.python(f'echo "Welcome to the board! {{}}"; exec {sys.executable} "$@"')
    with open_session(board.device(ssh=board.settings(python=chatty))) as opened:
        assert opened.fingerprint.runtime == "simulated"


def test_nothing_stays_behind(board: Board) -> None:
    with open_session(board.device()) as opened:
        assert opened.fingerprint
        agent, pid = opened._agent, opened.agent_pid
        assert agent is not None
        assert Path(agent.folder).is_dir()
        assert pid is not None
        assert ours(pid)
        socket = opened._transport._socket  # type: ignore[attr-defined]
        assert socket.exists()
    assert not Path(agent.folder).exists()
    assert not socket.exists()
    for _ in range(200):
        if not ours(pid):
            return
        time.sleep(0.02)
    pytest.fail("the agent is still there")


def test_a_long_folder_does_not_break_the_socket(board: Board, tmp_path: Path) -> None:
    transport = SshTransport(board.device(), tmp_path / ("x" * 90))
    assert len(str(transport._socket)) < 90
    transport.start(60).close()
    transport.close()
    assert not transport._socket.parent.exists()


def test_it_is_for_boards_only() -> None:
    with pytest.raises(InputError, match="not 'ssh'"):
        SshTransport(Device("d", "simulated"), Path("."))
