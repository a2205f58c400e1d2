"""``PasConfig``: everything that PaS can be told, and the paper's own settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hwsearch.errors import InputError
from hwsearch.search.checks import above_0, at_least, below_1, floor_and_aim, number_or_all, one_of, up_to
from hwsearch.train.loop import TrainConfig

#: What the search's loss counts; the budget itself is always kept as it was given.
COSTS = ("ms", "macs", "parameters")
#: What the winner's weights start from.
STARTS = ("masked", "scratch", "model")
#: What switches units on and off: the paper's masks, or scores against learnt thresholds (MGAS).
GATES = ("binary", "threshold")


def _steady() -> TrainConfig:
    """A trained network searched at a small, constant rate, as the paper does."""
    return TrainConfig(epochs=2.0, learning_rate=0.02, final_rate=0.02, warmup=0.0)


def _fine_tuning() -> TrainConfig:
    return TrainConfig(learning_rate=0.05)


@dataclass(frozen=True)
class PasConfig:
    """Everything that PaS can be told; ``PasConfig.published()`` is the paper's own.

    Args:
        warmup: training of the full network first; None: the model that comes in is trained already.
        training: of weights and masks together, the search itself.
        mask_rate: learning rate of the latent weights, relative to ``training``'s. They have no weight decay.
        mask_momentum: theirs.
        jitter: latents begin at 1 plus or minus up to this, so that equal ones do not fall all at once.
        cost: what the loss counts: ``ms`` of every limit of the budget; or, for comparison, ``macs`` (the paper) or
            ``parameters``, as many as uniform scaling has inside the budget.
        gate: ``binary`` masks, or ``threshold``: a sigmoid score against its group's learnt threshold, as MGAS gates
            filters.
        pressure: first weight of the budget's squared relative error, beside the task's own loss.
        pressure_rate: how far that weight follows the budget: missed by all of it during a whole search, the weight is
            multiplied by e to this power; 0: it stays (the paper).
        crossing: share of the search that the group which is pushed hardest needs at least to be switched off, which
            gives the task's loss time to tell its units apart; 0: no bound (the paper).
        aim: the share of the budget that the search steers at.
        floor: the share of the budget that the result uses at least, where the widths allow it.
        candidates: choices near the masks, on the budget, that are judged on held-out examples.
        score_images: held-out examples that they are judged on; None: all.
        calibration_images: training examples that batch-norm statistics are measured on.
        measured: candidates measured in a round, where the budget can measure.
        rounds: rounds of measuring at most.
        winner: fine-tuning of the found network; None: none.
        start: what the winner's weights start from: ``masked`` (those that the search leaves, the paper), ``scratch``,
            or ``model`` (the units with the largest weights of the network that was searched).
    """

    warmup: TrainConfig | None = None
    training: TrainConfig = field(default_factory=_steady)
    mask_rate: float = 10.0
    mask_momentum: float = 0.9
    jitter: float = 0.05
    cost: str = "ms"
    gate: str = "binary"
    pressure: float = 1.0
    pressure_rate: float = 10.0
    crossing: float = 0.3
    aim: float = 0.99
    floor: float = 0.98
    candidates: int = 8
    score_images: int | None = 1000
    calibration_images: int = 512
    measured: int = 2
    rounds: int = 6
    winner: TrainConfig | None = field(default_factory=_fine_tuning)
    start: str = "masked"

    def __post_init__(self) -> None:
        at_least(self, 1, "candidates", "measured", "rounds")
        at_least(self, 2, "calibration_images")
        number_or_all(self, "score_images")
        one_of(self, cost=COSTS, start=STARTS, gate=GATES)
        above_0(self, "mask_rate", "pressure")
        below_1(self, "mask_momentum")
        if not 0 <= self.jitter < 0.5:
            raise InputError(
                f"jitter is {self.jitter}; give 0 or more and below 0.5, so that all masks begin switched on"
            )
        up_to(self, 100, "pressure_rate")
        up_to(self, 1, "crossing")
        floor_and_aim(self)

    @classmethod
    def published(cls, **changes: Any) -> PasConfig:
        """The published settings: MACs in the loss with a weight that stays, masks that begin equal and learn at the
        weights' own rate, 9 epochs at a constant 0.02 and 48 of fine-tuning; ``changes`` override any field.

        The paper squares GMACs (weight 0.1 for RepVGG, 5 for ResNet-50), which is no number for other networks: the
        weight here is of the relative error.

        Example:
            >>> PasConfig.published(start="scratch").cost
            'macs'
        """
        training = TrainConfig(epochs=9, learning_rate=0.02, final_rate=0.02, warmup=0.0, nesterov=False)
        settings: dict[str, Any] = {
            "training": training,
            "mask_rate": 1.0,
            "jitter": 0.0,
            "cost": "macs",
            "pressure": 10.0,
            "pressure_rate": 0.0,
            "crossing": 0.0,
            "winner": TrainConfig(epochs=48, learning_rate=0.0256, nesterov=False),
        }
        return cls(**{**settings, **changes})
