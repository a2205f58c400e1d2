"""Optimised graphs read as kernels: families, shapes as run, fused tails, nothing dropped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hwsearch.device.onnx_kernels import kernels_of, spread
from hwsearch.errors import DeviceJobError
from hwsearch.graph.kernel import FAMILIES, Kernel

sys.path.insert(0, str(Path(__file__).parent))

from device_graphs import NCHWC, Graph, residual

Build = Callable[[Graph], object]


def last(build: Build, *shape: int) -> Kernel:
    graph = Graph(*shape)
    build(graph)
    return kernels_of(graph.bytes())[-1]


@pytest.mark.parametrize(
    ("family", "build"),
    [
        ("conv_first", lambda g: g.conv("input", "x", (3, 16))),
        ("pointwise", lambda g: g.conv("input", "x", (3, 16), 1)),
        ("depthwise", lambda g: g.conv("input", "x", (3, 3), group=3)),
        ("depthwise", lambda g: g.conv("input", "x", (3, 6), group=3)),
        (
            "conv_transpose",
            lambda g: g.node("ConvTranspose", ["input", g.weight("w", 3, 8, 2, 2)], "x", strides=[2, 2]),
        ),
        ("pool", lambda g: g.node("MaxPool", "input", "x", kernel_shape=[2, 2], strides=[2, 2])),
        ("global_pool", lambda g: g.node("GlobalAveragePool", "input", "x")),
        ("global_pool", lambda g: g.node("ReduceMean", "input", "x", axes=[2, 3], keepdims=1)),
        ("global_pool", lambda g: g.node("ReduceMean", "input", "x", axes=[-1, -2], keepdims=0)),
        ("reduce", lambda g: g.node("ReduceMean", "input", "x", axes=[1])),
        ("elementwise", lambda g: g.node("Relu", "input", "x")),
        ("elementwise", lambda g: g.node("Mul", ["input", "input"], "x")),
        ("concat", lambda g: g.node("Concat", ["input", "input", "input"], "x", axis=1)),
        ("free", lambda g: g.node("Flatten", "input", "x")),
        ("free", lambda g: g.node("Reshape", ["input", g.constant("to", [0, -1])], "x")),
        ("free", lambda g: g.node("Identity", "input", "x")),
        ("free", lambda g: g.node("Squeeze", ["input", g.constant("to", [0])], "x")),
        ("move", lambda g: g.node("Transpose", "input", "x", perm=[0, 2, 3, 1])),
        ("move", lambda g: g.node("Pad", ["input", g.constant("to", [0, 0, 1, 1, 0, 0, 1, 1])], "x")),
        ("norm", lambda g: g.node("Softmax", "input", "x")),
        ("other", lambda g: g.node("NobodyKnows", "input", "x", domain="com.microsoft")),
    ],
)
def test_families(family: str, build: Build) -> None:
    kernel = last(build, 1, 3, 8, 8)
    assert kernel.family == family
    assert family in FAMILIES


def test_one_channel_is_not_depthwise_and_few_groups_are_not_either() -> None:
    assert last(lambda g: g.conv("input", "x", (8, 8), group=2), 1, 8, 8, 8).family == "grouped"
    assert last(lambda g: g.conv("input", "x", (1, 8)), 1, 1, 8, 8).family == "conv_first"


def test_a_dense_convolution_and_its_numbers() -> None:
    kernel = last(lambda g: g.conv("input", "body.x", (16, 24), 5, strides=[2, 2]), 2, 16, 9, 11)
    assert kernel.family == "conv"
    assert (kernel.batch, kernel.in_channels, kernel.in_height, kernel.in_width) == (2, 16, 9, 11)
    assert (kernel.out_channels, kernel.out_height, kernel.out_width) == (24, 5, 6)
    assert (kernel.kernel_height, kernel.kernel_width, kernel.stride, kernel.groups) == (5, 5, 2, 1)
    assert kernel.macs == 2 * 5 * 6 * 24 * 16 * 25
    assert kernel.source == ("body.x",)
    assert kernel.node == "000_Conv"


def test_rectangular_kernels_and_dilation() -> None:
    def build(graph: Graph) -> None:
        inputs = ["input", graph.weight("w", 8, 16, 1, 7)]
        graph.node("Conv", inputs, "x", kernel_shape=[1, 7], pads=[0, 6, 0, 6], dilations=[2, 2], strides=[1, 1])

    kernel = last(build, 1, 16, 10, 10)
    assert (kernel.family, kernel.kernel_height, kernel.kernel_width, kernel.dilation) == ("conv", 1, 7, 2)
    assert (kernel.out_height, kernel.out_width) == (10, 10)


def test_one_and_three_spatial_axes_keep_their_arithmetic() -> None:
    def build(graph: Graph, *window: int) -> None:
        pads = [size // 2 for size in window] * 2
        inputs = ["input", graph.weight("w", 8, 6, *window)]
        graph.node("Conv", inputs, "x", kernel_shape=list(window), pads=pads)

    line = last(lambda graph: build(graph, 5), 2, 6, 20)
    assert (line.family, line.macs) == ("conv", 2 * 20 * 8 * 6 * 5)
    volume = last(lambda graph: build(graph, 3, 3, 3), 1, 6, 4, 5, 7)
    assert (volume.family, volume.macs) == ("conv", 4 * 5 * 7 * 8 * 6 * 27)


def test_the_blocked_path_with_padded_channels_and_fused_tails() -> None:
    """As ONNX Runtime writes it for 30 channels and a block of 8."""
    graph = Graph(1, 3, 8, 8)
    graph.conv("input", "s", (3, 32), activation="Relu", domain=NCHWC)
    graph.conv("s", "a", (32, 32), extra="s", activation="HardSigmoid", domain=NCHWC)
    graph.node("MaxPool", "a", "p", domain=NCHWC, kernel_shape=[2, 2], strides=[2, 2])
    graph.node("QuickGelu", "p", "q", domain="com.microsoft", alpha=1.0)
    graph.node("ReorderOutput", "q", "o", domain=NCHWC, channels=30)
    graph.node("ReorderInput", "o", "i", domain=NCHWC)
    graph.conv("i", "z", (32, 16), 1, domain=NCHWC)
    stem, body, pool, gelu, out, back, point = kernels_of(graph.bytes())
    assert (stem.family, stem.layout_in, stem.layout_out, stem.fused) == ("conv_first", "nchw", "nchwc", ("relu",))
    assert (body.family, body.layout_in, body.fused) == ("conv", "nchwc", ("add", "hardsigmoid"))
    assert body.input_elements == 2 * 32 * 64  # the fused add reads one more tensor
    assert (pool.family, pool.layout_out, pool.out_height) == ("pool", "nchwc", 4)
    assert (gelu.family, gelu.layout_in, gelu.layout_out) == ("elementwise", "nchwc", "nchwc")
    assert (out.family, out.in_channels, out.out_channels, out.layout_out) == ("reorder", 32, 30, "nchw")
    assert (back.family, back.in_channels, back.out_channels, back.layout_out) == ("reorder", 30, 32, "nchwc")
    assert (point.family, point.in_channels) == ("pointwise", 32)


def test_a_reorder_pads_to_the_block_of_the_graph() -> None:
    graph = Graph(1, 20, 4, 4)
    graph.node("ReorderInput", "input", "i", domain=NCHWC)
    graph.node("Relu", "i", "r")
    graph.conv("r", "z", (32, 48), 1, domain=NCHWC)
    assert kernels_of(graph.bytes())[0].out_channels == 32  # 48 outputs: blocks of 16


def test_channels_last_reorders() -> None:
    graph = Graph(1, 16, 4, 5)
    graph.conv("input", "z", (16, 16), 1, domain=NCHWC)
    graph.node("ReorderOutput", "z", "o", domain=NCHWC, channels=12, channels_last=1)
    graph.node("Softmax", "o", "s")
    _, reorder, softmax = kernels_of(graph.bytes())
    assert (reorder.out_channels, reorder.out_height, reorder.out_width) == (12, 4, 5)
    assert (softmax.in_channels, softmax.in_height) == (12, 4 * 5)  # rows of 12 values


def test_linear_layers_and_matrix_products() -> None:
    def linear(graph: Graph) -> None:
        graph.node("Flatten", "input", "flat")
        graph.node(
            "FusedGemm", ["flat", graph.weight("w", 10, 48)], "x", domain="com.microsoft", transB=1, activation="Relu"
        )

    kernel = last(linear, 4, 3, 4, 4)
    assert (kernel.family, kernel.batch, kernel.in_channels, kernel.out_channels) == ("gemm", 4, 48, 10)
    assert (kernel.macs, kernel.fused) == (4 * 48 * 10, ("relu",))
    product = last(lambda g: g.node("MatMul", ["input", g.weight("w", 7, 5)], "x"), 2, 3, 6, 7)
    assert product.family == "gemm"
    assert product.macs == 2 * 3 * 6 * 7 * 5


def test_a_transposed_batch_as_attention_has_it() -> None:
    def build(graph: Graph) -> None:
        graph.node("Transpose", "input", "t", perm=[1, 2, 3, 0])
        graph.node("FusedMatMul", ["input", "t"], "x", domain="com.microsoft", transBatchA=1)

    kernel = last(build, 16, 2, 4, 8)  # (rows, batch, heads, inner)
    assert (kernel.batch, kernel.in_channels, kernel.in_height, kernel.out_channels) == (2 * 4, 8, 16, 16)
    assert kernel.macs == 2 * 4 * 16 * 16 * 8
    assert kernel.memory_bytes == 4 * 2 * 4 * (16 * 8 + 8 * 16 + 16 * 16)  # both operands are activations


def test_broadcasting_counts_only_tensors_of_full_size() -> None:
    def gate(graph: Graph) -> None:
        graph.node("GlobalAveragePool", "input", "g")
        graph.node("Mul", ["g", "input"], "x")

    kernel = last(gate, 1, 16, 8, 8)
    assert (kernel.inputs, kernel.in_height, kernel.out_height) == (1, 8, 8)
    assert last(lambda g: g.node("Add", ["input", "input"], "x"), 1, 4, 8, 8).inputs == 2
    assert last(lambda g: g.node("Add", ["input", g.weight("w", 4, 1, 1)], "x"), 1, 4, 8, 8).inputs == 1


def test_concat_adds_up_and_counts() -> None:
    kernel = last(lambda g: g.node("Concat", ["input", "input", "input"], "x", axis=1), 1, 5, 4, 4)
    assert (kernel.inputs, kernel.in_channels, kernel.out_channels) == (3, 5, 15)


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ({"kernel_shape": [3, 3], "strides": [2, 2]}, 3),
        ({"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, 4),
        ({"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1]}, 5),  # 8 + 2 - 2, /2, + 1
        ({"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, 4),
        ({"kernel_shape": [3, 3], "strides": [1, 1], "auto_pad": "VALID"}, 6),
        ({"kernel_shape": [3, 3], "dilations": [2, 2]}, 4),
    ],
)
def test_windows(attributes: dict, size: int) -> None:
    assert last(lambda g: g.node("MaxPool", "input", "x", **attributes), 1, 4, 8, 8).out_height == size


def test_a_window_does_not_start_in_the_padding_at_the_end() -> None:
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1]}
    assert last(lambda g: g.node("AveragePool", "input", "x", **attributes), 1, 4, 17, 17).out_height == 9


def test_every_node_is_a_kernel_and_shapes_go_past_the_unknown() -> None:
    graph = Graph(1, 4, 8, 8)
    graph.node("NobodyKnows", "input", "u", domain="com.microsoft")
    graph.node("Split", "u", "v", axis=1)
    graph.nodes[-1].output.append("w")
    graph.node("Relu", "w", "x")
    unknown, split, relu = kernels_of(graph.bytes())
    assert (unknown.family, unknown.op) == ("other", "NobodyKnows")
    assert split.family == "move"
    assert (relu.in_channels, relu.in_height) == (2, 8)
    assert [kernel.node for kernel in (unknown, split, relu)] == ["000_NobodyKnows", "001_Split", "002_Relu"]


def test_kernels_are_equal_where_they_compute_the_same() -> None:
    one, two = kernels_of(residual()), kernels_of(residual())
    assert [kernel.key for kernel in one] == [kernel.key for kernel in two]
    bodies = [kernel for kernel in one if kernel.family == "conv"]
    assert len(bodies) == 2
    assert bodies[0] == bodies[1]
    assert bodies[0].source != bodies[1].source


@pytest.mark.parametrize("data", [b"garbage", b"\x00" * 50])
def test_bytes_that_are_no_graph_are_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(DeviceJobError, match="no ONNX file") as caught:
        kernels_of(data)
    assert "\n" not in str(caught.value)


def test_an_open_dimension_is_refused() -> None:
    graph = Graph(0, 3, 8, 8)
    graph.conv("input", "x", (3, 16))
    with pytest.raises(DeviceJobError, match="'input' has an open dimension"):
        kernels_of(graph.bytes())


def test_any_shape_is_spread_over_four_axes() -> None:
    assert spread(()) == (1, 1, 1, 1)
    assert spread((7,)) == (1, 7, 1, 1)
    assert spread((2, 7)) == (2, 7, 1, 1)
    assert spread((2, 7, 5)) == (2, 7, 5, 1)
    assert spread((2, 7, 5, 3)) == (2, 7, 5, 3)
    assert spread((2, 7, 5, 3, 4)) == (2, 7, 15, 4)
