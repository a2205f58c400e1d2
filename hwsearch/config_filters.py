"""``[filters]`` of a config: how the filters of an ordinary network are searched by MGAS's gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from hwsearch.config_training import method_settings
from hwsearch.config_types import Below1, Count, NotNegative, Positive, Share

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hwsearch.search.mgas_widths_config import FilterConfig
    from hwsearch.train.loop import TrainConfig


@dataclass(frozen=True)
class FilterSettings:
    """``[filters]``, for ``method = "mgas"`` on a network that is none of cells: see ``FilterConfig``;
    ``learning_rate`` is the weights', the same throughout."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    warmup_epochs: NotNegative | None = None
    epochs: Positive | None = None
    prune_every: Positive | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    checkpoint_s: NotNegative | None = None
    score_rate: Positive | None = None
    threshold_rate: Positive | None = None
    gate_momentum: Below1 | None = None
    rate: NotNegative | None = None
    threshold_weight: NotNegative | None = None
    aim: Share | None = None
    floor: Below1 | None = None
    candidates: Count | None = None
    score_images: Count | None = None
    calibration_images: Count | None = None
    start: Literal["scratch", "masked"] | None = None

    def config(self, winner: TrainConfig, shared: Mapping[str, Any]) -> FilterConfig:
        """The search that these settings stand for.

        Args:
            winner: how the found network is trained; gives seed and threads.
            shared: settings that all methods have.

        Raises:
            InputError: values that do not go together.
        """
        from hwsearch.search.mgas_widths_config import FilterConfig

        made: FilterConfig = method_settings(
            FilterConfig(), self, "filters", winner, ("batch_size", "checkpoint_s"), winner=winner, **shared
        )
        return made
