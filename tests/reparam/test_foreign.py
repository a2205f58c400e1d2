"""Blocks of other libraries: four conventions recognised, wrong ones caught and named, none skipped in silence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hwsearch.errors import CheckFailedError, InputError, UnsupportedModelError
from hwsearch.reparam.check import prove
from hwsearch.reparam.fold import fold, plan_fold
from hwsearch.reparam.statistics import randomise

torch.set_num_threads(1)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.3


def merged(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


class Two(nn.Module):
    """3x3 and 1x1 with a batch norm each: the smallest block that any of these libraries has."""

    def __init__(self, channels: int = 4, mode: str = "zeros") -> None:
        super().__init__()
        self.channels, self.mode = channels, mode
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False, padding_mode=mode)  # type: ignore[arg-type]
        self.thin = nn.Conv2d(channels, channels, 1, bias=False)
        self.wide_bn, self.thin_bn = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.reparam: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam is not None:
            return self.reparam(x)
        return self.wide_bn(self.wide(x)) + self.thin_bn(self.thin(x))

    def convolution(self) -> nn.Conv2d:
        (weight, bias), (thin, thin_bias) = merged(self.wide, self.wide_bn), merged(self.thin, self.thin_bn)
        conv = nn.Conv2d(self.channels, self.channels, 3, padding=1)  # upstream forgets the padding mode here, too
        conv.weight = nn.Parameter((weight + functional.pad(thin, (1, 1, 1, 1))).detach())
        conv.bias = nn.Parameter((bias + thin_bias).detach())
        return conv

    def in_place(self) -> None:
        self.reparam = self.convolution()
        for name in ("wide", "thin", "wide_bn", "thin_bn"):
            delattr(self, name)


class Switching(Two):
    def switch_to_deploy(self) -> None:
        self.in_place()


class Reparameterising(Two):
    def reparameterize(self) -> None:
        self.in_place()


class Merging(Two):
    def merge_kernel(self) -> None:
        self.in_place()


class Fusing(Two):
    def fuse(self) -> nn.Module:
        return self.convolution()


class Outer(nn.Module):
    """A block with a method of its own around one that has another: the outer one is called, then what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Fusing(), Switching()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())

    def fuse(self) -> nn.Module:
        self.first = self.first.fuse()  # type: ignore[assignment]
        return self


def ready(*modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*modules).eval()
    randomise(model, image(2, 4, 9, 8), torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("kind", [Switching, Reparameterising, Merging, Fusing, Outer])
def test_each_convention_is_recognised(kind: type[nn.Module]) -> None:
    model, x = ready(kind(), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), image(2, 4, 9, 8)
    plan = plan_fold(model, x)
    method = next(name for name in vars(kind) if name in ("switch_to_deploy", "reparameterize", "merge_kernel", "fuse"))
    assert plan.blocks == (("0", method),)
    assert plan.pairs == (("2", "3"),)
    folded = fold(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(module.training for module in folded.modules())
    with torch.no_grad():
        assert float((folded(x) - model(x)).abs().max() / model(x).abs().max()) < 1e-5
    assert isinstance(model[0], kind), "the original was changed"
    assert prove(model, folded, (2, 4, 9, 8), repeats=1).require().blocks[0].kind == method


def test_a_model_that_is_one_block() -> None:
    """Tools that look only at children do nothing here, in silence."""
    torch.manual_seed(0)
    model = Fusing().eval()
    assert isinstance(fold(model, image(1, 4, 5, 5)), nn.Conv2d)
    with pytest.raises(InputError, match="nothing to fold"):
        fold(fold(model, image(1, 4, 5, 5)))


def test_a_wrong_fold_of_another_library_is_caught_and_named_even_with_fresh_statistics() -> None:
    model = nn.Sequential(nn.ReLU(), Switching(mode="reflect")).eval()
    with pytest.raises(CheckFailedError, match=r"switch_to_deploy\(\) of block '1' \(Switching\) changes what it"):
        fold(model, image(1, 4, 9, 9))
    assert fold(model, image(1, 4, 9, 9), foreign=False) is not None, "its pairs fold all the same"


class Dropping(Two):
    """Replaces each batch norm by nothing: right with fresh statistics to 1e-5, wrong with any other."""

    def fuse(self) -> nn.Module:
        self.wide_bn, self.thin_bn = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        return self


def test_a_batch_norm_that_vanishes_is_caught_with_fresh_statistics() -> None:
    with pytest.raises(CheckFailedError, match=r"fuse\(\) of block '0' \(Dropping\)"):
        fold(nn.Sequential(Dropping()).eval(), image(1, 4, 9, 9))


class Failing(Two):
    def reparameterize(self) -> None:
        raise AttributeError("'NoneType' object has no attribute 'fuse_weights'")


def test_a_method_that_fails_is_told_with_its_block() -> None:
    model = nn.Sequential(nn.Sequential(Failing())).eval()
    with pytest.raises(UnsupportedModelError, match=r"reparameterize\(\) of block '0.0' \(Failing\) fails: 'NoneType'"):
        fold(model, image(1, 4, 9, 9))


def test_without_an_input_a_fold_of_another_library_is_not_believed() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'0' is a block of another library.*pass example_input"):
        fold(ready(Switching()))


def test_a_method_that_needs_arguments_is_not_ours_to_call() -> None:
    class Attention(Two):
        def fuse(self, left: Tensor, right: Tensor) -> Tensor:
            return left + right

    assert plan_fold(ready(Attention())).blocks == ()


def test_a_folded_block_is_left_alone() -> None:
    model, x = ready(Reparameterising()), image(1, 4, 9, 9)
    again = fold(fold(model, x), x, require=False)
    with torch.no_grad():
        assert torch.equal(again(x), fold(copy.deepcopy(model), x)(x))
