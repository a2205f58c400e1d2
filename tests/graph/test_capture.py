"""Capture: what a network is, its MACs against PyTorch's own counter, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.capture import capture
from hwsearch.models import mobilenetv2_small, resnet_small, vgg_small


def test_layers_carry_shapes_and_settings() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    network = capture(model, torch.zeros(2, 3, 8, 8))
    conv, linear = network.layers
    assert (conv.name, conv.op, conv.weight, conv.kernel, conv.stride) == ("0", "conv2d", "0.weight", (3, 3), (2, 2))
    assert (conv.in_shape, conv.out_shape) == ((2, 3, 8, 8), (2, 8, 4, 4))
    assert conv.macs == 2 * 4 * 4 * 8 * 3 * 9
    assert conv.parameters == 8 * 3 * 9 + 8
    assert (linear.name, linear.macs, linear.out_shape) == ("3", 2 * 128 * 5, (2, 5))
    assert (network.input_shape, network.output_shape) == ((2, 3, 8, 8), (2, 5))
    assert network.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("factory", [vgg_small, resnet_small, mobilenetv2_small], ids=lambda f: f.__name__)
def test_macs_are_half_of_what_the_flop_counter_counts(factory: type[nn.Module]) -> None:
    model = factory().eval()
    example = torch.zeros(2, 1, 28, 28)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    assert 2 * capture(model, example).macs == counter.get_total_flops()


def test_transposed_and_grouped_macs() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2), nn.Conv2d(6, 6, 3, groups=3))
    example = torch.zeros(1, 4, 5, 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    assert 2 * capture(model, example).macs == counter.get_total_flops()


def test_attention_macs() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x[..., :3, :], x[..., :3, :2])

    assert capture(Attention(), torch.zeros(2, 4, 5, 8)).macs == 2 * 4 * 5 * 3 * (8 + 2)


def test_a_layer_called_twice_counts_its_macs_twice_and_its_parameters_once() -> None:
    shared = nn.Conv2d(4, 4, 1)
    network = capture(nn.Sequential(shared, shared), torch.zeros(1, 4, 3, 3))
    assert network.macs == 2 * 16 * 9
    assert network.parameters == 20


def test_training_mode_and_gradients_are_left_as_found() -> None:
    model = resnet_small().train()
    model.stem[1].eval()
    capture(model, torch.zeros(1, 1, 28, 28))
    assert model.training
    assert model.stages.training
    assert not model.stem[1].training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_running_statistics_are_not_touched() -> None:
    model = resnet_small().train()
    before = model.stem[1].running_mean.clone()
    capture(model, torch.randn(4, 1, 28, 28))
    assert torch.equal(model.stem[1].running_mean, before)


@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (28, 28), (1, 1, 2, 2)])
def test_input_shape_that_does_not_fit_is_one_clear_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedModelError, match="forward of VGG fails on an input of shape") as caught:
        capture(vgg_small(), torch.zeros(shape))
    assert "\n" not in str(caught.value)
    assert str(tuple(shape)) in str(caught.value)


def test_a_forward_that_raises_is_named() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such luck\nsecond line")

    with pytest.raises(UnsupportedModelError, match=r"Broken fails on .* RuntimeError: no such luck; give") as caught:
        capture(Broken(), torch.zeros(1, 3))
    assert "second line" not in str(caught.value)


def test_data_dependent_python_is_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(UnsupportedModelError, match=r"torch.export cannot capture Branching") as caught:
        capture(Branching(), torch.zeros(1, 3))
    assert "\n" not in str(caught.value)


def test_no_tensor_output_is_refused() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> int:
            return 3

    with pytest.raises(UnsupportedModelError, match="Silent returns no tensor"):
        capture(Silent(), torch.zeros(1, 3))


@pytest.mark.parametrize(("model", "example"), [("vgg", torch.zeros(1)), (nn.Linear(1, 1), (1, 3, 28, 28))])
def test_wrong_kinds_of_arguments(model: object, example: object) -> None:
    with pytest.raises(InputError, match="capture needs"):
        capture(model, example)  # type: ignore[arg-type]
