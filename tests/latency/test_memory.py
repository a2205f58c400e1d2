"""Peak memory: closed forms, a reference that forgets nothing, and the runtime's own books."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hwsearch.device.onnx_kernels import Reader
from hwsearch.errors import DeviceJobError
from hwsearch.latency import random_quantised
from hwsearch.latency.memory import peak_memory
from hwsearch.latency.random_networks import FAMILIES, random_network


def network(
    nodes: Iterable[onnx.NodeProto], shape: list[int], outputs: dict[str, list[int]], **weights: np.ndarray
) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "memory",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in outputs.items()],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


def conv(source: str, weight: str, out: str) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, weight], [out])


def weight(out: int, inner: int) -> np.ndarray:
    return np.zeros((out, inner, 1, 1), np.float32)


def test_a_chain_needs_the_two_largest_neighbours() -> None:
    nodes = [conv("input", "a", "x"), conv("x", "b", "y"), conv("y", "c", "output")]
    data = network(nodes, [1, 2, 5, 5], {"output": [1, 3, 5, 5]}, a=weight(6, 2), b=weight(4, 6), c=weight(3, 4))
    found = peak_memory(data)
    assert found.peak_activation_bytes == 4 * 25 * (6 + 4)
    assert found.node == "001_Conv"
    assert found.input_bytes == 4 * 25 * 2
    assert found.weight_bytes == 4 * (12 + 24 + 12)
    assert found.total_bytes == 4 * (250 + 50 + 48)


def test_a_skip_stays_alive_and_an_activation_costs_nothing() -> None:
    def data(tail: str) -> bytes:
        nodes = [
            conv("input", "a", "skip"),
            conv("skip", "b", "x"),
            helper.make_node(tail, ["x"], ["r"]),
            conv("r", "c", "y"),
            helper.make_node("Concat", ["y", "skip"], ["output"], axis=1),
        ]
        return network(nodes, [1, 2, 5, 5], {"output": [1, 9, 5, 5]}, a=weight(6, 2), b=weight(8, 6), c=weight(3, 8))

    in_place = peak_memory(data("Relu"))
    assert in_place.peak_activation_bytes == 4 * 25 * max(6 + 8 + 3, 3 + 6 + 9)
    copied = peak_memory(data("Abs"))
    assert copied.peak_activation_bytes == 4 * 25 * (6 + 8 + 8)


def test_a_dead_buffer_waits_for_a_tensor_of_its_shape() -> None:
    nodes = [
        conv("input", "a", "x"),  # 6 channels, dead after y
        conv("x", "b", "y"),
        conv("y", "c", "z"),
        conv("z", "d", "w"),  # 6 channels again: takes the buffer of x, which was kept for it
        conv("w", "e", "output"),
    ]
    data = network(
        nodes, [1, 2, 5, 5], {"output": [1, 1, 5, 5]},
        a=weight(6, 2), b=weight(4, 6), c=weight(5, 4), d=weight(6, 5), e=weight(1, 6),
    )  # fmt: skip
    assert peak_memory(data).peak_activation_bytes == 4 * 25 * (6 + 4 + 5)


def test_a_view_shares_and_an_output_stays() -> None:
    nodes = [
        conv("input", "a", "x"),
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["first"]),
        helper.make_node("Gemm", ["flat", "v"], ["second"]),
    ]
    data = network(
        nodes, [1, 2, 5, 5], {"first": [1, 30], "second": [1, 40]},
        a=weight(6, 2), w=np.zeros((150, 30), np.float32), v=np.zeros((150, 40), np.float32),
    )  # fmt: skip
    assert peak_memory(data).peak_activation_bytes == 4 * (150 + 30 + 40)


def test_a_body_counts_where_it_runs() -> None:
    branch = [
        helper.make_graph(
            [conv("x", "b", f"{name}1"), conv(f"{name}1", "c", f"{name}2")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}2", TensorProto.FLOAT, [1, 3, 5, 5])],
        )
        for name in ("yes", "no")
    ]
    nodes = [
        conv("input", "a", "x"),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["go"]),
        helper.make_node("If", ["go"], ["output"], then_branch=branch[0], else_branch=branch[1]),
    ]
    data = network(
        nodes, [1, 2, 5, 5], {"output": [1, 3, 5, 5]},
        a=weight(6, 2), b=weight(20, 6), c=weight(3, 20), zero=np.zeros((), np.float32),
    )  # fmt: skip
    found = peak_memory(data)
    assert found.node == "003_If"
    assert found.peak_activation_bytes == 4 * 25 * (6 + 20 + 3) + 1  # the condition is one byte


def reference(data: bytes) -> int:
    """Bytes of tensors that are still needed, at the worst node: no sharing, no waiting."""
    model = onnx.load_from_string(data)
    reader = Reader(model)
    reader.kernels()
    nodes, worst = list(model.graph.node), 0
    kept = {value.name for value in model.graph.output}
    for step in range(len(nodes)):
        made = {name for node in nodes[: step + 1] for name in node.output}
        needed = {name for node in nodes[step:] for name in node.input} | kept | set(nodes[step].output)
        live = (made & needed) - set(reader.constants)
        worst = max(worst, sum(int(np.prod(reader.shapes[name])) * 4 for name in live))
    return worst


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_random_networks_lie_around_the_reference(family: str) -> None:
    """Writing in place and views save; buffers that wait cost: both by bounded amounts."""
    for seed in range(3):
        data = random_network(family, np.random.default_rng(seed))
        found, wanted = peak_memory(data).peak_activation_bytes, reference(data)
        assert 0.45 * wanted <= found <= 2.0 * wanted, (family, seed)


def books(data: bytes, folder: Path) -> tuple[bytes, int]:
    """The runtime's own peak: bytes asked of its arena and not given back, after each node, above those before."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_mem_pattern = False  # else one block is taken for all
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    feed = {v.name: np.zeros(v.shape, np.float32) for v in session.get_inputs()}
    session.run(None, feed)
    events = [e["args"] for e in json.loads(Path(session.end_profiling()).read_text()) if e.get("cat") == "Node"]
    if "mem_bytes_requested_in_use" not in events[0]:
        pytest.skip("this version of ONNX Runtime does not tell")
    in_use = [int(event["mem_bytes_requested_in_use"]) for event in events]
    before = in_use[0] - int(events[0]["mem_requested_in_use_delta"])
    return (folder / "optimised.onnx").read_bytes(), max(in_use) - before


@pytest.mark.real
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_plan_is_the_runtimes_own(family: str, tmp_path: Path) -> None:
    for seed in range(4):
        optimised, wanted = books(random_network(family, np.random.default_rng(seed)), tmp_path)
        assert peak_memory(optimised).peak_activation_bytes == wanted, (family, seed)


@pytest.mark.real
@pytest.mark.parametrize("family", random_quantised.FAMILIES)
def test_eight_bits_too(family: str, tmp_path: Path) -> None:
    optimised, wanted = books(random_quantised.random_network(family, np.random.default_rng(5)), tmp_path)
    assert peak_memory(optimised).peak_activation_bytes == wanted


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(DeviceJobError, match="no ONNX file"):
        peak_memory(b"\x01\x02\x03")
