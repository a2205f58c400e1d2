"""OpenVINO on this CPU: what it really runs, and whether our reading of it is right. No test looks at milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwsearch.device import runtime_openvino as openvino
from hwsearch.device.agent import Jobs
from hwsearch.device.canary import canary_bytes
from hwsearch.device.machine import processor
from hwsearch.device.onnx_kernels import kernels_of
from hwsearch.device.openvino_graph import read_graph
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.device.stopwatch import StopwatchSettings
from hwsearch.errors import DeviceJobError, InputError

sys.path.insert(0, str(Path(__file__).parent))

from device_graphs import Graph, head, residual, separable

# importing it here would report that to somebody (see _core)
pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")

DEVICE = Device("openvino", "openvino")


def mixed(channels: int = 24) -> bytes:
    """Gates, dilated and grouped convolutions, pools, a concat, two linear layers in a row."""
    graph = Graph(2, 3, 17, 17)
    graph.conv("input", "stem", (3, channels), strides=[2, 2])
    graph.node("Sigmoid", "stem", "stem_s")
    graph.node("Mul", ["stem", "stem_s"], "silu")
    graph.node("ReduceMean", "silu", "mean", axes=[2, 3], keepdims=1)
    graph.conv("mean", "down", (channels, 6), 1)
    graph.node("Relu", "down", "down_r")
    graph.conv("down_r", "up", (6, channels), 1)
    graph.node("Sigmoid", "up", "gate")
    graph.node("Mul", ["silu", "gate"], "scaled")
    graph.conv("scaled", "wide", (channels, 20), pads=[2] * 4, dilations=[2, 2])
    graph.node("MaxPool", "scaled", "pool", kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    graph.node("Concat", ["wide", "pool"], "joined", axis=1)
    graph.conv("joined", "grouped", (20 + channels, 8), group=2)
    graph.node("AveragePool", "grouped", "average", kernel_shape=[2, 2], strides=[2, 2])
    graph.node("GlobalAveragePool", "average", "pooled")
    graph.node("Flatten", "pooled", "flat", axis=1)
    graph.node("Gemm", ["flat", graph.weight("one.weight", 48, 8), graph.weight("one.bias", 48)], "one", transB=1)
    graph.node("Relu", "one", "one_r")
    graph.node("Gemm", ["one_r", graph.weight("two.weight", 10, 48), graph.weight("two.bias", 10)], "output", transB=1)
    return graph.bytes()


def tokens() -> bytes:
    """What no convolution is: products of activations, softmax, layer norm."""
    graph = Graph(2, 6, 16)
    graph.node("MatMul", ["input", graph.weight("q.weight", 16, 16)], "q")
    graph.node("Transpose", "q", "qt", perm=[0, 2, 1])
    graph.node("MatMul", ["q", "qt"], "scores")
    graph.node("Softmax", "scores", "attention", axis=-1)
    graph.node("MatMul", ["attention", "input"], "mixed")
    graph.node("LayerNormalization", ["mixed", graph.weight("s", 16), graph.weight("b", 16)], "output", axis=-1)
    return graph.bytes()


NETWORKS = {"residual": residual(), "separable": separable(30), "mixed": mixed(), "tokens": tokens()}


@pytest.fixture(scope="module")
def session() -> Iterator[DeviceSession]:
    with open_session(DEVICE) as opened:
        yield opened


@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernels_do_the_networks_work(session: DeviceSession, name: str) -> None:
    (kernels,) = session.lower([NETWORKS[name]])
    assert sum(kernel.macs for kernel in kernels) == sum(kernel.macs for kernel in kernels_of(NETWORKS[name]))
    assert not [kernel.op for kernel in kernels if kernel.family == "other"]


def test_dimensions_strides_and_tails(session: DeviceSession) -> None:
    (kernels,) = session.lower([mixed()])
    of = {kernel.source[0]: kernel for kernel in kernels if kernel.source}
    stem = of["stem"]
    assert (stem.in_channels, stem.out_channels, stem.stride, stem.out_height) == (3, 24, 2, 9)
    assert stem.fused == ("swish",)
    assert (of["wide"].dilation, of["wide"].kernel_height, of["wide"].family) == (2, 3, "conv")
    assert (of["grouped"].groups, of["grouped"].family) == (2, "grouped")
    assert (of["down"].family, of["down"].fused, of["up"].fused) == ("pointwise", ("relu",), ("sigmoid",))
    assert (of["pool"].family, of["pool"].kernel_height) == ("pool", 3)
    assert {of["mean"].family, of["pooled"].family} == {"global_pool"}
    assert (of["joined"].family, of["joined"].out_channels, of["joined"].inputs) == ("concat", 44, 2)
    # OpenVINO may compile both products into one layer; each is listed for itself all the same
    assert (of["one"].in_channels, of["one"].out_channels) == (8, 48)
    assert (of["two"].in_channels, of["two"].out_channels) == (48, 10)
    assert of["one"].fused == ("relu",)


def test_a_residual_add_is_fused_and_a_change_of_layout_is_a_kernel(session: DeviceSession) -> None:
    (kernels,) = session.lower([residual(32)])
    assert any(kernel.fused[:1] == ("add",) for kernel in kernels)
    layouts = {kernel.layout_out for kernel in kernels if kernel.family == "conv"}
    changed = any(kernel.family == "reorder" and kernel.layout_out in layouts for kernel in kernels)
    assert changed or layouts == {"nchw"}


def test_outputs_are_those_of_onnx_runtime(session: DeviceSession) -> None:
    from hwsearch.device import runtime_onnxruntime

    rng = np.random.default_rng(3)
    for name, shape in (("mixed", (2, 3, 17, 17)), ("tokens", (2, 6, 16))):
        values = {"input": rng.standard_normal(shape).astype(np.float32)}
        expected = runtime_onnxruntime.run(Device("ort", "onnxruntime"), NETWORKS[name], values)
        found = session.run(NETWORKS[name], values)
        assert list(found) == list(expected) == ["output"]
        np.testing.assert_allclose(found["output"], expected["output"], rtol=1e-3, atol=1e-5)


def test_precision_is_pinned_and_one_that_the_cpu_lacks_is_refused() -> None:
    compiled = openvino._Compiled(DEVICE, residual()).compiled
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    half = Device("openvino-bf16", "openvino", precision="bfloat16")
    if "avx512_bf16" in processor()[1] or "amx_tile" in processor()[1]:
        assert any("bfloat16" in kernel.dtype for kernel in openvino.parse(openvino.optimise(half, residual())))
    else:
        with pytest.raises(DeviceJobError, match="OpenVINO has no bfloat16 on this CPU"):
            openvino.probe(half)


def test_a_cap_on_instructions_is_another_device(session: DeviceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx2" not in processor()[1]:
        pytest.skip("this CPU has nothing above SSE4.1 to be capped")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")  # what the shell says must not make another device of this one
    with open_session(DEVICE) as other:
        assert other.fingerprint == session.fingerprint
        assert other.lower([residual()]) == session.lower([residual()])
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    with open_session(Device.load("x86-openvino-1t-sse41")) as capped:
        assert capped.fingerprint.isa == session.fingerprint.isa + " up to SSE41"
        (mine,), (theirs,) = session.lower([residual()]), capped.lower([residual()])
        kinds = {kernel.op for kernel in theirs if kernel.family == "conv"}
        assert not kinds & {kernel.op for kernel in mine if kernel.family == "conv"}
        assert not any("avx" in kind for kind in kinds)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"isa": "MMX"}, InputError, "options.isa is 'MMX'; known: SSE41, AVX, "),
        ({"turbo": 1}, InputError, "options.turbo is unknown to openvino; known: isa, pinning"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        openvino.optimise(Device("x", "openvino", options=options), residual())


def test_a_cap_above_the_cpu_is_no_cap_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "processor", lambda: ("old", frozenset({"sse4_1", "avx"})))
    with pytest.raises(DeviceJobError, match="this CPU has no avx512f, so AVX512_CORE would be another device"):
        openvino.probe(Device("x", "openvino", options={"isa": "avx512_core"}))
    openvino._core(DEVICE)
    with pytest.raises(DeviceJobError, match="this process runs OpenVINO up to all already"):
        openvino.probe(Device("x", "openvino", options={"isa": "AVX"}))


def test_nothing_is_reported_to_anybody() -> None:
    openvino._core(DEVICE)
    assert not hasattr(sys.modules["openvino_telemetry"], "Telemetry")


def test_what_is_no_execution_graph_is_refused() -> None:
    for data in (b"", b"{}", b'{"schema": "hwsearch.openvino-graph", "version": 99}', b"[1]"):
        with pytest.raises(DeviceJobError, match="not one of OpenVINO"):
            openvino.parse(data)
    graph = read_graph(openvino.optimise(DEVICE, residual()))
    assert all(value.form for layer in graph.layers for value in (*layer.inputs, *layer.outputs))


def test_a_time_job_joins_shares_and_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's job as a campaign asks for it, on a clock that a test may look at: a tick a reading."""
    ticks = iter(range(0, 10**12, 50_000))
    monkeypatch.setattr(openvino.Bench, "clock", staticmethod(lambda: next(ticks)))
    answers: list[dict[str, Any]] = []
    settings = StopwatchSettings(rounds_min=3, rounds_max=3, good_min=1, near_limit=50.0, canary_limit=50.0)
    (tmp_path / "canary").write_bytes(canary_bytes())
    networks = []
    for name in ("residual", "mixed"):
        (tmp_path / name).write_bytes(NETWORKS[name])
        networks.append({"name": name, "path": str(tmp_path / name)})
    request = {
        "networks": networks, "canary": str(tmp_path / "canary"), "reference_ms": None, "nodes": True,
        "settings": {name: getattr(settings, name) for name in StopwatchSettings.__dataclass_fields__},
        "folder": str(tmp_path),
    }  # fmt: skip
    Jobs(lambda event, **fields: answers.append({"event": event, **fields})).time(DEVICE, request)
    timings = [answer for answer in answers if answer["event"] == "timing"]
    assert {answer["timing"]["network"] for answer in timings} == {"residual", "mixed"}
    for answer in timings:
        kernels = openvino.parse(Path(answer["optimised"]).read_bytes())
        assert [op for op, _ in answer["shares"]] == [kernel.op for kernel in kernels]
        assert sum(share for _, share in answer["shares"]) == pytest.approx(1)


def test_a_bundle_keeps_its_promises_on_openvino(session: DeviceSession, tmp_path: Path) -> None:
    import torch

    from hwsearch.deploy.bundle import deploy
    from hwsearch.deploy.verify import run_cases
    from hwsearch.models.mobilenetv2 import mobilenetv2_small

    model = mobilenetv2_small(width=0.25).eval()
    bundle = deploy(model, torch.zeros(1, 1, 28, 28), DEVICE, tmp_path / "bundle", cases=2)
    numerics, _ = run_cases(bundle, session)
    assert numerics.ok


def test_a_network_with_a_head_keeps_its_sources(session: DeviceSession) -> None:
    """Owners of the weights name the kernels, at every width alike: what a lowering template is learnt by."""
    named = [
        {source for kernel in session.lower([separable(width)])[0] for source in kernel.source} for width in (8, 30)
    ]
    assert named[0] == named[1]
    assert {"stem", "deep", "point", "fc"} <= named[0]
    graph = Graph(1, 3, 8, 8)
    graph.conv("input", "a", (3, 8))
    assert {"a", "fc"} <= {source for kernel in session.lower([head(graph, "a", 8)])[0] for source in kernel.source}


def test_a_bundle_for_a_device_of_fewer_bits_allows_its_rounding(tmp_path: Path) -> None:
    import torch

    from hwsearch.deploy.bundle import deploy

    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU()).eval()
    half = Device("openvino-bf16", "openvino", precision="bfloat16")
    bundle = deploy(model, torch.zeros(1, 1, 8, 8), half, tmp_path / "bundle")
    assert (bundle.precision, bundle.relative_tolerance) == ("bfloat16", 0.05)
    with pytest.raises(InputError, match="precision is 'bfloat16': give one of float32, int8, or the device's own"):
        deploy(model, torch.zeros(1, 1, 8, 8), DEVICE, tmp_path / "other", precision="bfloat16")
