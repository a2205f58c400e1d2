"""How operations that only move, join or cut axes pass channel ids on: views, permutations, concatenations, slices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hwsearch.graph.capture import node_shape, op_name, source_line
from hwsearch.graph.ids import Ids, IntArray, Value, along, tracked_axes
from hwsearch.graph.rules import Context, argument_values, axis_ids, join_values, rule


@rule("cat", "concat", "concatenate")
def _cat(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    values = [value for value in arguments["tensors"] if isinstance(value, Value) and len(value.shape) == len(shape)]
    return concatenate(values, arguments.get("dim", 0) % len(shape), shape, context.ids, source_line(node))


def concatenate(values: list[Value], dim: int, shape: tuple[int, ...], ids: Ids, where: str) -> Value:
    """Ids lie end to end along ``dim``; along the other axes the parts are joined element by element."""
    rest = (*shape[:dim], 1, *shape[dim + 1 :])
    # Joining the other axes sees each part as if its `dim` were already reduced away.
    flattened = []
    for value in values:
        others = tuple(factor for factor in value.factors if factor.shape[dim] == 1)
        flattened.append(Value((*value.shape[:dim], 1, *value.shape[dim + 1 :]), others))
    joined = join_values(flattened, rest, ids, f"concatenated with a fixed tensor at {where}")
    parts = [axis_ids(value, dim, ids) for value in values]
    if all(part is None for part in parts):
        return Value(shape, joined.factors)
    pieces: list[IntArray] = []
    for part, value in zip(parts, values, strict=True):
        if part is None:
            part = ids.new(value.shape[dim])
            ids.freeze(part, f"a fixed part of the concatenation at {where}")
        pieces.append(part)
    return Value(shape, (*joined.factors, along(np.concatenate(pieces), dim, len(shape))))


@rule("stack")
def _stack(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    dim = arguments.get("dim", 0) % len(shape)
    values = [_insert_axis(value, dim) for value in arguments["tensors"] if isinstance(value, Value)]
    rest = (*shape[:dim], 1, *shape[dim + 1 :])
    joined = join_values(values, rest, context.ids, f"stacked with a fixed tensor at {source_line(node)}")
    return Value(shape, joined.factors)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "split_copy")
def _split(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    arguments = argument_values(node, environment)
    x = next(value for value in arguments.values() if isinstance(value, Value))
    dim = arguments.get("dim", 0) % len(x.shape)
    sizes = [int(part.shape[dim]) for part in node.meta["val"]]
    _tie_parts(x, dim, sizes, context.ids, f"{op_name(node)} into unequal parts at {source_line(node)}")
    parts, start = [], 0
    for size in sizes:
        parts.append(_cut(x, dim, slice(start, start + size)))
        start += size
    return tuple(parts)


def _tie_parts(x: Value, dim: int, sizes: list[int], ids: Ids, reason: str) -> None:
    """Parts of a split along a plain channel axis stay equal: the k-th channel of every part goes together.

    The sizes are Python numbers of the user's code. Equal parts are kept equal, which is what ``chunk`` does with a
    smaller tensor; unequal parts would need the code itself to change, so they are frozen.
    """
    factor = x.on(dim)
    if factor is None or len(sizes) < 2 or len(tracked_axes(factor)) > 1:
        return  # one index of a product axis is exact: nothing is tied, the rectangle rule settles the rest
    flat = axis_ids(x, dim, ids)
    assert flat is not None  # the factor runs along dim
    if len(set(sizes)) == 1:
        per_part = flat.reshape(len(sizes), -1)
        ids.join(per_part, per_part[:1])
    else:
        ids.freeze(flat, reason)


def _cut(x: Value, dim: int, where: slice) -> Value:
    """A slice of a value along one axis."""
    size = len(range(*where.indices(x.shape[dim])))
    shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    index = tuple(where if axis == dim else slice(None) for axis in range(len(x.shape)))
    return Value(shape, tuple(factor[index] if factor.shape[dim] > 1 else factor for factor in x.factors))


@rule("slice")
def _slice(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments = argument_values(node, environment)
    x, dim = arguments["self"], arguments.get("dim", 0) % len(arguments["self"].shape)
    size = x.shape[dim]
    where = slice(arguments.get("start"), arguments.get("end"), arguments.get("step") or 1)
    kept = range(*where.indices(size))
    if len(kept) < size:
        factor = x.on(dim)
        reason = f"a slice of channels at {source_line(node)}"
        if factor is not None and len(tracked_axes(factor)) == 1:
            length = max(len(kept), 1)
            even = where.step == 1 and size % length == 0 and kept.start % length == 0
            _tie_parts(x, dim, [length] * (size // length) if even else [kept.start, size], context.ids, reason)
    return _cut(x, dim, where)


@rule("select")
def _select(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x, index = arguments["self"], arguments["index"]
    dim = arguments["dim"] % len(x.shape)
    return _index_one(x, dim, index % x.shape[dim], shape, context, node)


@rule("unbind")
def _unbind(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    arguments = argument_values(node, environment)
    x = arguments["self"]
    dim = arguments.get("dim", 0) % len(x.shape)
    shape = x.shape[:dim] + x.shape[dim + 1 :]
    return tuple(_index_one(x, dim, index, shape, context, node) for index in range(x.shape[dim]))


def _index_one(x: Value, dim: int, index: int, shape: tuple[int, ...], context: Context, node: Any) -> Value:
    factors = []
    for factor in x.factors:
        if factor.shape[dim] == 1:
            factors.append(np.squeeze(factor, dim))
        elif len(tracked_axes(factor)) > 1:
            factors.append(np.take(factor, index, axis=dim))
        else:
            context.ids.freeze(factor, f"a single channel is selected at {source_line(node)}")
    return Value(shape, tuple(factors))


def _getitem(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    source = environment.get(node.args[0])
    if isinstance(source, tuple) and isinstance(node.args[1], int) and node.args[1] < len(source):
        return source[node.args[1]]
    shape = node_shape(node)
    return None if shape is None else Value(shape)


@rule("permute", "transpose", "t", "swapaxes", "movedim", "numpy_T", "swapdims", "adjoint", "mT")
def _permute(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x = arguments["self"]
    rank = len(x.shape)
    name = op_name(node).rstrip("_")
    if name == "permute":
        order = [axis % rank for axis in arguments["dims"]]
    elif name == "movedim":
        source = [arguments["source"]] if isinstance(arguments["source"], int) else arguments["source"]
        target = [arguments["destination"]] if isinstance(arguments["destination"], int) else arguments["destination"]
        order = [axis for axis in range(rank) if axis not in {s % rank for s in source}]
        for to, origin in sorted(zip([t % rank for t in target], [s % rank for s in source], strict=True)):
            order.insert(to, origin)
    else:
        order = list(range(rank))
        pair = [v for k, v in arguments.items() if k in ("dim0", "dim1", "axis0", "axis1")] or [-2, -1]
        if rank > 1:
            a, b = (axis % rank for axis in pair)
            order[a], order[b] = order[b], order[a]
    return Value(shape, tuple(np.transpose(factor, order) for factor in x.factors))


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_copy", "_reshape_alias", "ravel", "unsqueeze",
      "squeeze")  # fmt: skip
def _reshape(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    x = next(value for value in argument_values(node, environment).values() if isinstance(value, Value))
    return reshape(x, node_shape(node) or (), context.ids, source_line(node))


def reshape(x: Value, shape: tuple[int, ...], ids: Ids, where: str) -> Value:
    """Carry ids through a change of shape.

    Both shapes are cut into the smallest runs of axes with equal products. Within a run, ids are spread over all
    elements and laid out anew, so flattening ``(C, H, W)`` repeats each channel's id ``H*W`` times, and the reverse
    finds it again. An axis that ends up split is noted as a rectangle.
    """
    runs = _matching_runs(x.shape, shape)
    factors = []
    owner: dict[int, int] = {}
    for index, factor in enumerate(x.factors):
        for number, (old, _) in enumerate(runs):
            if any(factor.shape[axis] > 1 for axis in old) and owner.setdefault(number, index) != index:
                for mixed in (factor, x.factors[owner[number]]):
                    ids.freeze(mixed, f"two channel axes are merged at {where}")
    for factor in x.factors:
        touched = [run for run in runs if any(factor.shape[axis] > 1 for axis in run[0])]
        full, target = list(factor.shape), [1] * len(shape)
        for old, new in touched:
            for axis in old:
                full[axis] = x.shape[axis]
            for axis in new:
                target[axis] = shape[axis]
        laid = _compress(np.broadcast_to(factor, full).reshape(target))
        if len(tracked_axes(laid)) > 1:
            ids.rectangle(laid)
        factors.append(laid)
    covered: set[int] = set()
    kept = []
    for factor in factors:
        if not covered & set(tracked_axes(factor)):
            kept.append(factor)
            covered |= set(tracked_axes(factor))
    return Value(shape, tuple(kept))


def _matching_runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes of ``old`` and ``new`` with equal products, in order."""
    runs = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        a, b = math.prod(old[k] for k in left), math.prod(new[k] for k in right)
        while a != b:
            if a < b:
                left.append(left[-1] + 1 if left else i)
                a *= old[left[-1]]
            else:
                right.append(right[-1] + 1 if right else j)
                b *= new[right[-1]]
        runs.append((left, right))
        i, j = i + len(left), j + len(right)
    return runs


def _compress(factor: IntArray) -> IntArray:
    """Drop the axes along which the ids do not change."""
    for axis in tracked_axes(factor):
        first = factor.take([0], axis=axis)
        if (factor == first).all():
            factor = first
    return factor


@rule("expand", "expand_as", "broadcast_to")
def _expand(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    x, shape = argument_values(node, environment)["self"], node_shape(node) or ()
    lead = len(shape) - len(x.shape)
    return Value(shape, tuple(factor.reshape((1,) * lead + factor.shape) for factor in x.factors))


@rule("pad", "constant_pad_nd")
def _pad(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x = arguments["self"]
    kept = []
    for factor in x.factors:
        if any(shape[axis] != x.shape[axis] for axis in tracked_axes(factor)):
            context.ids.freeze(factor, f"padded along its channels at {source_line(node)}")
        else:
            kept.append(factor)
    return Value(shape, tuple(kept))


@rule("pixel_shuffle")
def _pixel_shuffle(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    """Output channel c is made of the r*r input channels from c*r*r on: they go together."""
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x, block = arguments["self"], arguments["upscale_factor"] ** 2
    channel = len(shape) - 3
    flat = axis_ids(x, channel, context.ids)
    if flat is None:
        return Value(shape)
    blocks = flat.reshape(-1, block)
    context.ids.join(blocks, blocks[:, :1])
    return Value(shape, (along(blocks[:, 0], channel, len(shape)),) if len(blocks) > 1 else ())


@rule("pixel_unshuffle")
def _pixel_unshuffle(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x, block = arguments["self"], arguments["downscale_factor"] ** 2
    channel = len(shape) - 3
    flat = axis_ids(x, channel, context.ids)
    return Value(shape) if flat is None else Value(shape, (along(np.repeat(flat, block), channel, len(shape)),))


@rule("channel_shuffle")
def _channel_shuffle(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    flat, groups = axis_ids(arguments["self"], 1, context.ids), arguments["groups"]
    if flat is None:
        return Value(shape)
    split = flat.reshape(groups, -1)
    context.ids.rectangle(split)
    return Value(shape, (along(split.T.reshape(-1), 1, len(shape)),))


def _insert_axis(x: Value, dim: int) -> Value:
    return Value((*x.shape[:dim], 1, *x.shape[dim:]), tuple(np.expand_dims(factor, dim) for factor in x.factors))


# getitem is a Python builtin, not an ATen operation: it has no in-place form.
rule("getitem")(_getitem)
