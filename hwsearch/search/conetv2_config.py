"""``ConetConfig``: everything that CONetV2 can be told, and the paper's own settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hwsearch.search.annealing import AnnealSettings
from hwsearch.search.checks import at_least, below_1, one_of, shares
from hwsearch.search.transfer import TRANSFERS
from hwsearch.train.loop import TrainConfig

#: How widths follow quality.
ACCEPTS = ("metropolis", "conetv2", "greedy")
#: What the winner's weights start from.
STARTS = ("scratch", "model", "trial")


@dataclass(frozen=True)
class ConetConfig:
    """Everything that CONetV2 can be told; ``ConetConfig.published()`` is the paper's own.

    Args:
        accept: how widths follow quality, see ``conetv2``.
        trials: networks trained on the way.
        training: of one trial; its epochs are a trial's epochs. Each trial draws its batches from a seed of its own.
        momentum: how much an earlier trial's quality counts for, 0 to below 1. In the published rule it sets the size
            of what is found; in ``metropolis`` quality is averaged, and it sets how smoothly.
        guard: count a layer with a single learnt direction by its rank (see ``quality``), which the paper does not.
        transfer: how weights go from trial to trial: ``preserve`` or ``svd`` (the paper).
        adas: a learning rate for each layer, see ``layer_rates``; ``adas_beta`` is its decay.
        start_share: ``metropolis`` starts from this share of every group's full width, moved into the budget.
        annealing: of ``metropolis``.
        stairs: search only widths that no larger width matches in time; None: in ``metropolis``, where milliseconds
            decide.
        measured: candidates measured in a round, where the budget can measure.
        rounds: rounds of measuring at most.
        winner: training of the found network; None: the last trial's weights, trained as one trial more.
        start: what the winner's weights start from: ``scratch`` (the paper), ``model`` (those that came in) or
            ``trial`` (the last one's, carried over).
    """

    accept: str = "metropolis"
    trials: int = 10
    training: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1.0))
    momentum: float = 0.6
    guard: bool = True
    transfer: str = "preserve"
    adas: bool = False
    adas_beta: float = 0.8
    start_share: float = 0.5
    annealing: AnnealSettings = field(default_factory=AnnealSettings)
    stairs: bool | None = None
    measured: int = 2
    rounds: int = 6
    winner: TrainConfig | None = field(default_factory=TrainConfig)
    start: str = "scratch"

    def __post_init__(self) -> None:
        at_least(self, 1, "trials", "measured", "rounds")
        one_of(self, accept=ACCEPTS, transfer=TRANSFERS, start=STARTS)
        below_1(self, "momentum", "adas_beta")
        shares(self, "start_share")

    @classmethod
    def published(cls, momentum: float = 0.8, **changes: Any) -> ConetConfig:
        """The published settings: 36 trials of 2 epochs at a constant rate under AdaS, transfer through the SVD, QC
        without a guard, and 250 epochs for the winner. ``momentum`` is its size knob; ``changes`` override any field.

        Example:
            >>> ConetConfig.published(trials=3).transfer
            'svd'
        """
        rate = 0.03
        training = TrainConfig(
            epochs=2.0, learning_rate=rate, final_rate=rate, warmup=0.0, nesterov=False, weight_decay=5e-4
        )
        settings: dict[str, Any] = {
            "accept": "conetv2",
            "trials": 36,
            "training": training,
            "momentum": momentum,
            "guard": False,
            "transfer": "svd",
            "adas": True,
            "winner": TrainConfig(epochs=250, weight_decay=5e-4),
        }
        return cls(**{**settings, **changes})
