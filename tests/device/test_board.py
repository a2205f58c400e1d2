"""What of a board can be tried without one: its settings, the files it needs, and an agent that guards its machine."""

from __future__ import annotations

import ast
import fcntl
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hwsearch.device import agent, courier, lock, runtime_simulated
from hwsearch.device.canary import canary_bytes
from hwsearch.device.payload import payload
from hwsearch.device.spec import RUNTIMES, Device
from hwsearch.device.ssh_settings import SshSettings
from hwsearch.errors import InputError

BOARD = """
runtime = "simulated"
threads = 2
transport = "ssh"
host = "pi@rpi5"
port = 2222
identity = "~/.ssh/board"
ssh_options = ["ProxyJump=gate", "compression=yes"]
python = "~/venv/bin/python"
folder = "/mnt/disk/hwsearch"
patience_s = 60
"""


def write(home: Path, text: str) -> Path:
    path = home / "devices" / "mine.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_board_is_a_device_file(tmp_path: Path) -> None:
    device = Device.load(write(tmp_path, BOARD))
    options = ("ProxyJump=gate", "compression=yes")
    assert device.ssh == SshSettings(
        "pi@rpi5", 2222, "~/.ssh/board", options, "~/venv/bin/python", "/mnt/disk/hwsearch", 60
    )
    assert Device.from_dict(device.to_dict()) == device
    assert hash(device) == hash(Device.from_dict(device.to_dict()))
    (tmp_path / "other").mkdir()
    again = Device("mine", "simulated", threads=2, transport="ssh", ssh=device.ssh, home=tmp_path / "other")
    assert Device.load(again.save()) == device
    short = Device.load(write(tmp_path, 'runtime = "simulated"\ntransport = "ssh"\nhost = "kitchen"'))
    assert short.ssh == SshSettings("kitchen")
    assert short.to_dict()["host"] == "kitchen"
    assert "folder" not in short.to_dict()
    beside = device.where_it_is()
    assert (beside.transport, beside.ssh, beside.threads) == ("local", None, 2)
    assert beside.where_it_is() is beside


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('transport = "ssh"', "belong together"),
        ('host = "pi@rpi5"', "belong together"),
        ('transport = "ssh"\npython = "python3"', "host is ''"),
        ('transport = "ssh"\nhost = "-oProxyCommand=touch x"', "host is '-oProxy"),
        ('transport = "ssh"\nhost = "a b"', "host is 'a b'"),
        ('transport = "ssh"\nhost = "x"\npython = "python3; touch x"', "python is 'python3; touch x'"),
        ('transport = "ssh"\nhost = "x"\npython = "A=1"', "python is 'A=1'"),
        ('transport = "ssh"\nhost = "x"\nfolder = "$(touch x)"', r"folder is '\$"),
        ('transport = "ssh"\nhost = "x"\nidentity = "-x"', "identity is '-x'"),
        ('transport = "ssh"\nhost = "x"\nport = 0', "port: .*greater than or equal to 1"),
        ('transport = "ssh"\nhost = "x"\npatience_s = -1', "patience_s: "),
        ('transport = "ssh"\nhost = "x"\nssh_options = ["ProxyCommand=touch x"]', "'ProxyCommand=touch x' is refused"),
        ('transport = "ssh"\nhost = "x"\nssh_options = ["LocalCommand=x"]', r"belongs into ~/\.ssh/config"),
        ('transport = "ssh"\nhost = "x"\nssh_options = ["ProxyJump=$(touch x)"]', "is refused"),
        ('transport = "ssh"\nhost = "x"\nssh_options = ["Compression"]', "is refused"),
        ('transport = "ssh"\nhost = "x"\npassword = "secret"', "password: Extra inputs are not permitted"),
        ('transport = "ssh"\nhost = ["x"]', "host: "),
    ],
)
def test_a_file_can_run_nothing_here_and_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, f'runtime = "simulated"\n{text}')
    with pytest.raises(InputError, match=message) as caught:
        Device.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{"port": True}, {"port": 70000}, {"patience_s": float("nan")}, {"identity": ""}])
def test_settings_made_in_code_are_checked_too(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        SshSettings("host", **values)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_board_gets_what_its_agent_imports_and_no_more(runtime: str) -> None:
    files = payload(runtime).files
    assert f"hwsearch/device/runtime_{runtime}.py" in files
    assert {"hwsearch/__init__.py", "hwsearch/device/__init__.py", "hwsearch/device/lock.py"} <= set(files)
    assert all(name.split("/")[1] in ("__init__.py", "errors.py", "device", "graph") for name in files)
    assert not {"hwsearch/device/session.py", "hwsearch/device/ssh.py", "hwsearch/device/check.py"} & set(files)
    assert sum(map(len, files.values())) < 200_000
    assert payload(runtime).name != payload(RUNTIMES[RUNTIMES.index(runtime) - 1]).name


def test_somebody_elses_runtime_travels_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hwsearch_runtime_mine.py").write_text("from hwsearch.device import canary\n")
    (tmp_path / "hwsearch_runtime_more").mkdir()
    for name in ("__init__.py", "inner.py"):
        (tmp_path / "hwsearch_runtime_more" / name).write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"hwsearch_runtime_mine.py", "hwsearch/device/canary.py"} <= set(payload("mine").files)
    assert "hwsearch_runtime_more/inner.py" in payload("more").files
    with pytest.raises(InputError, match="no runtime 'nobodys'"):
        payload("nobodys")


def test_the_courier_reads_as_python_of_long_ago() -> None:
    """What says that a board's Python is too old must itself be read by it."""
    ast.parse(Path(courier.__file__).read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.parametrize("name", sorted(payload("onnxruntime").files))
def test_the_agents_files_read_as_the_oldest_python_that_is_told(name: str) -> None:
    ast.parse(payload("onnxruntime").files[name], feature_version=(3, 10))


@pytest.fixture
def canary(tmp_path: Path) -> str:
    (tmp_path / "canary").write_bytes(canary_bytes())
    return str(tmp_path / "canary")


def test_one_timing_at_a_time_on_a_board(tmp_path: Path, canary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real path of a real device, but for its runtime: nothing may be timed here."""
    monkeypatch.setattr(lock, "FOLDER", tmp_path)
    monkeypatch.setattr(agent, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(agent, "runtime_of", lambda device: runtime_simulated)
    device, request = Device("d", "onnxruntime"), {"canary": canary, "seconds": 0.01}
    told: list[tuple[str, dict[str, Any]]] = []

    def work(jobs: agent.Jobs, device: Device) -> threading.Thread:
        thread = threading.Thread(target=jobs.calibrate, args=(device, request), daemon=True)
        thread.start()
        return thread

    def answer(event: str, **fields: Any) -> None:
        told.append((event, fields))

    with (tmp_path / "hwsearch-timing.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # somebody else times something there
        for jobs, mine in ((agent.Jobs(answer), device), (agent.Jobs(answer, board=True), Device("d", "simulated"))):
            work(jobs, mine).join(timeout=60)  # beside its host, or simulated: not the agent's to wait
            assert told.pop()[0] == "done"
            assert not told
        waiting = work(agent.Jobs(answer, board=True), device)
        for _ in range(500):
            if len(told) > 2:
                break
            time.sleep(0.01)
        assert {event for event, _ in told} == {"waiting", "alive"}
        assert "waiting for another timing" in next(fields["message"] for event, fields in told if event == "waiting")
        assert waiting.is_alive()
    waiting.join(timeout=60)
    assert told[-1][0] == "done"


def test_without_room_no_network_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").write_bytes(b"no onnx")
    told: list[str] = []
    request = {"networks": [{"name": "broken", "path": str(tmp_path / "broken")}], "folder": str(tmp_path)}
    jobs = agent.Jobs(lambda event, **fields: told.append(event))
    jobs.optimise(Device("d", "simulated"), request)
    assert told == ["failed", "done"]
    monkeypatch.setattr(agent, "ROOM_BYTES", 1 << 60)
    with pytest.raises(OSError, match="No space left") as caught:
        jobs.optimise(Device("d", "simulated"), request)
    assert agent._no_room(caught.value) == (
        f"the device cannot write {tmp_path} (the disk is full): make room there, then go on"
    )


def test_the_agent_of_a_board_removes_its_folder_when_told_to_leave(tmp_path: Path) -> None:
    import json
    import subprocess

    repository = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "hwsearch.device.agent", "--board", "token"]
    for leaves in (True, False):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(repository)},
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["pid"] == process.pid
        assert Path(ready["folder"]).is_dir()
        if leaves:
            process.stdin.write('{"job": "leave"}\n')
        process.stdin.close()
        assert process.wait(timeout=20) == 0
        assert Path(ready["folder"]).exists() != leaves, "a broken link must not cost what is finished"
        if not leaves:
            (Path(ready["folder"]) / "alive").unlink()
            Path(ready["folder"]).rmdir()
