"""Recalibration is the plain average of batch statistics, and touches nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hwsearch.errors import InputError
from hwsearch.train.batchnorm import recalibrate


def batches(count: int = 3) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 3, 4, 4, generator=generator) * (i + 1) + i,) for i in range(count)]


def test_statistics_are_the_mean_over_batches_whatever_was_there_before() -> None:
    norm = nn.BatchNorm2d(3)
    norm.running_mean = torch.full((3,), 77.0)
    model = nn.Sequential(norm, nn.Dropout(0.5))
    assert recalibrate(model, batches()) == 3
    means = torch.stack([batch[0].mean((0, 2, 3)) for batch in batches()]).mean(0)
    variances = torch.stack([batch[0].transpose(0, 1).flatten(1).var(1) for batch in batches()]).mean(0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)


def test_modes_momenta_and_weights_stay() -> None:
    frozen = nn.BatchNorm2d(3, momentum=0.3)
    model = nn.Sequential(frozen, nn.Conv2d(3, 3, 1)).train()
    frozen.eval()
    weights = [parameter.clone() for parameter in model.parameters()]
    recalibrate(model, batches())
    assert frozen.momentum == 0.3
    assert (model.training, frozen.training, model[1].training) == (True, False, True)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_nothing_to_do_and_nothing_to_do_it_with() -> None:
    assert recalibrate(nn.Conv2d(3, 3, 1), batches()) == 0
    with pytest.raises(InputError, match="at least one batch"):
        recalibrate(nn.BatchNorm2d(3), [])
