"""Small ONNX graphs for the device tests, written node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

NCHWC = "com.microsoft.nchwc"


class Graph:
    """Collects nodes; ``bytes()`` makes the model. Weights are random with a fixed seed."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.rng = np.random.default_rng(0)

    def weight(self, name: str, *shape: int) -> str:
        values = self.rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def constant(self, name: str, values: list[int]) -> str:
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def node(self, op: str, inputs: str | list[str], output: str, domain: str = "", **attributes: Any) -> str:
        inputs = [inputs] if isinstance(inputs, str) else inputs
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def conv(self, source: str, output: str, channels: tuple[int, int], kernel: int = 3, **attributes: Any) -> str:
        inner, outer = channels
        attributes = {"pads": [kernel // 2] * 4, "group": 1, "strides": [1, 1]} | attributes
        shape = (outer, inner // attributes["group"], kernel, kernel)
        inputs = [source, self.weight(f"{output}.weight", *shape), self.weight(f"{output}.bias", outer)]
        extra = attributes.pop("extra", None)
        return self.node(
            "Conv", [*inputs, *([extra] if extra else [])], output, kernel_shape=[kernel] * 2, **attributes
        )

    def bytes(self, output: str | None = None) -> bytes:
        output = output or self.nodes[-1].output[0]
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(self.shape))],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.weights,
        )
        opset = [helper.make_opsetid("", 17), helper.make_opsetid(NCHWC, 1), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def residual(channels: int = 32, side: int = 14) -> bytes:
    """Stem, residual block, pooling and a linear layer."""
    graph = Graph(1, 3, side, side)
    graph.conv("input", "stem", (3, channels))
    graph.node("Relu", "stem", "stem_relu")
    graph.conv("stem_relu", "a", (channels, channels))
    graph.node("Relu", "a", "a_relu")
    graph.conv("a_relu", "b", (channels, channels))
    graph.node("Add", ["b", "stem_relu"], "sum")
    graph.node("Relu", "sum", "sum_relu")
    return head(graph, "sum_relu", channels)


def separable(channels: int = 32, side: int = 14) -> bytes:
    """Stem, depth-wise and pointwise convolution, pooling and a linear layer."""
    graph = Graph(1, 3, side, side)
    graph.conv("input", "stem", (3, channels))
    graph.node("Relu", "stem", "stem_relu")
    graph.conv("stem_relu", "deep", (channels, channels), group=channels)
    graph.node("Relu", "deep", "deep_relu")
    graph.conv("deep_relu", "point", (channels, 32), 1)
    return head(graph, "point", 32)


def head(graph: Graph, source: str, channels: int) -> bytes:
    graph.node("GlobalAveragePool", source, "pooled")
    graph.node("Flatten", "pooled", "flat", axis=1)
    inputs = ["flat", graph.weight("fc.weight", 10, channels), graph.weight("fc.bias", 10)]
    graph.node("Gemm", inputs, "output", transB=1)
    return graph.bytes()
