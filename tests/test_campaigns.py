"""Several devices profiled by one command: a worker each, never two on one machine, and a failure costs one device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hwsearch import campaigns
from hwsearch.campaigns import FILES, Campaign, Profiled, profile_all, profile_one
from hwsearch.cli import app
from hwsearch.console import Console
from hwsearch.device.spec import Device
from hwsearch.device.ssh_settings import SshSettings
from hwsearch.errors import InputError


@pytest.fixture
def two(home: Path) -> Path:
    """A home with a second pretended device."""
    text = (home / "devices/simulated.toml").read_text()
    (home / "devices/other.toml").write_text(text.replace("gbytes = 10.0", "gbytes = 4.0"))
    return home


@pytest.mark.slow
def test_two_devices_get_the_tables_that_each_gets_alone(two: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hwsearch", "profile", "-d", "simulated", "-d", "other", "--minutes", "0.02"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["devices"]
    assert [one["device"] for one in found] == ["simulated", "other"]
    assert all(one["networks"] > 5 for one in found)
    assert "[simulated] " in done.stderr
    assert "[other] " in done.stderr
    alone = Device("other", "simulated", options=Device.load("other").options, home=tmp_path / "alone")
    profile_one(alone, Campaign(minutes=0.02), Console(json=True))
    for name in FILES:
        assert (two / "latency_tables/other" / name).read_bytes() == (alone.table_folder / name).read_bytes()


def test_machines_work_side_by_side_and_each_on_one_device_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def board(name: str, host: str) -> Device:
        return Device(name, "onnxruntime", transport="ssh", ssh=SshSettings(host))

    devices = [
        board("b1", "pi"),
        Device("l1", "simulated"),
        board("b2", "pi"),
        board("c1", "jetson"),
        Device("l2", "simulated"),
    ]
    log: list[tuple[str, str]] = []
    both_boards = threading.Barrier(2, timeout=20)

    def pretend(device: Device, campaign: Campaign, tell: campaigns.Say) -> Profiled:
        log.append(("begins", device.name))
        if device.name in ("b1", "c1"):
            both_boards.wait()  # passes only where the two are at work together
        tell("done")
        log.append(("ends", device.name))
        return Profiled(device.name, "", networks=1)

    monkeypatch.setattr(campaigns, "_in_process", pretend)
    said: list[str] = []
    found = profile_all(devices, Campaign(), said.append)
    assert [one.device for one in found] == [device.name for device in devices]
    assert log[:4] == [("begins", "l1"), ("ends", "l1"), ("begins", "l2"), ("ends", "l2")]
    assert log.index(("begins", "b2")) > log.index(("ends", "b1"))
    assert sorted(said) == [f"[{name}] done" for name in ("b1", "b2", "c1", "l1", "l2")]


def test_a_device_that_fails_costs_itself_only(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(device: Device, campaign: Campaign, tell: campaigns.Say) -> Profiled:
        if device.name == "simulated":
            raise InputError("it is on fire: put it out")
        return Profiled(device.name, "there", networks=3)

    monkeypatch.setattr(campaigns, "_in_process", pretend)
    done = CliRunner().invoke(app, ["profile", "-d", "simulated", "-d", "other", "--json"])
    assert done.exit_code == 2
    first, second = json.loads(done.stdout)["devices"]
    assert (first["error"], first["status"]) == ("it is on fire: put it out", 2)
    assert second["networks"] == 3
    shown = CliRunner().invoke(app, ["profile", "-d", "simulated", "-d", "other"])
    assert "Not profiled: simulated" in shown.stdout
    assert "Profiled other" in shown.stdout


def test_a_device_named_twice_is_refused() -> None:
    with pytest.raises(InputError, match="'a' is named 2 times"):
        profile_all([Device("a", "simulated"), Device("a", "simulated")], Campaign(), print)


def test_an_error_of_the_worker_comes_home(tmp_path: Path) -> None:
    campaign = Campaign(models=("no_such_package:model",))
    (found,) = profile_all([Device("a", "simulated", home=tmp_path)], campaign, lambda text: None)
    assert "no_such_package" in found.error
    assert found.status == 2


def test_a_worker_ends_with_whoever_asked(tmp_path: Path) -> None:
    """Killed as ``kill -9`` does, the command leaves no worker behind that would go on timing."""
    code = (
        "from pathlib import Path; from hwsearch.campaigns import Campaign, profile_all\n"
        "from hwsearch.device.spec import Device; import sys\n"
        "profile_all([Device('a', 'simulated', home=Path(sys.argv[1]))], Campaign(minutes=500), print)\n"
    )
    asking = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    journal = tmp_path / "latency_tables/a/journal.sqlite"
    wait_for(journal.exists)
    (worker,) = children(asking.pid)
    os.kill(asking.pid, signal.SIGKILL)
    asking.wait()
    wait_for(lambda: not Path(f"/proc/{worker}").exists())


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(condition: object) -> None:
    end = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
