"""``reparametrize``: blocks in place of convolutions, the same function, branches that learn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import hwsearch as hs
from hwsearch.errors import InputError
from hwsearch.models import mobilenetv2_small, repvgg_small, resnet_small, vgg_small
from hwsearch.reparam.algebra import ConvShape
from hwsearch.reparam.check import prove
from hwsearch.reparam.odbb import ODBB
from hwsearch.reparam.statistics import randomise

torch.set_num_threads(1)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3


def ready(factory: object) -> nn.Module:
    torch.manual_seed(0)
    model = factory().double().eval()  # type: ignore[operator]
    randomise(model, image(2, 1, 28, 28), torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("factory", [vgg_small, resnet_small, mobilenetv2_small], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("border", "post_norm"), [("pad_first", False), ("bn_pad", True)])
def test_the_network_computes_what_it_did(factory: object, border: str, post_norm: bool) -> None:
    """With trained statistics, before and after, unfolded and folded."""
    model, x = ready(factory), image(2, 1, 28, 28)
    with torch.no_grad():
        expected = model(x)
        names = hs.reparametrize(model, "odbb", border=border, post_norm=post_norm)
        assert names
        assert all(isinstance(model.get_submodule(name), ODBB) for name in names)
        got, folded = model(x), hs.fold(model, x)(x)
    scale = expected.abs().max()
    assert float((got - expected).abs().max() / scale) < 1e-10
    assert float((folded - expected).abs().max() / scale) < 1e-10


def test_in_training_mode_a_pair_is_the_same_at_the_start() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).double()
    other, x = copy.deepcopy(model), image(4, 3, 9, 9)
    hs.reparametrize(other)
    assert torch.allclose(other(x), model(x), rtol=0, atol=1e-12)
    assert other.training
    assert torch.equal(other[0].branches["kxk"].norm.running_mean, model[1].running_mean)


def test_new_branches_learn_from_the_first_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    hs.reparametrize(model)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimiser.zero_grad()
        model(image(4, 4, 9, 9).float()).square().mean().backward()
        optimiser.step()
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    # Behind it come a mean and a norm, each channel for itself: its scale has no effect while its 1x1 is the identity.
    assert set(still) <= {"0.branches.1x1-avg.inner_norm.weight"}


def test_fresh_branches_where_asked_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()).eval()
    other = copy.deepcopy(model)
    hs.reparametrize(model, ("1x1", "identity"), keep=False)
    assert model[0].names == ("kxk", "1x1", "identity")
    x = image(1, 4, 9, 9).float()
    assert float((model(x) - other(x)).detach().abs().max()) > 0.1


def test_layers_are_chosen_by_name_and_by_shape() -> None:
    model = resnet_small()
    assert hs.reparametrize(copy.deepcopy(model), layers="stages.2.*conv1") == ("stages.2.0.conv1", "stages.2.1.conv1")

    def thin(name: str, shape: ConvShape) -> tuple[str, ...] | None:
        return ("kxk", "1x1-kxk") if shape.kernel == (1, 1) else None

    names = hs.reparametrize(model, thin)
    assert names == ("stages.1.0.shortcut.0", "stages.2.0.shortcut.0")
    assert model.stages[1][0].shortcut[0].names == ("kxk", "1x1-kxk")


def test_a_second_call_leaves_blocks_alone() -> None:
    model = vgg_small()
    hs.reparametrize(model)
    with pytest.raises(InputError, match="nothing to re-parameterise"):
        hs.reparametrize(model)


def test_what_cannot_be_is_told_before_anything_changes() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    with pytest.raises(InputError, match="there is no block 'all'"):
        hs.reparametrize(model, "all")
    with pytest.raises(InputError, match=r"no convolution of Sequential larger than 1x1 is named like stem\.\*"):
        hs.reparametrize(model, layers="stem.*")
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="convolution '0' has a forward hook"):
        hs.reparametrize(model)
    assert type(model[0]) is nn.Conv2d


def test_whole_networks_of_blocks_are_proved_with_border_and_interior(tmp_path: object) -> None:
    model = repvgg_small(branches="dbb", border="bn_pad").eval()
    report = prove(model, hs.fold(model), (2, 1, 14, 14), repeats=1).require()
    assert len(report.blocks) == 7
    assert max(max(block.border_error, block.interior_error) for block in report.blocks) < 1e-12
    assert report.blocks[0].folded == "conv 3x3"
    path = tmp_path / "report.json"  # type: ignore[operator]
    report.save(path)
    assert '"border_error"' in path.read_text()
    with pytest.raises(InputError, match="cannot write"):
        report.save(tmp_path / "no" / "report.json")  # type: ignore[operator]


NETWORKS = {
    "repvgg": lambda: repvgg_small(),
    "repvgg quantisation-friendly": lambda: repvgg_small(post_norm=True),
    "odbb, bn_pad": lambda: repvgg_small(branches="odbb", border="bn_pad"),
    "dbb resnet": lambda: _with_blocks(resnet_small()),
    "odbb mobilenet": lambda: _with_blocks(mobilenetv2_small()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_stay_within_four_times_the_noise_of_float32(name: str) -> None:
    """Error of the folded float32 network against the unfolded float64 one, over that of the unfolded float32 one."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]().double().eval(), image(4, 1, 28, 28)
    randomise(model, x, torch.Generator().manual_seed(1))
    single = copy.deepcopy(model).float()
    with torch.no_grad():
        expected = model(x)
        scale = expected.abs().max()
        noise = float((single(x.float()).double() - expected).abs().max() / scale)
        error = float((hs.fold(single, x.float())(x.float()).double() - expected).abs().max() / scale)
    assert error <= 4 * noise + 1e-6


def _with_blocks(model: nn.Module) -> nn.Module:
    hs.reparametrize(model, "odbb", keep=False)
    return model
