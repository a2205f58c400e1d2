"""Torch-Pruning under a budget in milliseconds, as its user would write it."""

import copy
from collections.abc import Callable, Sequence

import torch_pruning as tp  # type: ignore[import-not-found]
from torch import Tensor, nn


def prune(
    model: nn.Module, example: Tensor, ignored: Sequence[str], milliseconds: Callable[[nn.Module], float],
    budget_ms: float, round_to: int | None = None,
) -> nn.Module | None:  # fmt: skip
    """The pretrained network pruned by magnitude, by the smallest ratio that keeps the budget; None where none does."""
    for percent in range(5, 95):
        pruned = copy.deepcopy(model)
        tp.pruner.MagnitudePruner(
            pruned,
            example,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=percent / 100,
            round_to=round_to,
            ignored_layers=[pruned.get_submodule(name) for name in ignored],
        ).step()
        if milliseconds(pruned) <= budget_ms:
            return pruned
    return None
