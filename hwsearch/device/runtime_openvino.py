"""OpenVINO on this CPU. The same names as in every runtime: ``probe, optimise, open_bench, run`` and ``parse``.

Device side: standard library, numpy and openvino. :func:`parse`, which runs on the host, needs none of them.

What OpenVINO really runs is its execution graph: fused layers, their layouts, the kernel chosen for each. It names no
strides, so ``optimise`` writes it down together with the operators that each layer came from, as JSON of its own
(:mod:`hwsearch.device.openvino_graph`). Precision is pinned to the device's: left alone, OpenVINO computes float32
networks in bfloat16 wherever the CPU can.

Options: ``isa`` caps the instruction sets of the kernels (oneDNN's ``ONEDNN_MAX_CPU_ISA``: SSE41, AVX, AVX2 ...): the
same CPU under another cap takes other kernels in other layouts, so it is honestly another device, and the cap is part
of its fingerprint. ``pinning`` (0 or 1) binds threads to cores.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.device.bench import Bench
from hwsearch.device.machine import governor, instruction_sets, processor
from hwsearch.device.openvino_graph import read_graph, write_graph
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.errors import DeviceJobError, InputError

if TYPE_CHECKING:
    from hwsearch.graph.kernel import Kernel

#: Networks may be interleaved: their times do not depend on each other beyond what the canary tells.
INTERLEAVES = True

_OPTIONS = ("isa", "pinning")
#: Caps that oneDNN knows, and the flag that a CPU must have so that the cap is what really runs there.
_ISAS = {
    "SSE41": "sse4_1", "AVX": "avx", "AVX2": "avx2", "AVX2_VNNI": "avx_vnni", "AVX512_CORE": "avx512f",
    "AVX512_CORE_VNNI": "avx512_vnni", "AVX512_CORE_BF16": "avx512_bf16", "AVX512_CORE_AMX": "amx_tile",
}  # fmt: skip
_VARIABLE = "ONEDNN_MAX_CPU_ISA"
#: OpenVINO's name of what networks are computed in, and of the capability that a CPU must have for it.
_PRECISIONS = {
    "float32": ("f32", "FP32"), "int8": ("f32", "INT8"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16"),
}  # fmt: skip

#: The engine of this process and the cap that it was made under: oneDNN reads the cap once.
_engine: tuple[str, Any] | None = None


def probe(device: Device) -> Fingerprint:
    """What this machine is, as far as a latency depends on it.

    Raises:
        InputError: an option is unknown, or its value makes no sense.
        DeviceJobError: the CPU lacks the precision or the instruction sets that the device asks for.
    """
    _core(device)
    import openvino

    cpu, flags = processor()
    cap = _cap(device)
    return Fingerprint(
        cpu=cpu,
        isa=instruction_sets(flags) + (f" up to {cap}" if cap else ""),
        runtime=device.runtime,
        runtime_version=str(openvino.get_version()),
        threads=device.threads,
        precision=device.precision,
        system=f"{platform.system()} {platform.machine()}",
        governor=governor(),
    )


def optimise(device: Device, network: bytes) -> bytes:
    """The execution graph that OpenVINO makes of an ONNX network, as JSON (see ``openvino_graph``).

    Raises:
        DeviceJobError: OpenVINO does not load the network; the message is its reason in one line.
    """
    return _Compiled(device, network).graph()


def run(device: Device, network: bytes, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's outputs by name for these inputs.

    Raises:
        DeviceJobError: OpenVINO does not load or run the network, or an input is missing, unknown or of a wrong shape.
    """
    loaded = _Compiled(device, network)
    wanted = loaded.input_names()
    if set(wanted) != set(inputs):
        raise DeviceJobError(f"the network has inputs {', '.join(wanted)}, given were {', '.join(inputs) or 'none'}")
    try:
        request = loaded.compiled.create_infer_request()
        for name, port in zip(wanted, loaded.compiled.inputs, strict=True):
            if tuple(port.shape) != inputs[name].shape:
                raise DeviceJobError(f"input {name!r} has the shape {inputs[name].shape}, not {tuple(port.shape)}")
            request.get_tensor(port).data[...] = inputs[name]
        request.infer()
        ports = zip(loaded.output_names(), loaded.compiled.outputs, strict=True)
        return {name: np.array(request.get_tensor(port).data) for name, port in ports}
    except DeviceJobError:
        raise
    except Exception as error:
        raise DeviceJobError(one_line(error)) from None


def open_bench(device: Device, canary: bytes) -> Bench:
    """A place to time networks on, with its canary loaded."""
    return Bench(partial(Loaded, device), canary)


def parse(optimised: bytes) -> tuple[Kernel, ...]:
    """The kernels of an execution graph, one a layer, in the order of execution (host side).

    Raises:
        DeviceJobError: the bytes are no graph that :func:`optimise` wrote.
    """
    from hwsearch.device.openvino_kernels import kernels_of

    return kernels_of(read_graph(optimised))


class Loaded:
    """One compiled network with its buffers filled."""

    def __init__(self, device: Device, network: bytes) -> None:
        self._device, self._network = device, network
        self._request = _Compiled(device, network).request()
        self.run()

    def run(self) -> None:
        """One inference."""
        self._request.infer()

    def profile(self, runs: int, run_ms: float) -> tuple[list[tuple[str, float]], bytes]:
        """Runs with OpenVINO's counters on.

        A counter is the mean over all runs of a layer's whole microseconds, cut off twice: in each run and in the
        mean. So the first runs, which pay for the memory, are taken out of the mean again, and what was cut off on
        the average is added.

        Args:
            runs: how often, at most; fewer when a run (of ``run_ms``) is long.

        Returns:
            (operation, share of the time) of each layer in execution order, and that very network's execution graph.
        """
        from hwsearch.device.openvino_kernels import shares_of

        runs = max(8, min(runs, int(400 / max(run_ms, 1e-3))))
        loaded = _Compiled(self._device, self._network, counters=True)
        request = loaded.request()
        warmup = 2
        for _ in range(warmup):
            request.infer()
        first = _counters(request)
        for _ in range(runs):
            request.infer()
        last = _counters(request)
        optimised = loaded.graph()
        graph = read_graph(optimised)
        times = []
        for layer in graph.layers:
            total = last.get(layer.name, 0) * (runs + warmup) - first.get(layer.name, 0) * warmup
            times.append(max(total / runs, 0.0) + (1.0 if total > 0 else 0.5))
        return shares_of(graph, times), optimised

    def close(self) -> None:
        """Frees the compiled network."""
        del self._request


class _Compiled:
    """A network read and compiled.

    Raises:
        DeviceJobError: OpenVINO does not load it, or would compute it in another precision than the device's.
    """

    def __init__(self, device: Device, network: bytes, counters: bool = False) -> None:
        core = _core(device)
        hint = _PRECISIONS[device.precision][0]
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": device.threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": bool(device.option("pinning", 0)),
            "PERF_COUNT": counters,
        }
        try:
            self.model = core.read_model(network)
            for port in self.model.inputs:
                if port.partial_shape.is_dynamic:
                    raise DeviceJobError(
                        f"input {port.any_name!r} has an open dimension in {port.partial_shape}; "
                        "export with fixed sizes"
                    )
            self.compiled = core.compile_model(self.model, "CPU", settings)
            found = self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        except DeviceJobError:
            raise
        except Exception as error:
            raise DeviceJobError(one_line(error)) from None
        if found != hint:
            raise DeviceJobError(f"OpenVINO computes in {found} here, not in {hint}: the CPU has no {device.precision}")

    def graph(self) -> bytes:
        """The execution graph with what it came from."""
        return write_graph(self.model, self.compiled.get_runtime_model())

    def input_names(self) -> list[str]:
        """The inputs' names in the ONNX file."""
        return [port.any_name for port in self.compiled.inputs]

    def output_names(self) -> list[str]:
        """The outputs' names in the ONNX file."""
        return [port.any_name for port in self.compiled.outputs]

    def request(self) -> Any:
        """A request with fixed random numbers in its inputs."""
        try:
            request = self.compiled.create_infer_request()
            for port in self.compiled.inputs:
                data = request.get_tensor(port).data
                if np.issubdtype(data.dtype, np.floating):
                    data[...] = np.random.default_rng(0).standard_normal(data.shape)
                else:
                    data[...] = 0
            request.infer()
        except Exception as error:
            raise DeviceJobError(one_line(error)) from None
        return request


def _counters(request: Any) -> dict[str, int]:
    """Mean microseconds of each layer so far."""
    return {info.node_name: round(info.real_time.total_seconds() * 1e6) for info in request.profiling_info}


def one_line(error: BaseException) -> str:
    """OpenVINO's reason without the places in its source, its line breaks and its length."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Exception from src", "Check '"))]
    text = " ".join(" ".join(kept or lines).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _cap(device: Device) -> str:
    """The device's cap on instruction sets, "" for none.

    Raises:
        InputError: an option is unknown, or there is no such cap.
    """
    for name in device.options:
        if name not in _OPTIONS:
            raise InputError(
                f"device {device.name}: options.{name} is unknown to openvino; known: {', '.join(_OPTIONS)}"
            )
    cap = str(device.options.get("isa", "")).upper()
    if cap and cap not in _ISAS:
        raise InputError(f"device {device.name}: options.isa is {cap!r}; known: {', '.join(_ISAS)}")
    return cap


def _core(device: Device) -> Any:
    """This process's OpenVINO, made under the device's cap."""
    global _engine
    cap = _cap(device)
    if cap and _ISAS[cap] not in processor()[1]:
        raise DeviceJobError(f"device {device.name}: this CPU has no {_ISAS[cap]}, so {cap} would be another device")
    if _engine is None:
        # before oneDNN is loaded; a variable that the user's shell set would make another device of this one
        os.environ.pop(_VARIABLE, None)
        if cap:
            os.environ[_VARIABLE] = cap
        # importing openvino reports to Google Analytics, by a fork beside running threads that now and then never ends;
        # without this package it does neither
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        _engine = cap, openvino.Core()
    if _engine[0] != cap:
        raise DeviceJobError(
            f"device {device.name}: this process runs OpenVINO up to {_engine[0] or 'all'} already; use another one"
        )
    wanted = _PRECISIONS[device.precision][1]
    if wanted not in _engine[1].get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise DeviceJobError(f"device {device.name}: OpenVINO has no {device.precision} on this CPU")
    return _engine[1]
