"""Strided 1x1 convolutions read every n-th pixel: the same function and gradients, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hwsearch.train.data import synthetic_images
from hwsearch.train.loop import TrainConfig, run_steps
from hwsearch.train.strides import strided_inputs


@pytest.mark.parametrize("stride", [2, (2, 1), 3])
def test_function_and_gradients_are_the_same(stride: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(9, 5, 1, stride)  # wide enough for the plain layer to be trusted
    image = torch.randn(2, 9, 7, 8, requires_grad=True)
    plain = conv(image)
    wanted = torch.autograd.grad(plain.square().sum(), [image, *conv.parameters()])
    with strided_inputs(nn.Sequential(conv)):
        assert conv.stride == (1, 1)
        guarded = conv(image)
        got = torch.autograd.grad(guarded.square().sum(), [image, *conv.parameters()])
    torch.testing.assert_close(guarded, plain)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_other_layers_are_left_alone_and_strides_come_back_after_an_error() -> None:
    layers = [nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, 2, padding=1), nn.Conv2d(4, 4, 1, 2)]
    seen = []

    def fail() -> None:
        with strided_inputs(nn.Sequential(*layers)):
            seen.extend(layer.stride for layer in layers)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert seen == [(2, 2), (1, 1), (2, 2), (1, 1)]
    assert [layer.stride for layer in layers] == [(2, 2), (1, 1), (2, 2), (2, 2)]
    assert not layers[3]._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_narrow_shortcuts_train_channels_last() -> None:
    """Without the guard this corrupts the heap on CPUs with AVX2."""
    torch.manual_seed(0)
    examples = synthetic_images(64, classes=4, shape=(1, 16, 16))
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 1, 2), nn.Flatten(), nn.Linear(6 * 64, 4))
    reference = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 1, 2), nn.Flatten(), nn.Linear(6 * 64, 4))
    reference.load_state_dict(model.state_dict())
    gradients = []

    def step(_: int, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        gradients.append((batch, model[1].weight.grad.clone()))
        return loss.detach()

    run_steps(model, examples, TrainConfig(steps=1, batch_size=32, learning_rate=1e-6), step, identity={})
    batch, got = gradients[0]
    with torch.backends.mkldnn.flags(enabled=False):
        nn.functional.cross_entropy(reference(batch[0].contiguous()), batch[1]).backward()
    wanted = reference[1].weight.grad
    assert wanted is not None
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
