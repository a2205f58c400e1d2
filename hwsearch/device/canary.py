"""The canary: a small fixed network timed just before and just after everything else.

Its time says how fast the machine is at that moment, so it mixes what networks are made of: a dense convolution, a
depth-wise one, a 1x1, a residual add and a linear layer. It is the same bytes on every device and for ever: the
reference speed of every table in git depends on it.
"""

from __future__ import annotations

from functools import cache

#: Names the canary in ``device.json``; a table made with another one cannot be compared.
CANARY = "canary-1"


@cache
def canary_bytes() -> bytes:
    """The canary as ONNX (25 MMACs: 0.5 to 1 ms on one core of a server; input ``(1, 40, 28, 28)``)."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(20)
    initializers, nodes = [], []

    def weight(name: str, *shape: int) -> str:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        initializers.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(name: str, source: str, channels: int, kernel: int, *, relu: bool, groups: int = 1) -> str:
        inputs = [
            source,
            weight(f"{name}.weight", channels, channels // groups, kernel, kernel),
            weight(f"{name}.bias", channels),
        ]
        pads, shape = [kernel // 2] * 4, [kernel, kernel]
        nodes.append(helper.make_node("Conv", inputs, [name], name=name, kernel_shape=shape, pads=pads, group=groups))
        if relu:
            nodes.append(helper.make_node("Relu", [name], [f"{name}_relu"], name=f"{name}_relu"))
            return f"{name}_relu"
        return name

    first = conv("dense_1", "input", 40, 3, relu=True)
    deep = conv("depthwise", first, 40, 3, relu=True, groups=40)
    point = conv("pointwise", deep, 40, 1, relu=True)
    second = conv("dense_2", point, 40, 3, relu=False)
    nodes.append(helper.make_node("Add", [second, first], ["sum"], name="sum"))
    nodes.append(helper.make_node("GlobalAveragePool", ["sum"], ["pooled"], name="pooled"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"))
    inputs = ["flat", weight("linear.weight", 10, 40), weight("linear.bias", 10)]
    nodes.append(helper.make_node("Gemm", inputs, ["output"], name="linear", transB=1))
    graph = helper.make_graph(
        nodes,
        CANARY,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 40, 28, 28])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 10])],
        initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="hwsearch"
    )
    return bytes(model.SerializeToString(deterministic=True))
