"""Device files: what is found where, and what a wrong one says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hwsearch.device.spec import Device, Fingerprint
from hwsearch.errors import InputError, SchemaError

FINGERPRINT = Fingerprint("cpu", "avx2", "onnxruntime", "1.31.1", 1, "float32", "Linux x86_64", "unknown")


def write(home: Path, text: str, name: str = "mine") -> Path:
    path = home / "devices" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_devices_of_the_repository_load() -> None:
    for name in ("x86-ort-1t", "x86-ort-2t", "simulated"):
        device = Device.load(name)
        assert device.name == name
        assert name in Device.names()
        assert device.table_folder.parts[-2:] == ("latency_tables", name)
    assert Device.load("x86-ort-2t").threads == 2
    assert Device.load("simulated").simulated
    assert not Device.load("x86-ort-1t").simulated


def test_the_home_of_the_environment_comes_first_and_owns_the_tables(home: Path) -> None:
    write(home, 'runtime = "simulated"\nthreads = 3\n', name="simulated")
    device = Device.load("simulated")
    assert device.threads == 3
    assert device.table_folder == home.resolve() / "latency_tables" / "simulated"


def test_a_path_is_a_device_too(tmp_path: Path) -> None:
    inside = write(tmp_path, 'runtime = "simulated"\n')
    assert Device.load(inside).table_folder == tmp_path.resolve() / "latency_tables" / "mine"
    outside = tmp_path / "other.toml"
    outside.write_text('runtime = "simulated"\n', encoding="utf-8")
    assert Device.load(str(outside)).home == tmp_path.resolve()


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown device 'tpu'; known devices: .*simulated.*x86-ort-1t"):
        Device.load("tpu")
    with pytest.raises(InputError, match="does not exist"):
        Device.load("nowhere/tpu.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runtime = ", r"mine.toml: is not valid TOML"),
        ("", r"mine.toml: runtime: Field required"),
        (
            'runtime = "tensorflow"',
            r"mine.toml: device mine: runtime 'tensorflow' is not one of onnxruntime, .*no module "
            "hwsearch_runtime_tensorflow is installed",
        ),
        ('runtime = "simulated"\nthreads = 0', r"mine.toml: threads: .*greater than or equal to 1 \(found 0\)"),
        ('runtime = "simulated"\nthreads = "two"', r"mine.toml: threads: .*valid integer \(found 'two'\)"),
        ('runtime = "simulated"\nprecision = "int3"', r"mine.toml: precision: "),
        ('runtime = "simulated"\nthreds = 1', r"mine.toml: threds: Extra inputs are not permitted"),
        ('runtime = "simulated"\n[options]\nnoise = [1]', r"mine.toml: options.noise: "),
        ('runtime = "simulated"\n[options]\nnoise = true', r"mine.toml: options.noise: "),
    ],
)
def test_a_wrong_file_names_itself_and_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        Device.load(path)
    assert "\n" not in str(caught.value).removeprefix(str(path))
    assert caught.value.exit_code == 2


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        Device.load(path)


@pytest.mark.parametrize("name", ["", "../up", "a b", "x" * 65, ".hidden"])
def test_a_name_is_a_file_name_and_no_path(name: str) -> None:
    with pytest.raises(InputError, match="device name"):
        Device(name=name, runtime="simulated")


@pytest.mark.parametrize(
    "fields", [{"runtime": "cuda"}, {"precision": "int4"}, {"transport": "pigeon"}, {"threads": 1.5}]
)
def test_a_device_made_in_code_is_checked_too(fields: dict) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        Device(**({"name": "d", "runtime": "simulated"} | fields))


def test_a_numeric_option_must_be_one() -> None:
    device = Device("d", "simulated", options={"noise": 0.5, "word": "x", "endless": float("inf")})
    assert device.option("noise", 0) == 0.5
    assert device.option("absent", 2) == 2.0
    for name in ("word", "endless"):
        with pytest.raises(InputError, match=f"options.{name}"):
            device.option(name, 0)


def test_a_device_travels_as_plain_values_without_its_home() -> None:
    device = Device("d", "simulated", threads=2, options={"noise": 0.5}, home=Path("/somewhere"))
    assert "home" not in device.to_dict()
    assert Device.from_dict(device.to_dict()) == device
    assert hash(device) == hash(Device.from_dict(device.to_dict()))


def test_a_fingerprint_says_what_differs() -> None:
    other = replace(FINGERPRINT, runtime_version="1.30.0", isa="avx512f")
    assert FINGERPRINT.differences(other) == ("isa: avx2 against avx512f", "runtime_version: 1.31.1 against 1.30.0")
    assert FINGERPRINT.differences(FINGERPRINT) == ()
    assert Fingerprint.from_dict(FINGERPRINT.to_dict()) == FINGERPRINT


@pytest.mark.parametrize(
    ("change", "message"),
    [({"threads": "1"}, "threads"), ({"threads": True}, "threads"), ({"cpu": 7}, "cpu"), ({"colour": "red"}, "colour")],
)
def test_a_damaged_fingerprint_names_the_field(change: dict, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        Fingerprint.from_dict(FINGERPRINT.to_dict() | change)
    with pytest.raises(SchemaError, match="list"):
        Fingerprint.from_dict([])  # type: ignore[arg-type]
