"""From a width choice to a trained network: what a search ends with, and what its baselines get as well."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from hwsearch.errors import InputError
from hwsearch.graph.foldable import folding_blocks
from hwsearch.graph.surgery import shrink
from hwsearch.search.baselines import importances
from hwsearch.search.pas_masks import MaskedNet, folded_network
from hwsearch.train.loop import Progress, TrainConfig, evaluate, train
from hwsearch.train.seeds import torch_seed

if TYPE_CHECKING:
    from torch import nn

    from hwsearch.graph.widths import WidthChoice, WidthSpace
    from hwsearch.train.task import Evaluation, Task


def train_choice(
    model: nn.Module,
    space: WidthSpace,
    choice: WidthChoice,
    task: Task,
    config: TrainConfig | None = None,
    *,
    scratch: bool = True,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, Evaluation]:
    """Shrink ``model`` to ``choice`` and train it on ``task.train``.

    A network of branches whose space is that of its folded form learns with its branches at full width, under masks
    that never move, and is then folded and sliced: an identity may lie between layers of different widths.

    Args:
        scratch: forget the model's weights first (the paper's way); False fine-tunes those that are carried over: of
            every group the units with the largest weights.
        folder: of the checkpoint; the same call again goes on from it.

    Returns:
        The trained network in evaluation mode, and its evaluation on ``task.valid``.

    Raises:
        InputError: branches, and a choice that narrows a group which no mask can silence.
    """
    config = config or TrainConfig()
    if folds_before_slicing(model, space):
        return _train_masked(model, space, choice, task, config, scratch=scratch, folder=folder, progress=progress)
    small = shrink(model, space, choice, None if scratch else largest(model, space, choice))
    if scratch:
        reset(small, config.seed)
    return finish(small, task, config, folder=folder, progress=progress)


def folds_before_slicing(model: nn.Module, space: WidthSpace) -> bool:
    """Whether ``model`` has blocks of branches where the space was made from its folded form."""
    return bool(folding_blocks(model)) and space.model is not None and not folding_blocks(space.model)


def _train_masked(
    model: nn.Module,
    space: WidthSpace,
    choice: WidthChoice,
    task: Task,
    config: TrainConfig,
    *,
    scratch: bool,
    folder: Path | None,
    progress: Progress | None,
) -> tuple[nn.Module, Evaluation]:
    """``train_choice`` of a network of branches on the widths of its folded form."""
    full = copy.deepcopy(model)
    if scratch:
        reset(full, config.seed)
    net = MaskedNet(full, space)
    for index in net.fixed:
        group = space.groups[index]
        if choice.widths[index] < group.units:
            raise InputError(
                f"group {group.name} mixes over its channels, so branches cannot learn at "
                f"{choice.widths[index]} of its {group.units} units: freeze it"
            )
    kept = net.largest(choice) if scratch else largest(folded_network(full, space), space, choice)
    net.set_masks(kept, freeze=True)
    train(net, task, config, folder=folder, progress=progress)
    small = net.sliced(choice, kept)
    return small, evaluate(small, task, task.valid, config)


def largest(model: nn.Module, space: WidthSpace, choice: WidthChoice) -> dict[str, NDArray[np.int64]]:
    """Per group the units (ascending) whose weights are largest: what of a trained network is worth keeping."""
    pairs = zip(space.groups, choice.widths, importances(space, model), strict=True)
    return {group.name: np.sort(np.argsort(-size, kind="stable")[:width]) for group, width, size in pairs}


def finish(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, Evaluation]:
    """Train ``model`` in place, and evaluate it on ``task.valid``."""
    train(model, task, config, folder=folder, progress=progress)
    return model, evaluate(model, task, task.valid, config)


def reset(model: nn.Module, seed: int) -> None:
    """Draw new weights in place for every module that knows how (``reset_parameters``), by the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "weights"))
        for module in model.modules():
            renew = getattr(module, "reset_parameters", None)
            if callable(renew):
                renew()
        for module in model.modules():  # what a module wants of layers inside it, which have just been drawn
            arrange = getattr(module, "after_reset", None)
            if callable(arrange):
                arrange()
