"""Whatever ONNX Runtime executes is a kernel: its optimised graph read node by node, against its own profiler's list.

The profiler is asked what ran and in which sizes, not how long it took.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hwsearch.device.onnx_kernels import Reader, kernels_of
from hwsearch.device.runtime_onnxruntime import example

sys.path.insert(0, str(Path(__file__).parent))

import kernel_zoo as zoo

pytestmark = pytest.mark.real
CONTROL = {"If", "Loop", "Scan"}


def executed(network: bytes, folder: Path) -> tuple[onnx.ModelProto, list[dict]]:
    """ORT's optimised graph, and its profiler's entries of one run, in order."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    session.run(None, {value.name: example(value) for value in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return onnx.load(folder / "optimised.onnx"), [event["args"] for event in events if event["cat"] == "Node"]


def check(network: bytes, folder: Path) -> Reader:
    """Every executed node is a kernel, in order; shapes and element types are the runtime's own."""
    model, events = executed(network, folder)
    reader = Reader(model)
    kernels = reader.executed()
    ran = [event["op_name"] for event in events]
    if CONTROL & set(ran):
        # the profiler notes a node with a body after the body
        assert sorted(kernel.op for kernel in kernels) == sorted(ran)
        return reader
    assert [kernel.op for kernel in kernels] == ran
    assert len({kernel.node for kernel in kernels}) == len(kernels)
    for node, event in zip(model.graph.node, events, strict=True):
        for name, (written,) in zip(
            filter(None, node.output), map(dict.items, event["output_type_shape"]), strict=True
        ):
            kind, shape = written
            assert list(reader.shapes[name]) == shape, (node.op_type, name)
            assert {"float": "float32"}.get(kind, kind) == reader.tensors.dtype(name), (node.op_type, name)
    assert not reader.guesses
    return reader


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODULES)
def test_todays_exporter(name: str, tmp_path: Path) -> None:
    reader = check(zoo.dynamo(name), tmp_path)
    assert not [kernel.op for kernel in reader.executed() if kernel.family == "other"]


@pytest.mark.parametrize("name", [name for name in zoo.MODULES if name not in zoo.NOT_TRACEABLE])
def test_the_old_exporter(name: str, tmp_path: Path) -> None:
    reader = check(zoo.torchscript(name), tmp_path)
    assert not [kernel.op for kernel in reader.executed() if kernel.family == "other"]


@pytest.mark.parametrize("opset", [11, 17, 20])
def test_opsets(opset: int, tmp_path: Path) -> None:
    check(zoo.torchscript("norms", opset), tmp_path)


@pytest.mark.parametrize("name", zoo.THIRD_PARTY)
def test_graphs_of_third_parties(name: str, tmp_path: Path) -> None:
    reader = check(zoo.THIRD_PARTY[name](), tmp_path)
    unknown = [kernel.op for kernel in reader.executed() if kernel.family == "other"]
    expected = {"branches": ["If"], "loop": ["Loop"], "scan": ["Scan"], "odd_operators": ["TopK", "CumSum", "Einsum"]}
    assert unknown == expected.get(name, [])


def test_bodies_are_priced_with_the_node_that_runs_them() -> None:
    heavy = [kernel for kernel in kernels_of(zoo.branches()) if "If" in kernel.node]
    assert [(kernel.op, kernel.family) for kernel in heavy] == [
        ("If", "other"),
        ("Conv", "conv"),
        ("Relu", "elementwise"),
    ]
    assert heavy[1].macs == 6 * 6 * 8 * 8 * 9
    rounds = [kernel for kernel in kernels_of(zoo.loop(3)) if kernel.op == "MatMul"]
    assert len(rounds) == 3
    assert len({kernel.node for kernel in rounds}) == 3
    assert kernels_of(zoo.loop(3))[-1].in_channels == 16  # the size comes out of the body
    steps = kernels_of(zoo.scan())
    assert [kernel.op for kernel in steps].count("Tanh") == 5
    assert [(kernel.op, kernel.in_channels, kernel.in_height) for kernel in steps[-2:]] == [
        ("Softmax", 3, 5),
        ("Add", 3, 1),
    ]


MULTIPLYING = ["attention", "convnext", "shuffle", "einsum", "line", "volume", "up", "grouped", "gates"]


@pytest.mark.parametrize("name", MULTIPLYING)
@pytest.mark.parametrize("exporter", [zoo.dynamo, zoo.torchscript])
def test_macs_are_those_that_torch_counts(name: str, exporter) -> None:  # type: ignore[no-untyped-def]
    """On the graph as exported: the optimised one pads channels, and counts those too."""
    module, shape = zoo.MODULES[name]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(torch.zeros(shape))
    kernels = kernels_of(exporter(name))
    assert sum(kernel.macs for kernel in kernels) == counter.get_total_flops() // 2
    assert not [kernel.op for kernel in kernels if kernel.family == "other"]


def test_macs_and_bytes_in_closed_form() -> None:
    (lstm,) = [kernel for kernel in kernels_of(zoo.dynamo("lstm")) if kernel.family == "recurrent"]
    assert lstm.macs == 12 * 4 * 24 * (32 + 24)
    assert lstm.weight_bytes == 4 * 4 * 24 * (32 + 24)
    (gru,) = [kernel for kernel in kernels_of(zoo.dynamo("gru")) if kernel.family == "recurrent"]
    assert gru.macs == 2 * 12 * 3 * 24 * (32 + 24)
    one, two = [kernel for kernel in kernels_of(zoo.fused_attention()) if kernel.family == "attention"]
    assert one.macs == 12 * 32 * 96 + 2 * 12 * 12 * 32  # projection, scores, mixing
    assert one.memory_bytes == 4 * (12 * 32 + 32 * 96 + 12 * 32)
    assert two.macs == 2 * 12 * 12 * 32
    assert two.memory_bytes == 4 * 4 * 12 * 32
    assert (one.groups, two.groups) == (4, 4)
    concat = next(kernel for kernel in kernels_of(zoo.dynamo("shuffle")) if kernel.family == "concat")
    assert concat.memory_bytes == 2 * 4 * 16 * 16 * 16
    resized = [kernel for kernel in kernels_of(zoo.dynamo("resized")) if kernel.family == "resize"]
    assert [kernel.kernel_height * kernel.kernel_width for kernel in resized] == [1, 4, 16]


def test_random_shapes_of_a_product_keep_their_arithmetic() -> None:
    """Einsum and MatMul of the same arrays are the same work."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        b, n, d, m = (int(size) for size in rng.integers(1, 9, 4))
        nodes = [
            onnx.helper.make_node("Transpose", ["input"], ["t"], perm=[0, 2, 1]),
            onnx.helper.make_node("MatMul", ["input", "t"], ["p"]),
            onnx.helper.make_node("Einsum", ["input", "input"], ["q"], equation="bnd,bmd->bnm"),
            onnx.helper.make_node("MatMul", ["input", "w"], ["r"]),
            onnx.helper.make_node("Add", ["p", "q"], ["output"]),
        ]
        data = zoo._graph(nodes, [b, n, d], {"w": np.zeros((d, m), np.float32)}, "output")
        _, matmul, einsum, linear, _ = kernels_of(data)
        assert matmul.macs == einsum.macs == b * n * n * d
        assert matmul.memory_bytes == einsum.memory_bytes == 4 * b * (2 * n * d + n * n)
        assert linear.macs == b * n * d * m
        assert linear.memory_bytes == 4 * (b * n * d + d * m + b * n * m)
