"""NVIDIA ModelOpt's FastNAS under a budget in milliseconds, as its user would write it: its own budget is in FLOPs."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import modelopt.torch.prune as mtp  # type: ignore[import-not-found]
import torch
from modelopt.torch.prune.fastnas import FastNASConfig  # type: ignore[import-not-found]
from torch import Tensor, nn


def prune(
    model: nn.Module, example: Tensor, batches: Iterable[Any], score: Callable[[nn.Module], float],
    milliseconds: Callable[[nn.Module], float], budget_ms: float, folder: Path,
) -> nn.Module | None:  # fmt: skip
    """The pretrained network pruned to the largest share of its FLOPs that keeps the budget; None where none does."""
    config = FastNASConfig().model_dump()
    for kind in ("nn.Conv2d", "nn.Linear", "nn.BatchNorm2d"):
        for rule in config.get(kind, {}).values():
            for name in rule or {}:
                if name.endswith("_divisor"):
                    rule[name] = 8  # its default, 32, is as wide as these layers are
    for percent in range(95, 5, -2):
        try:
            pruned, _ = mtp.prune(
                model=copy.deepcopy(model).to(memory_format=torch.contiguous_format),  # it refuses channels_last
                mode=[("fastnas", config)],
                constraints={"flops": f"{percent}%"},
                dummy_input=example,
                config={
                    "data_loader": batches,
                    "collect_func": lambda batch: batch,
                    "score_func": score,
                    "checkpoint": str(folder / "sensitivities.pth"),
                    "verbose": False,
                },
            )
        except ValueError:  # so few FLOPs are below its smallest network
            return None
        if milliseconds(pruned) <= budget_ms:
            return pruned  # type: ignore[no-any-return]
    return None
