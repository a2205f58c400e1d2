"""AdaS: a learning rate for every layer, that follows how much the layer still learns.

After each epoch a layer whose knowledge gain rises keeps a high rate and one whose gain stands still loses its own.
Applied to the gradients, relative to the rate that the training loop sets, so that it goes with any schedule; momentum
carries the scaled gradients, and weight decay keeps the loop's own rate.

Reference: AdaS (Hosseini and Plataniotis) in the form of CONet's published code: rate <- beta * rate + velocity, where
velocity is the change of the mean gain of a layer's sides over the last epoch (after the first epoch: the first rate).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from hwsearch.search.quality import NetworkQuality

_LEAST = 1e-20


def rate_factors(epochs: Sequence[NetworkQuality], first_rate: float, beta: float) -> dict[str, float]:
    """Each measured weight's rate after some epochs of one training, over the first rate.

    Args:
        epochs: quality after each finished epoch, oldest first.
        first_rate: learning rate of the first epoch.
        beta: share of a rate that is kept, 0 to 1.

    Example:
        >>> rate_factors([], 0.1, 0.8)
        {}
    """
    gains: dict[str, list[float]] = {}
    for quality in epochs:
        sides: dict[str, list[float]] = {}
        for (parameter, _), gain in quality.by_side("gain").items():
            sides.setdefault(parameter, []).append(gain)
        for parameter, found in sides.items():
            gains.setdefault(parameter, []).append(sum(found) / len(found))
    rates = {}
    for parameter, path in gains.items():
        rate = first_rate
        for epoch in range(len(path)):
            velocity = first_rate if epoch == 0 else path[epoch] - path[epoch - 1]
            rate = max(beta * rate + velocity, _LEAST)
        rates[parameter] = rate / first_rate
    return rates


def scale_gradients(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Multiply every gradient by the factor of the last measured weight before it, in the order of the parameters.

    What comes before the first measured weight takes that one's factor.
    """
    if not factors:
        return
    factor = next((factors[name] for name, _ in model.named_parameters() if name in factors), 1.0)
    for name, parameter in model.named_parameters():
        factor = factors.get(name, factor)
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
