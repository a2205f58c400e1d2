"""Fold a network for its run time: branches into one convolution, batch norms into the layer before them.

Blocks come first (``ODBB``, and those of other libraries that bring a folding method), then every pair of a convolution
or linear layer and a batch norm. In eval mode a batch norm is the affine map ``a*y + c`` per channel with
``a = gamma / sqrt(var + eps)`` and ``c = beta - mean * a``; behind ``y = W x + b`` both are one layer with weight
``a*W`` and bias ``a*b + c``. That is exact for every stride, padding (mode), dilation and group count, because ``a``
and ``c`` act on the output alone.

Contract: the model given is never changed; a fold either holds or raises; what stays unfolded is in ``FoldPlan.left``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from hwsearch.errors import CheckFailedError, InputError, InternalError, UnsupportedModelError
from hwsearch.reparam.algebra import scale_and_shift
from hwsearch.reparam.foreign import blocks_of, fold_foreign, foreign_blocks, replace_modules
from hwsearch.reparam.trace import Call, batch_norms, is_plain_affine, is_plain_norm, trace

#: Largest error of a folded network against the original, relative to the largest output, by type of the output.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """What is folded: ``pairs`` of (layer, batch norm) names, ``left``: (batch norm or block, why it stays), and
    ``blocks``: (name, "odbb" or the method of another library's block), which are folded before pairs are sought."""

    pairs: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...] = ()
    blocks: tuple[tuple[str, str], ...] = ()


def plan_fold(model: nn.Module, example_input: Tensor | None = None) -> FoldPlan:
    """Find every block, and every batch norm whose only input is a layer that nothing else reads.

    Args:
        model: in eval mode; batch is the first axis of its tensors; not changed.
        example_input: needed where ``torch.fx`` cannot follow the model or cannot tell a tensor's rank, and for blocks
            of other libraries, whose folds are checked on it.
    Raises:
        InputError: a module is in training mode (named), or lazy and not yet built; a branch is not aligned.
        UnsupportedModelError: the model cannot be traced, or only with an example input.
        CheckFailedError: a block of another library does not fold into what it computes.
    """
    _refuse_training(model)
    return fold_blocks(model, example_input)[1]


def fold_blocks(
    model: nn.Module, example_input: Tensor | None, *, minimal: bool = True, foreign: bool = True
) -> tuple[nn.Module, FoldPlan]:
    """The model, or its copy where it has blocks, with these folded; and the plan, its pairs not yet folded."""
    own, others = list(blocks_of(model)), foreign_blocks(model) if foreign else ()
    left, blocks = [], []
    new: dict[nn.Module, nn.Module] = {}
    if own or others:
        model = _copied(model)
        for name, block in list(blocks_of(model)):
            if any(module._forward_hooks or module._forward_pre_hooks for module in block.modules()):
                left.append((name, "it has a forward hook, which may change values: remove it first"))
                continue
            try:
                new[block] = block.fold(minimal)
            except InputError as error:
                raise InputError(f"block {name or 'ODBB'!r} does not fold: {error}") from error
            blocks.append((name, "odbb"))
        model = replace_modules(model, new)
    if others and example_input is None:
        raise UnsupportedModelError(
            f"{others[0] or type(model).__name__!r} is a block of another library, whose fold is checked on a real "
            "input: pass example_input to fold"
        )
    if others and example_input is not None:
        model, folded = fold_foreign(model, example_input)
        blocks += folded
    try:
        pairs = _plan(model, *trace(model))
    except UnsupportedModelError:
        if example_input is None:
            raise
        pairs = _plan(model, *trace(model, example_input))
    return model, FoldPlan(pairs.pairs, (*left, *pairs.left), tuple(blocks))


def _plan(model: nn.Module, calls: tuple[Call, ...], elsewhere: frozenset[str]) -> FoldPlan:
    readers: dict[str, list[Call]] = {}
    for call in calls:
        if call.kind == "norm" and call.source:
            readers.setdefault(call.source, []).append(call)
    of_norm: dict[str, list[Call]] = {}
    for call in calls:
        if call.kind == "norm":
            of_norm.setdefault(call.module, []).append(call)
    times_called = Counter(call.module for call in calls)
    pairs, left = [], []
    for name, norm in batch_norms(model):
        own = of_norm.get(name, [])
        reason = _why_not(model, name, norm, own, readers, times_called, elsewhere)
        if reason:
            left.append((name, reason))
        else:
            pairs.append((own[0].source, name))
    return FoldPlan(tuple(pairs), tuple(left))


def fold(
    model: nn.Module,
    example_input: Tensor | None = None,
    *,
    require: bool = True,
    minimal: bool = True,
    foreign: bool = True,
) -> nn.Module:
    """A copy of the model with every block of branches one convolution, and every foldable batch norm merged.

    An ``ODBB``, or a block of another library that brings ``fuse``, ``reparameterize``, ``switch_to_deploy`` or
    ``merge_kernel``, is replaced by what it folds into. Weight norm and its kin become the weight that they compute.
    The layers keep their names, dtype, memory format and ``requires_grad``, and gain a bias; each folded batch norm
    becomes ``nn.Identity``. Products are computed in float64 and rounded once. With an example input the copy is also
    run against the original. An optimiser made for the original does not know the copy's parameters.

    Args:
        model: in eval mode; not changed.
        example_input: see ``plan_fold``.
        require: raise when there is nothing to fold (a silent no-op is the most common way to deploy a slow network).
        minimal: a block of which only small branches run becomes a small convolution (only 1x1: a 1x1 convolution).
        foreign: fold blocks of other libraries by their own methods, each checked on the input that it gets.
    Raises:
        InputError: training mode, a branch that is not aligned, or nothing foldable while ``require``.
        UnsupportedModelError: the model cannot be traced or copied.
        CheckFailedError: a folded weight is not finite, or the copy computes something else.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> [type(m).__name__ for m in fold(model)]
        ['Conv2d', 'Identity', 'ReLU']

    Reference: Ding et al., RepVGG, CVPR 2021, section 3.3; ``hwsearch.reparam.algebra`` for blocks.
    """
    _refuse_training(model)
    folded, plan = fold_blocks(model, example_input, minimal=minimal, foreign=foreign)
    if require and not plan.pairs and not plan.blocks:
        reasons = "; ".join(f"{name}: {why}" for name, why in plan.left[:3]) or "the model has no batch norm"
        raise InputError(
            f"nothing to fold in {type(model).__name__} ({reasons}): it is deployed as it stands (from Python, "
            "require=False takes it so)"
        )
    folded = _copied(model) if folded is model else folded
    with torch.no_grad():
        new = dict(_fold_pair(folded, layer_name, norm_name) for layer_name, norm_name in plan.pairs)
        for layer in folded.modules():
            # what is left of weight norm and its kin: an exporter would bake in the weights of the moment
            if is_plain_affine(layer) and parametrize.is_parametrized(layer):
                _materialise(layer)
    replace_modules(folded, new)  # a norm may be registered under several names
    if example_input is not None:
        _compare(model, folded, example_input)
    return folded


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be copied ({error}): see copy.deepcopy") from error


def merge(layer: nn.Module, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias (float64) of ``scale * layer(x) + shift``; scale and shift of shape (out_channels,).

    Output channels are axis 0 of a weight, except in a transposed convolution: (in, out / groups, *kernel), where
    output channel ``g * out/groups + j`` is row ``j`` of the inputs of group ``g``.
    """
    weight = layer.weight.detach().double()  # type: ignore[operator]
    tail = [1] * (weight.ndim - 2)
    if isinstance(layer, _ConvTransposeNd):
        per_group = scale.view(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
        weight = weight * per_group.reshape(weight.shape[0], weight.shape[1], *tail)
    else:
        weight = weight * scale.view(-1, 1, *tail)
    bias = shift if layer.bias is None else shift + scale * layer.bias.detach().double()  # type: ignore[operator]
    return weight, bias


def _fold_pair(model: nn.Module, layer_name: str, norm_name: str) -> tuple[nn.Module, nn.Module]:
    """The layer gets its new weights; returned are the norm and what takes its place."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    if not isinstance(norm, _BatchNorm):
        raise InternalError(f"{norm_name!r} is a {type(norm).__name__}, not a batch norm")
    if parametrize.is_parametrized(layer):
        _materialise(layer)
    old = layer.weight
    weight, bias = merge(layer, *scale_and_shift(norm))
    weight, bias = weight.to(old.dtype), bias.to(old.dtype)  # type: ignore[arg-type]
    for what, tensor in (("weight", weight), ("bias", bias)):
        if not torch.isfinite(tensor).all():
            raise CheckFailedError(
                f"folding {norm_name!r} into {layer_name!r} gives a {what} that is not finite in {old.dtype}: "
                "look for NaN, a negative variance or values too large in either module"
            )
    learns_bias = any(p is not None and p.requires_grad for p in (old, layer.bias, norm.bias, norm.weight))  # type: ignore[union-attr]
    # New tensors, never written in place: a weight tied to another module must not change there.
    layer.weight = nn.Parameter(weight, requires_grad=bool(old.requires_grad))  # type: ignore[union-attr]
    layer.bias = nn.Parameter(bias, requires_grad=learns_bias)
    return norm, nn.Identity().train(norm.training)


def _materialise(layer: nn.Module) -> None:
    """Weight norm and its kin become the weight they compute.

    Not by ``remove_parametrizations``: that edits the generated class, which a deep copy shares with its original.
    """
    values = {name: getattr(layer, name) for name in layer.parametrizations}  # type: ignore[union-attr,operator]
    learns = {name: value.requires_grad for name, value in values.items()}
    layer.__class__ = type(layer).__bases__[0]
    del layer.parametrizations
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value.detach(), requires_grad=learns[name]))


def _why_not(
    model: nn.Module,
    name: str,
    norm: nn.Module,
    own: list[Call],
    readers: dict[str, list[Call]],
    times_called: Mapping[str, int],
    elsewhere: frozenset[str],
) -> str:
    """Why a batch norm cannot be folded, "" when it can."""
    if not is_plain_norm(norm):
        return f"{type(norm).__name__} does more than normalise"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics, so it depends on its batch"
    if not own:
        return "it is never called as a module"
    if missing := [call for call in own if not call.source]:
        return missing[0].reason
    sources = {call.source for call in own}
    if len(sources) > 1:
        return f"it is shared by several layers: {', '.join(sorted(sources))}"
    source = own[0].source
    if any(call.module != name for call in readers[source]) or times_called[source] != len(own):
        return f"layer {source!r} is called {times_called[source]} times, not always before this batch norm"
    layer = model.get_submodule(source)
    for module_name, module in ((source, layer), (name, norm)):
        if module_name in elsewhere:
            return f"the parameters of {module_name!r} are also used outside its own forward"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{module_name!r} has a forward hook, which may change values: remove it first"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels != norm.num_features:
        return f"{source!r} has {channels} outputs, the batch norm {norm.num_features}: another axis is normalised"
    if isinstance(layer, nn.Linear) and any(call.rank != 2 for call in own):
        if any(call.rank is None for call in own):
            raise UnsupportedModelError(
                f"{source!r} and {name!r}: which axis the batch norm works on depends on the rank of the input; "
                "pass example_input to fold"
            )
        return f"it works on axis 1, the outputs of {source!r} are on the last axis"
    if isinstance(layer, nn.Conv1d) and any(call.rank == 2 for call in own):
        return f"the input of {source!r} has no batch axis, so another axis is normalised"
    return ""


def _refuse_training(model: nn.Module) -> None:
    """A fold uses running statistics: in training mode the network would not."""
    training = [(name, module) for name, module in model.named_modules() if module.training]
    names = dict(batch_norms(model))
    norms = [(name, module) for name, module in training if name in names]
    for name, module in norms or training:
        raise InputError(
            f"module {name or type(model).__name__!r} ({type(module).__name__}) is in training mode: "
            "call model.eval() before folding"
        )


def _compare(model: nn.Module, folded: nn.Module, example_input: Tensor) -> None:
    """Run both networks on one input; outputs are tensors or nested tuples, lists and dicts of them."""
    from torch.utils._pytree import tree_leaves

    with torch.no_grad():
        pairs = zip(tree_leaves(model(example_input)), tree_leaves(folded(example_input)), strict=True)
        for expected, got in pairs:
            if not isinstance(expected, Tensor) or not expected.is_floating_point():
                continue
            if not torch.isfinite(expected).all():
                raise CheckFailedError(
                    f"the output of {type(model).__name__} is not finite on an example (NaN or infinity): check its "
                    "weights"
                )
            error = (got.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
            scale = expected.double().abs().max().item() if expected.numel() else 0.0
            if got.shape != expected.shape or not error <= _TOLERANCE.get(expected.dtype, 1e-3) * max(scale, 1e-6):
                raise CheckFailedError(
                    f"the folded {type(model).__name__} differs from the original by {error:.3g} on outputs up to "
                    f"{scale:.3g}: please report this model"
                )
