"""Conformance suites that a third party can run on its own extension: ``check_runtime``.

A runtime that passes can be profiled, searched for and verified on: these are the promises that the rest of hwsearch
relies on. Nothing here looks at milliseconds, so the suite runs on a busy machine.

Example:
    >>> from hwsearch.device.spec import Device
    >>> [outcome.passed for outcome in check_runtime(Device("toy", "simulated"))].count(False)
    0
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np

from hwsearch.device.agent import runtime_of
from hwsearch.device.canary import canary_bytes, check_networks
from hwsearch.device.session import open_session
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.errors import CheckFailedError, DeviceJobError, HwsearchError, InputError
from hwsearch.graph.kernel import FAMILIES, Kernel

#: What the device side of a runtime may not load: boards have none of it.
_HEAVY = ("torch", "onnx", "pydantic", "rich", "typer", "xgboost", "sklearn")
#: How far outputs may be off, relative to their largest value, by what the device computes in.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2, "int8": 1e-4}
#: Padded channels, and work that a runtime merges: MACs as run against those of the network.
_LEAST_MACS, _MOST_MACS = 0.98, 4.0


@dataclass(frozen=True)
class CheckOutcome:
    """One check: its name, what it promises, and why it failed ("" where it passed)."""

    name: str
    promise: str
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the promise is kept."""
        return not self.failure


class _Broken(Exception):
    """A promise that is not kept; the message says which value is wrong."""


def check_runtime(device: Device | str, *, raise_on_failure: bool = True) -> tuple[CheckOutcome, ...]:
    """Run every check on the runtime of a device: some seconds.

    Args:
        device: a device of that runtime, or its name.
        raise_on_failure: raise where a check fails; else the outcomes say so.

    Raises:
        CheckFailedError: checks failed; each is named with the value that was wrong.
        InputError: there is no such device.

    Example:
        >>> check_runtime("simulated")[0].name
        'names'
    """
    device = Device.load(device) if isinstance(device, str) else device
    outcomes = tuple(_outcome(check, device) for check in RUNTIME_CHECKS)
    failed = [f"{outcome.name}: {outcome.failure}" for outcome in outcomes if not outcome.passed]
    if failed and raise_on_failure:
        raise CheckFailedError(
            f"runtime {device.runtime}: {len(failed)} of {len(outcomes)} checks failed: {'; '.join(failed)}"
        )
    return outcomes


def _outcome(check: Callable[[Device], None], device: Device) -> CheckOutcome:
    name = check.__name__.removeprefix("check_")
    promise = " ".join((check.__doc__ or "").split())
    try:
        check(device)
    except (_Broken, HwsearchError) as error:
        return CheckOutcome(name, promise, str(error))
    except Exception as error:  # a runtime of somebody else's may raise anything; that is what is to be found out
        return CheckOutcome(name, promise, f"raised {type(error).__name__}: {' '.join(str(error).split())}")
    return CheckOutcome(name, promise)


# ---------------------------------------------------------------------- the checks


def check_names(device: Device) -> None:
    """The module offers the names that every runtime has."""
    runtime = runtime_of(device)
    for name in ("probe", "optimise", "run", "open_bench", "parse"):
        _require(callable(getattr(runtime, name, None)), f"{runtime.__name__} has no function {name}")
    _require(isinstance(getattr(runtime, "INTERLEAVES", None), bool), f"{runtime.__name__}.INTERLEAVES is no bool")


def check_import(device: Device) -> None:
    """Importing it loads the standard library and numpy only, not even the engine."""
    module = runtime_of(device).__name__
    code = f"import sys, {module}; print(*sorted(set({_HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    _require(done.returncode == 0, f"import {module} fails: {done.stderr.strip()[-200:]}")
    _require(not done.stdout.strip(), f"import {module} loads {done.stdout.strip()}")


def check_fingerprint(device: Device) -> None:
    """``probe`` tells the same every time, repeats the device's settings, and travels as JSON."""
    found = runtime_of(device).probe(device)
    _require(isinstance(found, Fingerprint), f"probe returned {type(found).__name__}, not Fingerprint")
    _require(found == runtime_of(device).probe(device), "two probes differ")
    _require(found == Fingerprint.from_dict(found.to_dict()), "the fingerprint does not survive to_dict")
    for name in ("runtime", "threads", "precision"):
        mine, wanted = getattr(found, name), getattr(device, name)
        _require(mine == wanted, f"fingerprint.{name} is {mine!r}, the device's is {wanted!r}")
    for name in ("cpu", "isa", "runtime_version", "system", "governor"):
        _require(bool(getattr(found, name)), f"fingerprint.{name} is empty")


def check_options(device: Device) -> None:
    """An option that it does not know is the user's mistake (InputError) and named, by ``optimise`` too."""
    wrong = replace(device, options={**device.options, "no_such_option": 1})
    runtime = runtime_of(device)
    if _raises(lambda: runtime.probe(wrong)):  # a probe may leave it to the first network
        _refused(lambda: runtime.probe(wrong), InputError, "probe with an unknown option", "no_such_option")
    _refused(lambda: runtime.optimise(wrong, _small()), InputError, "optimise with an unknown option", "no_such_option")


def check_kernels(device: Device) -> None:
    """Every kernel is whole: a known family, positive sizes, a name of its own in the graph, a readable precision."""
    for name, network in _networks():
        kernels = _kernels(device, network)
        _require(len({kernel.node for kernel in kernels}) == len(kernels), f"{name}: two kernels have one node name")
        for kernel in kernels:
            _require(kernel.family in FAMILIES, f"{name}: {kernel.node} has the unknown family {kernel.family!r}")
            _require(bool(kernel.op and kernel.node), f"{name}: a kernel has no op or node")
            sizes = [getattr(kernel, field) for field in _SIZES]
            _require(all(type(size) is int and size > 0 for size in sizes), f"{name}: sizes of {kernel.node}: {sizes}")
            _require("|" not in kernel.op, f"{name}: {kernel.op!r} holds a '|', which separates the parts of a key")


def check_nothing_dropped(device: Device) -> None:
    """The kernels do the network's work: its multiply-accumulates, and every layer with weights is some kernel's."""
    from hwsearch.device.onnx_kernels import kernels_of

    for name, network in _networks():
        plain, found = kernels_of(network), _kernels(device, network)
        share = sum(kernel.macs for kernel in found) / sum(kernel.macs for kernel in plain)
        _require(_LEAST_MACS <= share <= _MOST_MACS, f"{name}: the kernels have {share:.2f} times the network's MACs")
        wanted = {source for kernel in plain if kernel.weight_elements for source in kernel.source}
        missing = wanted - {source for kernel in found for source in kernel.source}
        _require(not missing, f"{name}: no kernel has the source {', '.join(sorted(missing))}")


def check_repeatable(device: Device) -> None:
    """Optimising a network twice gives the same kernels."""
    for name, network in _networks():
        one, two = ([kernel.key for kernel in _kernels(device, network)] for _ in range(2))
        _require(one == two, f"{name}: {_first_difference(one, two)}")


def check_widths(device: Device) -> None:
    """Another width changes sizes, not names: each layer with weights has the same source at every width."""
    sources = [
        {source for kernel in _kernels(device, _small(width)) if kernel.weight_elements for source in kernel.source}
        for width in (8, 16, 24)
    ]
    _require(all(found == sources[0] for found in sources), f"sources of three widths: {sources}")
    macs = [sum(kernel.macs for kernel in _kernels(device, _small(width))) for width in (8, 16, 32)]
    _require(macs == sorted(macs) and macs[0] < macs[-1], f"MACs of growing widths: {macs}")


def check_outputs(device: Device) -> None:
    """``run`` computes what ONNX's reference computes, and gives outputs under the names of the file."""
    from onnx.reference import ReferenceEvaluator

    network = _small()
    values = np.random.default_rng(5).standard_normal((1, 3, 12, 12)).astype(np.float32)
    (expected,) = ReferenceEvaluator(_proto(network)).run(None, {"input": values})
    found = runtime_of(device).run(device, network, {"input": values})
    _require(list(found) == ["output"], f"outputs are {list(found)}, the file's is 'output'")
    _require(found["output"].shape == expected.shape, f"shape {found['output'].shape}, not {expected.shape}")
    off = float(np.abs(found["output"] - expected).max() / np.abs(expected).max())
    limit = _TOLERANCE[device.precision]
    _require(off <= limit, f"outputs are off by {off:.2g} of their largest value (limit {limit:g})")


def check_refusals(device: Device) -> None:
    """What is no network, or has an open size, is refused with a DeviceJobError of one line."""
    runtime = runtime_of(device)
    bench = runtime.open_bench(device, canary_bytes())
    for name, data in (("nothing", b""), ("garbage", b"garbage"), ("half a network", _small()[:300])):
        _refused(partial(runtime.optimise, device, data), DeviceJobError, f"optimise({name})")
        _refused(partial(bench.open, "x", data), DeviceJobError, f"open({name})")
    _refused(lambda: bench.open("x", _small(batch=None)), DeviceJobError, "open(an open batch)")
    _refused(lambda: runtime.parse(b"garbage"), DeviceJobError, "parse(garbage)")
    wrong = {"no_such_input": np.zeros((1, 3, 12, 12), np.float32)}
    _refused(lambda: runtime.run(device, _small(), wrong), DeviceJobError, "run with a wrong input name")
    short = {"input": np.zeros((1, 3, 5, 5), np.float32)}
    _refused(lambda: runtime.run(device, _small(), short), DeviceJobError, "run with a wrong input shape")


def check_bench(device: Device) -> None:
    """A bench has a canary and a clock in whole nanoseconds; what is loaded runs, again and again."""
    bench = runtime_of(device).open_bench(device, canary_bytes())
    network = _small()
    bench.begin(network, 0)
    loaded = bench.open("small", network)
    for program in (bench.canary, loaded, bench.canary):
        before = bench.clock()
        for _ in range(3):
            program.run()
        after = bench.clock()
        _require(type(after) is int and after > before, f"three runs took from {before!r} to {after!r} on the clock")
    loaded.close()
    bench.open("again", network).run()


def check_shares(device: Device) -> None:
    """``profile`` gives each kernel its share, in the order of ``parse``; shares are positive and add up to 1."""
    runtime = runtime_of(device)
    bench = runtime.open_bench(device, canary_bytes())
    for name, network in _networks():
        loaded = bench.open(name, network)
        shares, optimised = loaded.profile(4, 0.2)
        kernels = runtime.parse(optimised)
        ops, wanted = [op for op, _ in shares], [kernel.op for kernel in kernels]
        _require(ops == wanted, f"{name}: {_first_difference(ops, wanted)}")
        total = math.fsum(share for _, share in shares)
        _require(abs(total - 1) < 1e-6, f"{name}: the shares add up to {total}")
        _require(all(share > 0 for _, share in shares), f"{name}: a share is not above 0")
        lowered = sorted(kernel.key for kernel in _kernels(device, network))
        _require(lowered == sorted(k.key for k in kernels), f"{name}: what was profiled has other kernels")
        loaded.close()


def check_agent(device: Device) -> None:
    """In an agent of its own it answers as it does here, and a network that it refuses costs that one job."""
    with open_session(device) as session:
        fingerprint = runtime_of(device).probe(device)
        _require(session.fingerprint == fingerprint, f"another fingerprint: {session.fingerprint}")
        _refused(lambda: session.optimise([b"garbage"], ["mine"]), DeviceJobError, "a refused job", "mine")
        (kernels,) = session.lower([_small()])
        here = [kernel.key for kernel in _kernels(device, _small())]
        _require([kernel.key for kernel in kernels] == here, "the agent lowers to other kernels")
        values = {"input": np.ones((1, 3, 12, 12), np.float32)}
        one, two = session.run(_small(), values), runtime_of(device).run(device, _small(), values)
        _require(bool(np.array_equal(one["output"], two["output"])), "the agent computes other outputs")


RUNTIME_CHECKS: tuple[Callable[[Device], None], ...] = (
    check_names, check_import, check_fingerprint, check_options, check_kernels, check_nothing_dropped,
    check_repeatable, check_widths, check_outputs, check_refusals, check_bench, check_shares, check_agent,
)  # fmt: skip

# ---------------------------------------------------------------------- networks and helpers

_SIZES = (
    "batch", "in_channels", "in_height", "in_width", "out_channels", "out_height", "out_width", "kernel_height",
    "kernel_width", "stride", "dilation", "groups", "inputs",
)  # fmt: skip


def _networks() -> Iterator[tuple[str, bytes]]:
    yield "canary", canary_bytes()
    yield from check_networks()
    yield "small", _small()


@cache
def _small(width: int = 16, batch: int | None = 1) -> bytes:
    """A stem, a residual block with a depth-wise convolution, pooling and a linear layer; input (batch, 3, 12, 12)."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(7)
    nodes: list[Any] = []
    weights: list[Any] = []

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))

    def layer(op: str, source: str, name: str, *shape: int, **attributes: Any) -> None:
        kernel = rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
        pairs = (("weight", kernel), ("bias", rng.standard_normal(shape[0])))
        weights.extend(numpy_helper.from_array(v.astype(np.float32), f"{name}.{kind}") for kind, v in pairs)
        node(op, [source, f"{name}.weight", f"{name}.bias"], name, **attributes)

    layer("Conv", "input", "stem", width, 3, 3, 3, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    node("Relu", ["stem"], "stem_relu")
    layer("Conv", "stem_relu", "deep", width, 1, 3, 3, kernel_shape=[3, 3], pads=[1] * 4, group=width)
    node("Relu", ["deep"], "deep_relu")
    layer("Conv", "deep_relu", "point", width, width, 1, 1, kernel_shape=[1, 1])
    node("Add", ["point", "stem_relu"], "sum")
    node("GlobalAveragePool", ["sum"], "pooled")
    node("Flatten", ["pooled"], "flat")
    layer("Gemm", "flat", "output", 10, width, transB=1)
    nodes[-1].name = "linear"
    images = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch or "batch", 3, 12, 12])
    answers = helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch or "batch", 10])
    graph = helper.make_graph(nodes, "small", [images], [answers], weights)
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name="hwsearch")
    return bytes(model.SerializeToString(deterministic=True))


def _proto(network: bytes) -> Any:
    import onnx

    return onnx.load_from_string(network)


def _kernels(device: Device, network: bytes) -> tuple[Kernel, ...]:
    runtime: ModuleType = runtime_of(device)
    optimised = runtime.optimise(device, network)
    _require(isinstance(optimised, bytes), f"optimise returned {type(optimised).__name__}, not bytes")
    return tuple(runtime.parse(optimised))


def _require(condition: bool, failure: str) -> None:
    if not condition:
        raise _Broken(failure)


def _raises(call: Callable[[], Any]) -> bool:
    try:
        call()
    except HwsearchError:
        return True
    return False


def _refused(call: Callable[[], Any], kind: type[HwsearchError], what: str, names: str = "") -> None:
    """The call raises an error of that kind, in one line that names something."""
    try:
        call()
    except kind as error:
        _require("\n" not in str(error) and bool(str(error)), f"{what}: the message has several lines or none")
        _require(names in str(error), f"{what}: the message does not name {names!r}: {error}")
        return
    except Exception as error:
        raise _Broken(f"{what} raised {type(error).__name__}, not {kind.__name__}: {error}") from None
    raise _Broken(f"{what} raised nothing, not {kind.__name__}")


def _first_difference(one: list[str], two: list[str]) -> str:
    pairs = enumerate(itertools.zip_longest(one, two, fillvalue="nothing"))
    return next((f"at {index}: {a} against {b}" for index, (a, b) in pairs if a != b), "")
