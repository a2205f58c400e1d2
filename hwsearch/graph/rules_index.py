"""How operations that pick, repeat or rearrange positions pass channel ids on: indexing, repetition, patches, gates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hwsearch.graph.capture import node_shape, source_line
from hwsearch.graph.ids import Value, along, tracked_axes
from hwsearch.graph.rules import Context, argument_values, axis_ids, keep_only, plain_value, rule


@rule("index_select", "gather", "scatter", "scatter_add", "index_add", "index_copy", "index_fill", "take_along_dim")
def _picked(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """Positions along one axis are picked by a tensor: nothing there may move."""
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x, dim = arguments["self"], arguments.get("dim")
    others = [value for key, value in arguments.items() if isinstance(value, Value) and key != "self" and value.factors]
    if dim is None or len(shape) != len(x.shape) or others:
        return context.give_up(node, environment)
    axes = set(range(len(shape))) - {dim % len(shape)}
    reason = f"positions are picked by a tensor at {source_line(node)}"
    return Value(shape, tuple(keep_only(x, axes, context.ids, reason)))


@rule("index")
def _index(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """``x[:, i, j]``: the indexed axes, side by side, become those of the index; the others pass."""
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x, indices = arguments["self"], arguments["indices"]
    axes = [axis for axis, index in enumerate(indices) if isinstance(index, Value)]
    for axis in axes:
        for factor in indices[axis].factors:
            context.ids.freeze(factor, f"it picks positions at {source_line(node)}")
    if axes != list(range(axes[0], axes[0] + len(axes))):
        return context.give_up(node, environment)
    rest = set(range(len(x.shape))) - set(axes)
    kept = keep_only(x, rest, context.ids, f"positions are picked by a tensor at {source_line(node)}")
    new = len(shape) - len(rest)
    laid = [f.reshape((*f.shape[: axes[0]], *(1,) * new, *f.shape[axes[-1] + 1 :])) for f in kept]
    return Value(shape, tuple(laid))


@rule("index_put", "_index_put_impl", "select_scatter", "slice_scatter", "masked_scatter", "copy", "fill", "zero")
def _written(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """Writing into a tensor: harmless where no channel is tracked, else unknown."""
    return context.give_up(node, environment)


@rule("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "sym_size")
def _fresh(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """What comes out holds nothing of what went in."""
    return plain_value(node)


@rule("repeat", "tile")
def _repeat(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """Copies along an axis carry the same ids again."""
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x = arguments["self"]
    lead = (1,) * (len(shape) - len(x.shape))
    times = [new // old for new, old in zip(shape, lead + x.shape, strict=True)]
    factors = []
    for factor in x.factors:
        laid = factor.reshape(lead + factor.shape)
        factors.append(np.tile(laid, [n if size > 1 else 1 for n, size in zip(times, laid.shape, strict=True)]))
    return Value(shape, tuple(factors))


@rule("repeat_interleave")
def _repeat_interleave(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x, dim, repeats = arguments.get("self"), arguments.get("dim"), arguments.get("repeats")
    if not isinstance(x, Value) or not isinstance(dim, int) or not isinstance(repeats, int):
        return context.give_up(node, environment)
    factors = [f if f.shape[dim] == 1 else np.repeat(f, repeats, dim) for f in x.factors]
    return Value(shape, tuple(factors))


@rule("narrow")
def _narrow(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x, dim = arguments["self"], arguments["dim"] % len(shape)
    whole = shape[dim] == x.shape[dim]
    axes = set(range(len(shape))) - (set() if whole else {dim})
    return Value(shape, tuple(keep_only(x, axes, context.ids, f"a slice of channels at {source_line(node)}")))


@rule("glu")
def _glu(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """The first half of an axis gated by the second: the k-th of both go together."""
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x, dim = arguments["self"], arguments.get("dim", -1) % len(shape)
    others = [factor for factor in x.factors if factor.shape[dim] == 1]
    flat = axis_ids(x, dim, context.ids)
    if flat is None:
        return Value(shape, tuple(others))
    first, second = flat.reshape(2, -1)
    context.ids.join(first, second)
    return Value(shape, (*others, along(first, dim, len(shape))))


@rule("im2col", "unfold")
def _patches(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """``(N, C, H, W)`` to ``(N, C*k*k, L)``: every channel becomes the pixels of its patch."""
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x = arguments["self"]
    if "kernel_size" not in arguments or len(x.shape) != 4:  # Tensor.unfold: windows along one axis become a last axis
        dim = arguments.get("dimension")
        if not isinstance(dim, int):
            return context.give_up(node, environment)
        axes = set(range(len(x.shape))) - {dim % len(x.shape)}
        kept = keep_only(x, axes, context.ids, f"cut into windows at {source_line(node)}")
        return Value(shape, tuple(factor[..., np.newaxis] for factor in kept))
    keep_only(x, {1}, context.ids, f"cut into patches at {source_line(node)}")
    flat = axis_ids(x, 1, context.ids)
    pixels = math.prod(arguments["kernel_size"])
    return Value(shape) if flat is None else Value(shape, (along(np.repeat(flat, pixels), 1, 3),))


@rule("col2im")
def _unpatch(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x = arguments["self"]
    if len(x.shape) != 3:
        return context.give_up(node, environment)
    keep_only(x, {1}, context.ids, f"put together from patches at {source_line(node)}")
    flat = axis_ids(x, 1, context.ids)
    if flat is None:
        return Value(shape)
    blocks = flat.reshape(-1, math.prod(arguments["kernel_size"]))
    context.ids.join(blocks, blocks[:, :1])
    return Value(shape, (along(blocks[:, 0], 1, 4),))


@rule("diagonal", "tril", "triu")
def _plane(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """What is taken from a plane depends on where it lies: only other axes may be tracked."""
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x = arguments["self"]
    if len(shape) != len(x.shape) or any({len(shape) - 2, len(shape) - 1} & set(tracked_axes(f)) for f in x.factors):
        return context.give_up(node, environment)
    return Value(shape, x.factors)
