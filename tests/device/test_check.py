"""`device check` on simulated devices, and its file."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from hwsearch.device.check import DeviceCheck, check_device
from hwsearch.device.spec import Device
from hwsearch.errors import InputError, SchemaError


@pytest.fixture(scope="module")
def checked() -> DeviceCheck:
    return check_device(Device("simulated", "simulated"), seconds=2.0, save=False)


def test_a_quiet_device_is_ok_and_its_noise_floor_is_small(checked: DeviceCheck) -> None:
    assert checked.ok
    assert checked.messages == ()
    assert 0 < checked.noise_floor < 0.05 < checked.raw_noise_floor
    assert checked.best_ms < checked.reference_ms
    assert checked.fingerprint.runtime == "simulated"
    assert (checked.busy, checked.stolen) == (None, None)


def test_a_noisy_device_is_called_so(home: Path) -> None:
    noisy = check_device(Device("simulated", "simulated", options={"noise": 0.9}), seconds=1.0, passes=2)
    assert noisy.verdict == "noisy"
    assert "differs by" in noisy.messages[0]
    assert DeviceCheck.load(home.resolve() / "latency_tables" / "simulated") == noisy


def test_the_check_is_saved_beside_the_devices_table_and_the_same_each_time(home: Path) -> None:
    told: list[str] = []
    result = check_device("simulated", seconds=0.2, message=told.append)
    folder = Device.load("simulated").table_folder
    first = (folder / "device.json").read_bytes()
    assert DeviceCheck.load(folder) == result
    assert any("canary" in line for line in told)
    assert any("pass 3 of 3" in line for line in told)
    check_device("simulated", seconds=0.2)
    assert (folder / "device.json").read_bytes() == first
    assert [path.name for path in folder.iterdir()] == ["device.json"]


def test_a_missing_check_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run `hwsearch device check mine` first"):
        DeviceCheck.load(tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "no device check"),
        ({"version": 2}, "version 2"),
        ({"reference_ms": 0}, "reference_ms is 0"),
        ({"reference_ms": "fast"}, "reference_ms is 'fast'"),
        ({"noise_floor": math.nan}, "noise_floor is nan"),
        ({"extra": 1}, "unknown fields extra"),
        ({"canary": "canary-0"}, "'canary-0'"),
        ({"fingerprint": {}}, "fingerprint"),
    ],
)
def test_a_damaged_check_is_refused(checked: DeviceCheck, tmp_path: Path, change: dict, message: str) -> None:
    path = checked.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change), encoding="utf-8")
    with pytest.raises(SchemaError, match=message) as caught:
        DeviceCheck.load(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_truncated_check_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "device.json").write_text(text, encoding="utf-8")
    with pytest.raises(SchemaError):
        DeviceCheck.load(tmp_path)


def test_an_unwritable_folder_is_named(checked: DeviceCheck, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be written"):
        checked.save(tmp_path / "file" / "folder")
    path = replace(checked, verdict="noisy").save(tmp_path)
    assert stat.S_ISREG(path.stat().st_mode)
    assert not DeviceCheck.load(tmp_path).ok


@pytest.mark.parametrize("change", [{"passes": 1}, {"seconds": math.nan}, {"seconds": -1.0}])
def test_senseless_wishes_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        check_device("simulated", save=False, **change)
