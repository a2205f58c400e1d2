"""``Callback``: code of the user's own in the training of a network, named by ``[train] callback = "module:Name"``.

    class Lookahead(Callback):                                # my_training.py
        def optimiser(self, groups, config):
            return torch.optim.AdamW(groups, lr=config.learning_rate)

It steers every network that is trained on its own: the full one, uniform scaling, the found one and the finalists of a
search, all alike. Steps of a search itself (a super-network's, masks') are the method's. A loss that *those* should
follow as well, or a metric of one's own, is a ``Task`` (``hwsearch.train.own_data``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from hwsearch.errors import HwsearchError, InputError
from hwsearch.graph.factory import call, failure, find_factory, prints_aside
from hwsearch.train.data import Batch

if TYPE_CHECKING:
    from hwsearch.train.loop import TrainConfig
    from hwsearch.train.task import Task

T = TypeVar("T")
_METHODS = ("begin", "optimiser", "loss", "update", "after_step", "end", "state")


@runtime_checkable
class Callback(Protocol):
    """What a training asks. Every method has a default: a subclass says only what it wants otherwise.

    What is random must come from torch's global generator, which is seeded for every step, or from the step's number:
    then a training that goes on after a kill equals the unbroken one. One object is made for each training.
    """

    def begin(self, model: nn.Module, config: TrainConfig, steps: int) -> None:
        """Before the first step, and again before a killed training goes on (its weights are read back after this)."""

    def optimiser(self, groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer | None:
        """The optimiser; None is SGD as ``[train]`` says.

        Args:
            groups: torch's parameter groups: weights with ``weight_decay``, then biases and normalisation without.

        The learning rate of every step is set from ``[train]`` (warm-up and cosine), times a group's own ``factor``
        where it has one. The optimiser's state goes into the checkpoint: tensors and plain numbers.
        """
        return None

    def loss(self, model: nn.Module, batch: Batch, task: Task, step: int) -> Tensor:
        """The loss (scalar) of a batch, whose gradient is taken; ``batch[0]`` is the model's input."""
        return task.loss(model(batch[0]), batch)

    def update(self, optimiser: torch.optim.Optimizer, model: nn.Module, step: int) -> None:
        """With the gradients there (clipped where ``[train]`` says so): change the weights."""
        optimiser.step()

    def after_step(self, model: nn.Module, step: int, steps: int, loss: float) -> None:
        """For logging: after the update of step number ``step``, from 0, of ``steps``."""

    def end(self, model: nn.Module) -> None:
        """After the last step: the weights that the model keeps (an average, say). Must do the same when done again."""

    def state(self) -> Mapping[str, Tensor]:
        """Tensors of the callback's own that a checkpoint must hold, by name: always the same, changed in place."""
        return {}


def make_callback(spec: str) -> Callback:
    """The callback that ``module:name`` makes: a class, or a function that returns one of its objects.

    Raises:
        InputError: there is no such name, it fails, or what it makes lacks a method.

    Example:
        >>> make_callback("my_training:Lookahead")                                    # doctest: +SKIP
    """
    made = call(spec, find_factory(spec, "callback"), None, "callback")
    missing = [name for name in _METHODS if not callable(getattr(made, name, None))]
    if missing:
        raise InputError(
            f"the callback {spec} is a {type(made).__name__} without {', '.join(missing)}: make it a class of "
            "hwsearch.train.callback.Callback, which has all of them"
        )
    return made  # type: ignore[no-any-return]


def asked(spec: str, name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call a method of a callback; what it raises is one line that names it and the place in the user's code.

    Raises:
        InputError: the method raises.
    """
    try:
        with prints_aside():
            return function(*arguments)
    except HwsearchError:
        raise
    except Exception as error:
        raise InputError(f"the callback {spec} fails in {name}: {failure(error)}") from error


class OwnSteps:
    """One training's callback: every call names it where it fails, and checks what comes back. See ``Callback``."""

    def __init__(self, spec: str) -> None:
        self.spec, self.callback = spec, make_callback(spec)
        self.model: nn.Module = nn.Identity()

    def begin(self, model: nn.Module, config: TrainConfig, steps: int) -> None:
        """The training is of this model from here on."""
        self.model = model
        asked(self.spec, "begin", self.callback.begin, model, config, steps)

    def optimiser(self, groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer | None:
        """The user's own, or None."""
        made = asked(self.spec, "optimiser", self.callback.optimiser, groups, config)
        if made is not None and not isinstance(made, torch.optim.Optimizer):
            raise InputError(f"the callback {self.spec} gives a {type(made).__name__} as optimiser: give one of torch")
        return made

    def loss(self, batch: Batch, task: Task, step: int) -> Tensor:
        """Of a batch."""
        made = asked(self.spec, "loss", self.callback.loss, self.model, batch, task, step)
        if not isinstance(made, Tensor) or made.dim() != 0 or not made.requires_grad:
            raise InputError(f"the callback {self.spec} gives no loss: give a tensor of one number with its gradient")
        return made

    def update(self, optimiser: torch.optim.Optimizer, step: int) -> None:
        """Change the weights."""
        asked(self.spec, "update", self.callback.update, optimiser, self.model, step)

    def after_step(self, step: int, steps: int, loss: float) -> None:
        """Tell of a step."""
        asked(self.spec, "after_step", self.callback.after_step, self.model, step, steps, loss)

    def end(self) -> None:
        """All steps are done."""
        asked(self.spec, "end", self.callback.end, self.model)

    def state(self) -> dict[str, Tensor]:
        """Its own tensors."""
        found = dict(asked(self.spec, "state", self.callback.state))
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
            raise InputError(f"the callback {self.spec} keeps something else than tensors in its state: give tensors")
        return found
