"""``unfold_bn``: the inverse of a fold. A folded convolution becomes a convolution and a batch norm again.

The statistics are measured on data; gamma and beta are chosen so that the network computes what it did. What comes out
can be trained on or quantised with simulated rounding, and folds back into what it was.

Reference: RepVGG tools/insert_bn.py (the idea).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from hwsearch.errors import InputError
from hwsearch.reparam.trace import is_plain_affine

_NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}


class _Moments:
    """Sum, sum of squares and count per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        flat = values.detach().double().movedim(1, 0).flatten(1)
        self.count += flat.shape[1]
        self.sum, self.square = self.sum + flat.sum(1), self.square + flat.square().sum(1)


def unfold_bn(model: nn.Module, batches: Iterable[Tensor], *, layers: str | Sequence[str] = "*") -> nn.Module:
    """A copy of the model with a batch norm behind its convolutions; it computes the same.

    Each convolution ``name`` becomes ``Sequential(conv, bn)`` of the same name; the bias moves into the batch norm.

    Args:
        model: in eval mode, as it comes from ``fold``; not changed.
        batches: inputs (N, ...) to take the statistics from.
        layers: patterns of names of the convolutions that are unfolded.
    Raises:
        InputError: training mode, no batch, or no convolution of such a name that runs.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
        >>> [type(m).__name__ for m in unfold_bn(model, [torch.randn(4, 3, 8, 8)])[0]]
        ['Conv2d', 'BatchNorm2d']
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if training := [name for name, module in model.named_modules() if module.training]:
        raise InputError(f"module {training[0] or type(model).__name__!r} is in training mode: call model.eval() first")
    chosen = {
        name: module
        for name, module in model.named_modules()
        if type(module) in _NORMS and is_plain_affine(module) and any(fnmatchcase(name, p) for p in patterns)
    }
    if not chosen:
        raise InputError(f"no convolution of {type(model).__name__} is named like {', '.join(patterns)}")
    moments = _measure(model, chosen, batches)
    result = copy.deepcopy(model)
    for name, found in moments.items():
        old = result.get_submodule(name)
        new = _with_norm(old, found)
        if old is result:
            return new
        for parent in list(result.modules()):
            for child_name, child in parent._modules.items():
                if child is old:
                    parent._modules[child_name] = new
    return result


def _measure(model: nn.Module, chosen: dict[str, nn.Module], batches: Iterable[Tensor]) -> dict[str, _Moments]:
    """Moments of each convolution's output without its bias, over all batches."""
    moments: dict[str, _Moments] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            if output.dim() == module.weight.dim():  # type: ignore[operator]
                shift = 0.0 if module.bias is None else module.bias.detach().view(1, -1, *[1] * (output.dim() - 2))  # type: ignore[operator]
                moments.setdefault(name, _Moments()).add(output - shift)

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in chosen.items()]
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count or not moments:
        raise InputError("statistics need at least one batch that runs through the convolutions; give one")
    return moments


def _with_norm(conv: nn.Module, found: _Moments) -> nn.Module:
    """The convolution without bias and the batch norm that undoes its own normalisation."""
    assert isinstance(found.sum, Tensor) and isinstance(found.square, Tensor)  # noqa: PT018  (add was called)
    weight, bias = conv.weight, conv.bias
    norm = _NORMS[type(conv)](weight.shape[0], device=weight.device, dtype=weight.dtype)  # type: ignore[index,union-attr,arg-type]
    mean = found.sum / found.count
    variance = (found.square / found.count - mean.square()).clamp_min(0.0)
    with torch.no_grad():
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]
        # From what is stored, not from the float64 values: scale and shift must undo exactly what the layer will do.
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())  # type: ignore[union-attr]
        norm.bias.copy_(norm.running_mean if bias is None else norm.running_mean.double() + bias.double())  # type: ignore[union-attr,operator,arg-type]
    conv.register_parameter("bias", None)
    return nn.Sequential(conv, norm).train(conv.training)
