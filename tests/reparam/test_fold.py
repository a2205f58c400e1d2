"""Folding: exact on every kind of layer, strict about what it must not touch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hwsearch.errors import CheckFailedError, InputError, UnsupportedModelError
from hwsearch.reparam.check import randomise
from hwsearch.reparam.fold import fold, plan_fold

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3


def worst(model: nn.Module, folded: nn.Module, x: Tensor) -> float:
    """Largest error relative to the largest output."""
    with torch.no_grad():
        expected, got = model(x), folded(x)
    return float((expected - got).abs().max() / expected.abs().max())


def ready(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """In eval mode, float64, with random statistics."""
    torch.manual_seed(seed)
    model = model.double().eval()
    randomise(model, x, torch.Generator().manual_seed(seed))
    return model


class Net(nn.Module):
    """A model whose forward is given: keeps each test's graph beside its name."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kernel=st.sampled_from([1, 2, 3, 5, (1, 3), (3, 1), (5, 3)]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    multiplier=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolutions_of_every_shape_fold_exactly(
    kernel: object,
    stride: int,
    dilation: int,
    groups: int,
    multiplier: int,
    mode: str,
    bias: bool,
    affine: bool,
    seed: int,
) -> None:
    conv = nn.Conv2d(
        4,
        4 * multiplier,
        kernel,
        stride,
        1,
        dilation,
        groups,
        bias=bias,
        padding_mode=mode,  # type: ignore[arg-type]
    )
    x = image(2, 4, 17, 14)
    model = ready(nn.Sequential(conv, nn.BatchNorm2d(4 * multiplier, affine=affine)), x, seed)
    assert worst(model, fold(model), x) < 1e-13


@settings(max_examples=60, deadline=None, derandomize=True)
@given(stride=st.integers(1, 2), groups=st.sampled_from([1, 2, 3, 6]), bias=st.booleans(), wider=st.integers(1, 2))
def test_transposed_convolutions_fold_exactly(stride: int, groups: int, bias: bool, wider: int) -> None:
    conv = nn.ConvTranspose2d(6, 6 * wider, 3, stride, 1, stride - 1, groups, bias=bias)
    x = image(2, 6, 7, 5)
    model = ready(nn.Sequential(conv, nn.BatchNorm2d(6 * wider)), x)
    assert worst(model, fold(model), x) < 1e-13


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)), (2, 3, 9)),
        (nn.Sequential(nn.Conv3d(2, 4, 3, bias=False), nn.BatchNorm3d(4)), (2, 2, 5, 6, 4)),
        (nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), (2, 4, 9)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)), (3, 3, 2, 2)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5)), (3, 12)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.Dropout(0.5), nn.BatchNorm2d(4)), (2, 3, 4, 4)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)), (2, 3, 4, 4)),
    ],
    ids=["conv1d", "conv3d", "transpose1d", "linear", "linear-chain", "dropout-between", "sync"],
)
def test_other_layers_fold_exactly(model: nn.Module, shape: tuple[int, ...]) -> None:
    model = copy.deepcopy(model).double().eval()
    x = image(*shape)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -1, 1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.3, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, -1, 1)
    folded = fold(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert worst(model, folded, x) < 1e-13


def test_the_original_is_untouched_and_the_copy_keeps_its_names() -> None:
    x = image(1, 3, 8, 8)
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), x)
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}
    assert isinstance(folded[1], nn.Identity)  # type: ignore[index]
    assert not any(m.training for m in folded.modules())


def test_dtype_memory_format_and_requires_grad_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    model = model.to(memory_format=torch.channels_last).to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    layer = fold(model)[0]  # type: ignore[index]
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad  # the batch norm's parameters learned


def test_half_precision_is_folded_in_double_and_rounded_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval()
    randomise(model, image(1, 3, 8, 8), GENERATOR)
    half = copy.deepcopy(model).half()
    layer = fold(half)[0]  # type: ignore[index]
    exact = fold(copy.deepcopy(half).double())[0]  # type: ignore[index]
    assert torch.equal(layer.weight, exact.weight.half())
    assert torch.equal(layer.bias, exact.bias.half())


def test_folding_twice_has_nothing_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    folded = fold(model)
    with pytest.raises(InputError, match=r"nothing to fold in Sequential .*no batch norm"):
        fold(folded)
    again = fold(folded, require=False)
    assert again is not folded
    assert all(torch.equal(a, b) for a, b in zip(folded.parameters(), again.parameters(), strict=True))


def test_training_mode_is_refused_and_the_module_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].train()
    with pytest.raises(InputError, match=r"module '1' \(BatchNorm2d\) is in training mode: call model.eval\(\)"):
        fold(model)
    with pytest.raises(InputError, match="module 'Dropout'"):
        fold(nn.Dropout())


# --- pairs are found in the graph, never by name ---


def bn(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


REFUSED = {
    "the convolution has a second reader": (
        Net(lambda s, x: (y := s.a(x)) + s.b(y), a=conv(), b=bn()),
        "'a' is also read by another layer",
    ),
    "a second reader works in place": (
        Net(lambda s, x: (torch.relu_(y := s.a(x)), s.b(y))[1], a=conv(), b=bn()),
        "",  # fx sees two readers, export sees the relu in between
    ),
    "something between": (
        Net(lambda s, x: s.b(torch.relu(s.a(x))), a=conv(), b=bn()),
        "does not come from a convolution",
    ),
    "one batch norm after two convolutions": (
        Net(lambda s, x: s.b(s.a(x)) + s.b(s.c(x)), a=conv(), b=bn(), c=conv()),
        "it is shared by several layers: a, c",
    ),
    "one convolution before two batch norms": (
        Net(lambda s, x: s.b(s.a(x)) + s.c(s.a(x)), a=conv(), b=bn(), c=bn()),
        "'a' is called 2 times, not always before",
    ),
    "a convolution also used alone": (
        Net(lambda s, x: s.a(s.b(s.a(x))), a=conv(), b=bn()),
        "'a' is called 2 times",
    ),
    "its weight used elsewhere": (
        Net(lambda s, x: functional.conv2d(s.b(s.a(x)), s.a.weight), a=conv(), b=bn()),
        "'a'",  # to export the second use is a second call of the layer
    ),
    "its statistics used elsewhere": (
        Net(lambda s, x: s.b(s.a(x)) + s.b.running_mean.view(1, -1, 1, 1), a=conv(), b=bn()),
        "parameters of 'b' are also used outside",
    ),
    "no running statistics": (
        Net(lambda s, x: s.b(s.a(x)), a=conv(), b=nn.BatchNorm2d(4, track_running_stats=False)),
        "keeps no running statistics",
    ),
    "never called": (Net(lambda s, x: s.a(x), a=conv(), b=bn()), "never called"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_what_cannot_be_folded_is_left_alone_with_the_reason(case: str, tracer: str) -> None:
    model, reason = REFUSED[case]
    model = model.eval()
    if tracer == "export":
        from hwsearch.reparam import fold as module
        from hwsearch.reparam.trace import trace

        plan = module._plan(model, *trace(model, image(2, 4, 8, 8).float()))
    else:
        plan = plan_fold(model)
    assert plan.pairs == ()
    assert any(reason in why for _, why in plan.left), plan.left
    with pytest.raises(InputError, match="nothing to fold"):
        fold(model)


def test_a_pair_used_several_times_folds_once() -> None:
    x = image(2, 4, 8, 8)
    model = ready(Net(lambda s, x: s.b(s.a(torch.relu(s.b(s.a(x))))), a=conv(), b=bn()), x)
    assert worst(model, fold(model), x) < 1e-12


def test_a_weight_tied_to_another_layer_is_not_changed_there() -> None:
    x = image(2, 4, 8, 8)
    model = Net(lambda s, x: s.c(s.b(s.a(x))), a=conv(), b=bn(), c=conv())
    model.c.weight = model.a.weight
    model = ready(model, x)
    assert worst(model, fold(model), x) < 1e-12


def test_a_batch_norm_registered_twice_is_replaced_everywhere() -> None:
    x = image(2, 4, 8, 8)
    model = Net(lambda s, x: s.b(s.a(x)), a=conv(), b=bn())
    model.alias = model.b
    folded = fold(ready(model, x))
    assert isinstance(folded.alias, nn.Identity)


def test_weight_norm_becomes_the_weight_it_computes() -> None:
    x = image(2, 4, 8, 8)
    model = Net(lambda s, x: s.b(s.a(x)), a=nn.utils.parametrizations.weight_norm(conv()), b=bn())
    model = ready(model, x)
    folded = fold(model)
    assert worst(model, folded, x) < 1e-12
    assert "a.weight" in folded.state_dict()
    assert worst(model, folded, x) < 1e-12  # the original still has its parametrisation


def test_a_forward_hook_may_change_values_so_its_pair_stays() -> None:
    model = Net(lambda s, x: s.b(s.a(x)), a=conv(), b=bn()).eval()
    model.a.register_forward_hook(lambda module, inputs, output: output * 2)
    assert "forward hook" in plan_fold(model).left[0][1]


def test_a_subclass_that_does_more_is_left_alone() -> None:
    class NormAct(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(x, self.weight - self.weight.mean())

    assert "NormAct does more" in plan_fold(nn.Sequential(conv(), NormAct(4)).eval()).left[0][1]
    assert plan_fold(nn.Sequential(Standardised(4, 4, 3), bn()).eval()).pairs == ()


def test_a_subclass_with_the_same_forward_folds() -> None:
    class Named(nn.Conv2d):
        pass

    assert plan_fold(nn.Sequential(Named(4, 4, 3), bn()).eval()).pairs == (("0", "1"),)


# --- rank and control flow: when an example input is needed ---


def test_a_linear_layer_on_sequences_is_not_its_batch_norms_axis() -> None:
    """On (N, 5, F) BatchNorm1d(5) works on axis 1, not on the 5 outputs of the linear layer."""
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)).eval()
    with pytest.raises(UnsupportedModelError, match=r"'0' and '1'.*pass example_input"):
        plan_fold(model)
    assert "axis 1" in plan_fold(model, torch.zeros(2, 5, 7)).left[0][1]
    assert plan_fold(model, torch.zeros(2, 7)).pairs == (("0", "1"),)


def test_unequal_channels_mean_another_axis() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(6)).eval()
    assert "another axis" in plan_fold(model).left[0][1]


def test_control_flow_needs_an_example_input() -> None:
    model = ready(Net(lambda s, x: s.b(s.a(x)) if x.shape[1] == 4 else x, a=conv(), b=bn()), image(2, 4, 8, 8))
    with pytest.raises(UnsupportedModelError, match="pass example_input"):
        fold(model)
    x = image(2, 4, 8, 8)
    assert worst(model, fold(model, x), x) < 1e-13


def test_arguments_with_defaults_keep_them() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), bn()

        def forward(self, x: Tensor, features: bool = False) -> Tensor:
            return self.a(x) if features else self.b(self.a(x))

    assert plan_fold(Optional().eval()).pairs == (("a", "b"),)


def test_a_model_that_cannot_be_traced_at_all() -> None:
    model = Net(lambda s, x: s.b(s.a(x)) if float(x.sum()) > 0 else x, a=conv(), b=bn()).eval()
    with pytest.raises(UnsupportedModelError, match=r"torch.export cannot capture Net on an input of 2x4x8x8"):
        fold(model, torch.ones(2, 4, 8, 8))


def test_lazy_layers_are_named() -> None:
    with pytest.raises(InputError, match=r"'0' \(LazyConv2d\) has no weights yet"):
        fold(nn.Sequential(nn.LazyConv2d(4, 3), bn()).eval())


# --- broken values ---


@pytest.mark.parametrize(("name", "value"), [("running_var", -1.0), ("running_mean", float("nan"))])
def test_statistics_that_make_no_number_are_refused(name: str, value: float) -> None:
    model = nn.Sequential(conv(), bn()).eval()
    getattr(model[1], name)[2] = value
    with pytest.raises(CheckFailedError, match=r"folding '1' into '0' gives a (weight|bias) that is not finite"):
        fold(model)


def test_overflow_in_half_precision_is_refused() -> None:
    model = nn.Sequential(conv(), bn()).eval().half()
    model[1].running_var.zero_()
    model[1].weight.data.fill_(60000)
    with pytest.raises(CheckFailedError, match=r"not finite in torch\.float16"):
        fold(model)


def test_with_an_example_input_a_wrong_fold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from hwsearch.reparam import fold as module

    right = module.scale_and_shift
    monkeypatch.setattr(module, "scale_and_shift", lambda norm: (right(norm)[0] * 1.1, right(norm)[1]))
    x = image(2, 4, 8, 8)
    with pytest.raises(CheckFailedError, match="the folded Sequential differs from the original"):
        fold(ready(nn.Sequential(conv(), bn()), x), x)


def test_a_single_layer_is_nothing_to_fold() -> None:
    with pytest.raises(InputError, match="nothing to fold in Conv2d"):
        fold(conv().eval())
    with pytest.raises(InputError, match="nothing to fold in BatchNorm2d"):
        fold(bn().eval())
