"""Random, non-trivial batch norm statistics: what makes a wrong fold show.

Fresh batch norms (mean 0, variance 1, gamma 1, beta 0) hide almost every folding bug.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hwsearch.errors import InternalError


def randomise(model: nn.Module, example_input: Tensor, generator: torch.Generator) -> None:
    """Give every batch norm random statistics, in place: gamma in ±[0.3, 1.5] with one in ten zero, beta in ±0.5.

    Running mean and variance are those of the activations on ``example_input`` (batch first), moved by up to half a
    standard deviation and scaled by 0.3 to 2: non-trivial, yet a deep network's activations neither die nor explode.
    """

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).mul_(high - low).add_(low).to(like)

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    batch = torch.cat([example_input, *(_like(example_input, generator) for _ in range(7))])
    with torch.no_grad():
        for norm in norms:
            norm.eps = float(10 ** uniform(torch.empty(()), -5, -2.5))
            if norm.affine:
                sign = torch.sign(uniform(norm.weight, -1, 1))
                alive = (uniform(norm.weight, 0, 1) > 0.1).to(norm.weight)
                norm.weight.copy_(sign * alive * uniform(norm.weight, 0.3, 1.5))
                norm.bias.copy_(uniform(norm.bias, -0.5, 0.5))
            norm.train()
            norm.momentum = 1.0  # the running statistics become those of this batch
        model(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
            mean, variance = norm.running_mean, norm.running_var
            if mean is None or variance is None:
                raise InternalError("a batch norm lost its running statistics in a forward pass")
            mean.add_(variance.sqrt() * uniform(mean, -0.5, 0.5))
            variance.mul_(uniform(variance, 0.3, 2.0)).add_(0.01 * variance.mean())  # a dead channel's is zero


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor) + 0.3


def is_norm(module: nn.Module) -> bool:
    """True for batch norms, subclasses and look-alikes of other libraries included (FrozenBatchNorm and the like)."""
    return isinstance(module, _BatchNorm) or "BatchNorm" in type(module).__name__
