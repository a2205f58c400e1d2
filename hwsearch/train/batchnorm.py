"""Batch-norm statistics measured afresh: the mean over a few batches instead of a decaying trace of training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hwsearch.errors import InputError
from hwsearch.train.data import Batch


def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Set the running statistics of all batch-norm layers to their plain average over ``batches``.

    Only batch-norm layers are put in training mode (dropout stays off); modes and momenta are restored.

    Returns:
        How many batches were used; 0 where the model has no batch-norm layer with statistics.

    Raises:
        InputError: no batch was given though the model has such layers.

    Reference: "cumulative moving average" of ``torch.nn.BatchNorm2d`` (momentum ``None``); for sub-networks of shared
    weights: Yu and Huang, Universally Slimmable Networks (2019), section 3.3.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for batch in batches:
                model(batch[0])
                count += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if count == 0:
        raise InputError("batch-norm statistics need at least one batch; give one")
    return count
