"""``reparametrize``: a plain network's convolutions become blocks of branches, in place, their weights kept.

Which batch norm belongs to which convolution is read off the graph, as folding does, never off names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.reparam.algebra import ConvMap, ConvShape
from hwsearch.reparam.branches import ConvBranch, NormMaker
from hwsearch.reparam.fold import plan_fold
from hwsearch.reparam.foreign import replace_modules
from hwsearch.reparam.odbb import ODBB, branch_kinds
from hwsearch.reparam.trace import is_plain_affine

#: Branches by the name of a convolution and its shape; ``None`` leaves it as it is.
Chooser = Callable[[str, ConvShape], "str | Sequence[str] | None"]


def reparametrize(
    model: nn.Module,
    branches: str | Sequence[str] | Chooser = "odbb",
    *,
    layers: str | Sequence[str] = "*",
    border: str = "pad_first",
    post_norm: bool = False,
    keep: bool = True,
    norm: NormMaker = nn.BatchNorm2d,
    middle_ratio: int | None = None,
    example_input: Tensor | None = None,
) -> tuple[str, ...]:
    """Turn convolutions of a network into ``ODBB`` blocks, in place.

    The kxk branch takes over the convolution's own parameters, and the batch norm behind it where there is one (which
    becomes ``nn.Identity``, or the batch norm after the sum with ``post_norm``). With ``keep`` all other branches start
    at zero, so that the network computes in eval mode what it did; they start learning at once. A 1x1 convolution is
    left alone unless ``branches`` names kinds for it through a function.

    Args:
        model: any mode; may be a single convolution's parent, not a bare convolution.
        branches: a block's name (``BLOCKS``), kinds, or a function of (name, shape) that gives one of these or None.
        layers: patterns of names of the convolutions that become blocks.
        border, post_norm, middle_ratio: see ``ODBB``. For depth-wise blocks whose widths are searched the ratio is 1.
        keep: new branches start at zero; without it they start as fresh layers do.
        norm: makes the batch norms of new branches.
        example_input: where the graph cannot be read without one, see ``plan_fold``.
    Returns:
        Names of the blocks, in the model's order.
    Raises:
        InputError: no convolution fits, or a convolution is shared or bears a hook.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> reparametrize(model)
        ('0',)
        >>> model[0].names
        ('kxk', '1x1', '1xk', 'kx1', '1x1-kxk', '1x1-avg', 'identity')
    """
    if not callable(branches):
        branch_kinds(branches)  # a wrong name is told before anything changes
    patterns = [layers] if isinstance(layers, str) else list(layers)
    taken = {f"{name}." for name, module in model.named_modules() if isinstance(module, ODBB)}
    chosen: dict[str, str | Sequence[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or not is_plain_affine(module):
            continue
        if any(name.startswith(prefix) for prefix in taken) or not any(fnmatchcase(name, p) for p in patterns):
            continue
        shape = ConvShape.of(module)
        kinds = branches(name, shape) if callable(branches) else (branches if shape.kernel != (1, 1) else None)
        if kinds is not None:
            chosen[name] = kinds
    if not chosen or "" in chosen:
        raise InputError(
            f"no convolution of {type(model).__name__} larger than 1x1 is named like {', '.join(patterns)}: nothing to "
            "re-parameterise"
        )
    partners = _partners(model, example_input)
    new: dict[nn.Module, nn.Module] = {}
    for name, kinds in chosen.items():
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)  # chosen are
        if conv._forward_hooks or conv._forward_pre_hooks:
            raise InputError(f"convolution {name!r} has a forward hook, which a block would lose: remove it first")
        if nn.utils.parametrize.is_parametrized(conv):
            raise InputError(f"convolution {name!r} has a parametrisation (weight norm or alike): remove it first")
        factory: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        block = ODBB(
            ConvShape.of(conv),
            _with_kxk(branch_kinds(kinds)),
            border=border,
            post_norm=post_norm,
            norm=norm,
            middle_ratio=middle_ratio,
            **factory,
        )
        partner = model.get_submodule(partners[name]) if name in partners else None
        _take_over(block, conv, partner)
        if keep:
            _silence(block)
        if partner is not None:
            new[partner] = nn.Identity().train(partner.training)
        block.train(conv.training)
        new[conv] = block
    replace_modules(model, new)
    return tuple(chosen)


def _partners(model: nn.Module, example_input: Tensor | None) -> dict[str, str]:
    """Convolution to the batch norm that is its only reader."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return {}
    try:
        return dict(plan_fold(copy.deepcopy(model).eval(), example_input).pairs)
    except UnsupportedModelError as error:
        if example_input is not None:
            raise
        raise UnsupportedModelError(f"{error} (reparametrize takes example_input too)") from error


def _with_kxk(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The weights of the convolution need a branch to live in."""
    return kinds if "kxk" in kinds else ("kxk", *kinds)


def _take_over(block: ODBB, conv: nn.Conv2d, partner: nn.Module | None) -> None:
    """The kxk branch gets the convolution's parameters; the norms are such that eval mode computes what it did."""
    branch = block.branches["kxk"]
    assert isinstance(branch, ConvBranch)  # _with_kxk put it there
    branch.conv.weight = conv.weight
    branch.conv.bias = conv.bias
    if partner is not None and isinstance(block.post_norm, nn.Identity):
        branch.norm = partner
        return
    if partner is not None:
        block.post_norm = partner
    for norm in (branch.norm, block.post_norm):
        if norm is not partner and isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
            with torch.no_grad():
                norm.weight.fill_((1.0 + norm.eps) ** 0.5)  # fresh statistics divide by sqrt(1 + eps)


def _silence(block: ODBB) -> None:
    """All branches but the first kxk give zero; what has nothing to set to zero is taken off the kxk kernel."""
    main = block.branches["kxk"]
    assert isinstance(main, ConvBranch)  # as above
    for name, branch in block._named():
        if name == "kxk":
            continue
        last = branch.last_norm()
        with torch.no_grad():
            if isinstance(last, nn.modules.batchnorm._BatchNorm) and last.affine:
                last.weight.zero_()
            elif isinstance(branch, ConvBranch):
                branch.conv.weight.zero_()
            else:
                rest = branch.conv_map().embedded(block.host, name)
                scale = ConvMap(torch.ones_like(rest.weight), rest.bias, block.host).then_norm(main.norm).weight
                main.conv.weight.sub_((rest.weight / scale).to(main.conv.weight.dtype))
