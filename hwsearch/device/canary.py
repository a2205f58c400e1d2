"""Fixed networks: the canary, timed just before and just after everything else, and those of `device check`.

The canary's time says how fast the machine is at that moment, so it mixes what networks are made of: dense
convolutions, a depth-wise one, a 1x1, a residual add and a linear layer. It is the same on every device and for ever:
the reference speed of every table in git depends on it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

#: Names the canary in ``device.json``; numbers made with another one cannot be compared.
CANARY = "canary-2"


@cache
def canary_bytes() -> bytes:
    """The canary as ONNX (4 MMACs: 0.1 to 0.2 ms on one core of a server; input ``(1, 16, 28, 28)``).

    Short, because disturbances come and go within milliseconds: a canary, a network and a canary must fit in between.
    """
    net = _Builder(CANARY, (1, 16, 28, 28))
    first = net.conv("dense_1", "input", 16, 3)
    deep = net.conv("depthwise", first, 16, 3, depthwise=True)
    point = net.conv("pointwise", deep, 16, 1)
    second = net.conv("dense_2", point, 16, 3, relu=False)
    return net.finish(net.add("sum", second, first))


@cache
def check_networks() -> tuple[tuple[str, bytes], ...]:
    """(name, ONNX) of six unlike networks whose times `device check` takes again and again."""
    stem = _Builder("stem", (1, 3, 48, 48))
    narrow = _Builder("narrow", (1, 16, 28, 28))
    depth = _Builder("depthwise", (1, 64, 28, 28))
    point = _Builder("pointwise", (1, 96, 14, 14))
    odd = _Builder("odd", (1, 30, 28, 28))  # leaves the blocked path: reorders
    adds = _Builder("adds", (1, 64, 56, 56))  # memory, hardly any arithmetic
    made = [
        (stem, stem.conv("b", stem.conv("a", "input", 24, 3), 24, 3)),
        (narrow, narrow.conv("b", narrow.conv("a", "input", 32, 3), 64, 3)),
        (depth, depth.conv("b", depth.conv("a", "input", 64, 3, depthwise=True), 64, 1)),
        (point, point.conv("b", point.conv("a", "input", 256, 1), 96, 1)),
        (odd, odd.conv("b", odd.conv("a", "input", 30, 3, depthwise=True), 32, 3)),
        (adds, adds.add("b", adds.add("a", "input", "input"), "input")),
    ]
    return tuple((net.name, net.finish(last)) for net, last in made)


class _Builder:
    """Writes a small ONNX network node by node; every method returns the name of its output."""

    def __init__(self, name: str, shape: tuple[int, int, int, int]) -> None:
        import numpy as np

        self.name, self.shape = name, shape
        self._rng = np.random.default_rng(20)
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._channels = {"input": shape[1]}

    def _weight(self, name: str, *shape: int) -> str:
        import numpy as np
        from onnx import numpy_helper

        values = self._rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        self._weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def _node(self, op: str, inputs: list[str], output: str, channels: int, **attributes: Any) -> str:
        from onnx import helper

        self._nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        self._channels[output] = channels
        return output

    def conv(
        self, name: str, source: str, channels: int, kernel: int, *, relu: bool = True, depthwise: bool = False
    ) -> str:
        groups = channels if depthwise else 1
        shape = (channels, self._channels[source] // groups, kernel, kernel)
        inputs = [source, self._weight(f"{name}.weight", *shape), self._weight(f"{name}.bias", channels)]
        settings = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4, "group": groups}
        output = self._node("Conv", inputs, name, channels, **settings)
        return self._node("Relu", [output], f"{name}_relu", channels) if relu else output

    def add(self, name: str, left: str, right: str) -> str:
        return self._node("Add", [left, right], name, self._channels[left])

    def finish(self, last: str) -> bytes:
        """Global pooling and a linear layer to 10 outputs after ``last``, and the whole as bytes."""
        from onnx import TensorProto, helper

        channels = self._channels[last]
        pooled = self._node("GlobalAveragePool", [last], "pooled", channels)
        flat = self._node("Flatten", [pooled], "flat", channels)
        linear = [flat, self._weight("linear.weight", 10, channels), self._weight("linear.bias", 10)]
        self._node("Gemm", linear, "output", 10, transB=1)
        graph = helper.make_graph(
            self._nodes,
            self.name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(self.shape))],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, [self.shape[0], 10])],
            self._weights,
        )
        opset = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name="hwsearch")
        return bytes(model.SerializeToString(deterministic=True))
