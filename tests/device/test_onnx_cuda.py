"""ONNX Runtime's CUDA provider where there is no GPU: what is refused, and how graphs and profiles of one are read."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from hwsearch.device import onnx_cuda, runtime_onnxruntime
from hwsearch.device.onnx_cuda import CPU, CUDA, Gpu, check_session, gpu_here, node_microseconds, provider_of, providers
from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.errors import DeviceUnavailableError, InputError

sys.path.insert(0, str(Path(__file__).parent))

from device_graphs import Graph, residual

without_provider = pytest.mark.skipif(
    CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has the CUDA provider"
)


def gpu(precision: str = "float32", **options: Any) -> Device:
    return Device("gpu", "onnxruntime", precision=precision, options={"provider": CUDA} | options)


def test_the_default_is_the_cpu_and_others_are_refused() -> None:
    assert provider_of(Device("x", "onnxruntime")) == CPU
    assert provider_of(Device.load("gpu-ort-cuda")) == CUDA
    for device, message in (
        (Device("x", "onnxruntime", options={"provider": "cuda"}), f"known: {CPU}, {CUDA}"),
        (Device("x", "onnxruntime", options={"tf32": 1}), f"options.tf32 is for {CUDA}"),
        (gpu("int8"), "has no precision 'int8'"),
    ):
        with pytest.raises(InputError, match=message):
            providers(device)


@without_provider
def test_without_the_package_the_error_says_what_to_install() -> None:
    with open_session(gpu()) as session, pytest.raises(DeviceUnavailableError) as caught:
        _ = session.fingerprint
    text = str(caught.value)
    assert text.startswith(f"device gpu: onnxruntime {onnxruntime.__version__} has no {CUDA}")
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in text
    assert "\n" not in text
    with open_session(gpu()) as session, pytest.raises(DeviceUnavailableError, match="onnxruntime-gpu"):
        session.optimise([residual()])


def test_without_a_gpu_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu_here.cache_clear()
    with pytest.raises(DeviceUnavailableError, match="no NVIDIA GPU answers here"):
        providers(gpu())


def test_a_gpu_is_what_its_driver_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$4" = 2 ] && echo "NVIDIA Toy 1, 9.0, 570.1"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    gpu_here.cache_clear()
    try:
        assert gpu_here() == Gpu("NVIDIA Toy 1", "9.0", "570.1")
        monkeypatch.setattr(onnx_cuda, "_available", lambda: None)
        assert providers(gpu(tf32=1)) == [(CUDA, {"device_id": "0", "use_tf32": "1"}), CPU]
        found = runtime_onnxruntime.probe(gpu())
        assert found.cpu.startswith("NVIDIA Toy 1 beside ")
        assert found.isa == "compute capability 9.0"
        assert found.runtime_version == f"{onnxruntime.__version__} {CUDA} driver 570.1"
        assert found != runtime_onnxruntime.probe(gpu(tf32=1))
    finally:
        gpu_here.cache_clear()


def test_a_session_that_fell_back_to_the_cpu_is_refused() -> None:
    session = SimpleNamespace(get_providers=lambda: [CPU])
    check_session(Device("x", "onnxruntime"), session)
    with pytest.raises(DeviceUnavailableError, match="could not load its CUDA provider"):
        check_session(gpu(), session)


def node(name: str, us: int, provider: str = CUDA) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": {"op_name": name, "provider": provider}}


def kernel(us: int, parent: str = "") -> dict[str, Any]:
    return {"cat": "Kernel", "name": "sm90_gemm", "dur": us, "args": {"parent_name": f"{parent}_kernel_time"}}


def test_a_node_takes_what_its_kernels_on_the_gpu_take() -> None:
    first = [node("Conv", 900), kernel(10, "Conv"), node("Relu", 800), kernel(5, "Conv"), kernel(3, "Relu")]
    second = [node("Conv", 2), node("Relu", 2), kernel(20, "Conv"), kernel(4, "Relu"), node("Shape", 7, CPU)]
    events = [{"cat": "Session", "name": "run", "dur": 1}, *first, node("Shape", 6, CPU), *second]
    nodes = [event for event in events if event["cat"] == "Node"]
    assert node_microseconds(events, nodes) == [15, 3, 6, 20, 4, 7]
    runs = runtime_onnxruntime._shares(events, 2, 0, CUDA)
    assert [op for op, _ in runs] == ["Conv", "Relu", "Shape"]
    assert sum(share for _, share in runs) == pytest.approx(1)
    assert runs[0][1] > runs[2][1] > runs[1][1]


def test_a_profile_without_kernels_of_the_gpu_is_refused() -> None:
    events = [node("Conv", 900)]
    with pytest.raises(DeviceUnavailableError, match="built without CUDA profiling"):
        node_microseconds(events, events)


def test_what_is_left_on_the_cpu_has_no_price_of_the_gpu() -> None:
    graph = Graph(1, 32, 8, 8)
    graph.conv("input", "conv", (32, 8))
    graph.node("MemcpyToHost", "conv", "here")
    graph.node("Selu", "here", "odd")
    graph.node("Flatten", "odd", "flat")
    graph.node("Relu", "flat", "also")
    graph.node("MemcpyFromHost", "also", "there")
    graph.node("Relu", "there", "output")
    kernels = runtime_onnxruntime.parse(graph.bytes())
    families = {kernel.op: kernel.family for kernel in kernels[:-1]}
    assert families == {
        "Conv": "conv", "MemcpyToHost": "other", "Selu": "other", "Flatten": "free", "Relu": "other",
        "MemcpyFromHost": "other",
    }  # fmt: skip
    assert kernels[-1].family == "elementwise"
    assert kernels[-1].out_channels == 8 * 8 * 8
