"""What any torch optimiser remembers, as tensors and plain numbers by parameter name: for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hwsearch.errors import InputError, SchemaError

Numbers = dict[str, dict[str, float]]


def remembered(optimiser: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], Numbers]:
    """(tensors as ``<parameter>/<key>``, numbers by parameter and key) of an optimiser's state.

    Raises:
        InputError: the optimiser keeps something else, which no checkpoint can hold.
    """
    tensors: dict[str, Tensor] = {}
    numbers: Numbers = {}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            elif isinstance(value, int | float) and not isinstance(value, bool):
                numbers.setdefault(name, {})[key] = value
            elif value is not None:
                raise InputError(
                    f"the optimiser {type(optimiser).__name__} keeps a {type(value).__name__} ({key}), which no "
                    "checkpoint holds: use one that keeps tensors and numbers"
                )
    return tensors, numbers


def put_back(
    optimiser: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Give an optimiser the state that ``remembered`` told; a tensor of its parameter's shape gets its strides too.

    Raises:
        SchemaError: the state is of parameters that the model does not have.
    """
    known = dict(model.named_parameters())
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        if name not in known:
            raise SchemaError(f"the checkpoint has an optimiser's state for {name!r}, which the network does not have")
        parameter = known[name]
        # the same bits follow from the same strides
        kept = torch.empty_like(parameter, dtype=value.dtype) if value.shape == parameter.shape else value.clone()
        optimiser.state[parameter][key] = kept.detach().copy_(value)
    for name, values in numbers.items():
        if name not in known:
            raise SchemaError(f"the checkpoint has an optimiser's state for {name!r}, which the network does not have")
        optimiser.state[known[name]].update(values)
