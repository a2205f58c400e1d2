"""``[weights]`` of a config: how single weights of the found network are searched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict

from hwsearch.config_training import given
from hwsearch.config_types import Below1, Count, NotNegative, Positive, Share
from hwsearch.errors import InputError

if TYPE_CHECKING:
    from hwsearch.search.mgas_weights_config import WeightConfig
    from hwsearch.train.loop import TrainConfig

#: Fields that are the training's, not the search's.
_TRAINING = ("batch_size", "learning_rate", "checkpoint_s")


@dataclass(frozen=True)
class WeightSettings:
    """``[weights]``, for ``method = "mgas"``: see ``WeightConfig``; without the section all weights are kept."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    pattern: Literal["free", "2:4"] | None = None
    max_parameters: Count | None = None
    max_bytes: Count | None = None
    epochs: Positive | None = None
    tuning_epochs: NotNegative | None = None
    prune_every: Positive | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    checkpoint_s: NotNegative | None = None
    least: Share | None = None
    threshold_rate: Positive | None = None
    threshold_momentum: Below1 | None = None
    rate: NotNegative | None = None

    def __post_init__(self) -> None:
        if self.asked:
            from hwsearch.search.mgas_weights_config import check_size_budget

            try:
                check_size_budget(self.pattern or "free", self.max_parameters, self.max_bytes)
            except InputError as error:
                raise InputError(f"[weights]: {error}") from error

    @property
    def asked(self) -> bool:
        """Whether the section says anything."""
        return bool(given(self))

    def config(self, like: TrainConfig) -> WeightConfig | None:
        """The search that these settings stand for; None: no such search.

        Args:
            like: gives seed, threads and batch size.

        Raises:
            InputError: values that do not go together.
        """
        from hwsearch.search.mgas_weights_config import WeightConfig, steady

        if not self.asked:
            return None
        said = given(self)
        training = {"batch_size": like.batch_size, **{name: said.pop(name) for name in _TRAINING if name in said}}
        try:
            return WeightConfig(training=replace(steady(), seed=like.seed, threads=like.threads, **training), **said)
        except InputError as error:
            raise InputError(f"[weights]: {error}") from error
