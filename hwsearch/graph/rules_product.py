"""How products of tensors pass channel ids: ``matmul`` and its kin, ``einsum``, attention.

All of them are one thing: lay the operands out over a common list of axes, join element by element as broadcasting
does, then sum over some of the axes. A sum over channels against a matrix of parameters *reads* the channels, as a
linear layer does. A sum over channels of two activations (queries against keys) has no weight that could silence one of
them, and is scaled by their number: channels that share all their other axes stay together (the features of a head),
and a plain channel axis stays as it is.
"""

from __future__ import annotations

import math
import string
from typing import Any

import numpy as np

from hwsearch.graph.capture import bound_arguments, node_shape, op_name, source_line
from hwsearch.graph.ids import IntArray, Value, tracked_axes
from hwsearch.graph.rules import (
    Context,
    aligned,
    argument_values,
    axis_ids,
    join_values,
    product_with_matrix,
    rule,
)


def contract(
    node: Any, operands: list[tuple[Value, str, bool]], output: str, sizes: dict[str, int], context: Context
) -> Value:
    """Multiply and sum as ``einsum`` does: ``operands`` are (value, one letter an axis, made of parameters alone)."""
    where = source_line(node)
    letters = output + "".join(sorted({letter for _, term, _ in operands for letter in term} - set(output)))
    shape = tuple(sizes[letter] for letter in letters)
    laid = [_lay_out(value, term, letters, sizes) for value, term, _ in operands]
    summed = set(range(len(output), len(letters)))
    for value, (_, _, fixed) in zip(laid, operands, strict=True):
        for factor in value.factors:
            if fixed and summed & set(tracked_axes(factor)):
                context.read.append(factor.ravel())
    product = join_values(laid, shape, context.ids, f"multiplied with a fixed tensor at {where}")
    silent = not any(fixed for _, _, fixed in operands)
    kept = []
    for factor in product.factors:
        axes = set(tracked_axes(factor))
        index = tuple(slice(0, 1) if axis in summed else slice(None) for axis in range(factor.ndim))
        if not axes & summed:
            kept.append(factor[index])
        elif axes <= summed:
            if silent:
                context.ids.freeze(factor, f"two activations are multiplied over it at {where}")
        else:
            context.ids.join(factor, factor[index])
            kept.append(factor[index])
    if silent:
        context.products.append((node.name, math.prod(shape), tuple(factor.ravel() for factor in product.factors)))
    full = tuple(sizes[letter] for letter in output)
    return Value(full, tuple(factor.reshape(factor.shape[: len(output)]) for factor in kept))


def _lay_out(value: Value, term: str, letters: str, sizes: dict[str, int]) -> Value:
    """The value over all letters: its own axes in their order, the others of size 1 (spread by broadcasting)."""
    places = [term.index(letter) if letter in term else None for letter in letters]

    def move(array: IntArray) -> IntArray:
        order = [place for place in places if place is not None]
        moved = np.transpose(array, order)
        return moved[tuple(np.newaxis if place is None else slice(None) for place in places)]

    shape = tuple(1 if place is None else value.shape[place] for place in places)
    return Value(shape, tuple(move(factor) for factor in value.factors))


@rule("matmul", "mm", "addmm", "bmm", "baddbmm", "mv")
def _matmul(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """Axes before the last two are broadcast, the inner ones summed; a matrix of parameters makes a linear layer."""
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    names = [name for name in ("mat1", "batch1", "self", "mat2", "batch2", "other", "vec") if name in arguments]
    if len(names) == 3:
        names.remove("self")  # what is added to the product
    sources = bound_arguments(node)
    left, right = (arguments[name] for name in names)
    fixed = [sources[name] in context.constant for name in names]
    if fixed == [False, True] and len(right.shape) == 2 and len(right.factors) == sum(n > 1 for n in right.shape):
        bias = arguments["self"] if "self" not in names else None
        inputs, outputs = axis_ids(right, 0, context.ids), axis_ids(right, 1, context.ids)
        return product_with_matrix(left, inputs, outputs, bias, shape, context, f"the product at {source_line(node)}")
    batch = string.ascii_lowercase[: max(len(left.shape), len(right.shape), 2) - 2]
    terms = []
    for value, one, two in ((left, "K", "MK"), (right, "K", "KN")):
        terms.append(one if len(value.shape) == 1 else batch[len(batch) + 2 - len(value.shape) :] + two)
    output = (batch if max(len(left.shape), len(right.shape)) > 2 else "") + "".join(
        letter for letter, term in (("M", terms[0]), ("N", terms[1])) if letter in term
    )
    sizes = _sizes([(left, terms[0]), (right, terms[1])])
    where = source_line(node)
    found = contract(node, [(left, terms[0], fixed[0]), (right, terms[1], fixed[1])], output, sizes, context)
    if "self" in arguments and "self" not in names:
        added = aligned(arguments["self"], len(shape))
        return join_values([found, added], shape, context.ids, f"combined with a fixed tensor at {where}")
    return found


def _sizes(operands: list[tuple[Value, str]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for value, term in operands:
        for letter, size in zip(term, value.shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    return sizes


@rule("einsum")
def _einsum(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    arguments = argument_values(node, environment)
    equation = str(arguments["equation"]).replace(" ", "")
    values, nodes = arguments["tensors"], node.args[1]
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    repeated = any(len(set(term)) < len(term) for term in terms)
    if "." in equation or repeated or len(terms) != len(values):
        return context.give_up(node, environment)
    if not arrow:
        joined = "".join(terms)
        output = "".join(sorted(letter for letter in set(joined) if joined.count(letter) == 1))
    operands = [
        (value, term, source in context.constant) for value, term, source in zip(values, terms, nodes, strict=True)
    ]
    sizes = _sizes([(value, term) for value, term, _ in operands])
    return contract(node, operands, output, sizes, context)


@rule("scaled_dot_product_attention")
def _attention(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """Softmax of queries times keys, times values; ``enable_gqa`` lets several query heads share a key head."""
    arguments = argument_values(node, environment)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    where = source_line(node)
    if len(query.shape) > 2 and key.shape[-3:-2] != query.shape[-3:-2]:
        key, value = (_repeat_heads(item, query.shape[-3]) for item in (key, value))
    batch = string.ascii_lowercase[: len(query.shape) - 2]
    sizes = _sizes([(query, batch + "LE"), (key, batch + "SE"), (value, batch + "SV")])
    pair = [(query, batch + "LE", False), (key, batch + "SE", False)]
    scores = contract(node, pair, batch + "LS", sizes, context)
    mask = arguments.get("attn_mask")
    if isinstance(mask, Value):
        laid = aligned(mask, len(scores.shape))
        scores = join_values([scores, laid], scores.shape, context.ids, f"masked by a fixed tensor at {where}")
    for axis in (len(scores.shape) - 2, len(scores.shape) - 1):
        factor = scores.on(axis)
        if factor is not None:
            context.ids.freeze(factor, f"{op_name(node)} runs over it at {where}")
    return contract(node, [(scores, batch + "LS", False), (value, batch + "SV", False)], batch + "LV", sizes, context)


def _repeat_heads(item: Value, heads: int) -> Value:
    """Key heads repeated for grouped queries: head ``h`` of the queries meets head ``h // repeats`` of the keys."""
    axis = len(item.shape) - 3
    repeats = heads // item.shape[axis]
    shape = (*item.shape[:axis], heads, *item.shape[axis + 1 :])
    factors = [f if f.shape[axis] == 1 else np.repeat(f, repeats, axis) for f in item.factors]
    return Value(shape, tuple(factors))
