"""How each operation passes channel ids from its inputs to its output: layers, element-wise operations, reductions.

A rule takes the graph node, the values so far and the context, and returns the node's value. Rules that only move axes
live in ``rules_shape.py``, those that pick or repeat in ``rules_index.py``, products of activations in
``rules_product.py``; all fill the same table ``RULES``, by ATen name without overload.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hwsearch.graph.capture import bound_arguments, node_shape, op_name, source_line
from hwsearch.graph.ids import Ids, IntArray, Value, along, tracked_axes

#: The reason given for kernel heights and widths; too plain to be worth reporting.
KERNEL_EXTENT = "kernel extent"

Rule = Callable[[Any, dict[Any, Any], "Context"], Any]
RULES: dict[str, Rule] = {}


@dataclass
class Context:
    """What the rules share: the ids, the operations without a rule, and the weight axes that read channels.

    ``products`` are multiplications of activations: graph node, multiplications, and the ids along their axes.
    """

    ids: Ids
    unknown: list[str] = field(default_factory=list)
    read: list[IntArray] = field(default_factory=list)
    constant: set[Any] = field(default_factory=set)  # graph nodes that are made of parameters alone
    products: list[tuple[str, int, tuple[IntArray, ...]]] = field(default_factory=list)

    def give_up(self, node: Any, environment: dict[Any, Any]) -> Any:
        """Freeze what meets an operation without a rule, report it, and go on with a value without ids."""
        where = f"{op_name(node)} at {source_line(node)}"
        factors = [factor for value in values_in((node.args, node.kwargs), environment) for factor in value.factors]
        if factors:
            self.unknown.append(where)
        # weight norm and its kin, old and new: weights that are computed anew in every forward
        computed = ".parametrizations." in where or "_weight_norm" in where
        advice = ": remove the parametrisation, as torch.nn.utils.parametrize.remove_parametrizations does"
        for factor in factors:
            self.ids.freeze(factor, f"no rule for {where}{advice if computed else ''}")
        return plain_value(node)


def values_in(tree: Any, environment: dict[Any, Any]) -> list[Value]:
    """All values that a nested argument structure mentions."""
    if isinstance(tree, list | tuple):
        return [value for item in tree for value in values_in(item, environment)]
    if isinstance(tree, dict):
        return values_in(list(tree.values()), environment)
    found = environment.get(tree) if hasattr(tree, "op") else tree
    if isinstance(found, tuple):
        return [value for value in found if isinstance(value, Value)]
    return [found] if isinstance(found, Value) else []


def plain_value(node: Any, factors: tuple[IntArray, ...] = ()) -> Any:
    """A value with the given ids, shaped as the node's result (a tuple of them where it has several)."""
    result = node.meta.get("val")
    if isinstance(result, list | tuple):
        return tuple(Value(tuple(int(s) for s in v.shape), factors) if hasattr(v, "shape") else None for v in result)
    shape = node_shape(node)
    return None if shape is None else Value(shape, factors)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations (their in-place forms included)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
            RULES[name + "_"] = function
        return function

    return register


def argument_values(node: Any, environment: dict[Any, Any]) -> dict[str, Any]:
    """The node's arguments by name, with graph nodes replaced by their ``Value`` (nested lists included)."""

    def value(item: Any) -> Any:
        if hasattr(item, "op"):
            return environment.get(item)
        if isinstance(item, list | tuple):
            return [value(part) for part in item]
        return item

    return {name: value(item) for name, item in bound_arguments(node).items()}


def axis_ids(value: Value, axis: int, ids: Ids) -> IntArray | None:
    """The ids along one axis as a flat array, or None when the axis is fixed.

    An operation that reads one axis cannot see that it is a part of a product: whatever runs along the other axes of
    the same factor is joined.
    """
    factor = value.on(axis)
    if factor is None:
        return None
    flat = np.moveaxis(factor, axis, 0).reshape(factor.shape[axis], -1)
    if flat.shape[1] > 1:
        ids.join(flat, flat[:, :1])
    return np.ascontiguousarray(flat[:, 0])


def keep_only(value: Value, axes: set[int], ids: Ids, reason: str) -> list[IntArray]:
    """The factors on ``axes``; factors elsewhere are frozen, factors on both are joined over the rest."""
    kept = []
    for factor in value.factors:
        inside = [axis for axis in tracked_axes(factor) if axis in axes]
        if not inside:
            ids.freeze(factor, reason)
        elif len(inside) == len(tracked_axes(factor)):
            kept.append(factor)
        else:
            index = tuple(slice(None) if axis in axes else slice(0, 1) for axis in range(factor.ndim))
            ids.join(factor, factor[index])
            kept.append(factor[index])
    return kept


def join_or_freeze(left: IntArray | None, right: IntArray | None, ids: Ids, reason: str) -> None:
    """Join two axes; where one of them is fixed, the other has to keep its size."""
    if left is not None and right is not None:
        ids.join(left, right)
    elif left is not None or right is not None:
        ids.freeze(left if left is not None else right, reason)  # type: ignore[arg-type]


def with_axis(factors: list[IntArray], axis_ids_: IntArray | None, axis: int, shape: tuple[int, ...]) -> Value:
    """A value with the given factors plus flat ids along ``axis``."""
    extra = () if axis_ids_ is None else (along(axis_ids_, axis, len(shape)),)
    return Value(shape, (*factors, *extra))


@rule("conv1d", "conv2d", "conv3d")
def _conv(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x, weight, bias, groups = arguments["input"], arguments["weight"], arguments.get("bias"), arguments["groups"]
    ids, where = context.ids, source_line(node)
    channel = len(shape) - (len(weight.shape) - 2) - 1
    _freeze_kernel(weight, ids)
    keep_only(x, {channel}, ids, f"the convolution at {where} runs over this axis")
    x_ids, outputs, inputs = axis_ids(x, channel, ids), axis_ids(weight, 0, ids), axis_ids(weight, 1, ids)
    fixed = f"the convolution at {where} reads channels that are fixed"
    channels = x.shape[channel]
    if groups == 1:
        join_or_freeze(x_ids, inputs, ids, fixed)
        _mark_read(inputs, context)
    elif groups == channels:
        if outputs is not None:
            # Output i*m+j of a depth-wise convolution with multiplier m reads input i alone.
            per_input = outputs.reshape(channels, -1)
            join_or_freeze(None if x_ids is None else x_ids[:, None], per_input, ids, fixed)
    else:
        # Equal share per group: the k-th channel of every group goes together, on both sides.
        _grouped(x_ids, inputs, groups, ids, fixed)
        _mark_read(inputs, context)
        if outputs is not None:
            per_group = outputs.reshape(groups, -1)
            ids.join(per_group, per_group[:1])
    if bias is not None:
        join_or_freeze(axis_ids(bias, 0, ids), outputs, ids, fixed)
    return with_axis([], outputs, channel, shape)


def _grouped(x_ids: IntArray | None, inputs: IntArray | None, groups: int, ids: Ids, fixed: str) -> None:
    if x_ids is None:
        join_or_freeze(None, inputs, ids, fixed)
        return
    per_group = x_ids.reshape(groups, -1)
    ids.join(per_group, per_group[:1])
    join_or_freeze(per_group[:1], None if inputs is None else inputs[None, :], ids, fixed)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x, weight, bias, groups = arguments["input"], arguments["weight"], arguments.get("bias"), arguments["groups"]
    ids, where = context.ids, source_line(node)
    channel = len(shape) - (len(weight.shape) - 2) - 1
    _freeze_kernel(weight, ids)
    keep_only(x, {channel}, ids, f"the transposed convolution at {where} runs over this axis")
    x_ids, inputs, per_group = axis_ids(x, channel, ids), axis_ids(weight, 0, ids), axis_ids(weight, 1, ids)
    fixed = f"the transposed convolution at {where} reads channels that are fixed"
    join_or_freeze(x_ids, inputs, ids, fixed)
    outputs = per_group
    if groups == 1:
        _mark_read(inputs, context)
    elif groups == x.shape[channel] and per_group is None:
        outputs = inputs
    else:
        for axis in (inputs, per_group):
            if axis is not None:
                ids.freeze(axis, f"grouped transposed convolution at {where}")
        outputs = None
    bias_ids = None if bias is None else axis_ids(bias, 0, ids)
    if bias_ids is not None:
        join_or_freeze(bias_ids, outputs, ids, fixed)
    return with_axis([], outputs, channel, shape)


@rule("linear")
def _linear(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments, shape = argument_values(node, environment), node_shape(node) or ()
    x, weight, bias = arguments["input"], arguments["weight"], arguments.get("bias")
    ids, where = context.ids, source_line(node)
    outputs, inputs = axis_ids(weight, 0, ids), axis_ids(weight, 1, ids)
    return product_with_matrix(x, inputs, outputs, bias, shape, context, f"the linear layer at {where}")


def product_with_matrix(
    x: Value,
    inputs: IntArray | None,
    outputs: IntArray | None,
    bias: Value | None,
    shape: tuple[int, ...],
    context: Context,
    where: str,
) -> Value:
    """``x`` times a matrix over its last axis: that axis is read, the others are only positions."""
    ids, last, fixed = context.ids, len(x.shape) - 1, f"{where} reads features that are fixed"
    # Positions that came and went with a width would change how often the matrix is used: MACs would not be a product.
    keep_only(x, {last}, ids, f"{where} is applied along it")
    join_or_freeze(axis_ids(x, last, ids), inputs, ids, fixed)
    _mark_read(inputs, context)
    if bias is not None:
        join_or_freeze(axis_ids(bias, len(bias.shape) - 1, ids), outputs, ids, fixed)
    others = [factor for factor in x.factors if factor.shape[last] == 1]
    return with_axis(others, outputs, len(shape) - 1, shape)


@rule("batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit_no_training")
def _channel_norm(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    arguments = argument_values(node, environment)
    x, ids = arguments["input"], context.ids
    channel = 1
    x_ids = axis_ids(x, channel, ids) if len(x.shape) > 1 else None
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(arguments.get(name), Value):
            join_or_freeze(axis_ids(arguments[name], 0, ids), x_ids, ids, "it normalises channels that are fixed")
    for factor in x.factors:
        if factor is not x.on(channel):
            ids.reduced(factor, f"normalisation at {source_line(node)} takes its statistics over them")
    return Value(x.shape, x.factors)


@rule("group_norm")
def _group_norm(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments = argument_values(node, environment)
    x, ids, groups = arguments["input"], context.ids, arguments["num_groups"]
    x_ids = axis_ids(x, 1, ids)
    for name in ("weight", "bias"):
        if isinstance(arguments.get(name), Value):
            join_or_freeze(axis_ids(arguments[name], 0, ids), x_ids, ids, "it normalises channels that are fixed")
    if x_ids is not None:
        per_group = x_ids.reshape(groups, -1)
        ids.join(per_group, per_group[:1])
        if groups < len(x_ids):
            ids.reduced(x_ids, f"group normalisation at {source_line(node)} mixes channels")
    return Value(x.shape, x.factors)


@rule("layer_norm", "rms_norm")
def _layer_norm(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments = argument_values(node, environment)
    x, ids = arguments["input"], context.ids
    normalised = len(arguments["normalized_shape"])
    for name in ("weight", "bias"):
        parameter = arguments.get(name)
        if isinstance(parameter, Value):
            for axis in range(normalised):
                inside = axis_ids(x, len(x.shape) - normalised + axis, ids)
                join_or_freeze(axis_ids(parameter, axis, ids), inside, ids, "it normalises features that are fixed")
    for axis in range(len(x.shape) - normalised, len(x.shape)):
        factor = x.on(axis)
        if factor is not None:
            ids.reduced(factor, f"layer normalisation at {source_line(node)} mixes features")
    return Value(x.shape, x.factors)


@rule("prelu")
def _prelu(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    arguments = argument_values(node, environment)
    x, weight = arguments["self"], arguments["weight"]
    if math.prod(weight.shape) > 1:
        join_or_freeze(axis_ids(weight, 0, context.ids), axis_ids(x, 1, context.ids), context.ids, "fixed channels")
    return Value(x.shape, x.factors)


@rule("embedding")
def _embedding(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    weight, shape = argument_values(node, environment)["weight"], node_shape(node) or ()
    rows = axis_ids(weight, 0, context.ids)
    if rows is not None:
        context.ids.freeze(rows, f"the rows of an embedding at {source_line(node)}")
    return with_axis([], axis_ids(weight, 1, context.ids), len(shape) - 1, shape)


@rule(
    "add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "where", "fmod", "remainder", "atan2", "lerp",
    "addcmul", "addcdiv", "logaddexp", "eq", "ne", "gt", "ge", "lt", "le", "logical_and", "logical_or", "bitwise_and",
    "masked_fill", "copysign", "heaviside", "hypot", "xlogy", "true_divide", "floor_divide", "subtract", "multiply",
    "divide",
)  # fmt: skip
def _elementwise(node: Any, environment: dict[Any, Any], context: Context) -> Value:
    """Align the operands from the right, as broadcasting does, and join what meets."""
    shape = node_shape(node) or ()
    rank = len(shape)
    operands = [value for value in argument_values(node, environment).values() if isinstance(value, Value)]
    laid = [aligned(value, rank) for value in operands]
    return join_values(laid, shape, context.ids, f"combined with a fixed tensor at {source_line(node)}")


def aligned(value: Value, rank: int) -> Value:
    """The value with leading axes of size 1, as broadcasting sees it."""
    lead = (1,) * (rank - len(value.shape))
    return Value(lead + value.shape, tuple(factor.reshape(lead + factor.shape) for factor in value.factors))


def join_values(values: list[Value], shape: tuple[int, ...], ids: Ids, reason: str) -> Value:
    """Join values of equal rank element by element, as broadcasting does; a fixed axis freezes what meets it.

    An operand whose axis has size 1 is spread over the others and ties nothing (a squeeze-and-excitation gate of shape
    ``(N, C, 1, 1)`` ties its channels, and no positions). Where factors run along different axes (features of a head
    against a weight per head), what is left are the axes that they share: along the others their ids are one.
    """
    found = [list(value.factors) for value in values]
    queue = [(index, factor) for index, factors in enumerate(found) for factor in factors]
    while queue:
        index, factor = queue.pop(0)
        axes = kept = set(tracked_axes(factor))
        for value, others in zip(values, found, strict=True):
            if others is found[index]:
                continue
            met = [other for other in others if axes & set(tracked_axes(other))]
            for other in met:
                ids.join(factor, other)
                kept = kept & set(tracked_axes(other))
            fixed = {axis for axis in axes if value.shape[axis] > 1} - {a for o in met for a in tracked_axes(o)}
            kept = kept - fixed
        if kept != axes:
            found[index] = [other for other in found[index] if other is not factor]
            smaller = factor[tuple(slice(None) if axis in kept else slice(0, 1) for axis in range(factor.ndim))]
            ids.join(factor, smaller)
            if kept:
                found[index].append(smaller)
            else:
                ids.freeze(factor, reason)
            # What has become shorter here may leave others against a fixed axis: all are looked at again.
            queue = [(place, other) for place, factors in enumerate(found) for other in factors]
    union: list[IntArray] = []
    covered: set[int] = set()
    for factors in found:
        for factor in factors:
            if not covered & set(tracked_axes(factor)):
                union.append(factor)
                covered |= set(tracked_axes(factor))
    return Value(shape, tuple(union))


@rule(
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "sigmoid", "tanh", "gelu", "elu", "selu", "celu",
    "leaky_relu", "mish", "softplus", "softsign", "logsigmoid", "log_sigmoid", "rrelu", "threshold", "hardshrink",
    "softshrink", "tanhshrink", "abs", "neg", "exp", "expm1", "log", "log1p", "log2", "sqrt", "rsqrt", "square",
    "reciprocal", "sin", "cos", "erf", "sign", "floor", "ceil", "round", "trunc", "clamp", "clamp_min", "clamp_max",
    "clip", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout", "identity",
    "alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy", "to", "_to_copy", "type_as", "float",
    "half", "double", "logical_not", "isnan", "isinf", "nan_to_num", "zeros_like", "ones_like", "positive", "frac",
    "requires_grad", "full_like", "isfinite", "log10", "erfc", "sinh", "cosh", "tan", "asinh", "atan", "rand_like",
    "randn_like", "empty_like", "bernoulli",
)  # fmt: skip
def _unary(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    value = next((v for v in argument_values(node, environment).values() if isinstance(v, Value)), None)
    return Value(node_shape(node) or (), () if value is None else value.factors)


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "lp_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_nearest_exact2d", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d", "max_pool2d_with_indices", "grid_sampler",
)  # fmt: skip
def _spatial(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """Operations over the trailing axes: the leading two (batch and channel) pass through."""
    arguments = argument_values(node, environment)
    x = next(value for value in arguments.values() if isinstance(value, Value))
    spatial = int(next(digit for digit in op_name(node) if digit.isdigit())) if op_name(node) != "grid_sampler" else 2
    leading = set(range(len(x.shape) - spatial))
    kept = tuple(keep_only(x, leading, context.ids, f"pooled or resized at {source_line(node)}"))
    return plain_value(node, kept)


@rule("mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod", "max", "min",
    "any", "all", "argmax", "argmin", "var_mean", "std_mean", "aminmax", "median", "nanmean", "nansum",
    "count_nonzero")  # fmt: skip
def _reduce(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    arguments = argument_values(node, environment)
    values = [value for value in arguments.values() if isinstance(value, Value)]
    if len(values) > 1:  # torch.max(a, b) is an element-wise maximum
        return _elementwise(node, environment, context)
    x, ids = values[0], context.ids
    dims = arguments.get("dim")
    rank = len(x.shape)
    dims = [dims] if isinstance(dims, int) else dims
    axes = {axis % rank for axis in dims} if dims and rank else set(range(rank))
    kept = []
    for factor in x.factors:
        inside = set(tracked_axes(factor)) & axes
        if inside and inside == set(tracked_axes(factor)):
            ids.reduced(factor, f"{op_name(node)} over channels at {source_line(node)}")
            continue
        index = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(rank))
        if inside:
            ids.join(factor, factor[index])
        kept.append(factor[index] if arguments.get("keepdim") else factor[index].squeeze(tuple(axes)))
    return plain_value(node, tuple(kept))


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "topk", "flip", "roll")
def _along_axis(node: Any, environment: dict[Any, Any], context: Context) -> Any:
    """Operations whose result along ``dim`` depends on everything there: a tracked axis has to stay."""
    arguments = argument_values(node, environment)
    x = next(value for value in arguments.values() if isinstance(value, Value))
    dims = arguments.get("dim", arguments.get("dims", -1))
    rank = len(x.shape)
    listed = [dims] if isinstance(dims, int) else dims or range(rank)  # a roll without dims runs over everything
    axes = {axis % rank for axis in listed}
    reason = f"{op_name(node)} along it at {source_line(node)}"
    kept = tuple(keep_only(x, set(range(rank)) - axes, context.ids, reason))
    return plain_value(node, kept)


def _freeze_kernel(weight: Value, ids: Ids) -> None:
    for axis in range(2, len(weight.shape)):
        factor = weight.on(axis)
        if factor is not None:
            ids.freeze(factor, KERNEL_EXTENT)


def _mark_read(inputs: IntArray | None, context: Context) -> None:
    if inputs is not None:
        context.read.append(inputs)


# Imported for their side effect: they fill RULES with the operations that move axes, pick from them, and multiply.
from hwsearch.graph import rules_index, rules_product, rules_shape  # noqa: E402, F401
