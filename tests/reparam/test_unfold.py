"""``unfold_bn`` is the inverse of ``fold``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hwsearch as hs
from hwsearch.errors import InputError
from hwsearch.models import repvgg_small, resnet_small

torch.set_num_threads(1)


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 1, 28, 28, generator=generator, dtype=torch.float64) + 0.2 for _ in range(count)]


@pytest.mark.parametrize("factory", [resnet_small, repvgg_small], ids=lambda f: f.__name__)
def test_it_computes_the_same_and_folds_back(factory: object) -> None:
    torch.manual_seed(0)
    folded = hs.fold(factory().double().eval())  # type: ignore[operator]
    x = batches(1)[0]
    unfolded = hs.unfold_bn(folded, batches())
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in unfolded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(convolutions)
    assert not any(m.bias is not None for m in unfolded.modules() if isinstance(m, nn.Conv2d))
    assert all(m.bias is not None for m in convolutions), "the model that came in was changed"
    with torch.no_grad():
        scale = folded(x).abs().max()
        assert float((unfolded(x) - folded(x)).abs().max() / scale) < 1e-12
        assert float((hs.fold(unfolded)(x) - folded(x)).abs().max() / scale) < 1e-12


def test_the_statistics_are_those_of_the_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3)).double().eval()
    unfolded = hs.unfold_bn(model, batches())
    y = torch.cat([model(batch) for batch in batches()]).detach() - model[0].bias.detach().view(1, -1, 1, 1)
    assert torch.allclose(unfolded[0][1].running_mean, y.mean((0, 2, 3)))
    assert torch.allclose(unfolded[0][1].running_var, y.var((0, 2, 3), correction=0))


def test_some_layers_only() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 1, bias=False)).double().eval()
    unfolded = hs.unfold_bn(model, batches(), layers="1")
    assert isinstance(unfolded[0], nn.Conv2d)
    assert isinstance(unfolded[1][1], nn.BatchNorm2d)


def test_refusals() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3)).double()
    with pytest.raises(InputError, match="is in training mode"):
        hs.unfold_bn(model, batches())
    with pytest.raises(InputError, match="at least one batch"):
        hs.unfold_bn(model.eval(), [])
    with pytest.raises(InputError, match="no convolution of Sequential is named like head"):
        hs.unfold_bn(model, batches(), layers="head")
