"""8-bit graphs as ONNX Runtime's own tools write them: the kernels carry precision, family, and the bytes of it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from hwsearch.graph.kernel import Kernel, element_bytes

sys.path.insert(0, str(Path(__file__).parent))

from device_graphs import Graph, head
from test_kernel_coverage import check

pytestmark = pytest.mark.real
U8, S8 = QuantType.QUInt8, QuantType.QInt8


def network() -> bytes:
    """Dense, depth-wise, pointwise; a sum, a gate, pools, a concat, a linear layer; odd widths."""
    graph = Graph(1, 3, 32, 32)
    graph.conv("input", "stem", (3, 32), strides=[2, 2])
    graph.node("Relu", "stem", "stem_r")
    graph.conv("stem_r", "deep", (32, 32), group=32)
    graph.node("Relu", "deep", "deep_r")
    graph.conv("deep_r", "point", (32, 32), 1)
    graph.node("Add", ["point", "stem_r"], "sum")
    graph.node("GlobalAveragePool", "sum", "mean")
    graph.conv("mean", "gate", (32, 32), 1)
    graph.node("Sigmoid", "gate", "gate_s")
    graph.node("Mul", ["sum", "gate_s"], "scaled")
    graph.node("MaxPool", "scaled", "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    graph.conv("pool", "wide", (32, 30))
    graph.node("Relu", "wide", "wide_r")
    graph.node("Concat", ["wide_r", "pool"], "joined", axis=1)
    graph.node("AveragePool", "joined", "average", kernel_shape=[2, 2], strides=[2, 2])
    return head(graph, "average", 62)


class Random(CalibrationDataReader):
    """Two random images."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.images = iter([{"input": rng.standard_normal((1, 3, 32, 32)).astype(np.float32)} for _ in range(2)])

    def get_next(self) -> dict | None:
        return next(self.images, None)


def static(folder: Path, form: QuantFormat, weights: QuantType, activations: QuantType) -> bytes:
    (folder / "float.onnx").write_bytes(network())
    quantize_static(
        folder / "float.onnx", folder / "eight.onnx", Random(), quant_format=form, weight_type=weights,
        activation_type=activations, per_channel=weights is S8,
    )  # fmt: skip
    return (folder / "eight.onnx").read_bytes()


def kernels(network: bytes, folder: Path) -> tuple[Kernel, ...]:
    found = check(network, folder).executed()
    assert not [kernel.op for kernel in found if kernel.family == "other"]
    return found


@pytest.mark.parametrize(("weights", "dtype"), [(S8, "uint8*int8"), (U8, "uint8")])
def test_a_calibrated_network_runs_in_eight_bits(weights: QuantType, dtype: str, tmp_path: Path) -> None:
    found = kernels(static(tmp_path, QuantFormat.QDQ, weights, U8), tmp_path)
    heavy = [kernel for kernel in found if kernel.macs]
    assert {kernel.dtype for kernel in heavy} == {dtype}
    assert Counter(kernel.family for kernel in heavy) == Counter(conv_first=1, depthwise=1, pointwise=2, conv=1, gemm=1)
    first = heavy[0]
    assert (first.in_channels, first.in_height, first.out_channels, first.out_height) == (3, 32, 32, 16)
    assert first.memory_bytes == 3 * 32 * 32 + 32 * 27 + 32 * 16 * 16  # one byte each
    assert first.weight_bytes == 32 * 27
    by_op = {kernel.op: kernel for kernel in found}
    assert by_op["QLinearAdd"].memory_bytes == 3 * 32 * 16 * 16
    assert by_op["QLinearConcat"].memory_bytes == 2 * 62 * 8 * 8
    assert by_op["QLinearMul"].inputs == 1  # the gate costs nothing to read
    assert by_op["QuantizeLinear"].memory_bytes == (4 + 1) * 3 * 32 * 32
    assert by_op["QGemm"].macs == 620


def test_channels_last_is_a_layout_not_a_shape(tmp_path: Path) -> None:
    found = kernels(static(tmp_path, QuantFormat.QDQ, S8, U8), tmp_path)
    if not any(kernel.layout_out == "nhwc" for kernel in found):
        pytest.skip("this CPU runs 8 bits with the channels first")
    for kernel in found:
        if kernel.layout_in == kernel.layout_out == "nhwc" and kernel.family != "conv_first":
            assert kernel.in_channels in (30, 32), kernel
    there = [kernel for kernel in found if kernel.op == "Transpose"]
    assert {(kernel.layout_in, kernel.layout_out) for kernel in there} == {("nchw", "nhwc"), ("nhwc", "nchw")}
    assert all((k.in_channels, k.in_height, k.in_width) == (k.out_channels, k.out_height, k.out_width) for k in there)


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_signed_activations_are_read_too(form: QuantFormat, tmp_path: Path) -> None:
    assert kernels(static(tmp_path, form, S8, S8), tmp_path)


def test_weights_alone_quantised_in_advance(tmp_path: Path) -> None:
    (tmp_path / "float.onnx").write_bytes(network())
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "eight.onnx")
    found = kernels((tmp_path / "eight.onnx").read_bytes(), tmp_path)
    whole = next(kernel for kernel in found if kernel.op == "ConvInteger")
    assert whole.dtype == "uint8*int8>int32"
    assert whole.memory_bytes == 3 * 32 * 32 + 32 * 27 + 4 * 32 * 16 * 16
    assert {kernel.dtype for kernel in found if kernel.op == "DynamicQuantizeLinear"} == {"float32>uint8"}
    assert {kernel.dtype for kernel in found if kernel.op == "Cast"} == {"int32>float32"}


def test_products_of_whole_numbers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["input"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["product"]),
        helper.make_node("Cast", ["product"], ["output"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "whole",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [6, 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((16, 8), np.int8), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    _, product, _ = kernels(model.SerializeToString(), tmp_path)
    assert (product.family, product.dtype, product.macs) == ("gemm", "uint8*int8>int32", 6 * 16 * 8)
    assert product.memory_bytes == 6 * 16 + 16 * 8 + 4 * 6 * 8


def test_element_sizes() -> None:
    assert element_bytes("float16") == (2, 2, 2)
    assert element_bytes("float32*int4") == (4, 0.5, 4)
    assert element_bytes("float32>uint8") == (4, 4, 1)
    assert element_bytes("no such type") == (4, 4, 4)
