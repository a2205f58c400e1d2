"""``rehearse``: do network, data, task and callback go together? Asked before minutes of profiling, not after them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hwsearch.errors import HwsearchError, InputError
from hwsearch.graph.capture import evaluation_mode
from hwsearch.graph.factory import failure
from hwsearch.train.callback import make_callback
from hwsearch.train.data import Examples
from hwsearch.train.loop import TrainConfig, laid_out, settings
from hwsearch.train.task import Task

_TRAINING, _OTHERS = 16, 2  # examples of each set


def rehearse(
    model: nn.Module, task: Task, test: Examples, config: TrainConfig, input_shape: Sequence[int]
) -> tuple[str, ...]:
    """A few examples go through network, loss and metric; nothing is learnt, and the model stays as it is.

    Args:
        test: the test set, whose examples must be of the same kind.
        config: of the networks' training; its callback is made once.
        input_shape: what the network is timed on, batch included.

    Returns:
        Lines that the user should know of.

    Raises:
        InputError: one line that says which two do not go together.
    """
    with evaluation_mode(model), torch.no_grad(), settings(config):
        for examples, name in ((task.train, "training"), (task.valid, "held-out"), (test, "test")):
            _try(model, task, examples, name, config, tuple(input_shape))
        _try_training(model, task, config)
    if config.callback is not None:
        make_callback(config.callback)
    shape = tuple(task.train.take(np.arange(1))[0].shape[1:])
    if shape != tuple(input_shape)[1:]:
        found, timed = _sizes(shape), _sizes(tuple(input_shape)[1:])
        return (f"the data's images are {found}, the network is timed on {timed} (model.input)",)
    return ()


def _try(
    model: nn.Module, task: Task, examples: Examples, name: str, config: TrainConfig, input_shape: tuple[int, ...]
) -> None:
    # spread over the set, which may be sorted by class
    count = min(_TRAINING if name == "training" else _OTHERS, len(examples))
    batch = laid_out(examples.take(np.linspace(0, len(examples) - 1, count).astype(np.int64)), config)
    images = _sizes(tuple(batch[0].shape[1:]))
    try:
        output = model(batch[0])
    except Exception as error:
        raise InputError(
            f"the network fails on the {name} images, which are {images} (model.input is {_sizes(input_shape)}): "
            f"{failure(error)}; change the data, or the network"
        ) from error
    if not isinstance(output, Tensor):
        raise InputError(_several(model, output, "returns"))
    told = _sizes(tuple(output.shape))
    try:
        loss = task.loss(output, batch)
        worth = task.summary(task.tally(output, batch))
    except HwsearchError:
        raise
    except Exception as error:
        targets = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {_sizes(tuple(t.shape))}" for t in batch[1:])
        raise InputError(
            f"the network's output ({told}) and the {name} targets ({targets}) do not go together in "
            f"{type(task).__name__}: {failure(error)}"
        ) from error
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise InputError(f"the loss of {type(task).__name__} is no tensor of one number: give a mean over the batch")
    if not np.isfinite([float(loss), worth.loss]).all():
        raise InputError(
            f"the loss on a few {name} examples is {float(loss)}: look for numbers in the data or the weights that are "
            "not finite"
        )


def _try_training(model: nn.Module, task: Task, config: TrainConfig) -> None:
    """A step's forward on a copy in training mode, whose code may differ (a second head, dropout, a batch norm)."""
    batch = laid_out(task.train.take(np.arange(min(_TRAINING, config.batch_size, len(task.train)))), config)
    with torch.random.fork_rng(devices=[]):
        try:
            learner = copy.deepcopy(model).train()
            output = learner(batch[0])
        except Exception as error:
            raise InputError(
                f"the network fails in training mode, on {_sizes(tuple(batch[0].shape))}: {failure(error)}; change the "
                "network, or train.batch_size"
            ) from error
    if isinstance(output, Tensor):
        return
    try:
        task.loss(output, batch)  # a task of the user's own may know what to do with a second head
    except Exception as error:
        raise InputError(_several(model, output, "returns in training mode")) from error


def _several(model: nn.Module, output: object, when: str) -> str:
    return (
        f"{type(model).__name__} {when} a {type(output).__name__}: give a network that returns one tensor (torch.cat "
        "joins heads, and the loss of a task of your own takes them apart)"
    )


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "single numbers"
