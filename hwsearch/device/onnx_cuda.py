"""ONNX Runtime's CUDA provider: what an ``onnxruntime`` device adds where it computes on an NVIDIA GPU.

A device asks for it by ``options.provider = "CUDAExecutionProvider"``. Inputs and outputs lie in the GPU's memory, so
no copy is timed; a run is over when the GPU has done it, so the host's clock tells its time, launches included. TF32 is
off unless ``options.tf32 = 1`` (left alone, ONNX Runtime rounds float32 products to ten bits on recent GPUs). Which of
cuDNN's algorithms a convolution takes is found out when it first runs, as ONNX Runtime does by default.

Shares are those of the GPU's own kernels, as CUPTI reports them through the profiler, joined with the node that
launched them: the host's time of a node is that of its launch. A node that ONNX Runtime leaves on the CPU has the
host's time, and its kernel the family ``other``: what is learnt on one side says nothing about the other
(``onnx_operators``).

Limits: no CUDA graphs, float32 only. All of this was written by the documentation and the sources of ONNX Runtime; what
needs a GPU has not run, ``tools/gpu_check`` runs it. Tested is what can be without one: the errors, the reading of
graphs with copies, and the joining of a profile.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import cache
from typing import Any

from hwsearch.device.spec import Device
from hwsearch.errors import DeviceUnavailableError, InputError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@dataclass(frozen=True)
class Gpu:
    """What the driver says about the GPU."""

    name: str
    capability: str
    driver: str


def provider_of(device: Device) -> str:
    """The provider that a device asks for, by default the CPU's.

    Raises:
        InputError: there is no such provider here, or other settings do not go with it.
    """
    provider = str(device.options.get("provider", CPU))
    if provider not in (CPU, CUDA):
        raise InputError(f"device {device.name}: options.provider is {provider!r}; known: {CPU}, {CUDA}")
    if provider == CPU and "tf32" in device.options:
        raise InputError(f"device {device.name}: options.tf32 is for {CUDA}; leave it out")
    if provider == CUDA and device.precision != "float32":
        raise InputError(f"device {device.name}: {CUDA} has no precision {device.precision!r} here; use float32")
    return provider


def providers(device: Device) -> list[Any]:
    """What a session is asked for, in ONNX Runtime's form.

    Raises:
        DeviceUnavailableError: this ONNX Runtime has no such provider, or there is no GPU.
    """
    if provider_of(device) == CPU:
        return [CPU]
    _available()
    gpu_here()
    return [(CUDA, {"device_id": "0", "use_tf32": str(int(device.option("tf32", 0)))}), CPU]


def check_session(device: Device, session: Any) -> None:
    """That a session is where it should be: ONNX Runtime takes the CPU, with a warning, where a library is missing.

    Raises:
        DeviceUnavailableError: it is on the CPU.
    """
    if provider_of(device) not in session.get_providers():
        raise DeviceUnavailableError(
            "ONNX Runtime could not load its CUDA provider: it needs CUDA and cuDNN of its own version "
            "(pip install 'onnxruntime-gpu[cuda,cudnn]')"
        )


def place_of(device: Device) -> str:
    """Where inputs and outputs lie, by ONNX Runtime's name of that memory."""
    return "cuda" if provider_of(device) == CUDA else "cpu"


@cache
def gpu_here() -> Gpu:
    """The first GPU that this process may use.

    Raises:
        DeviceUnavailableError: there is none, or no driver.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run([*command, "-i", visible or "0"], capture_output=True, text=True, timeout=30, check=False)
        name, capability, driver = (field.strip() for field in done.stdout.strip().split(","))
    except (OSError, subprocess.TimeoutExpired, ValueError):
        raise DeviceUnavailableError(
            "no NVIDIA GPU answers here (nvidia-smi names none): its driver is missing, or this is another machine"
        ) from None
    return Gpu(name, capability, driver)


def node_microseconds(events: list[dict[str, Any]], nodes: list[dict[str, Any]]) -> list[float]:
    """What each node's event stands for: the sum of the GPU's kernels that it launched, or the host's time on the CPU.

    Args:
        events: all of a profile, in its order.
        nodes: those of them that tell a node's run.

    Raises:
        DeviceUnavailableError: there is no kernel of the GPU among them.
    """
    place = {id(event): index for index, event in enumerate(nodes)}
    times = [0.0] * len(nodes)
    launched_by: dict[str, int] = {}  # the latest run of each node: a run is over before the next one begins
    latest, kernels = -1, 0
    for event in events:
        if id(event) in place:
            latest = place[id(event)]
            launched_by[event["name"]] = latest
        elif event.get("cat") == "Kernel" and latest >= 0:
            kernels += 1
            parent = str(event.get("args", {}).get("parent_name", ""))
            times[launched_by.get(parent, latest)] += float(event["dur"])
    if not kernels:
        raise DeviceUnavailableError(
            "this ONNX Runtime does not report the GPU's kernels (it was built without CUDA profiling), so nodes "
            "cannot be told apart: take a package that does, or the runtime tensorrt"
        )
    on_cpu = [event.get("args", {}).get("provider") == CPU for event in nodes]
    return [float(event["dur"]) if cpu else time for event, cpu, time in zip(nodes, on_cpu, times, strict=True)]


def _available() -> None:
    """That the installed package has the provider at all; the libraries that it needs are loaded.

    Raises:
        DeviceUnavailableError: it has not.
    """
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        raise DeviceUnavailableError(
            f"onnxruntime {onnxruntime.__version__} has no {CUDA}: pip uninstall onnxruntime, then pip install "
            "'onnxruntime-gpu[cuda,cudnn]' (the two packages share one module)"
        )
    _preload()


@cache
def _preload() -> None:
    """CUDA and cuDNN where pip puts them, which the system's linker does not know."""
    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        preload()
