"""``[cells]`` of a config: how operations and filters of a network of cells are searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field

from hwsearch.config_training import method_settings
from hwsearch.config_types import Below1, Count, NotNegative, Positive, Share, Switch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hwsearch.search.mgas_config import MgasConfig
    from hwsearch.train.loop import TrainConfig


@dataclass(frozen=True)
class CellSettings:
    """``[cells]``, for ``method = "mgas"``: see ``MgasConfig``; ``learning_rate`` is the weights', the same throughout.

    ``published`` begins from the settings of the paper's code.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    stages: Count | None = None
    warmup_epochs: NotNegative | None = None
    stage_epochs: Positive | None = None
    final_epochs: Positive | None = None
    prune_every: Positive | None = None
    stage_share: Annotated[float, Field(strict=True, gt=0, le=1, description="a share above 0, up to 1")] | None = None
    slack: Positive | None = None
    regrow: Share | None = None
    filters: Switch | None = None
    quantum: Count | None = None
    least: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    checkpoint_s: NotNegative | None = None
    score_rate: Positive | None = None
    threshold_rate: Positive | None = None
    gate_momentum: Below1 | None = None
    controller: Literal["dual", "goldnas"] | None = None
    rate: NotNegative | None = None
    prune_goal: Count | None = None
    rho: NotNegative | None = None
    mu: NotNegative | None = None
    threshold_weight: NotNegative | None = None
    aim: Share | None = None
    candidates: Count | None = None
    published: Switch = False

    def base(self) -> MgasConfig:
        """What the settings change."""
        from hwsearch.search.mgas_config import MgasConfig

        return MgasConfig.published() if self.published else MgasConfig()

    def config(self, winner: TrainConfig, shared: Mapping[str, Any]) -> MgasConfig:
        """The search that these settings stand for.

        Args:
            winner: how the found network is trained; gives seed and threads.
            shared: settings that all methods have.

        Raises:
            InputError: values that do not go together.
        """
        made: MgasConfig = method_settings(
            self.base(), self, "cells", winner, ("batch_size", "checkpoint_s"), winner=winner, **shared
        )
        return made
