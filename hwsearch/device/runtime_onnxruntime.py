"""ONNX Runtime on this CPU, or on an NVIDIA GPU (``onnx_cuda``).

The same names as in every runtime: ``probe, optimise, open_bench, run`` and ``parse``.

Device side: standard library, numpy and onnxruntime. Only :func:`parse`, which runs on the host, needs ``onnx``.

Node times come from ORT's own profiler and are used as shares of the unprofiled time: profiling slows small networks
two or three times, and durations are whole microseconds, cut off (so half a microsecond is added, and a mean over many
runs taken instead of a median). The names that ORT makes up (``ReorderOutput_token_14``) differ from session to
session, so the optimised graph is saved by the very session that is profiled, and nodes are joined by position in it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.device.bench import Bench
from hwsearch.device.machine import governor, instruction_sets, processor
from hwsearch.device.onnx_cuda import (
    CPU,
    check_session,
    gpu_here,
    node_microseconds,
    place_of,
    provider_of,
    providers,
)
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.errors import DeviceJobError, InputError

if TYPE_CHECKING:
    from hwsearch.graph.kernel import Kernel

#: Networks may be interleaved: their times do not depend on each other beyond what the canary tells.
INTERLEAVES = True

_OPTIONS = ("spinning", "provider", "tf32")
_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def probe(device: Device) -> Fingerprint:
    """What this machine is, as far as a latency depends on it.

    Raises:
        DeviceUnavailableError: the device asks for a provider that is not there.
    """
    import onnxruntime

    cpu, flags = processor()
    isa, version = instruction_sets(flags), str(onnxruntime.__version__)
    if provider_of(device) != CPU:
        providers(device)
        gpu = gpu_here()
        # the host launches the kernels: of small networks that is the larger part
        cpu, isa = f"{gpu.name} beside {cpu}", f"compute capability {gpu.capability}"
        version += f" {provider_of(device)} driver {gpu.driver}" + (" tf32" if device.option("tf32", 0) else "")
    return Fingerprint(
        cpu=cpu,
        isa=isa,
        runtime=device.runtime,
        runtime_version=version,
        threads=device.threads,
        precision=device.precision,
        system=f"{platform.system()} {platform.machine()}",
        governor=governor(),
    )


def optimise(device: Device, network: bytes) -> bytes:
    """The graph that ORT would really run, as ONNX with its own operators.

    Raises:
        DeviceJobError: ORT does not load the network; the message is ORT's reason in one line.
    """
    with TemporaryDirectory(dir=scratch()) as folder:
        path = Path(folder) / "optimised.onnx"
        options = _options(device)
        options.optimized_model_filepath = str(path)
        _session(device, network, options)
        return path.read_bytes()


def run(device: Device, network: bytes, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's outputs by name for these inputs.

    Raises:
        DeviceJobError: ORT does not load or run the network, or an input is missing, unknown or of the wrong shape.
    """
    session = _session(device, network, _options(device))
    names = [output.name for output in session.get_outputs()]
    try:
        outputs = dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:
        raise DeviceJobError(one_line(error)) from None
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
            raise DeviceJobError(f"the output {name!r} is no tensor of numbers, and cannot be compared")
    return outputs


def open_bench(device: Device, canary: bytes) -> Bench:
    """A place to time networks on, with its canary loaded."""
    return Bench(partial(Loaded, device), canary)


def parse(optimised: bytes) -> tuple[Kernel, ...]:
    """The kernels of an optimised graph, one per node, in the order of execution (host side).

    Raises:
        DeviceJobError: the bytes are no ONNX graph.
    """
    from hwsearch.device.onnx_kernels import kernels_of

    return kernels_of(optimised)


class Loaded:
    """One session with bound inputs and outputs."""

    def __init__(self, device: Device, network: bytes) -> None:
        import onnxruntime

        self._device, self._network = device, network
        session = _session(device, network, _options(device))
        self._binding, place = session.io_binding(), place_of(device)
        for value in session.get_inputs():
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(example(value), place, 0)
            self._binding.bind_ortvalue_input(value.name, buffer)
        for value in session.get_outputs():
            kind = _TYPES.get(value.type)
            if kind is not None and all(isinstance(size, int) and size > 0 for size in value.shape):
                buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(value.shape, kind), place, 0)
                self._binding.bind_ortvalue_output(value.name, buffer)
            else:
                self._binding.bind_output(value.name, place)
        self._session = session
        try:
            self.run()
        except Exception as error:
            raise DeviceJobError(one_line(error)) from None

    def run(self) -> None:
        """One inference; on a GPU it is over when the GPU is done, which ONNX Runtime waits for."""
        self._session.run_with_iobinding(self._binding)

    def profile(self, runs: int, run_ms: float) -> tuple[list[tuple[str, float]], bytes]:
        """Runs under ORT's profiler.

        Args:
            runs: how often, at most; fewer when a run (of ``run_ms``) is long.

        Returns:
            (operation, share of the time) of each node in execution order, and that very session's optimised graph.
        """
        runs = max(4, min(runs, int(400 / max(run_ms, 1e-3))))
        with TemporaryDirectory(dir=scratch()) as folder:
            path = Path(folder) / "optimised.onnx"
            options = _options(self._device)
            options.optimized_model_filepath = str(path)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = _session(self._device, self._network, options)
            feed = {value.name: example(value) for value in session.get_inputs()}
            warmup = 2  # the first runs pay for the memory
            for _ in range(runs + warmup):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            optimised = path.read_bytes()
        return _shares(events, runs + warmup, warmup, provider_of(self._device)), optimised

    def close(self) -> None:
        """Frees the session."""
        del self._session, self._binding


def _shares(events: list[dict[str, Any]], runs: int, warmup: int, provider: str = CPU) -> list[tuple[str, float]]:
    """Each node's share from the profiler's events of ``runs`` equal runs."""
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    if not nodes or len(nodes) % runs:
        raise DeviceJobError(
            f"the profiler reported {len(nodes)} node events in {runs} runs; the runs differ from each other"
        )
    names = np.array([event["name"] for event in nodes]).reshape(runs, -1)
    if (names != names[0]).any():
        raise DeviceJobError("the profiler reported another order of nodes in each run; use one inter-op thread")
    spent = [event["dur"] for event in nodes] if provider == CPU else node_microseconds(events, nodes)
    times = np.array(spent, dtype=np.float64).reshape(runs, -1)[warmup:] + 0.5
    times.sort(axis=0)
    quarter = len(times) // 4
    means = times[quarter : len(times) - quarter].mean(axis=0)
    shares = means / means.sum()
    return [(str(event["args"]["op_name"]), float(share)) for event, share in zip(nodes, shares, strict=False)]


def example(value: Any) -> np.ndarray:
    """Fixed random numbers for a graph input.

    Raises:
        DeviceJobError: the input has no fixed shape, or a type that is not known here.
    """
    for size in value.shape:
        if not isinstance(size, int) or size < 1:
            raise DeviceJobError(
                f"input {value.name!r} has the open dimension {size!r} in {value.shape}; export with fixed sizes"
            )
    kind = _TYPES.get(value.type)
    if kind is None:
        raise DeviceJobError(f"input {value.name!r} has the type {value.type}; known: {', '.join(_TYPES)}")
    if np.issubdtype(kind, np.floating):
        return np.asarray(np.random.default_rng(0).standard_normal(value.shape), kind)
    return np.asarray(np.zeros(value.shape, kind))


def one_line(error: BaseException) -> str:
    """A runtime's reason without its line breaks, its own prefix and its length."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", " ".join(str(error).split()) or type(error).__name__)
    return text if len(text) <= 300 else text[:297] + "..."


def scratch() -> str | None:
    """A folder in memory for files that live for a moment, or None for the system's temporary folder.

    Containers often have 64 MB there, too little for a large network.
    """
    if not (os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK)):
        return None
    return "/dev/shm" if shutil.disk_usage("/dev/shm").free >= 512 << 20 else None


def _options(device: Device) -> Any:
    import onnxruntime

    for name in device.options:
        if name not in _OPTIONS:
            raise InputError(
                f"device {device.name}: options.{name} is unknown to onnxruntime; known: {', '.join(_OPTIONS)}"
            )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = device.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # failures come as exceptions; the rest would only fill the agent's stderr
    # off by default: a worker that spins on after its session's run steals the core of the next session in a round
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(device.option("spinning", 0))))
    return options


def _session(device: Device, network: bytes, options: Any) -> Any:
    import onnxruntime

    wanted = providers(device)
    try:
        session = onnxruntime.InferenceSession(network, options, providers=wanted)
    except Exception as error:
        raise DeviceJobError(one_line(error)) from None
    check_session(device, session)
    return session
