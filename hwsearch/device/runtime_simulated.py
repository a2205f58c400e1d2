"""A pretended device with the habits of a real one: the whole chain is tested and resumed on it, in no wall time.

The same names as in every runtime. Its optimiser (:mod:`hwsearch.device.simulated_graph`) blocks channels and fuses by
shape, so there are stairs and layout changes; layers in 8 bits (QDQ) are faster. Its machine wanders in speed a
little, is disturbed for tenths of a second and has noise, and the canary feels that as every network does.

Everything about a network follows from (options, its bytes, the stopwatch's settings): its clock starts at a moment
derived from the bytes, and its noise from the same seed. So results depend neither on what ran before nor on a restart.

Options: ``block`` (channels), ``gmacs`` and ``gbytes`` (10^9 per second), ``node_us``, ``overhead_us``, ``drift`` and
``noise`` (relative), ``spells`` (share of the tenths of a second that are 1.5 times slower), ``slowdown`` (a busy
machine: factor on every time), ``seed``; and for tests: ``version`` is another runtime version (the same machine), a
network whose name contains ``crash_on`` kills the agent, ``hang_on`` makes it hang, ``fail_on`` is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from hwsearch.device.spec import Device, Fingerprint
from hwsearch.errors import DeviceJobError, InputError

if TYPE_CHECKING:
    from hwsearch.graph.kernel import Kernel

#: One network at a time: neighbours must not matter here.
INTERLEAVES = False

VERSION = "1"  # of the cost model: another number, another device

_DEFAULTS: dict[str, float] = {
    "block": 8, "gmacs": 20.0, "gbytes": 10.0, "node_us": 1.5, "overhead_us": 12.0, "drift": 0.012, "noise": 0.003,
    "spells": 0.25, "slowdown": 1.0, "seed": 0,
}  # fmt: skip
_FAULTS = ("crash_on", "hang_on", "fail_on")
_LARGEST = 1e9
_TEXTS = ("version", *_FAULTS)

#: Share of the peak that a family reaches; halved in the plain layout.
_EFFICIENCY = {
    "conv": 1.0,
    "conv_first": 0.6,
    "pointwise": 0.8,
    "depthwise": 0.35,
    "grouped": 0.5,
    "conv_transpose": 0.5,
    "gemm": 0.25,
}


def probe(device: Device) -> Fingerprint:
    """What this pretends to be; other options are another machine."""
    digest = hashlib.sha256(json.dumps(_options(device), sort_keys=True).encode()).hexdigest()
    return Fingerprint(
        cpu=f"simulated {digest[:12]}",
        isa=f"block{_options(device)['block']:.0f}",
        runtime=device.runtime,
        runtime_version=str(device.options.get("version", VERSION)),
        threads=device.threads,
        precision=device.precision,
        system="simulated",
        governor="performance",
    )


def optimise(device: Device, network: bytes) -> bytes:
    """The simulated optimiser's graph (JSON of its own, see :mod:`hwsearch.device.simulated_graph`)."""
    from hwsearch.device.simulated_graph import optimised_graph

    return optimised_graph(network, block=int(_options(device)["block"]))


def parse(optimised: bytes) -> tuple[Kernel, ...]:
    """The kernels of an optimised graph, in the order of execution."""
    from hwsearch.device.simulated_graph import read_graph

    return read_graph(optimised)


def run(device: Device, network: bytes, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's outputs, computed by ONNX Runtime: only the time is simulated."""
    from hwsearch.device import runtime_onnxruntime

    return runtime_onnxruntime.run(Device(name=device.name, runtime="onnxruntime"), network, inputs)


def open_bench(device: Device, canary: bytes) -> Bench:
    """A place to time networks on, with its canary loaded."""
    return Bench(device, canary)


def kernel_ms(kernel: Kernel, options: Mapping[str, float], threads: int = 1) -> float:
    """Milliseconds of one kernel at reference speed: arithmetic or memory, some of the other, dispatch."""
    if kernel.family == "free":
        return 2e-4
    rate = options["gmacs"] * 1e6 * _EFFICIENCY.get(kernel.family, 1.0) * (1 + 0.8 * (threads - 1))
    if kernel.layout_out == "nchw" and kernel.family not in ("gemm", "conv_first"):
        rate /= 2
    if kernel.dtype != "float32":
        rate *= 2.5  # 8 bits
    compute, memory = kernel.macs / rate, kernel.memory_bytes / (options["gbytes"] * 1e6)
    trait = f"{kernel.family}|{kernel.kernel_height}x{kernel.kernel_width}|{kernel.stride}|{'+'.join(kernel.fused)}"
    temper = 0.9 + 0.2 * (zlib.crc32(trait.encode()) % 1024) / 1024  # what no formula knows: for a predictor to learn
    return (max(compute, memory) + 0.2 * min(compute, memory)) * temper + options["node_us"] / 1e3


class Bench:
    """The simulated machine: one clock, one speed at each moment, one source of noise."""

    def __init__(self, device: Device, canary: bytes) -> None:
        self.device = device
        self.options = _options(device)
        self._seed = int(self.options["seed"])
        self._now = 0
        self._rng = np.random.default_rng(0)
        self.begin(canary, 0)
        self.canary = Loaded(self, canary)

    def clock(self) -> int:
        """Simulated nanoseconds."""
        return self._now

    def begin(self, network: bytes, seed: int) -> None:
        """Sets the clock and the noise to where they always are for this network and stopwatch seed."""
        key = json.dumps([VERSION, self.options, self.device.threads, seed], sort_keys=True).encode()
        digest = hashlib.sha256(key + network).digest()
        self._now = int.from_bytes(digest[:5], "big") * 1000
        self._rng = np.random.default_rng(int.from_bytes(digest[8:16], "big"))

    def open(self, name: str, network: bytes) -> Loaded:
        """Loads a network (some simulated milliseconds).

        Raises:
            DeviceJobError: it is no ONNX graph, or its name matches ``fail_on``.
        """
        if self._faulty("crash_on", name):
            os.kill(os.getpid(), signal.SIGKILL)  # as a crash, but without a core file
        while self._faulty("hang_on", name):
            time.sleep(0.1)
        if self._faulty("fail_on", name):
            raise DeviceJobError("this simulated device refuses networks of that name (options.fail_on)")
        loaded = Loaded(self, network)
        self.advance(8.0, noise=False)
        return loaded

    def advance(self, work_ms: float, noise: bool = True) -> None:
        """Lets the clock run on by ``work_ms`` of work at the machine's present speed."""
        factor = self._slowness(self._now / 1e9)
        if noise:
            factor *= math.exp(self.options["noise"] * float(self._rng.standard_normal()))
            if self._rng.random() < 0.01:
                factor *= 1.4  # an interrupt
        self._now += max(1, int(work_ms * factor * 1e6))

    def jitter(self, count: int) -> np.ndarray:
        """Factors (count,) around 1 for the shares of nodes."""
        return np.exp(self.options["noise"] * self._rng.standard_normal(count))

    def _slowness(self, seconds: float) -> float:
        """Time per work at a moment, 1 at reference speed: two waves of drift, and spells of a tenth of a second."""
        wave = 0.7 * self._wave(seconds, 2.5) + 0.3 * self._wave(seconds, 0.3)
        spell = 1.5 if self._unit(int(10 * seconds), 7) < self.options["spells"] else 1.0
        return self.options["slowdown"] * spell * (1 + self.options["drift"] * wave)

    def _wave(self, seconds: float, period: float) -> float:
        """Smooth noise in [-1, 1]."""
        step, part = divmod(seconds / period, 1.0)
        part = part * part * (3 - 2 * part)
        salt = int(period * 100)
        return 2 * ((1 - part) * self._unit(int(step), salt) + part * self._unit(int(step) + 1, salt)) - 1

    def _unit(self, step: int, salt: int) -> float:
        """A fixed pseudo-random number in [0, 1) for a moment (the splitmix64 finaliser)."""
        mask = (1 << 64) - 1
        value = (step * 0x9E3779B97F4A7C15 + salt * 0xD1B54A32D192ED03 + self._seed * 0x8CB92BA72F3D8DD7) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return float((value ^ (value >> 31)) / 2**64)

    def _faulty(self, fault: str, name: str) -> bool:
        wanted = self.device.options.get(fault)
        return isinstance(wanted, str) and wanted != "" and wanted in name


class Loaded:
    """One network on the simulated machine."""

    def __init__(self, bench: Bench, network: bytes) -> None:
        self._bench = bench
        self._optimised = optimise(bench.device, network)
        kernels = parse(self._optimised)
        self._ops = [kernel.op for kernel in kernels]
        self._ms = np.array([kernel_ms(kernel, bench.options, bench.device.threads) for kernel in kernels])
        # a network is more than its kernels: a start, and caches that its own tensors evict
        self.total_ms = 1.03 * float(self._ms.sum()) + bench.options["overhead_us"] / 1e3

    def run(self) -> None:
        """One inference: the clock goes on, nothing is computed."""
        self._bench.advance(self.total_ms)

    def profile(self, runs: int, run_ms: float) -> tuple[list[tuple[str, float]], bytes]:
        """(operation, share) of each node in execution order, and the optimised graph."""
        self._bench.advance(2.0 * runs * self.total_ms)
        times = self._ms * self._bench.jitter(len(self._ms))
        return [(op, float(share)) for op, share in zip(self._ops, times / times.sum(), strict=True)], self._optimised

    def close(self) -> None:
        """Nothing to free."""


def _options(device: Device) -> dict[str, float]:
    """The options with their defaults.

    Raises:
        InputError: an option is unknown, or its value makes no sense.
    """
    for name in device.options:
        if name not in _DEFAULTS and name not in _TEXTS:
            known = ", ".join([*_DEFAULTS, *_TEXTS])
            raise InputError(f"device {device.name}: options.{name} is unknown to simulated; known: {known}")
    options = {name: device.option(name, default) for name, default in _DEFAULTS.items()}
    for name in ("block", "gmacs", "gbytes", "slowdown"):
        if options[name] <= 0 or (name == "block" and options[name] not in (4, 8, 16, 32)):
            rule = "4, 8, 16 or 32" if name == "block" else "a number above 0"
            raise InputError(f"device {device.name}: options.{name} is {options[name]:g}; use {rule}")
    for name in ("node_us", "overhead_us", "noise", "spells", "drift"):
        if options[name] < 0 or (name == "drift" and options[name] >= 1):
            raise InputError(
                f"device {device.name}: options.{name} is {options[name]:g}; use a number from 0 (drift: below 1)"
            )
    for name, value in options.items():
        # Beyond these the clock, which counts nanoseconds, would stand still or overflow.
        most = 1.0 if name == "noise" else _LARGEST
        if value > most or (name in ("gmacs", "gbytes", "slowdown") and value < 1 / _LARGEST):
            raise InputError(f"device {device.name}: options.{name} is {value:g}; use a number up to {most:g}")
    return options
