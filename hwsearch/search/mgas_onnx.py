"""ONNX files of networks of cells without an export: a search asks for the milliseconds of hundreds of them.

The file is what exporting the folded network gives, node by node, in milliseconds instead of seconds; its weights are
any. What is deployed and measured is exported from the module itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hwsearch.models.cells import Genotype, place, weightless

if TYPE_CHECKING:
    import onnx

_OPSET, _IR = 18, 9


def cells_onnx(genotype: Genotype, widths: Mapping[str, int], input_shape: Sequence[int]) -> bytes:
    """A genotype at given widths as ONNX, batch norms folded: input ``input``, output ``output``.

    Args:
        widths: see ``Genotype.widths``.
        input_shape: ``(N, C, H, W)``.

    Example:
        >>> genotype = Genotype.full(Blueprint())                                     # doctest: +SKIP
        >>> len(cells_onnx(genotype, genotype.widths(), (1, 1, 28, 28))) > 1000       # doctest: +SKIP
        True
    """
    from onnx import TensorProto, helper

    blueprint, writer = genotype.blueprint, _Writer()
    x = writer.conv("input", (widths["stem"], blueprint.in_channels, 3, 3), blueprint.stem_stride)
    outputs = [(x, widths["stem"])] * 2
    edges = blueprint.edges()
    for c in range(blueprint.cells):
        states: dict[int, str] = {}
        for i, (before, channels) in enumerate(outputs[-2:]):
            if genotype.reads(c, i):
                stride = 2 if i == 0 and c - 1 in blueprint.reductions else 1
                states[i] = writer.pointwise(before, channels, widths[f"{c}.pre{i}"], stride)
        for e, (source, node) in enumerate(edges):
            inside, outside = widths.get(place(c, source), 0), widths[f"{c}.node{node}"]
            for name in genotype.kept[c][e]:
                middle = widths.get(f"{c}.{e}.{name}", 0)
                x = writer.operation(name, states[source], inside, middle, outside, blueprint.stride(c, e))
                states[node + 2] = writer.node("Add", [states[node + 2], x]) if node + 2 in states else x
        nodes = range(blueprint.nodes)
        joined = [states[n + 2] for n in nodes]
        x = writer.node("Concat", joined, axis=1) if len(joined) > 1 else joined[0]
        outputs.append((x, sum(widths[f"{c}.node{n}"] for n in nodes)))
    axes = writer.constant(np.array([2, 3], dtype=np.int64))
    x = writer.node("ReduceMean", [outputs[-1][0], axes], keepdims=0)
    weight, bias = writer.weight((blueprint.classes, outputs[-1][1])), writer.weight((blueprint.classes,))
    writer.node("Gemm", [x, weight, bias], transB=1)
    writer.nodes[-1].output[0] = "output"
    graph = helper.make_graph(
        writer.nodes,
        "cells",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(input_shape))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [input_shape[0], blueprint.classes])],
        writer.tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="hwsearch")
    model.ir_version = _IR
    return bytes(model.SerializeToString(deterministic=True))


class _Writer:
    """Writes nodes one after another."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self._written = 0
        self._known: dict[tuple[object, ...], str] = {}

    def node(self, op: str, inputs: Sequence[str], **attributes: object) -> str:
        from onnx import helper

        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"n_{name}", **attributes))
        return name

    def constant(self, values: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"w{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def weight(self, shape: Sequence[int]) -> str:
        """Small values that are all different: a runtime stores equal tensors once."""
        size = int(np.prod(shape))
        values = (np.arange(self._written, self._written + size) % 8191 - 4095).astype(np.float32) / 1e5
        self._written += size
        return self.constant(values.reshape(tuple(shape)))

    def conv(self, x: str, shape: Sequence[int], stride: int = 1, dilation: int = 1, groups: int = 1) -> str:
        """A convolution with its folded bias, "same" padding."""
        size = shape[-1]
        pad = dilation * (size // 2)
        return self.node(
            "Conv", [x, self.weight(shape), self.weight(shape[:1])], dilations=[dilation] * 2, group=groups,
            kernel_shape=[size, size], pads=[pad] * 4, strides=[stride] * 2,
        )  # fmt: skip

    def relu(self, x: str) -> str:
        return self.once("Relu", x)

    def once(self, op: str, x: str, **attributes: object) -> str:
        """A node without weights: one for all that read it, as exporters write it."""
        key = (op, x, repr(attributes))
        if key not in self._known:
            self._known[key] = self.node(op, [x], **attributes)
        return self._known[key]

    def pointwise(self, x: str, inside: int, outside: int, stride: int = 1) -> str:
        return self.conv(self.relu(x), (outside, inside, 1, 1), stride)

    def operation(self, name: str, x: str, inside: int, middle: int, outside: int, stride: int) -> str:
        """One operation of an edge."""
        if name == "skip":
            return x if weightless(name, stride) else self.pointwise(x, inside, outside, stride)
        size = int(name[-1])
        if name[:3] in ("avg", "max"):
            op, more = ("MaxPool", {}) if name.startswith("max") else ("AveragePool", {"count_include_pad": 0})
            shared = {"kernel_shape": [size] * 2, "pads": [size // 2] * 4, "strides": [stride] * 2}
            return self.once(op, x, **shared, **more)
        spread = 2 if name.startswith("dil") else 1
        sizes = [inside, outside] if name.startswith("dil") else [inside, middle, outside]
        for number, (read, written) in enumerate(pairwise(sizes)):
            x = self.relu(x)
            # a depth-wise convolution is followed by no batch norm of its own: it has no bias
            x = self.depthwise(x, read, size, stride if number == 0 else 1, spread)
            x = self.conv(x, (written, read, 1, 1))
        return x

    def depthwise(self, x: str, channels: int, size: int, stride: int, dilation: int) -> str:
        pad = dilation * (size // 2)
        return self.node(
            "Conv", [x, self.weight((channels, 1, size, size))], dilations=[dilation] * 2, group=channels,
            kernel_shape=[size, size], pads=[pad] * 4, strides=[stride] * 2,
        )  # fmt: skip
