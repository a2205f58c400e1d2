"""``[supernet]``, ``[trial]`` and ``[train]`` of a config: how weights are fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import ConfigDict

from hwsearch.config_types import Below1, Count, NotNegative, OwnCode, Positive, Switch
from hwsearch.errors import InputError

if TYPE_CHECKING:
    from hwsearch.train.loop import TrainConfig


class Run(Protocol):
    """``[run]``, as far as a training hangs on it."""

    @property
    def seed(self) -> int: ...

    @property
    def threads(self) -> int: ...


def method_settings(
    base: Any, section: Any, title: str, like: TrainConfig, training: Collection[str], **changes: Any
) -> Any:
    """A method's settings ``base`` with what a section of its own says.

    Args:
        base: a config dataclass with a ``training`` whose learning rate is the same throughout.
        section: the section, its names those of ``base`` or of its training.
        title: of the section, for messages.
        like: gives the training's seed and threads.
        training: names that are the training's.
        changes: fields of ``base`` that the section does not decide.

    Raises:
        InputError: values that do not go together.
    """
    said = given(section)
    steps: dict[str, Any] = {name: said[name] for name in training if name in said}
    if "epochs" in steps:
        steps["steps"] = None
    if "learning_rate" in said:
        steps |= {"learning_rate": said["learning_rate"], "final_rate": said["learning_rate"]}
    names = {field.name for field in dataclasses.fields(base)} - {"training", *changes}
    own = {name: value for name, value in said.items() if name in names}
    try:
        fitted = dataclasses.replace(base.training, seed=like.seed, threads=like.threads, **steps)
        return dataclasses.replace(base, training=fitted, **own, **changes)
    except InputError as error:
        raise InputError(f"[{title}]: {error}") from error


@dataclass(frozen=True)
class TrainSettings:
    """``[supernet]``, ``[trial]`` and ``[train]``: see ``TrainConfig``. ``steps`` and ``epochs`` exclude each other."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    epochs: Positive | None = None
    steps: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    final_rate: NotNegative | None = None
    warmup: Below1 | None = None
    momentum: Below1 | None = None
    nesterov: Switch | None = None
    weight_decay: NotNegative | None = None
    clip: Positive | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    channels_last: Switch | None = None
    checkpoint_s: NotNegative | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise InputError("a training has both epochs and steps: give one of the two")

    def config(self, run: Run, section: str = "train", like: TrainConfig | None = None) -> TrainConfig:
        """The training that these settings stand for; ``section`` is their name, for messages, ``like`` the defaults.

        Raises:
            InputError: values that do not go together.
        """
        from hwsearch.train.loop import TrainConfig

        try:
            chosen = given(self)
            if "epochs" in chosen:
                chosen["steps"] = None  # which would override them
            return dataclasses.replace(like or TrainConfig(), seed=run.seed, threads=run.threads, **chosen)
        except InputError as error:
            raise InputError(f"[{section}]: {error}") from error


@dataclass(frozen=True)
class NetworkTraining(TrainSettings):
    """``[train]``: networks on their own. ``callback`` names the user's own code in it, see ``Callback``."""

    callback: OwnCode | None = None


def given(settings: Any, *names: str, **renamed: str) -> dict[str, Any]:
    """The fields that were given (all of them by default); ``renamed`` maps new names to fields."""
    if not names and not renamed:
        names = tuple(f.name for f in dataclasses.fields(settings))
    pairs = {**{name: name for name in names}, **renamed}
    return {new: value for new, old in pairs.items() if (value := getattr(settings, old)) is not None}
