"""Verification on the simulated device (instant, real outputs), and once on this machine's ONNX Runtime."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hwsearch.deploy.bundle import Bundle, deploy
from hwsearch.deploy.verify import verify
from hwsearch.device.check import DeviceCheck, check_device
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.device.stopwatch import PROFILE
from hwsearch.errors import DeviceJobError, InputError, NoisyDeviceError, SchemaError

torch.set_num_threads(1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


def make(folder: Path, device: Device, budget_ms: float | None, **other: float) -> Bundle:
    torch.manual_seed(1)
    return deploy(network(), torch.randn(1, 1, 16, 16), device, folder, budget_ms=budget_ms, **other)  # type: ignore[arg-type]


@pytest.fixture
def device(home: Path) -> Device:
    """The simulated device, checked."""
    device = Device.load("simulated")
    check_device(device, seconds=0.2, passes=2)
    return device


@pytest.fixture
def session(device: Device) -> DeviceSession:  # type: ignore[misc]
    with open_session(device) as opened:
        yield opened


def test_the_verdict_follows_the_budget(device: Device, session: DeviceSession, tmp_path: Path) -> None:
    loose = verify(make(tmp_path / "loose", device, 1000.0, predicted_ms=0.1), device, session=session)
    assert (loose.status, loose.reasons, loose.notes, loose.exit_code) == ("pass", (), (), 0)
    assert loose.predicted_ms == 0.1
    assert loose.numerics.ok
    assert loose.numerics.max_relative_error < 1e-5
    assert loose.measured_ms is not None
    assert loose.raw_p50_ms is not None
    assert loose.noise_floor == DeviceCheck.load(device.table_folder).noise_floor

    exact = verify(make(tmp_path / "exact", device, loose.measured_ms), device, session=session)
    assert exact.measured_ms == loose.measured_ms  # the simulated device answers alike to alike
    assert exact.status in ("pass", "conditional")

    tight = verify(make(tmp_path / "tight", device, loose.measured_ms * 0.9), device, session=session)
    assert (tight.status, tight.exit_code) == ("fail", 1)
    assert "is above the budget" in tight.reasons[0]

    none = verify(make(tmp_path / "none", device, None), device, session=session)
    assert none.status == "pass"
    assert none.measured_ms == loose.measured_ms
    assert "no budget" in none.notes[0]


def test_it_opens_its_own_session_and_takes_names(device: Device, tmp_path: Path) -> None:
    make(tmp_path / "bundle", device, 1000.0)
    verdict = verify(str(tmp_path / "bundle"), "simulated", settings=PROFILE)
    assert verdict.status == "pass"
    assert verdict.device == "simulated"


def test_a_network_that_computes_something_else_fails(device: Device, session: DeviceSession, tmp_path: Path) -> None:
    """Weights are changed and every hash is mended: only running it can tell."""
    import onnx
    from onnx import numpy_helper

    bundle = make(tmp_path / "bundle", device, 1000.0)
    model = onnx.load_from_string(bundle.model)
    for tensor in model.graph.initializer:
        if tensor.name == "0.weight":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.01, tensor.name))
    content = model.SerializeToString()
    assert content != bundle.model
    (bundle.folder / "model.onnx").write_bytes(content)
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle.folder / "manifest.json").write_text(json.dumps(manifest))
    verdict = verify(bundle, device, session=session)
    assert verdict.status == "fail"
    assert not verdict.numerics.ok
    assert "differ from the golden ones" in verdict.reasons[0]


def test_a_model_the_runtime_rejects(device: Device, session: DeviceSession, tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle", device, 1000.0)
    content = bundle.model.replace(b"Conv", b"Cond")
    (bundle.folder / "model.onnx").write_bytes(content)
    text = (bundle.folder / "manifest.json").read_text()
    (bundle.folder / "manifest.json").write_text(
        text.replace(bundle.sha256["model.onnx"], hashlib.sha256(content).hexdigest())
    )
    with pytest.raises(DeviceJobError):
        verify(bundle, device, session=session)


def test_an_output_by_another_name(device: Device, session: DeviceSession, tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle", device, 1000.0)
    text = (bundle.folder / "manifest.json").read_text()
    (bundle.folder / "manifest.json").write_text(text.replace('"output_name": "output"', '"output_name": "logits"'))
    with pytest.raises(SchemaError, match="has outputs output, the manifest says 'logits'"):
        verify(bundle, device, session=session)


def test_a_bundle_in_memory_is_read_anew(device: Device, session: DeviceSession, tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle", device, 1000.0)
    (bundle.folder / "model.onnx").write_bytes(b"x" * len(bundle.model))
    with pytest.raises(SchemaError, match="SHA-256"):
        verify(bundle, device, session=session)


def test_a_device_that_was_never_checked(device: Device, session: DeviceSession, tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle", device, 1000.0)
    (device.table_folder / "device.json").unlink()
    verdict = verify(bundle, device, session=session)  # the bundle remembers the reference of this very device
    assert verdict.notes == ("reference speed and noise floor are the bundle's own",)

    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    manifest["fingerprint"]["runtime_version"] = "0"
    (bundle.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"not the device .*runtime_version: 0 against .*run `hwsearch device check"):
        verify(bundle, device, session=session)

    unchecked = make(tmp_path / "unchecked", device, 1000.0)
    with pytest.raises(InputError, match="device simulated has not been checked"):
        verify(unchecked, device, session=session)


def test_another_device_is_noted(device: Device, session: DeviceSession, tmp_path: Path) -> None:
    other = Device(name="elsewhere", runtime="simulated", home=tmp_path)
    verdict = verify(make(tmp_path / "bundle", other, 1000.0), device, session=session)
    assert verdict.notes == ("the bundle was made for elsewhere, it was verified on simulated",)


@pytest.mark.real
@pytest.mark.serial
def test_on_this_machine(home: Path) -> None:
    """Numbers of a busy machine prove nothing, so only what does not depend on time is asserted."""
    device = Device.load("x86-ort-1t")
    try:
        check_device(device, seconds=0.5, passes=2)
        verdict = verify(make(home / "bundle", device, 1000.0), device, settings=PROFILE)
    except NoisyDeviceError:
        pytest.skip("this machine is too busy to be measured")
    assert verdict.numerics.ok
    assert verdict.numerics.max_relative_error < 1e-5
    assert verdict.status == "pass"
