"""`device check` on simulated devices, and its file."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from hwsearch.device.check import DeviceCheck, _Load, _verdict, check_device
from hwsearch.device.machine import Machine
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.errors import InputError, SchemaError


@pytest.fixture(scope="module")
def checked() -> DeviceCheck:
    return check_device(Device("simulated", "simulated"), seconds=2.0, save=False)


def test_a_quiet_device_is_ok_and_its_noise_floor_is_small(checked: DeviceCheck) -> None:
    assert checked.ok
    assert len(checked.messages) == 1
    assert checked.messages[0].startswith("the canary scatters by"), "a fourth of the time it is disturbed"
    assert 0 < checked.noise_floor < 0.05
    assert checked.noise_floor < checked.raw_noise_floor
    assert checked.reference_ms < checked.typical_ms
    assert 0 < checked.disturbed < 1
    assert checked.coarse == 0
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
        ({"version": 1}, "version 1"),
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


def test_a_check_of_before_is_read(checked: DeviceCheck, tmp_path: Path) -> None:
    path = checked.save(tmp_path)
    data = json.loads(path.read_text())
    for name in ("threads", "cores", "usable_cores", "turbo", "contention"):
        del data[name]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert DeviceCheck.load(tmp_path) == checked


FINGERPRINT = Fingerprint("cpu", "avx2", "onnxruntime", "1.31.1", 1, "float32", "Linux", "performance")
BOX = Machine(cores=4, usable=4.0)


def judged(load: _Load, *, noise: float = 0.02, spread: float = 0.05, governor: str = "performance") -> tuple:
    noisy, messages = _verdict(noise, 0.0, spread, load, replace(FINGERPRINT, governor=governor), [])
    return noisy, " | ".join(messages)


def test_a_quiet_machine_has_nothing_to_say() -> None:
    assert judged(_Load(0.05, 0.0, 1, BOX)) == (False, "")
    assert judged(_Load(None, None, 1, None)) == (False, "")


@pytest.mark.parametrize(
    ("load", "noisy", "words"),
    [
        (_Load(1.5, 0.0, 1, BOX), False, "other processes keep 1.5 of 4 cores busy"),
        (_Load(3.6, 0.0, 1, BOX), True, "other processes keep 3.6 of 4 cores busy"),
        (_Load(0.0, 0.1, 1, BOX), False, "the hypervisor takes 0.10 cores away"),
        (_Load(0.0, 0.0, 8, BOX), True, "8 threads on 4 cores"),
        (_Load(0.0, 0.0, 2, Machine(4, 1.5, quota=1.5)), True, "2 threads on a quota of 1.5 cores"),
        (_Load(0.0, 0.0, 2, Machine(4, 2.0, quota=2.0)), False, "the system may pause them"),
        (_Load(0.0, 0.0, 4, Machine(4, 2.0)), True, "4 threads on 2 cores"),
        (_Load(0.0, 0.0, 1, Machine(4, 4.0, turbo="on")), False, "turbo is on"),
    ],
)
def test_who_else_wants_the_cores(load: _Load, noisy: bool, words: str) -> None:
    found = judged(load)
    assert found[0] is noisy
    assert words in found[1]


def test_remarks_and_reasons() -> None:
    quiet = _Load(0.0, 0.0, 1, BOX)
    assert judged(quiet, governor="powersave") == (
        False, "the frequency governor is 'powersave'; 'performance' is steadier",
    )  # fmt: skip
    assert judged(quiet, spread=0.4)[1].startswith("the canary scatters by 40%")
    assert judged(quiet, noise=0.2)[0]


@pytest.mark.parametrize(
    ("load", "share"),
    [
        (_Load(0.0, 0.0, 1, BOX), 0.0),
        (_Load(3.5, 0.0, 1, BOX), 0.5),
        (_Load(4.0, 0.0, 2, BOX), 1.0),
        (_Load(2.0, 0.2, 1, BOX), 0.2),
        (_Load(None, None, 1, BOX), None),
    ],
)
def test_contention_is_the_share_of_the_timed_cores_that_others_take(load: _Load, share: float | None) -> None:
    assert load.contention == (None if share is None else pytest.approx(share))
