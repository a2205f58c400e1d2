"""Operators that multiply matrices: convolutions, linear layers, stacks of products, attention, recurrent layers.

Their dimensions are those of the work that is done: padded channels of a blocked convolution, rows and columns of a
product whatever was transposed, heads and keys of an attention.
"""

from __future__ import annotations

import math
from typing import Any

from hwsearch.device.onnx_operators import Described, Rule
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

#: Position of the weight among the inputs of a convolution.
_CONV = {"Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvTranspose": 1, "QLinearConv": 3, "ConvInteger": 1}
#: Position of the second operand of a product.
_GEMM = {
    "Gemm": 1, "FusedGemm": 1, "MatMul": 1, "FusedMatMul": 1, "TransposeMatMul": 1, "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "QLinearMatMul": 3, "QGemm": 3,
}  # fmt: skip
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "DynamicQuantizeLSTM": 4}


def _conv(node: Node, tensors: Tensors) -> Described:
    main, weight = tensors.shape(node.input(0)), tensors.shape(node.input(_CONV[node.op]))
    if len(weight) < 3 or len(main) != len(weight):
        return Described("other", tensors.inferred(node, main))
    last = node.op == "NhwcFusedConv" or node.number("channels_last", 0) == 1
    layout = "nchwc" if node.blocked else "nhwc" if last else "nchw"
    logical = channels_first(main) if last else main
    groups = node.number("group", 1)
    kernel = spread((1, 1, *weight[2:]))[2:]
    transposed = node.op == "ConvTranspose"
    out_channels = weight[1] * groups if transposed else weight[0]
    # what runs is what the weight says: a blocked convolution pads its input channels too
    in_channels = weight[0] if transposed else weight[1] * groups
    space = tensors.inferred(node, main)[2:] if transposed else windows(logical[2:], weight[2:], node)
    fused = []
    if node.input(3) and node.op in ("Conv", "FusedConv", "NhwcFusedConv"):
        fused.append("add")
    if node.text("activation"):
        fused.append(node.text("activation").lower())
    out = (logical[0], out_channels, *space)
    fields: dict[str, Any] = {
        "in_shape": (logical[0], in_channels, *logical[2:]),
        "out_shape": out,
        "fused": tuple(fused),
        "kernel_height": kernel[0],
        "kernel_width": kernel[1],
        "stride": (node.numbers("strides") or [1])[0],
        "dilation": (node.numbers("dilations") or [1])[0],
        "groups": groups,
    }
    if transposed:
        family = "conv_transpose"
    elif groups > 1:
        family = "depthwise" if groups == in_channels else "grouped"
    elif kernel == (1, 1):
        family = "pointwise"
    elif tensors.layout(node.input(0)) != "nchwc" and (layout == "nchwc" or in_channels <= 4):
        family = "conv_first"
    else:
        family = "conv"
    written = None
    if node.op == "QLinearConv":
        written = tensors.dtype(node.input(7))
    # A blocked convolution may read a plain image; the others read what they write.
    return Described(
        family,
        channels_last(out) if last else out,
        fields,
        layout,
        layout_in="nhwc" if last else None,
        weight=_CONV[node.op],
        dtype_out=written,
    )


def _gemm(node: Node, tensors: Tensors) -> Described:
    second = node.input(_GEMM[node.op])
    one, two = tensors.shape(node.input(0)), tensors.shape(second)
    if not one or not two:
        return Described("other", tensors.inferred(node, one))
    one, two = _turned(one, node, "A"), _turned(two, node, "B")
    rows, columns = one[-2] if len(one) > 1 else 1, two[-1] if len(two) > 1 else 1
    stack = broadcast([one[:-2], two[:-2]])
    matrix = math.prod(two[:-2]) == 1
    fields: dict[str, Any] = {
        "fused": (node.text("activation").lower(),) if node.text("activation") else (),
        "inputs": 1 if second in tensors.constants and matrix else 2,
    }
    count = math.prod(stack)
    if matrix and fields["inputs"] == 1:
        # One matrix for all rows, as in a linear layer: the runtime multiplies them at once.
        fields |= {"in_shape": (count * rows, one[-1]), "out_shape": (count * rows, columns)}
    else:
        fields |= {"in_shape": (count, one[-1], rows), "out_shape": (count, columns, rows)}
    out = (*stack, *one[-2:-1], *((columns,) if len(two) > 1 else ()))
    written = None
    if node.op == "QGemm":
        written = tensors.dtype(node.input(8)) if node.input(8) else "float32"
    elif node.op == "QLinearMatMul":
        written = tensors.dtype(node.input(7))
    return Described("gemm", out, fields, "nchw", weight=_GEMM[node.op], dtype_out=written)


def _turned(shape: Shape, node: Node, letter: str) -> Shape:
    """An operand's shape after the transpositions that are part of the product."""
    if node.number(f"transBatch{letter}", 0) and len(shape) > 2:
        shape = (*shape[1:-1], shape[0], shape[-1])
    if node.number(f"trans{letter}", 0) and len(shape) > 1:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return shape


def _few_bits(node: Node, tensors: Tensors) -> Described:
    """A product with weights of a few bits each: their size stands in the attributes."""
    main = tensors.shape(node.input(0))
    rows, inner, columns = math.prod(main[:-1]), node.number("K", 1), node.number("N", 1)
    fields = {"in_shape": (rows, inner), "out_shape": (rows, columns)}
    return Described("gemm", (*main[:-1], columns), fields, "nchw", weight=1)


def _einsum(node: Node, tensors: Tensors) -> Described:
    """Two operands are a stack of products; one is moved or summed; more are unknown."""
    shapes = [tensors.shape(name) for name in node.inputs]
    out = tensors.inferred(node, shapes[0] if shapes else ())
    left, _, right = node.text("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if "..." in left or len(terms) != len(shapes) or any(len(t) != len(s) for t, s in zip(terms, shapes, strict=True)):
        return Described("other", out, {"inputs": max(1, len(shapes))})
    size = {letter: n for term, shape in zip(terms, shapes, strict=True) for letter, n in zip(term, shape, strict=True)}
    if not right and "->" not in node.text("equation"):
        right = "".join(sorted(letter for letter in size if left.count(letter) == 1))
    if len(terms) == 1:
        return Described("move" if len(right) == len(size) else "reduce", out)
    if len(terms) > 2:
        return Described("other", out, {"inputs": len(shapes)})
    one, two, kept = set(terms[0]), set(terms[1]), set(right)

    def product(letters: set[str]) -> int:
        return math.prod(size[letter] for letter in letters)

    stack, inner = product(one & two & kept), product((one & two) - kept)
    rows, columns = product(one - two), product(two - one)
    fields = {"in_shape": (stack, inner, rows), "out_shape": (stack, columns, rows), "inputs": 2}
    if node.inputs[1] in tensors.constants and stack == 1:
        fields = {"in_shape": (rows, inner), "out_shape": (rows, columns), "inputs": 1}
    return Described("gemm", out, fields, "nchw")


def _attention(node: Node, tensors: Tensors) -> Described:
    """Attention of every kind: with its projection inside, or of given queries, keys and values."""
    query = tensors.shape(node.input(0))
    projects = node.op == "QAttention" or (node.op == "Attention" and not node.standard)
    if len(query) == 5:  # queries, keys and values packed: (B, S, heads, 3, width)
        batch, rows, heads, _, width = query
        return _attended(node, (batch, rows, heads * width), (batch, rows, rows), heads, heads * width, 1)
    if projects and len(query) == 3:
        columns = tensors.shape(node.input(1))[-1]
        sizes = node.numbers("qkv_hidden_sizes") or [columns // 3] * 3
        batch, rows, _ = query
        return _attended(node, query, (batch, rows, rows), node.number("num_heads", 1), sizes[2], columns)
    key, value = tensors.shape(node.input(1)), tensors.shape(node.input(2))
    if len(query) == 4 and len(key) == 4 and len(value) == 4:  # (B, heads, S, width)
        tensors.learn(node)
        batch, heads, rows, width = query
        found = _attended(node, (batch, rows, heads * width), (batch, rows, key[2]), heads, heads * value[3], 1)
        found.out = (batch, heads, rows, value[3])
        return found
    if len(query) == 3 and len(key) == 3 and len(value) == 3:
        tensors.learn(node)
        heads = node.number("num_heads", node.number("q_num_heads", 1))
        shared = max(1, heads // max(1, node.number("kv_num_heads", heads)))
        return _attended(node, query, (query[0], query[1], key[1]), heads, value[2] * shared, 1)
    return Described("other", tensors.inferred(node, query), {"inputs": len(node.inputs)})


def _attended(
    node: Node, query: Shape, span: tuple[int, int, int], heads: int, width: int, projected: int
) -> Described:
    batch, rows, keys = span
    fields = {
        "in_shape": (batch, query[2], rows),
        "out_shape": (batch, width, rows),
        "kernel_height": keys,
        "kernel_width": projected,
        "groups": heads,
    }
    return Described("attention", (batch, rows, width), fields, "nchw", weight=1 if projected > 1 else None)


def _recurrent(node: Node, tensors: Tensors) -> Described:
    main = tensors.shape(node.input(0))
    hidden = node.number("hidden_size", 0)
    if len(main) != 3 or not hidden:
        return Described("other", tensors.inferred(node, main), {"inputs": len(node.inputs)})
    directions = 2 if node.text("direction") == "bidirectional" else 1
    first = node.number("layout", 0) == 1
    batch, steps = (main[0], main[1]) if first else (main[1], main[0])
    out = (batch, steps, directions, hidden) if first else (steps, directions, batch, hidden)
    state = (batch, directions, hidden) if first else (directions, batch, hidden)
    for name in node.outputs[1:]:
        if name:
            tensors.set(name, state)
    fields = {
        "in_shape": (batch, main[2], steps),
        "out_shape": (batch, directions * hidden, steps),
        "kernel_height": _GATES[node.op],
        "groups": directions,
    }
    return Described("recurrent", out, fields, "nchw", weight=1)


PRODUCTS: dict[str, Rule] = {
    **dict.fromkeys(_CONV, _conv),
    **dict.fromkeys(_GEMM, _gemm),
    **dict.fromkeys(("MatMulNBits", "MatMulBnb4"), _few_bits),
    **dict.fromkeys(
        ("Attention", "GroupQueryAttention", "MultiHeadAttention", "PackedAttention", "QAttention"), _attention
    ),
    **dict.fromkeys(_GATES, _recurrent),
    "Einsum": _einsum,
}
