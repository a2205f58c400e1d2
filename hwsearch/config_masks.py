"""``[masks]`` of a config: how widths are learnt by gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from hwsearch.config_training import given, method_settings
from hwsearch.config_types import Below1, Count, NotNegative, Positive, Share, Switch
from hwsearch.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hwsearch.search.pas_config import PasConfig
    from hwsearch.train.loop import TrainConfig


@dataclass(frozen=True)
class MaskSettings:
    """``[masks]``, for ``method = "pas"``: the search's training at one constant ``learning_rate``, and ``PasConfig``.

    ``rate`` and ``momentum`` are those of the masks. ``warmup`` trains the full network first as ``[train]`` says; by
    default it is left out where ``[model]`` has weights. ``published`` begins from the paper's settings.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    epochs: Positive | None = None
    steps: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    checkpoint_s: NotNegative | None = None
    warmup: Switch | None = None
    rate: Positive | None = None
    momentum: Below1 | None = None
    jitter: Below1 | None = None
    cost: Literal["ms", "macs", "parameters"] | None = None
    gate: Literal["binary", "threshold"] | None = None
    pressure: Positive | None = None
    pressure_rate: NotNegative | None = None
    crossing: Share | None = None
    aim: Share | None = None
    floor: Below1 | None = None
    candidates: Count | None = None
    score_images: Count | None = None
    calibration_images: Count | None = None
    published: Switch = False

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise InputError("[masks] has both epochs and steps: give one of the two")

    def base(self) -> PasConfig:
        """What the settings change."""
        from hwsearch.search.pas_config import PasConfig

        return PasConfig.published() if self.published else PasConfig()

    def config(self, train: TrainConfig, winner: TrainConfig, shared: Mapping[str, Any], *, trained: bool) -> PasConfig:
        """The search that these settings stand for.

        Args:
            train: how a network is trained on its own: the warm-up; gives seed and threads.
            winner: how the found network is fine-tuned.
            shared: settings that all methods have.
            trained: whether the model brings trained weights.

        Raises:
            InputError: values that do not go together.
        """
        warm = self.warmup if self.warmup is not None else not trained
        shared = {**shared, **given(self, mask_rate="rate", mask_momentum="momentum")}
        made: PasConfig = method_settings(
            self.base(), self, "masks", train, ("epochs", "steps", "batch_size", "checkpoint_s"),
            warmup=train if warm else None, winner=winner, **shared,
        )  # fmt: skip
        return made
