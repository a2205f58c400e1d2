"""TensorRT on an NVIDIA GPU: versions 10 and 11, and TensorRT for RTX. The same names as in every runtime.

Device side: standard library, numpy, TensorRT, ``cuda-python``, and ``onnx`` (to name the nodes of a network).
:func:`parse`, which runs on the host, needs none of them.

A network is a CUDA graph that is launched and waited for; its time is what CUDA's events around it say, and a bench's
clock is the sum of these, so that what Python does beside it does not count. Shares are those of TensorRT's profiler,
which runs the layers one by one. Kernels come from the engine inspector, reformats included.

Options: ``flavour`` (``tensorrt`` or ``rtx``), ``workspace_mb``, ``dla`` (a core; the GPU does what that cannot),
``tf32`` (0 or 1: float32 products in ten bits), ``level`` (builder optimisation level), ``graph`` (0: no CUDA graph),
``sparse`` (1: kernels that skip the zeros of 2:4 blocks).

Limits: parsing and building are tested, without a GPU, by TensorRT for RTX. What needs a driver (``probe``, ``run``,
the bench, the inspector's words) was written by the documentation and has not run; ``tools/gpu_check`` runs it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.device.spec import Device, Fingerprint
from hwsearch.device.tensorrt_engine import EngineFacts, build_engine, flavour_of, load, pack_engine, unpack_engine
from hwsearch.device.tensorrt_kernels import kernels_of, read_graph, shares_of, write_graph
from hwsearch.device.tensorrt_precision import typed
from hwsearch.errors import DeviceJobError

if TYPE_CHECKING:
    from hwsearch.graph.kernel import Kernel

#: Networks may be interleaved: their times do not depend on each other beyond what the canary tells.
INTERLEAVES = True


def probe(device: Device) -> Fingerprint:
    """What the GPU is, as far as a latency depends on it.

    Raises:
        DeviceJobError: there is no TensorRT, no CUDA for Python, or no GPU.
    """
    facts = facts_of(device)
    cuda = _cuda()
    properties = _ask(cuda.cudaGetDeviceProperties, 0)
    return Fingerprint(
        cpu=properties.name.decode().strip("\0"),
        isa=facts.capabilities[0],
        runtime=device.runtime,
        runtime_version=f"{facts.flavour} {facts.version} cuda {_ask(cuda.cudaDriverGetVersion)}",
        threads=device.threads,
        precision=device.precision,
        system=f"{platform.system()} {platform.machine()}",
        governor="unknown",
    )


def optimise(device: Device, network: bytes) -> bytes:
    """The layers of the engine that TensorRT builds, with the nodes that they came from, as JSON.

    Raises:
        DeviceJobError: TensorRT does not parse or build the network; the message is its reason in one line.
    """
    return _Engine(device, network).graph()


def run(device: Device, network: bytes, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's outputs by name for these inputs.

    Raises:
        DeviceJobError: TensorRT does not build or run the network, or an input is missing, unknown or of a wrong shape.
    """
    loaded = Loaded(device, network)
    wanted = {name: buffer.shape for name, buffer in loaded.inputs.items()}
    if {name: value.shape for name, value in inputs.items()} != wanted:
        raise DeviceJobError(f"the network's inputs are {wanted}; give those")
    for name, value in inputs.items():
        loaded.inputs[name].fill(value)
    loaded.execute()
    return {name: buffer.read() for name, buffer in loaded.outputs.items()}


def open_bench(device: Device, canary: bytes) -> Bench:
    """A place to time networks on, with its canary loaded."""
    return Bench(device, canary)


def parse(optimised: bytes) -> tuple[Kernel, ...]:
    """The kernels of an engine, in the order of execution (host side).

    Raises:
        DeviceJobError: the bytes are no graph that :func:`optimise` wrote.
    """
    return kernels_of(read_graph(optimised))


def facts_of(device: Device) -> EngineFacts:
    """Flavour, version and compute capability of here: what an engine is bound to."""
    flavour = flavour_of(device)
    cuda = _cuda()
    properties = _ask(cuda.cudaGetDeviceProperties, 0)
    return EngineFacts(flavour, str(load(flavour).__version__), (f"sm_{properties.major}{properties.minor}",))


class Bench:
    """Loaded networks and the clock to time them by: nanoseconds that the GPU has worked for this bench."""

    def __init__(self, device: Device, canary: bytes) -> None:
        self.device = device
        self.spent_ns = 0
        self.canary = self.open("canary", canary)

    def clock(self) -> int:
        """GPU nanoseconds so far, by CUDA's events."""
        return self.spent_ns

    def open(self, name: str, network: bytes) -> Loaded:
        """Builds a network; its input is fixed random numbers, its buffers are allocated once."""
        return Loaded(self.device, network, self)

    def begin(self, network: bytes, seed: int) -> None:
        """Nothing to set: this clock is the GPU's."""


class _Engine:
    """A built engine, and the network it is of."""

    def __init__(self, device: Device, network: bytes) -> None:
        self.network = typed(network, device.precision)
        flavour = flavour_of(device)
        self.trt = load(flavour)
        self.runtime = self.trt.Runtime(self.trt.Logger(self.trt.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine(_built(device, self.network))
        if self.engine is None:
            raise DeviceJobError("TensorRT does not load the engine that it built; is the GPU's memory full?")

    def graph(self) -> bytes:
        """The engine's layers and the network's nodes."""
        from hwsearch.device.onnx_kernels import Reader, read_model

        model = read_model(self.network)
        kernels = Reader(model).kernels()
        names = [node.name or node.output[0] for node in model.graph.node]
        inspector = self.engine.create_engine_inspector()
        told = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        return write_graph(told, dict(zip(names, kernels, strict=True)))


class Loaded:
    """One engine with bound buffers on the GPU, captured as a CUDA graph."""

    def __init__(self, device: Device, network: bytes, bench: Bench | None = None) -> None:
        self._bench = bench
        self._engine = _Engine(device, network)
        trt, engine = self._engine.trt, self._engine.engine
        self._context = engine.create_execution_context()
        cuda = _cuda()
        self._stream = _ask(cuda.cudaStreamCreate)
        self._start, self._end = _ask(cuda.cudaEventCreate), _ask(cuda.cudaEventCreate)
        self.inputs: dict[str, _Buffer] = {}
        self.outputs: dict[str, _Buffer] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            buffer = _Buffer(tuple(engine.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name)))
            self._context.set_tensor_address(name, buffer.address)
            reads = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if reads else self.outputs)[name] = buffer
        for buffer in self.inputs.values():
            buffer.fill(np.random.default_rng(0).standard_normal(buffer.shape))
        self.execute()
        self._graph = self._capture() if device.option("graph", 1) else None

    def execute(self) -> None:
        """One inference, waited for."""
        if not self._context.execute_async_v3(int(self._stream)):
            raise DeviceJobError("TensorRT does not run the network")
        _ask(_cuda().cudaStreamSynchronize, self._stream)

    def run(self) -> None:
        """One inference; the bench's clock goes on by what the GPU took."""
        cuda = _cuda()
        _ask(cuda.cudaEventRecord, self._start, self._stream)
        if self._graph is not None:
            _ask(cuda.cudaGraphLaunch, self._graph, self._stream)
        else:
            self._context.execute_async_v3(int(self._stream))
        _ask(cuda.cudaEventRecord, self._end, self._stream)
        _ask(cuda.cudaEventSynchronize, self._end)
        if self._bench is not None:
            self._bench.spent_ns += max(1, int(_ask(cuda.cudaEventElapsedTime, self._start, self._end) * 1e6))

    def profile(self, runs: int, run_ms: float) -> tuple[list[tuple[str, float]], bytes]:
        """Runs under TensorRT's profiler, layer by layer and without the CUDA graph.

        Returns:
            (operation, share of the time) of each kernel in execution order, and that very engine's graph.
        """
        runs = max(4, min(runs, int(400 / max(run_ms, 1e-3))))
        collector = _collector(self._engine.trt)
        context = self._engine.engine.create_execution_context()
        for name, buffer in {**self.inputs, **self.outputs}.items():
            context.set_tensor_address(name, buffer.address)
        context.profiler = collector
        for number in range(runs + 2):
            if number == 2:
                collector.ms.clear()  # the first runs pay for the memory
            context.execute_async_v3(int(self._stream))
            _ask(_cuda().cudaStreamSynchronize, self._stream)
        optimised = self._engine.graph()
        return shares_of(read_graph(optimised), collector.ms), optimised

    def close(self) -> None:
        """Frees what is on the GPU."""
        cuda = _cuda()
        if self._graph is not None:
            _ask(cuda.cudaGraphExecDestroy, self._graph)
        for buffer in (*self.inputs.values(), *self.outputs.values()):
            buffer.free()
        _ask(cuda.cudaStreamDestroy, self._stream)
        del self._context, self._engine

    def _capture(self) -> Any:
        """The inference as a CUDA graph, so that small networks are not timed by how fast Python launches them."""
        cuda = _cuda()
        _ask(cuda.cudaStreamBeginCapture, self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        self._context.execute_async_v3(int(self._stream))
        return _ask(cuda.cudaGraphInstantiate, _ask(cuda.cudaStreamEndCapture, self._stream), 0)


class _Buffer:
    """An array on the GPU."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.address = _ask(_cuda().cudaMalloc, max(1, int(np.prod(shape)) * self.dtype.itemsize))

    def fill(self, values: np.ndarray) -> None:
        """Copies values to the GPU."""
        data = np.ascontiguousarray(values, self.dtype)
        _ask(_cuda().cudaMemcpy, self.address, data.ctypes.data, data.nbytes, _kind("HostToDevice"))

    def read(self) -> np.ndarray:
        """Copies the array from the GPU."""
        data = np.empty(self.shape, self.dtype)
        _ask(_cuda().cudaMemcpy, data.ctypes.data, self.address, data.nbytes, _kind("DeviceToHost"))
        return data

    def free(self) -> None:
        _ask(_cuda().cudaFree, self.address)


def _built(device: Device, network: bytes) -> bytes:
    """The network's engine: of an earlier build here, else built now, with the timing cache of all builds before."""
    facts = facts_of(device)
    folder = _cache_folder(device, facts)
    path = folder / f"{hashlib.sha256(network).hexdigest()[:32]}.engine"
    timings = folder / "timing.cache"
    if path.exists():
        try:
            return unpack_engine(path.read_bytes(), facts)
        except DeviceJobError:
            path.unlink()
    known = timings.read_bytes() if timings.exists() else None
    engine, grown = build_engine(device, network, timing_cache=known)
    _write(path, pack_engine(engine, facts))
    if grown is not None:
        _write(timings, grown)
    return engine


def _cache_folder(device: Device, facts: EngineFacts) -> Path:
    """Where engines and timings lie that hold for these options, this version and this GPU."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = repr((facts, sorted(device.options.items()), device.precision)).encode()
    folder = root / "hwsearch" / f"tensorrt-{hashlib.sha256(key).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(path: Path, data: bytes) -> None:
    """A file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)


def _collector(trt: Any) -> Any:
    class Collector(trt.IProfiler):  # type: ignore[misc, name-defined]
        """Adds up the milliseconds of each layer."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.ms: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.ms[layer_name] = self.ms.get(layer_name, 0.0) + ms

    return Collector()


@cache
def _cuda() -> Any:
    """CUDA's runtime for Python."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise DeviceJobError("the package cuda-python is not installed; install it beside TensorRT") from None
    return runtime


def _ask(call: Any, *arguments: Any) -> Any:
    """A CUDA call's result without its status; an error is the device's."""
    status, *results = call(*arguments)
    if int(status) != 0:
        raise DeviceJobError(f"{call.__name__} failed: {getattr(status, 'name', status)}")
    return results[0] if results else None


def _kind(name: str) -> Any:
    return getattr(_cuda().cudaMemcpyKind, f"cudaMemcpy{name}")
