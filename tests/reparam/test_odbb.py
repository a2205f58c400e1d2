"""The block: which branches it has, what it folds into, what it keeps, what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from block_grid import random_block, random_input, shake
from torch import nn

from hwsearch.errors import CheckFailedError, InputError
from hwsearch.reparam.algebra import ConvShape, taps
from hwsearch.reparam.branches import BRANCHES, SequenceBranch
from hwsearch.reparam.odbb import BLOCKS, ODBB

torch.set_num_threads(1)
HOST = ConvShape(4, 4, (3, 3), padding=((1, 1), (1, 1)))


def block(*branches: str, host: ConvShape = HOST, **options: object) -> ODBB:
    torch.manual_seed(0)
    made = ODBB(host, branches or "odbb", dtype=torch.float64, **options).eval()  # type: ignore[arg-type]
    shake(made, np.random.default_rng(0))
    return made


# --- which branches ---


def test_branches_that_a_host_cannot_have_are_left_out() -> None:
    assert block().kinds == BLOCKS["odbb"]
    assert "identity" not in block(host=ConvShape(4, 8, (3, 3), padding=((1, 1), (1, 1)))).kinds
    assert block(host=ConvShape(4, 4, (1, 1))).kinds == ("kxk", "1x1-kxk", "identity")
    with pytest.raises(InputError, match=r"no branch 'identity': the stride is \(2, 2\)"):
        block("kxk", "identity", host=ConvShape(4, 4, (3, 3), (2, 2), padding=((1, 1), (1, 1))), strict=True)
    with pytest.raises(InputError, match="no branch of 1x1 fits: 1x1: its kernel is 1x1 already"):
        block("1x1", host=ConvShape(4, 4, (1, 1)))
    with pytest.raises(InputError, match=r"no branch 'nine': give some of kxk, "):
        block("nine")
    with pytest.raises(InputError, match="there is no block 'rep': give one of odbb, dbb"):
        ODBB(HOST, "rep")
    with pytest.raises(InputError, match="border is 'none'"):
        ODBB(HOST, border="none")


def test_a_stride_keeps_the_sequence_a_branch_of_its_own() -> None:
    strided = block("1x1-kxk", host=ConvShape(4, 8, (3, 3), (2, 2), padding=((1, 1), (1, 1))))
    branch = strided.branches["1x1-kxk"]
    assert isinstance(branch, SequenceBranch)
    assert isinstance(branch.pointwise, nn.Conv2d)


def test_a_depth_wise_host_has_twice_the_channels_inside_and_a_bare_mean() -> None:
    deep = block(host=ConvShape(4, 4, (3, 3), padding=((1, 1), (1, 1)), groups=4))
    assert deep.branches["1x1-kxk"].pointwise.out_channels == 8  # type: ignore[union-attr]
    assert isinstance(deep.branches["1x1-avg"].pointwise, nn.Identity)
    assert "dw-pw" not in block("kxk", "dw-pw", host=deep.host).kinds


def test_a_kind_may_occur_several_times() -> None:
    several = block("kxk", "kxk", "1x1", "kxk")
    assert several.names == ("kxk", "kxk#2", "1x1", "kxk#3")
    x = random_input(0)
    with torch.no_grad():
        assert torch.allclose(several.fold()(x), several(x), rtol=0, atol=1e-12)


def test_a_quantisation_friendly_block_has_no_norm_on_1x1_and_identity_and_one_behind_the_sum() -> None:
    friendly = block("kxk", "1x1", "identity", post_norm=True)
    norms = [name for name, module in friendly.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == ["branches.kxk.norm", "post_norm"]


# --- the fold ---


def test_a_fold_is_one_convolution_and_the_block_stays_as_it_was() -> None:
    source = block(*BRANCHES)
    before = copy.deepcopy(source.state_dict())
    folded = source.fold()
    assert type(folded) is nn.Conv2d
    assert sum(p.numel() for p in folded.parameters()) == 4 * 4 * 9 + 4
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in before.items())
    assert folded.training is False
    assert torch.equal(folded.weight, copy.deepcopy(source).fold().weight)


def test_training_flag_dtype_layout_and_gradients_are_kept() -> None:
    source = block("kxk", "1x1").to(torch.float32).to(memory_format=torch.channels_last)
    source.branches["kxk"].requires_grad_(False)
    folded = source.fold()
    assert folded.weight.dtype == torch.float32
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    assert folded.weight.requires_grad
    source.requires_grad_(False)
    assert not source.fold().weight.requires_grad


def test_folding_in_place_happens_once() -> None:
    source, x = block(), random_input(1)
    with torch.no_grad():
        expected = source(x)
        source.switch_to_deploy()
        first = source.folded
        source.reparameterize()
        assert source.folded is first is source.fold() is source.fuse()
        assert torch.allclose(source(x), expected, rtol=0, atol=1e-12)
    assert [type(m) for m in source.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))] == [nn.Conv2d]


def test_the_equivalent_kernel_is_differentiable() -> None:
    """Analytic gradients of kernel and bias against differences, for every parameter of every branch."""
    small = ODBB(ConvShape(2, 2, (3, 3), padding=((1, 1), (1, 1))), BRANCHES, dtype=torch.float64).eval()
    shake(small, np.random.default_rng(2))
    names = [name for name, _ in small.named_parameters()]

    def kernel_and_bias(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        class Equivalent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = small

            def forward(self) -> tuple[torch.Tensor, ...]:
                return self.block.equivalent_kernel_bias()

        named = {f"block.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Equivalent(), named, ())

    values = tuple(p.detach().requires_grad_() for p in small.parameters())
    assert torch.autograd.gradcheck(kernel_and_bias, values, fast_mode=True)


# --- minimal support ---


@pytest.mark.parametrize(
    ("branches", "kernel", "padding"),
    [
        (("1x1", "identity"), (1, 1), (0, 0)),
        (("1xk",), (1, 5), (0, 2)),
        (("kx1", "identity"), (5, 1), (2, 0)),
        (("1xk", "kx1"), (5, 5), (2, 2)),
        (("1x1-avg",), (5, 5), (2, 2)),
        (("dilated",), (5, 5), (2, 2)),
    ],
)
def test_minimal_support(branches: tuple[str, ...], kernel: tuple[int, int], padding: tuple[int, int]) -> None:
    source, x = block(*branches, host=ConvShape(4, 4, (5, 5), padding=((2, 2), (2, 2)))), random_input(3)
    small, whole = source.fold(), source.fold(minimal=False)
    assert (small.kernel_size, small.padding) == (kernel, padding)
    assert whole.kernel_size == (5, 5)
    with torch.no_grad():
        assert torch.allclose(small(x), source(x), rtol=0, atol=1e-12)
        assert torch.allclose(whole(x), source(x), rtol=0, atol=1e-12)


def test_minimal_support_counts_kinds_never_numbers() -> None:
    source = block("kxk", "1x1")
    source.branches["kxk"].conv.weight.data.zero_()  # type: ignore[union-attr]
    assert source.fold().kernel_size == (3, 3)
    source.activate([False, True])
    assert source.fold().kernel_size == (1, 1)


def test_support_that_a_layer_could_not_pad_stays_whole() -> None:
    """Without padding a 1x1 would have to crop; with dilation 2 it is small again."""
    assert block("1x1", host=ConvShape(4, 4, (3, 3))).fold().kernel_size == (3, 3)
    dilated = block("1x1", host=ConvShape(4, 4, (3, 3), dilation=(2, 2), padding=((2, 2), (2, 2)))).fold()
    assert (dilated.kernel_size, dilated.dilation, dilated.padding) == ((1, 1), (1, 1), (0, 0))


# --- masks and gates ---


def test_a_masked_branch_does_not_run() -> None:
    source, x, calls = block("kxk", "1x1", "1xk"), random_input(4), []
    source.branches["1x1"].conv.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    source.activate([True, False, True])
    source(x)
    assert not calls
    source.activate([True, True, True])
    source(x)
    assert calls == [1]


def test_the_mask_is_part_of_the_state() -> None:
    source = block("kxk", "1x1", "1xk")
    source.activate([False, True, False])
    other = block("kxk", "1x1", "1xk")
    other.load_state_dict(source.state_dict())
    assert other.mask == (False, True, False)
    assert torch.equal(other.fold().weight, source.fold().weight)
    assert copy.deepcopy(source).mask == source.mask
    with pytest.raises(InputError, match="run at least one"):
        source.activate([False, False, False])
    with pytest.raises(InputError, match="does not fit 3 branches"):
        source.activate([True])


def test_a_gate_scales_its_branch_and_gets_its_gradient() -> None:
    source, x = block("kxk", "1x1"), random_input(5)
    gate = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    source.activate([True, True], gate)
    out = source(x)
    out.sum().backward()
    assert gate.grad is not None
    expected = [float(branch(x).detach().sum()) for branch in source.branches.values()]
    assert gate.grad.tolist() == pytest.approx(expected)
    assert copy.deepcopy(source)._gate is None


# --- costs ---


def test_costs_are_counted_from_the_branch() -> None:
    source = block("kxk", "1x1", "identity", "1x1-kxk")
    costs = [branch.cost(17, 14) for branch in source.branches.values()]  # type: ignore[operator]
    area = 17 * 14
    assert [cost.macs for cost in costs] == [16 * 9 * area, 16 * area, 0, 16 * 9 * area + 16 * 19 * 16]
    assert [cost.parameters for cost in costs] == [16 * 9 + 8, 16 + 8, 8, 16 * 10 + 16]
    assert costs[0].activation_bytes == 4 * 2 * 4 * area
    assert costs[2].activation_bytes == 4 * 4 * area


# --- refusals ---


def test_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match="is in training mode"):
        block().train().fold()
    one = block()
    one.branches["1x1"].norm.train()  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"'branches.1x1.norm' of an ODBB is in training mode"):
        one.fold()


def test_a_norm_without_statistics_is_refused_and_the_branch_named() -> None:
    source = ODBB(HOST, ("kxk", "1xk"), norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False)).eval()
    with pytest.raises(InputError, match="branch 'kxk': a batch norm without running statistics"):
        source.fold()


def test_a_hook_in_a_branch_is_refused() -> None:
    source = block("kxk", "1x1")
    source.branches["1x1"].conv.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="branch '1x1' has a forward hook on a Conv2d"):
        source.fold()


def test_values_that_are_no_numbers_are_refused() -> None:
    source = block("kxk")
    source.branches["kxk"].norm.running_var.fill_(-1)  # type: ignore[union-attr,operator]
    with pytest.raises(CheckFailedError, match="the fold of an ODBB of kxk is not finite"):
        source.fold()


SAME = ConvShape(4, 4, (3, 3), padding=((1, 1), (1, 1)))
DILATED = ConvShape(4, 4, (3, 3), dilation=(2, 2), padding=((1, 1), (1, 1)))
EVEN = ConvShape(4, 4, (2, 2), dilation=(2, 2), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize(
    ("part", "target", "reason"),
    [
        (ConvShape(4, 4, (1, 1)), DILATED, "outputs differ in size"),
        (ConvShape(4, 4, (1, 1), (2, 2), padding=((1, 1), (1, 1))), SAME, r"stride is \(2, 2\), in the target"),
        (ConvShape(4, 4, (1, 1), groups=2), SAME, "groups is 2, in the target 1"),
        (ConvShape(4, 4, (3, 3), padding=((1, 1), (1, 1)), mode="reflect"), SAME, "pads with reflect"),
        (ConvShape(4, 4, (5, 5), padding=((2, 2), (2, 2))), SAME, "taps lie outside"),
        (ConvShape(4, 4, (2, 2), padding=((1, 0), (1, 0))), EVEN, "taps lie between"),
    ],
)
def test_a_misaligned_branch_is_named(part: ConvShape, target: ConvShape, reason: str) -> None:
    """A 1x1 beside a 3x3 of dilation 2 and padding 1, and other things that look as if they fitted."""
    with pytest.raises(InputError, match=f"branch 'thin'.*{reason}"):
        taps(part, target, "thin")


def test_a_deep_copy_folds_alike() -> None:
    source = random_block(3)
    other = copy.deepcopy(source)
    assert torch.equal(other.fold().weight, source.fold().weight)
