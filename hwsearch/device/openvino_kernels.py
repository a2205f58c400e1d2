"""OpenVINO's execution graph read as kernels (host side, standard library only).

One function a kind of layer. A layer of a kind that nobody mapped has the family ``other``: it is listed, never
dropped. Channels of a blocked layout are counted as they lie in memory, padded to whole blocks. A kernel's ``op`` is
the operation and the implementation that OpenVINO chose for it (``Convolution/jit_avx2_dw``): that decides the time of
a shape more than anything else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from hwsearch.device.openvino_graph import ExecutionGraph, Layer, Operator, Shape, Value
from hwsearch.graph.kernel import Kernel

_DTYPES = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64", "i8": "int8", "u8": "uint8",
    "i4": "int4", "u4": "uint4", "i16": "int16", "u16": "uint16", "i32": "int32", "u32": "uint32", "i64": "int64",
    "u64": "uint64", "boolean": "bool", "u1": "bool",
}  # fmt: skip
_CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
#: Operators that are no work of their own where they are merged into a layer.
_SILENT = ("Constant", "Convert", "FakeQuantize", "Reshape", "Result", "Squeeze", "Unsqueeze")
#: A tail's name in ``Kernel.fused``, where it is not the operator's own in small letters.
_TAILS = {
    "Clamp": "clip", "HSigmoid": "hardsigmoid", "HSwish": "hardswish", "Maximum": "clip", "Minimum": "clip",
    "Multiply": "mul", "Subtract": "sub",
}  # fmt: skip

Fields: TypeAlias = dict[str, Any]
Rule: TypeAlias = Callable[[Layer, Mapping[str, Operator]], tuple[str, Fields]]


def kernels_of(graph: ExecutionGraph) -> tuple[Kernel, ...]:
    """The kernels of a graph in the order of execution."""
    return tuple(kernel for kernels in kernels_by_layer(graph) for kernel in kernels)


def kernels_by_layer(graph: ExecutionGraph) -> list[tuple[Kernel, ...]]:
    """The kernels of each layer: one, or one a product where OpenVINO compiled several products into one layer."""
    found, count = [], 0
    for layer in graph.layers:
        parts = _parts(layer, graph.operators)
        found.append(tuple(_kernel(count + number, part, graph.operators) for number, part in enumerate(parts)))
        count += len(parts)
    return found


def shares_of(graph: ExecutionGraph, times: Sequence[float]) -> list[tuple[str, float]]:
    """(operation, share) of each kernel from its layer's time; products of one layer share it by their MACs."""
    found = []
    for kernels, time in zip(kernels_by_layer(graph), times, strict=True):
        macs = sum(kernel.macs for kernel in kernels)
        found += [(kernel.op, time * kernel.macs / macs if len(kernels) > 1 else time) for kernel in kernels]
    whole = sum(time for _, time in found)
    return [(op, time / whole) for op, time in found]


def _parts(layer: Layer, operators: Mapping[str, Operator]) -> list[Layer]:
    """A compiled chain of products (a head of linear layers) cut behind each of them; any other layer as it is."""
    chain = [(name, operators[name]) for name in layer.origins if name in operators]
    products = [name for name, op in chain if op.type == "MatMul"]
    if layer.type != "Subgraph" or len(products) < 2 or any(op.type == "Softmax" for _, op in chain):
        return [layer]
    parts, value = [], layer.inputs[0]
    starts = [layer.origins.index(name) for name in products]
    for start, end in zip([0, *starts[1:]], [*starts[1:], len(layer.origins)], strict=True):
        origins = layer.origins[start:end]
        product = next(operators[name] for name in origins if operators.get(name) and operators[name].type == "MatMul")
        weight, out = Value(product.weight, value.dtype, "ab", True), replace(value, shape=product.out_shape)
        owned = tuple(name for name in layer.parameters if name in product.parameters)
        parts.append(
            replace(layer, type="MatMul", origins=origins, parameters=owned, inputs=(value, weight), outputs=(out,))
        )
        value = out
    return parts


def layout_of(form: str) -> str:
    """A memory format's layout: ``nchw``, ``nhwc`` or blocked with its size, ``nchw8c``.

    Example:
        >>> layout_of("abcd"), layout_of("acdb"), layout_of("aBcd8b")
        ('nchw', 'nhwc', 'nchw8c')
    """
    block = re.fullmatch(r"aB[a-z]*?(\d+)b", form)
    if block:
        return f"nchw{block[1]}c"
    return "nhwc" if re.fullmatch(r"ac[d-z]*b", form) else "nchw"


def _kernel(index: int, layer: Layer, operators: Mapping[str, Operator]) -> Kernel:
    mine = {name: operators[name] for name in layer.origins if name in operators}
    main = next((value for value in layer.inputs if not value.constant), None)
    family, fields = _RULES.get(layer.type, _other)(layer, mine)
    out = layer.outputs[0] if layer.outputs else main
    layout_in, layout_out = (layout_of(value.form) if value is not None else "nchw" for value in (main, out))
    op = f"{fields.pop('name', layer.type)}/{_implementation(layer.kernel)}"
    in_shape = fields.pop("in_shape", main.shape if main is not None else ())
    out_shape = fields.pop("out_shape", out.shape if out is not None else ())
    batch, channels, height, width = _spread(in_shape)
    out_batch, out_channels, out_height, out_width = _spread(out_shape)
    if batch != out_batch:
        batch, channels, height, width = _spread((1, *in_shape))
        _, out_channels, out_height, out_width = _spread((1, *out_shape))
    else:
        channels, out_channels = _padded(channels, layout_in), _padded(out_channels, layout_out)
    if fields.get("groups", 1) > 1 and family == "depthwise":
        fields["groups"] = channels
    dimensions: Fields = {
        "batch": batch, "in_channels": channels, "in_height": height, "in_width": width,
        "out_channels": out_channels, "out_height": out_height, "out_width": out_width,
    }  # fmt: skip
    return Kernel(
        family=family,
        op=op,
        dtype=_dtype(layer, family, main, out),
        layout_in=layout_in,
        layout_out=layout_out,
        node=f"{index:03d}_{op}",
        source=_source(layer, operators),
        **(dimensions | fields),
    )


def _implementation(kernel: str) -> str:
    """The chosen implementation without its precision, which the kernel's ``dtype`` tells."""
    return re.sub(r"_(f|fp|bf|i|u)(16|32|64|8|4)$", "", kernel, flags=re.IGNORECASE)


def _padded(channels: int, layout: str) -> int:
    block = re.fullmatch(r"nchw(\d+)c", layout)
    return -(-channels // int(block[1])) * int(block[1]) if block else channels


def _spread(shape: Shape) -> tuple[int, int, int, int]:
    """Any shape as (batch, channels, height, width)."""
    sizes = [size or 1 for size in shape]  # an open one counts as one
    if len(sizes) < 2:
        return (1, sizes[0] if sizes else 1, 1, 1)
    space = sizes[2:]
    height, width = (math.prod(space[:-1]), space[-1]) if len(space) > 1 else (space[0] if space else 1, 1)
    return (sizes[0], sizes[1], height, width)


def _dtype(layer: Layer, family: str, main: Value | None, out: Value | None) -> str:
    """Element types of input, weights and output."""
    read = _name(main.dtype if main is not None else layer.precision)
    written = _name(out.dtype) if out is not None else read
    weights = [value for value in layer.inputs[1:] if value.constant]
    text = read
    if family in ("conv", "conv_first", "pointwise", "depthwise", "grouped", "conv_transpose", "gemm") and weights:
        eight = read in ("int8", "uint8")
        kept = "int8" if eight and weights[0].dtype == "f32" else _name(weights[0].dtype)
        text += f"*{kept}" if kept != read and (eight or kept not in ("float32", "bfloat16", "float16")) else ""
    return text if written == read else f"{text}>{written}"


def _name(dtype: str) -> str:
    return _DTYPES.get(dtype, dtype)


def _source(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, ...]:
    """The layers of the model that it came from: owners of its parameters, else its own name without what is added."""
    if layer.type == "Reorder":
        return ()  # named after its neighbours where a name is needed
    parameters = list(layer.parameters)
    for name in (*layer.parameters, *layer.origins):
        parameters += operators[name].parameters if name in operators else ()
    owners = [name.rpartition(".")[0] for name in parameters if "." in name]
    named = (name for name in layer.origins if name in operators and operators[name].named)
    own = (re.sub(r"/(WithoutBiases|fq_[a-z]+_\d+)$", "", name) for name in named)
    return tuple(dict.fromkeys(owners)) or tuple(own)[:1]


def _tail(layer: Layer, operators: Mapping[str, Operator], head: tuple[str, ...]) -> tuple[str, ...]:
    """What follows the first operator of a kind in a layer, without a bias and what computes nothing."""
    found: list[str] = []
    started = False
    alone = sum(not value.constant for value in layer.inputs) < 2
    for op in operators.values():
        if not started:
            started = op.type in head
            continue
        if op.type in _SILENT or (op.type == "Add" and op.activations < 2 and not found):
            continue
        name = _TAILS.get(op.type, op.type.lower())
        if op.type == "GroupConvolution":
            name = f"depthwise{'x'.join(map(str, op.weight[-2:]))}s{op.strides[0] if op.strides else 1}"
        elif op.type == "Multiply" and op.activations > 1 and alone:
            name = "swish"  # a gate made of the very value that it gates
        if not (name == "clip" and found[-1:] == ["clip"]):
            found.append(name)
    return tuple(found)


def _convolution(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    """A convolution with its tail; kernel and groups from the operator's weights, else from the layer's own."""
    op = next((op for op in operators.values() if op.type in _CONVOLUTIONS), None)
    constants = [value.shape for value in layer.inputs if value.constant]
    main = layer.inputs[0].shape
    weight = op.weight if op is not None and op.weight else (constants[0] if constants else ())
    rank = len(main)
    if rank < 3 or len(weight) not in (rank, rank + 1):
        return _other(layer, operators)
    groups = weight[0] if len(weight) > rank else 1
    inner, kernel = main[1], weight[-(rank - 2) :]
    tall, wide = _spread((1, 1, *kernel))[2:]
    # a depth-wise convolution may be merged in behind this one: its output is not this one's
    out = op.out_shape if op is not None and op.out_shape else layer.outputs[0].shape
    fields: Fields = {
        "kernel_height": tall, "kernel_width": wide, "groups": groups, "out_shape": out,
        "stride": op.strides[0] if op is not None and op.strides else max(1, main[-1] // max(1, out[-1])),
        "dilation": op.dilations[0] if op is not None and op.dilations else 1,
        "fused": _tail(layer, operators, _CONVOLUTIONS),
    }  # fmt: skip
    plain = layout_of(layer.inputs[0].form) == "nchw"
    if layer.type == "Deconvolution":
        return "conv_transpose", fields
    if groups > 1:
        return ("depthwise" if groups == inner else "grouped"), fields
    if (tall, wide) == (1, 1):
        return "pointwise", fields
    first = plain and (layout_of(layer.outputs[0].form) != "nchw" or inner <= 4)
    return ("conv_first" if first else "conv"), fields


def _product(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    """Rows times a constant matrix, or a stack of products of two activations."""
    one, out = layer.inputs[0].shape, layer.outputs[0].shape
    if not one or not out:
        return _other(layer, operators)
    constant = sum(not value.constant for value in layer.inputs[:2]) < 2
    columns = out[-1]
    fused = _tail(layer, operators, ("MatMul", "FullyConnected"))
    if constant:
        rows = math.prod(out[:-1])
        inner = math.prod(one) // max(1, rows)
        return "gemm", {"in_shape": (rows, inner), "out_shape": (rows, columns), "fused": fused}
    rows = out[-2] if len(out) > 1 else 1
    stack = math.prod(out[:-2])
    inner = math.prod(one) // max(1, math.prod(one[:-2]) * rows)
    shapes = {"in_shape": (stack, inner, rows), "out_shape": (stack, columns, rows)}
    return "gemm", {**shapes, "inputs": 2, "fused": fused}


def _pooling(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    op = next((op for op in operators.values() if op.kernel), None)
    name = _operation(layer, operators)
    if _whole_image(layer):
        return "global_pool", {"name": name}
    if op is None:
        return "other", {"name": name}
    height, width = _spread((1, 1, *op.kernel))[2:]
    stride = op.strides[0] if op.strides else 1
    return "pool", {"name": name, "kernel_height": height, "kernel_width": width, "stride": stride}


def _whole_image(layer: Layer) -> bool:
    """Whether each image becomes one value a channel."""
    before, after = layer.inputs[0].shape, layer.outputs[0].shape
    kept = tuple(size for size in after[2:] if size != 1)
    return len(before) > 2 and not kept and after[:2] == before[:2] and math.prod(before[2:]) > 1


def _reduce(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    name, shape = _operation(layer, operators), layer.inputs[0].shape
    axes = next((op.axes for op in operators.values() if op.axes), ())
    if not axes:
        return ("global_pool" if _whole_image(layer) else "reduce"), {"name": name}
    places = {axis % len(shape) for axis in axes}
    full = tuple(1 if axis in places else size for axis, size in enumerate(shape))
    family = "global_pool" if len(shape) == 4 and places == {2, 3} else "reduce"
    return family, {"name": name, "out_shape": full}


def _elementwise(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    """One or several operations on each value; ``inputs`` counts tensors of the full size."""
    out = layer.outputs[0].shape
    size = math.prod(out)
    full = sum(1 for value in layer.inputs if not value.constant and math.prod(value.shape) == size)
    names = [op.type for op in operators.values() if op.type not in _SILENT] or [_operation(layer, operators)]
    if "MatMul" in names:
        return _attention(layer, operators) if "Softmax" in names else _other(layer, operators)
    fused = tuple(_TAILS.get(name, name.lower()) for name in names[1:])
    return "elementwise", {"name": names[0], "fused": fused, "inputs": max(1, full), "in_shape": out}


def _attention(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    """Scores, softmax and mixing in one layer; sizes from its first and its last product."""
    products = [op for op in operators.values() if op.type == "MatMul"]
    if len(products) != 2 or any(len(op.out_shape) < 2 or not op.weight for op in products):
        return _other(layer, operators)
    scores, mixed = (op.out_shape for op in products)
    stack, rows, keys = math.prod(scores[:-2]), scores[-2], scores[-1]
    inner = math.prod(products[0].weight) // max(1, stack * keys)
    shapes = {"in_shape": (stack, inner, rows), "out_shape": (stack, mixed[-1], rows)}
    return "attention", {**shapes, "kernel_height": keys}


def _norm(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    shape = layer.inputs[0].shape
    axes = next((op.axes for op in operators.values() if op.axes), ())
    row = math.prod(shape[axis] for axis in axes) if axes else (shape[-1] if shape else 1)
    shape = (1, max(1, row), max(1, math.prod(shape) // max(1, row)))
    return "norm", {"name": _operation(layer, operators), "in_shape": shape, "out_shape": shape}


def _concat(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    return "concat", {"inputs": len(layer.inputs)}


def _move(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    """Bytes moved; what only picks a part reads no more than that."""
    if layer.type in ("StridedSlice", "Gather", "GatherElements", "GatherND"):
        return "move", {"in_shape": layer.outputs[0].shape}
    if layer.type == "Split":
        return "move", {"inputs": len(layer.outputs), "out_shape": layer.inputs[0].shape}
    return "move", {}


def _resize(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    """Points read a point written: one for the nearest, two an axis between which it interpolates, or four."""
    mode = next((op.mode for op in operators.values() if op.mode), "nearest").lower()
    taps = 4 if "cubic" in mode else 2 if "linear" in mode else 1
    height, width = _spread((1, 1, *[taps] * max(0, len(layer.outputs[0].shape) - 2)))[2:]
    return "resize", {"kernel_height": height, "kernel_width": width}


def _reorder(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    return "reorder", {}


def _free(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    return "free", {}


def _other(layer: Layer, operators: Mapping[str, Operator]) -> tuple[str, Fields]:
    names = [op.type for op in operators.values() if op.type not in _SILENT]
    return "other", {"name": "+".join([layer.type, *names]), "inputs": max(1, len(layer.inputs))}


def _operation(layer: Layer, operators: Mapping[str, Operator]) -> str:
    """The first operator's type: a layer's own says only of which kind it is."""
    return next((op.type for op in operators.values() if op.type not in _SILENT), layer.type)


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_table(_convolution, "Convolution Deconvolution"),
    **_table(_product, "FullyConnected MatMul"),
    **_table(_pooling, "Pooling AdaptivePooling"),
    **_table(_reduce, "Reduce"),
    **_table(_elementwise, "Eltwise Subgraph Math Convert FakeQuantize"),
    **_table(_norm, "Softmax LogSoftmax MVN NormalizeL2 Lrn RMS GRN"),
    **_table(_concat, "Concatenation"),
    **_table(
        _move,
        "BatchToSpace Broadcast DepthToSpace Gather GatherElements GatherND Pad ReverseSequence Roll"
        " ScatterElementsUpdate ScatterNDUpdate ScatterUpdate ShuffleChannels SpaceToBatch SpaceToDepth Split"
        " StridedSlice Tile Transpose",
    ),
    **_table(_resize, "GridSample Interpolate"),
    **_table(_reorder, "Reorder"),
    **_table(_free, "Identity Reshape ShapeOf"),
}
