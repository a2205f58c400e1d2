"""Blocks of other libraries: recognised by the method that folds them, folded by it, and checked before it is believed.

Four conventions are in use: ``switch_to_deploy()`` (RepVGG, DBB, ACNet, OREPA, RepGhost), ``reparameterize()``
(MobileOne, FastViT, timm), ``merge_kernel()`` (RepLKNet), which change a block in place, and ``fuse()`` (LeViT, RepViT,
TinyViT, EfficientViT, SHViT), which returns its replacement. Upstream code drops dilations, padding modes and batch
norms now and then, so each block is compared with its fold under random statistics on the input that it really gets.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hwsearch.errors import CheckFailedError, UnsupportedModelError
from hwsearch.reparam.odbb import ODBB
from hwsearch.reparam.statistics import is_norm, randomise

#: Names of folding methods, in the order in which one is chosen.
METHODS = ("fuse", "reparameterize", "switch_to_deploy", "merge_kernel")
#: Largest error of a block's fold relative to its largest output; upstream kernels are float32 even in a float64 block.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class Recorded:
    """Arguments of one call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def method_of(module: nn.Module) -> str:
    """The name of a module's own folding method, "" when it has none or nothing to fold."""
    if isinstance(module, ODBB) or not any(is_norm(inner) for inner in module.modules()):
        return ""
    for name in METHODS:
        method = getattr(module, name, None)
        if callable(method) and not isinstance(method, nn.Module) and _needs_nothing(method):
            return name
    return ""


def foreign_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the outermost modules with a folding method of their own ("" is the model itself)."""
    found: list[str] = []
    for name, module in model.named_modules():
        # modules come depth first: what is inside a block comes right behind it
        inside = bool(found) and (found[-1] == "" or name.startswith(f"{found[-1]}."))
        if not inside and method_of(module):
            found.append(name)
    return tuple(found)


def fold_foreign(model: nn.Module, example_input: Tensor) -> tuple[nn.Module, tuple[tuple[str, str], ...]]:
    """Fold all blocks of other libraries, in place; what stands for the model now, and (block, method) of each.

    Raises:
        CheckFailedError: a block's fold computes something else; the block is named.
        UnsupportedModelError: a block's method fails.
    """
    names = foreign_blocks(model)
    if not names:
        return model, ()
    _check(model, names, example_input)
    folded: list[tuple[str, str]] = []
    new: dict[nn.Module, nn.Module] = {}
    for name in names:
        block = model.get_submodule(name)
        folded.append((name, method_of(block)))
        new[block] = convert(block, name)
    return replace_modules(model, new), tuple(folded)


def convert(block: nn.Module, name: str) -> nn.Module:
    """Call a block's folding method, then those of what it became; the block itself may be changed."""
    training = block.training
    method = method_of(block)
    if method:
        try:
            with torch.no_grad():
                result = getattr(block, method)()
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UnsupportedModelError(
                f"{method}() of block {name or 'the model'!r} ({type(block).__name__}) fails: {reason}; "
                "fold it by hand, or pass foreign=False to fold without it"
            ) from error
        block = result if isinstance(result, nn.Module) else block
    for child_name, child in list(block.named_children()):
        block._modules[child_name] = convert(child, f"{name}.{child_name}" if name else child_name)
    return block.train(training)


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put another module wherever a key is registered, in one walk; the model, or what stands for it now."""
    for parent in list(model.modules()):
        if parent in new:
            continue  # it goes, and what is inside it with it
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def record_calls(model: nn.Module, names: tuple[str, ...], example_input: Tensor) -> dict[str, Recorded]:
    """What each named module is called with in one forward pass (its last call); those never called are left out."""
    found: dict[str, Recorded] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A copy: an in-place activation behind the block may change what it was given.
            found[name] = copy.deepcopy(Recorded(args, kwargs))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in names]
    try:
        with torch.no_grad():
            model(example_input)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _check(model: nn.Module, names: tuple[str, ...], example_input: Tensor) -> None:
    """Every block against its fold, both with the same random statistics, on the input that it gets in the model."""
    from torch.utils._pytree import tree_leaves

    shaken = copy.deepcopy(model)
    randomise(shaken, example_input, torch.Generator().manual_seed(0))
    for name, call in record_calls(shaken, names, example_input).items():
        block = shaken.get_submodule(name)
        kind = type(block).__name__
        with torch.no_grad():
            expected = tree_leaves(copy.deepcopy(block)(*copy.deepcopy(call.args), **call.kwargs))
            got = tree_leaves(convert(copy.deepcopy(block), name)(*call.args, **call.kwargs))
        for one, other in zip(expected, got, strict=True):
            if not isinstance(one, Tensor) or not one.is_floating_point() or not one.numel():
                continue
            scale = max(float(one.double().abs().max()), 1e-6)
            error = float((one.double() - other.double()).abs().max()) if one.shape == other.shape else float("inf")
            if not error <= _TOLERANCE.get(one.dtype, 1e-4) * scale:
                raise CheckFailedError(
                    f"{method_of(block)}() of block {name or 'the model'!r} ({kind}) changes what it computes, by "
                    f"{error:.2g} on outputs up to {scale:.2g}: its own fold is wrong; pass foreign=False to fold "
                    "without it"
                )


def blocks_of(model: nn.Module) -> Iterator[tuple[str, ODBB]]:
    """Every unfolded ODBB by its first name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ODBB) and not module.folded)


def _needs_nothing(method: Any) -> bool:
    """True when a method can be called without arguments."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not inspect.Parameter.empty or p.kind in kinds for p in parameters)
