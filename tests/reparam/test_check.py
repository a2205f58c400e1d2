"""The proof bites: every way of folding wrongly that has been seen in the wild makes it fail."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hwsearch.errors import CheckFailedError, InputError
from hwsearch.reparam import fold as fold_module
from hwsearch.reparam.check import prove
from hwsearch.reparam.fold import fold

torch.set_num_threads(1)


class Residual(nn.Module):
    """Every foldable kind in one small network: dense, depth-wise, transposed with groups, linear; with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=True), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.up(x + self.deep(x)).mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def test_a_right_fold_is_proved_and_reported() -> None:
    model = network()
    report = prove(model, fold(model), (2, 3, 8, 8)).require()
    assert report.ok
    assert {case.dtype for case in report.cases} == {"float32", "float64"}
    assert {case.statistics for case in report.cases} == {"as given", "random"}
    exact = [c for c in report.cases if c.dtype == "float64" and c.statistics == "random"]
    assert max(c.max_relative_error for c in exact) < 1e-12
    assert report.pairs == (("stem.0", "stem.1"), ("deep.0", "deep.1"), ("up.0", "up.1"), ("head.1", "head.2"))
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["ok"] is True
    assert written["max_relative_error"] == report.max_relative_error


def test_the_report_is_a_function_of_its_arguments() -> None:
    model = network()
    assert prove(model, None, (2, 3, 8, 8), seed=3) == prove(model, None, (2, 3, 8, 8), seed=3)
    assert prove(model, None, (2, 3, 8, 8), seed=3) != prove(model, None, (2, 3, 8, 8), seed=4)


def test_the_model_is_not_changed() -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prove(model, None, (1, 3, 8, 8))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m.training for m in model.modules())


# --- mutations: break one rule at a time ---

SCALE, MERGE = fold_module.scale_and_shift, fold_module.merge


def forget_eps(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    eps, norm.eps = norm.eps, 0.0
    result = SCALE(norm)
    norm.eps = eps
    return result


def one_eps_for_all(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    eps, norm.eps = norm.eps, 1e-5
    result = SCALE(norm)
    norm.eps = eps
    return result


def forget_mean(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    return SCALE(norm)[0], norm.bias.detach().double()


def drop_the_sign_of_gamma(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale, _ = SCALE(norm)
    return scale.abs(), norm.bias.detach().double() - norm.running_mean.double() * scale.abs()


def forget_the_square_root(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps)
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def drop_the_inner_bias(layer: nn.Module, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return MERGE(layer, scale, shift)[0], shift


def keep_the_inner_bias_unscaled(layer: nn.Module, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = MERGE(layer, scale, shift)
    return weight, bias if layer.bias is None else shift + layer.bias.detach().double()


def transposed_like_plain(layer: nn.Module, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = MERGE(layer, scale, shift)
    if isinstance(layer, nn.ConvTranspose2d):
        weight = layer.weight.detach().double() * scale.view(-1, 1, 1, 1)
    return weight, bias


def transposed_without_groups(layer: nn.Module, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = MERGE(layer, scale, shift)
    if isinstance(layer, nn.ConvTranspose2d):
        weight = layer.weight.detach().double() * scale[: weight.shape[1]].view(1, -1, 1, 1)
    return weight, bias


def fold_in_half(layer: nn.Module, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = MERGE(layer, scale, shift)
    return weight.half().double(), bias.half().double()


MUTATIONS: list[tuple[str, Callable[..., tuple[Tensor, Tensor]]]] = [
    ("scale_and_shift", forget_eps),
    ("scale_and_shift", one_eps_for_all),
    ("scale_and_shift", forget_mean),
    ("scale_and_shift", drop_the_sign_of_gamma),
    ("scale_and_shift", forget_the_square_root),
    ("merge", drop_the_inner_bias),
    ("merge", keep_the_inner_bias_unscaled),
    ("merge", transposed_like_plain),
    ("merge", transposed_without_groups),
    ("merge", fold_in_half),
]


@pytest.mark.parametrize(("where", "mutant"), MUTATIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_fold_is_caught(where: str, mutant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_module, where, mutant)
    report = prove(network(), None, (2, 3, 8, 8), fold_function=fold_without_its_own_check)
    assert not report.ok
    with pytest.raises(CheckFailedError, match=r"the fold of Residual is wrong in \d+ of 18 cases"):
        report.require()


def fold_without_its_own_check(model: nn.Module) -> nn.Module:
    """``fold`` without an example input does not compare: the proof alone must find the mistake."""
    head = model.head
    model.head = nn.Identity().eval()  # its rank needs an example input
    folded = fold(model)
    model.head = folded.head = head
    return folded


def test_a_fold_of_other_weights_is_caught() -> None:
    torch.manual_seed(1)
    other = Residual().eval()
    report = prove(network(), fold(other, torch.zeros(1, 3, 8, 8)), (2, 3, 8, 8), repeats=0)
    assert not report.ok


def test_a_network_that_is_not_finite_proves_nothing() -> None:
    model = network()
    model.stem[0].weight.data[0] = float("nan")  # type: ignore[index]
    with pytest.raises(CheckFailedError, match="cannot prove a fold: float32 alone changes"):
        prove(model, model, (1, 3, 8, 8))


@pytest.mark.parametrize("shape", [(), (1, 0, 8, 8)])
def test_a_shape_without_elements_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="input shape"):
        prove(network(), None, shape)
