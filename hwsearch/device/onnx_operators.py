"""What each operator is to a predictor: its family, the dimensions that count, and its output's shape and layout.

One function a kind of operator, in one table. ORT's own operators (``com.microsoft`` and its blocked and 8-bit ones)
stand beside ONNX's, since they are what an optimised graph is made of. Products are in ``onnx_products``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from hwsearch.device.onnx_shapes import (
    Node,
    Shape,
    Tensors,
    broadcast,
    channels_first,
    channels_last,
    spread,
    windows,
)


@dataclass
class Described:
    """A node in the terms of a kernel.

    Attributes:
        family: one of ``FAMILIES``.
        out: shape of the first output, as the tensor really is.
        fields: further fields of the kernel; ``in_shape`` and ``out_shape`` where those that count are not the tensors'
            own (batch, channels, height, width).
        layout: of the output; None is the main input's.
        layout_in: that the node reads; None is the main input's.
        main: position of the main input.
        weight: position of the weights, where the node has any.
        dtype_out: element type of the output; None is the main input's.
    """

    family: str
    out: Shape
    fields: dict[str, Any] = field(default_factory=dict)
    layout: str | None = None
    layout_in: str | None = None
    main: int = 0
    weight: int | None = None
    dtype_out: str | None = None


Rule = Callable[[Node, Tensors], Described]

#: What ONNX Runtime puts into a graph where a GPU and its host hand over to each other.
_COPIES = ("MemcpyFromHost", "MemcpyToHost")


def describe(node: Node, tensors: Tensors) -> Described:
    """A node as its operator's rule sees it; an operator without a rule is ``other``."""
    from hwsearch.device.onnx_products import PRODUCTS

    if node.op in _COPIES and node.standard:
        return _copy(node, tensors)
    rule = PRODUCTS.get(node.op) or _RULES.get(node.op)
    if rule is not None and (node.standard or node.domain.startswith("com.microsoft")):
        found = rule(node, tensors)
    else:
        found = Described("other", tensors.inferred(node, _main(node, tensors)), {"inputs": max(1, len(node.inputs))})
    if node.input(found.main) in tensors.on_host and node.input(found.main) not in tensors.constants:
        # Left on the CPU in a graph of the GPU's: prices of the family are the GPU's.
        tensors.on_host.update(node.outputs)
        found.family = found.family if found.family == "free" else "other"
    if node.outputs and node.outputs[0] in tensors.guesses and found.family != "free":
        # Its size is a guess, so its price would be: say so.
        found.family = "other"
    if found.dtype_out is None:
        found.dtype_out = _DTYPE_OUT.get(node.op)
    return found


def _copy(node: Node, tensors: Tensors) -> Described:
    """A copy between the memories of a GPU and its host; what follows one to the host is computed there."""
    if node.op == "MemcpyToHost":
        tensors.on_host.update(node.outputs)
    return Described("other", _main(node, tensors))


def same_layout(node: Node, tensors: Tensors) -> str:
    """The layout that a node without one of its own works in: the most special one of its inputs."""
    found = {tensors.layout(name) for name in node.inputs if name and name not in tensors.constants}
    return next((layout for layout in ("nchwc", "nhwc") if layout in found), "nchw")


def _main(node: Node, tensors: Tensors, index: int = 0) -> Shape:
    return tensors.shape(node.input(index))


def _unary(node: Node, tensors: Tensors) -> Described:
    return Described("elementwise", _main(node, tensors))


def _quantising(node: Node, tensors: Tensors) -> Described:
    """To or from 8 bits; the zero point tells which kind."""
    main, dtype = _main(node, tensors), tensors.dtype
    if node.op == "QuantizeLinear":
        written = dtype(node.input(2)) if node.input(2) else "uint8"
        return Described("elementwise", main, dtype_out=written)
    if node.op == "DequantizeLinear":
        return Described("elementwise", main, dtype_out=dtype(node.input(1)))
    for scalar, kind in zip(node.outputs[1:], ("float32", "uint8"), strict=False):
        tensors.set(scalar, (), kind)
    return Described("elementwise", main, dtype_out="uint8")


def _cast(node: Node, tensors: Tensors) -> Described:
    from hwsearch.device.onnx_shapes import dtype_name

    tensors.calculate(node)  # a cast size is still a size
    return Described("elementwise", _main(node, tensors), dtype_out=dtype_name(node.number("to", 1)))


def _elementwise(node: Node, tensors: Tensors, operands: Iterable[int] | None = None) -> Described:
    """Broadcasting; ``inputs`` counts tensors of the full size, since scalars and weights cost nothing to read."""
    tensors.calculate(node)
    names = [name for name in (node.inputs if operands is None else map(node.input, operands)) if name]
    shapes = [tensors.shape(name) for name in names]
    out = broadcast(shapes)
    full = sum(
        1
        for name, shape in zip(names, shapes, strict=True)
        if math.prod(shape) == math.prod(out) and name not in tensors.constants
    )
    layout = same_layout(node, tensors)
    shape = channels_first(out) if layout == "nhwc" else out
    fields = {"inputs": max(1, full), "in_shape": shape, "out_shape": shape}
    return Described("elementwise", out, fields, layout, layout_in=layout)


def _where(node: Node, tensors: Tensors) -> Described:
    found = _elementwise(node, tensors, (0, 1, 2) if node.op == "Where" else (0, 1, 4))
    found.main = 1
    return found


def _quantised_pair(node: Node, tensors: Tensors) -> Described:
    return _elementwise(node, tensors, (0, 3))


def _pool(node: Node, tensors: Tensors) -> Described:
    main = _main(node, tensors)
    kernel = tuple(node.numbers("kernel_shape") or ())
    if len(main) < 3 or len(kernel) != len(main) - 2:
        return Described("other", tensors.inferred(node, main))
    last = node.op == "NhwcMaxPool" or node.number("channels_last", 0) == 1
    logical = channels_first(main) if last else main
    out = (*logical[:2], *windows(logical[2:], kernel, node))
    height, width = spread((1, 1, *kernel))[2:]
    stride = (node.numbers("strides") or [1])[0]
    fields = {"kernel_height": height, "kernel_width": width, "stride": stride}
    for further in node.outputs[1:]:  # the places of the maxima
        tensors.set(further, out, "int64")
    layout = "nchwc" if node.blocked else "nhwc" if last else tensors.layout(node.input(0))
    return _placed("pool", main, out, fields, layout)


def _global_pool(node: Node, tensors: Tensors) -> Described:
    main = _main(node, tensors)
    last = node.number("channels_last", 0) == 1
    logical = channels_first(main) if last else main
    layout = "nchwc" if node.blocked else "nhwc" if last else tensors.layout(node.input(0))
    return _placed("global_pool", main, (*logical[:2], *[1] * (len(main) - 2)), {}, layout)


def _placed(family: str, main: Shape, out: Shape, fields: dict[str, Any], layout: str) -> Described:
    """A node on (N, C, spatial...) whose tensors have their channels last where the layout says so."""
    last = layout == "nhwc"
    fields = fields | {"in_shape": channels_first(main) if last else main, "out_shape": out}
    return Described(family, channels_last(out) if last else out, fields, layout, layout_in=layout)


def _reduce(node: Node, tensors: Tensors) -> Described:
    main = _main(node, tensors)
    axes = node.numbers("axes")
    if axes is None and node.op in ("ArgMax", "ArgMin"):
        axes = [node.number("axis", 0)]
    if axes is None and node.input(1) and not node.op.startswith("QLinear"):
        axes = tensors.value(node.input(1))
        if not axes and node.input(1) not in tensors.constants:
            return Described("other", tensors.inferred(node, main))
    if not axes:
        axes = [] if node.number("noop_with_empty_axes", 0) else list(range(len(main)))
    places = sorted(axis % len(main) for axis in axes) if main else []
    full = tuple(1 if axis in places else size for axis, size in enumerate(main))
    kept = tuple(size for axis, size in enumerate(main) if axis not in places)
    tensors.calculate(node)
    layout = tensors.layout(node.input(0))
    spatial = [1, 2] if layout == "nhwc" else [2, 3]
    mean = len(main) == 4 and places == spatial
    known = mean and node.op in ("ReduceMean", "ReduceSum", "ReduceMax", "QLinearReduceMean")
    out = full if node.number("keepdims", 1) else kept
    if layout == "nhwc":
        fields = {"in_shape": channels_first(main), "out_shape": channels_first(full)}
        return Described("global_pool" if known else "reduce", out, fields, layout if out == full else "nchw")
    return Described("global_pool" if known else "reduce", out, {"out_shape": full}, "nchw")


def _norm(node: Node, tensors: Tensors) -> Described:
    """Rows of the values that are normalised together."""
    main = _main(node, tensors)
    total, inputs = math.prod(main), 1
    if node.op in ("InstanceNormalization",):
        row = math.prod(main[2:])
    elif node.op in ("GroupNormalization", "GroupNorm", "SkipGroupNorm"):
        row = total // max(1, (main[0] if main else 1) * max(1, node.number("num_groups", node.number("groups", 1))))
    elif node.op in ("MeanVarianceNormalization", "LRN"):
        row = total // max(1, main[1]) if len(main) > 1 else total
    elif node.op in ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization"):
        old = node.standard and tensors.opset.get("", 13) < 13 and node.op != "LpNormalization"
        axis = node.number("axis", 1 if old else -1) % max(1, len(main))
        row = math.prod(main[axis:]) if old else (main[axis] if main else 1)
    elif node.op == "QLinearSoftmax":
        axis = node.number("axis", -1) % max(1, len(main))
        row = math.prod(main[axis:]) if node.number("opset", 13) < 13 else (main[axis] if main else 1)
    elif node.op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"):
        axis = node.number("axis", -1) % max(1, len(main))
        row = math.prod(main[axis:])
    else:
        row = main[-1] if main else 1
    if node.op.startswith("Skip"):
        inputs = 2
    _further(node, tensors, main)
    shape = (1, max(1, row), max(1, total // max(1, row)))
    layout = tensors.layout(node.input(0))
    return Described("norm", main, {"in_shape": shape, "out_shape": shape, "inputs": inputs}, layout)


def _further(node: Node, tensors: Tensors, main: Shape) -> None:
    """Further outputs of a fused normalisation: statistics, and the sum of a skip connection (the last one)."""
    for place, name in enumerate(node.outputs[1:], 1):
        if name:
            last = node.op.startswith("Skip") and place == len(node.outputs) - 1
            tensors.set(name, main if last else main[:-1])


def _concat(node: Node, tensors: Tensors) -> Described:
    quantised = node.op == "QLinearConcat"
    places = list(range(2, len(node.inputs), 3)) if quantised else list(range(len(node.inputs)))
    shapes = [tensors.shape(node.input(place)) for place in places]
    tensors.calculate(node)
    axis = node.number("axis", 1)
    joined = list(shapes[0])
    if joined and all(len(shape) == len(joined) for shape in shapes):
        joined[axis] = sum(shape[axis] for shape in shapes)
    layout = "nchwc" if node.blocked else same_layout(node, tensors)
    last = layout == "nhwc"
    return Described(
        "concat",
        tuple(joined),
        {
            "inputs": len(places),
            "in_shape": channels_first(shapes[0]) if last else shapes[0],
            "out_shape": channels_first(tuple(joined)) if last else tuple(joined),
        },
        layout,
        layout_in=layout,
        main=places[0],
    )


def _move(node: Node, tensors: Tensors) -> Described:
    """Bytes moved; what only picks a part reads no more than that."""
    main = _main(node, tensors)
    out = tensors.inferred(node, main)
    if node.op in ("Slice", "Gather", "GatherElements", "GatherND"):
        return Described("move", out, {"in_shape": out}, tensors.layout(node.input(0)))
    if node.op == "Split":
        return Described("move", out, {"inputs": len(node.outputs), "out_shape": main}, tensors.layout(node.input(0)))
    return Described("move", out, layout=tensors.layout(node.input(0)))


def _transpose(node: Node, tensors: Tensors) -> Described:
    """Its output is plain, unless it hands an 8-bit image to operators that want the channels last."""
    main = _main(node, tensors)
    order = node.numbers("perm") or list(reversed(range(len(main))))
    tensors.calculate(node)
    out = tuple(main[axis] for axis in order) if len(order) == len(main) else main
    wanted = node.outputs[0] in tensors.channels_last
    before = tensors.layout(node.input(0))
    fields: dict[str, Any] = {"in_shape": channels_first(main) if before == "nhwc" else main, "out_shape": out}
    if wanted:
        fields["out_shape"] = channels_first(out)
    return Described("move", out, fields, "nhwc" if wanted else "nchw")


def _free(node: Node, tensors: Tensors) -> Described:
    main = _main(node, tensors)
    out = tensors.inferred(node, main)
    return Described("free", out, layout="nchw")


def _resize(node: Node, tensors: Tensors) -> Described:
    """Points read a point written: one for the nearest, two an axis between which it interpolates linearly, or four."""
    main = _main(node, tensors)
    if node.blocked:
        scales = node.attributes.get("scales") or [1] * 4
        out = tuple(int(size * scale) for size, scale in zip(main, scales, strict=False))
    else:
        out = tensors.inferred(node, main)
    taps = {"linear": 2, "bilinear": 2, "cubic": 4, "bicubic": 4}.get(node.text("mode", "nearest"), 1)
    if node.op == "GridSample":
        taps = {"nearest": 1, "cubic": 4, "bicubic": 4}.get(node.text("mode", "linear"), 2)
    height, width = spread((1, 1, *[taps] * max(0, len(main) - 2)))[2:]
    layout = "nchwc" if node.blocked else tensors.layout(node.input(0))
    return Described("resize", out, {"kernel_height": height, "kernel_width": width}, layout)


def _reorder(node: Node, tensors: Tensors) -> Described:
    main = _main(node, tensors)
    if node.op == "ReorderInput":
        if node.number("channels_last", 0):
            main = channels_first(main)
        out = (main[0], tensors.padded(node.outputs[0], main[1]), *main[2:])
        return Described("reorder", out, {"in_shape": main}, "nchwc")
    shape = (main[0], node.number("channels", main[1]), *main[2:])
    if node.number("channels_last", 0):
        return Described("reorder", channels_last(shape), {"out_shape": shape}, "nchw")
    return Described("reorder", shape, {}, "nchw")


def _table(rule: Rule, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(" ".join(names).split(), rule)


_RULES: dict[str, Rule] = {
    **_table(
        _unary,
        "Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization BiasGelu Ceil Celu Clip Cos Cosh Elu",
        "Erf Exp FastGelu Floor Gelu HardSigmoid HardSwish IsInf IsNaN LeakyRelu Log Mish Neg Not PRelu",
        "QLinearLeakyRelu QLinearSigmoid QuickGelu Reciprocal Relu RotaryEmbedding Round Selu Shrink Sigmoid Sign Sin",
        "Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu",
    ),
    **_table(_quantising, "QuantizeLinear DequantizeLinear DynamicQuantizeLinear"),
    **_table(_cast, "Cast"),
    **_table(
        _elementwise,
        "Add And BiasAdd BitShift Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or Pow Sub",
        "Sum Xor",
    ),
    **_table(_where, "Where QLinearWhere"),
    **_table(_quantised_pair, "QLinearAdd QLinearMul"),
    **_table(_pool, "MaxPool AveragePool LpPool NhwcMaxPool QLinearAveragePool"),
    **_table(_global_pool, "GlobalAveragePool GlobalMaxPool GlobalLpPool QLinearGlobalAveragePool"),
    **_table(
        _reduce,
        "ArgMax ArgMin QLinearReduceMean ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin",
        "ReduceProd ReduceSum ReduceSumSquare",
    ),
    **_table(
        _norm,
        "BiasSoftmax GroupNorm GroupNormalization Hardmax InstanceNormalization",
        "LayerNormalization LogSoftmax LpNormalization LRN MeanVarianceNormalization QLinearSoftmax RMSNormalization",
        "SimplifiedLayerNormalization SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization Softmax",
    ),
    **_table(_concat, "Concat QLinearConcat"),
    **_table(
        _move,
        "Compress DepthToSpace Expand Gather GatherElements GatherND Pad ReverseSequence ScatterElements ScatterND",
        "Slice SpaceToDepth Split Tile Trilu",
    ),
    **_table(_transpose, "Transpose"),
    **_table(_free, "Constant ConstantOfShape Dropout Flatten Identity Range Reshape Shape Size Squeeze Unsqueeze"),
    **_table(_resize, "GridSample Resize Upsample"),
    **_table(_reorder, "ReorderInput ReorderOutput"),
}  # fmt: skip

_DTYPE_OUT = {
    **dict.fromkeys(("And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"), "bool"),
    **dict.fromkeys(("ArgMax", "ArgMin", "NonZero", "Shape", "Size"), "int64"),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), "int32"),
    **dict.fromkeys(("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"), "float32"),
}
