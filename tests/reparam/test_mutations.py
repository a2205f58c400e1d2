"""The grid has teeth: each rule of folding, broken once, makes it fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from block_grid import cases, errors_of
from torch import Tensor, nn
from torch.nn import functional

from hwsearch.errors import InputError
from hwsearch.reparam import algebra, branches
from hwsearch.reparam.algebra import ConvMap, ConvShape
from hwsearch.reparam.branches import SequenceBranch
from hwsearch.reparam.odbb import ODBB

torch.set_num_threads(1)

RIGHT = {
    "scale_and_shift": algebra.scale_and_shift,
    "taps": algebra.taps,
    "identity": ConvMap.identity.__func__,  # type: ignore[attr-defined]
    "average": ConvMap.average.__func__,  # type: ignore[attr-defined]
    "pointwise": branches.compose_pointwise,
    "depthwise": branches.compose_depthwise,
    "folded_shape": ODBB.folded_shape,
}


def worst(enough: float = float("inf"), first: int = 5000, count: int = 60) -> tuple[float, float]:
    """Largest errors (border, interior) over a small grid, or until ``enough``; a fold that fails is all wrong."""
    border = interior = 0.0
    for _, block, x in cases(first, count):
        try:
            found = errors_of(block, x)
        except (InputError, RuntimeError, IndexError):  # shapes that do not fit; a mistake of this file is no mutation
            return float("inf"), float("inf")
        border, interior = max(border, found.border), max(interior, found.interior)
        if max(border, interior) > enough:
            break
    return border, interior


def test_unbroken_the_small_grid_passes() -> None:
    assert max(worst()) < 1e-12


def forget_eps(norm: Any) -> tuple[Tensor, Tensor]:
    eps, norm.eps = norm.eps, 0.0
    found = RIGHT["scale_and_shift"](norm)
    norm.eps = eps
    return found


def forget_the_mean(norm: Any) -> tuple[Tensor, Tensor]:
    scale, shift = RIGHT["scale_and_shift"](norm)
    return scale, shift + norm.running_mean * scale


def drop_the_sign_of_gamma(norm: Any) -> tuple[Tensor, Tensor]:
    scale, shift = RIGHT["scale_and_shift"](norm)
    return scale.abs(), shift


def swap_height_and_width(part: ConvShape, target: ConvShape, name: str = "") -> tuple[slice, slice]:
    rows, columns = RIGHT["taps"](part, target, name)
    return columns, rows


def always_centre(part: ConvShape, target: ConvShape, name: str = "") -> tuple[slice, slice]:
    starts = [(size - k) // 2 for size, k in zip(target.kernel, part.kernel, strict=True)]
    return slice(starts[0], starts[0] + part.kernel[0]), slice(starts[1], starts[1] + part.kernel[1])


def ignore_dilation(part: ConvShape, target: ConvShape, name: str = "") -> tuple[slice, slice]:
    rows, columns = RIGHT["taps"](part, target, name)
    sizes = part.kernel
    return slice(rows.start, rows.start + sizes[0]), slice(columns.start, columns.start + sizes[1])


def group_index_of_the_whole(cls: type[ConvMap], like: Tensor, shape: ConvShape) -> ConvMap:
    found = RIGHT["identity"](cls, like, shape)
    return replace(found, weight=found.weight.roll(1, 1))


def all_ones_for_identity(cls: type[ConvMap], like: Tensor, shape: ConvShape) -> ConvMap:
    found = RIGHT["identity"](cls, like, shape)
    return replace(found, weight=torch.ones_like(found.weight))


def mean_over_one_axis(cls: type[ConvMap], like: Tensor, shape: ConvShape) -> ConvMap:
    found = RIGHT["average"](cls, like, shape)
    return replace(found, weight=found.weight * shape.kernel[0])


def mean_in_single_precision(cls: type[ConvMap], like: Tensor, shape: ConvShape) -> ConvMap:
    found = RIGHT["average"](cls, like, shape)
    return replace(found, weight=found.weight.float().double())


def drop_the_inner_bias(first: ConvMap, second: ConvMap) -> ConvMap:
    return RIGHT["pointwise"](replace(first, bias=torch.zeros_like(first.bias)), second)


def inner_bias_at_one_tap(first: ConvMap, second: ConvMap) -> ConvMap:
    found = RIGHT["pointwise"](replace(first, bias=torch.zeros_like(first.bias)), second)
    g = second.shape.groups
    tap = second.weight[:, :, 0, 0].reshape(g, -1, second.weight.shape[1])
    return replace(found, bias=found.bias + torch.einsum("gom,gm->go", tap, first.bias.reshape(g, -1)).reshape(-1))


def groups_mixed_up(first: ConvMap, second: ConvMap) -> ConvMap:
    found = RIGHT["pointwise"](replace(first, weight=first.weight.flip(0), bias=first.bias), second)
    return found


def multiplier_before_channel(first: ConvMap, second: ConvMap) -> ConvMap:
    return RIGHT["depthwise"](first, replace(second, weight=second.weight.flip(1)))


def pad_zeros_after_the_norm(self: SequenceBranch, y: Tensor) -> Tensor:
    (top, bottom), (left, right) = self.host.padding
    return functional.pad(y, (left, right, top, bottom))


def zeros_for_every_mode(x: Tensor, shape: ConvShape) -> Tensor:
    (top, bottom), (left, right) = shape.padding
    return functional.pad(x, (left, right, top, bottom))


def forget_the_post_norm(self: ODBB) -> ConvMap:
    return branches.total(self._maps(), self.host)


def fold_all_branches(self: ODBB) -> list[tuple[str, ConvMap]]:
    return [(name, branch.conv_map()) for name, branch in list(self.branches.items())[:-1] or self.branches.items()]


def support_of_one_branch(self: ODBB, minimal: bool = True) -> ConvShape:
    middle = tuple((size - 1) // 2 for size in self.host.kernel)
    return self.host.window((middle[0], middle[1]), (1, 1))


MUTATIONS: list[tuple[Any, str, Callable[..., Any]]] = [
    (algebra, "scale_and_shift", forget_eps),
    (algebra, "scale_and_shift", forget_the_mean),
    (algebra, "scale_and_shift", drop_the_sign_of_gamma),
    (algebra, "taps", swap_height_and_width),
    (algebra, "taps", always_centre),
    (algebra, "taps", ignore_dilation),
    (ConvMap, "identity", classmethod(group_index_of_the_whole)),  # type: ignore[list-item]
    (ConvMap, "identity", classmethod(all_ones_for_identity)),  # type: ignore[list-item]
    (ConvMap, "average", classmethod(mean_over_one_axis)),  # type: ignore[list-item]
    (ConvMap, "average", classmethod(mean_in_single_precision)),  # type: ignore[list-item]
    (branches, "compose_pointwise", drop_the_inner_bias),
    (branches, "compose_pointwise", inner_bias_at_one_tap),
    (branches, "compose_pointwise", groups_mixed_up),
    (branches, "compose_depthwise", multiplier_before_channel),
    (ODBB, "conv_map", forget_the_post_norm),
    (ODBB, "_maps", fold_all_branches),
    (ODBB, "folded_shape", support_of_one_branch),
]


@pytest.mark.parametrize(("where", "name", "mutant"), MUTATIONS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_broken_rule_is_seen(where: Any, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, name, mutant)
    assert max(worst(enough=1e-10)) > 1e-10


@pytest.mark.parametrize(
    ("where", "name", "mutant"),
    [(SequenceBranch, "_with_border", pad_zeros_after_the_norm), (branches, "pad", zeros_for_every_mode)],
    ids=["pad_zeros_after_the_norm", "zeros_for_every_mode"],
)
def test_a_wrong_border_is_seen_on_the_border_alone(
    where: Any, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake that a mean over the map forgives: inside all is exact."""
    monkeypatch.setattr(where, name, mutant)
    border, interior = worst()
    assert border > 1e-3
    assert interior < 1e-12


def test_unfoldable_modules_are_no_silent_identity() -> None:
    """A batch norm that folding does not know must not vanish."""
    block = ODBB(ConvShape(4, 4, (3, 3), padding=((1, 1), (1, 1))), ("kxk",), norm=nn.InstanceNorm2d).eval()
    with pytest.raises(InputError, match=r"branch 'kxk': a InstanceNorm2d does not fold"):
        block.fold()
