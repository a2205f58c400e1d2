"""ONNX Runtime on this CPU: what it really runs, and whether our reading of it is right. No test asserts a time."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from hwsearch.device import lock
from hwsearch.device import runtime_onnxruntime as ort
from hwsearch.device.canary import canary_bytes, check_networks
from hwsearch.device.check import check_device
from hwsearch.device.onnx_kernels import Reader
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.device.stopwatch import StopwatchSettings
from hwsearch.errors import DeviceJobError, HwsearchError, InputError

sys.path.insert(0, str(Path(__file__).parent))

from device_graphs import Graph, head, residual, separable

pytestmark = [pytest.mark.real, pytest.mark.serial]

DEVICE = Device("x86-ort-1t", "onnxruntime")
#: As short as it goes, and patient: these tests are about the path, on machines of any noise.
SHORT = StopwatchSettings(
    warmup_seconds=0.01,
    reading_ms=0.5,
    rounds_min=3,
    rounds_max=3,
    good_min=1,
    near_limit=50.0,
    canary_limit=50.0,
    profile_runs=8,
)


def squeeze(channels: int) -> bytes:
    """A block with squeeze-and-excitation, SiLU, a strided and a dilated convolution, pooling and a concat."""
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
    graph.node("AveragePool", "grouped", "average", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1, pads=[1] * 4)
    return head(graph, "average", 8)


def tokens() -> bytes:
    """What no convolution is: products of matrices, softmax, layer norm."""
    graph = Graph(2, 6, 16)
    graph.node("MatMul", ["input", graph.weight("w", 16, 16)], "q")
    graph.node("Transpose", "q", "qt", perm=[0, 2, 1])
    graph.node("MatMul", ["q", "qt"], "scores")
    graph.node("Softmax", "scores", "attention", axis=-1)
    graph.node("MatMul", ["attention", "input"], "mixed")
    graph.node("LayerNormalization", ["mixed", graph.weight("s", 16), graph.weight("b", 16)], "output", axis=-1)
    return graph.bytes()


NETWORKS = {
    "canary": canary_bytes(),
    **dict(check_networks()),
    "residual": residual(),
    "residual30": residual(30),
    "separable": separable(),
    "separable30": separable(30),
    "squeeze": squeeze(24),
    "squeeze30": squeeze(30),
    "tokens": tokens(),
}


@pytest.fixture(scope="module")
def session() -> Iterator[DeviceSession]:
    with open_session(DEVICE) as opened:
        yield opened


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_are_those_that_the_runtime_reports_at_run_time(name: str) -> None:
    """Our shapes, propagated by hand, against the profiler's, node by node."""
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        options = ort._options(DEVICE)
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        running = ort._session(DEVICE, NETWORKS[name], options)
        running.run(None, {value.name: ort.example(value) for value in running.get_inputs()})
        events = json.loads(Path(running.end_profiling()).read_text(encoding="utf-8"))
        model = onnx.load(f"{folder}/optimised.onnx")
    reader = Reader(model)
    kernels = reader.kernels()
    reported = [event["args"] for event in events if event["cat"] == "Node"]
    assert [kernel.op for kernel in kernels] == [event["op_name"] for event in reported]
    for node, event in zip(model.graph.node, reported, strict=True):
        assert list(reader.shapes[node.output[0]]) == next(iter(event["output_type_shape"][0].values())), node.op_type
    assert {kernel.op for kernel in kernels if kernel.family == "other"} <= {"Softmax", "LayerNormalization"}


def test_a_stem_is_first_and_odd_widths_leave_the_blocked_path(session: DeviceSession) -> None:
    even, odd = session.lower([separable(32), separable(30)])
    assert even[0].family == "conv_first"
    assert [kernel.family for kernel in even if kernel.macs][:3] == ["conv_first", "depthwise", "pointwise"]
    if even[0].layout_out != "nchwc":
        pytest.skip("this CPU has no blocked layout")
    assert odd[0].out_channels == 32  # padded: that is what runs
    assert any(kernel.family == "reorder" for kernel in odd[:3])


def test_a_residual_add_is_fused(session: DeviceSession) -> None:
    (kernels,) = session.lower([residual(32)])
    if kernels[0].layout_out != "nchwc":
        pytest.skip("this CPU has no blocked layout")
    assert any(kernel.fused == ("add", "relu") for kernel in kernels)
    assert not any(kernel.op == "Add" for kernel in kernels)


def test_timings_and_node_shares_come_from_one_graph(session: DeviceSession) -> None:
    networks = list(NETWORKS.items())
    timings = {
        timing.network: timing for timing in session.time(networks, reference_ms=None, settings=SHORT, nodes=True)
    }
    assert set(timings) == set(NETWORKS)
    for name, timing in timings.items():
        assert timing.measured_ms > 0
        assert 0 < timing.raw_p50_ms <= timing.raw_p90_ms
        assert (timing.rounds, timing.discarded) == (3, 0)
        assert sum(share for _, share in timing.node_shares) == pytest.approx(1.0)
        assert all(share > 0 for _, share in timing.node_shares)
        assert [node for node, _ in timing.node_shares] == [kernel.node for kernel in timing.kernels]
        (lowered,) = session.lower([NETWORKS[name]])
        assert sorted(kernel.key for kernel in lowered) == sorted(kernel.key for kernel in timing.kernels)


def test_outputs_are_the_networks_own(session: DeviceSession) -> None:
    graph = Graph(1, 3, 6, 6)
    graph.conv("input", "a", (3, 4), 1)
    values = np.random.default_rng(3).standard_normal((1, 3, 6, 6)).astype(np.float32)
    weight, bias = (onnx.numpy_helper.to_array(tensor) for tensor in graph.weights)
    expected = np.einsum("nchw,oc->nohw", values, weight[:, :, 0, 0]) + bias[None, :, None, None]
    np.testing.assert_allclose(session.run(graph.bytes(), {"input": values})["a"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data", [b"", b"garbage", residual()[:300]])
def test_a_broken_network_gives_the_runtimes_reason_in_one_line(session: DeviceSession, data: bytes) -> None:
    with pytest.raises(DeviceJobError, match="network 'mine': ") as caught:
        session.optimise([data], names=["mine"])
    assert "\n" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)
    errors: list[HwsearchError] = []
    timings = session.time(
        [("broken", data), ("good", residual())],
        reference_ms=None,
        settings=SHORT,
        on_error=lambda name, error: errors.append(error),
    )
    assert [timing.network for timing in timings] == ["good"]
    assert len(errors) == 1


def test_networks_that_cannot_be_timed_say_why(session: DeviceSession) -> None:
    open_batch = Graph(0, 3, 8, 8)
    open_batch.conv("input", "x", (3, 8))
    with pytest.raises(DeviceJobError, match="network 'open': input 'input' has the open dimension"):
        list(session.time([("open", open_batch.bytes())], reference_ms=None, settings=SHORT))
    fails = Graph(1, 4)
    fails.node("Gather", [fails.weight("table", 2), "index"], "x")
    fails.nodes.insert(0, onnx.helper.make_node("Cast", ["input"], ["wide"], to=onnx.TensorProto.INT64))
    fails.nodes.insert(1, onnx.helper.make_node("Add", ["wide", fails.constant("far", [99])], ["index"]))
    with pytest.raises(DeviceJobError, match=r"network 'fails': .*out of data bounds"):
        list(session.time([("fails", fails.bytes())], reference_ms=None, settings=SHORT))


def test_a_killed_agent_costs_at_most_one_network(session: DeviceSession) -> None:
    errors: list[HwsearchError] = []
    networks = [(str(number), residual()) for number in range(24)]
    timings = session.time(
        networks, reference_ms=None, settings=SHORT, on_error=lambda name, error: errors.append(error)
    )
    first = next(timings)
    assert session.agent_pid is not None
    os.kill(session.agent_pid, signal.SIGKILL)
    rest = list(timings)
    assert len(errors) <= 1
    assert len({timing.network for timing in [first, *rest]}) == len(rest) + 1 == 24 - len(errors)


def test_the_machine_is_held_while_something_is_timed(session: DeviceSession) -> None:
    def held() -> bool:
        with open(lock.FOLDER / "hwsearch-timing.lock", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    timings = session.time([("a", residual()), ("b", residual())], reference_ms=None, settings=SHORT)
    next(timings)
    assert held()
    timings.close()  # type: ignore[attr-defined]
    # another process may measure now, so freedom is seen in this thread's own books
    assert not lock._held.files


def test_somebody_who_waits_is_told(session: DeviceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_told_until", {})  # an earlier test may have waited: that would be one episode
    code = (
        "import sys; from hwsearch.device.lock import background_lock\n"
        "with background_lock(): print('held', flush=True); sys.stdin.readline()"
    )
    repository = Path(__file__).resolve().parent.parent.parent
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository)},
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        assert holder.stdin is not None
        holder.stdin.write("\n")
        holder.stdin.flush()

    with open_session(DEVICE, message=tell) as waiting:
        assert waiting.calibrate_canary(0.1).median_ms > 0
    holder.wait(timeout=30)
    assert any("waiting" in text for text in told)


def test_two_threads_and_their_options() -> None:
    two = Device("x86-ort-2t", "onnxruntime", threads=2, options={"spinning": 1})
    with open_session(two) as opened:
        assert opened.fingerprint.threads == 2
        (timing,) = opened.time([("a", residual())], reference_ms=None, settings=SHORT)
        assert timing.measured_ms > 0
    with (
        open_session(Device("x", "onnxruntime", options={"turbo": 1})) as wrong,
        pytest.raises(InputError, match=r"options\.turbo is unknown to onnxruntime; known: spinning, "),
    ):
        wrong.lower([residual()])


def test_the_fingerprint_tells_cpu_and_version(session: DeviceSession) -> None:
    import onnxruntime

    found = session.fingerprint
    assert found.runtime_version == onnxruntime.__version__
    assert found.cpu
    assert found.isa
    assert found.governor


def test_device_check_runs_here(home: Path) -> None:
    """Whatever it finds: this machine may be busy."""
    result = check_device("x86-ort-1t", seconds=0.2, passes=2)
    assert result.reference_ms > 0
    assert result.noise_floor > 0
    assert result.verdict in ("ok", "noisy")
    assert result.ok or result.messages
    assert (Device.load("x86-ort-1t").table_folder / "device.json").is_file()
