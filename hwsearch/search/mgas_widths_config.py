"""``FilterConfig``: everything that MGAS can be told about the filters of an ordinary network."""

from __future__ import annotations

from dataclasses import dataclass, field

from hwsearch.errors import InputError
from hwsearch.search.checks import above_0, at_least, below_1, floor_and_aim, number_or_all, one_of
from hwsearch.search.mgas_weights_config import WeightConfig
from hwsearch.train.loop import TrainConfig

#: What the winner's weights start from.
STARTS = ("scratch", "masked")


def _steady() -> TrainConfig:
    return TrainConfig(learning_rate=0.05, final_rate=0.05, warmup=0.0, nesterov=False)


@dataclass(frozen=True)
class FilterConfig:
    """Everything that MGAS can be told about the filters of an ordinary network.

    Args:
        training: of weights and gates together; its epochs and steps are set by the two below.
        warmup_epochs: of weights alone at the beginning.
        epochs: of weights and gates.
        prune_every: epochs between two commits of the masks.
        score_rate, threshold_rate, gate_momentum: of SGD on the gates; there is no weight decay on them.
        rate: what the price's multiplier gains in a search that misses its target by all of it.
        threshold_weight: of exp(-threshold), which pushes all thresholds up whatever they stand for (the paper).
        clip: the weights' gradient is clipped to this norm.
        aim: the share of the budget that the search ends at, before its result is moved exactly onto it.
        floor: the share of the budget that the result uses at least, where the widths allow it.
        candidates: choices near the gates, on the budget, that are judged on held-out examples.
        score_images: held-out examples that they are judged on; None: all.
        calibration_images: training examples that batch-norm statistics are measured on.
        measured, rounds: candidates measured in a round and rounds at most, where the budget can measure.
        winner: training of the found network; None: none, which ``start = "masked"`` allows.
        start: what the winner's weights start from: ``scratch`` (the paper), or ``masked``, those that the search
            leaves.
        weights: search of the found network's single weights, after its training; None: they are all kept.
    """

    training: TrainConfig = field(default_factory=_steady)
    warmup_epochs: float = 1.0
    epochs: float = 3.0
    prune_every: float = 0.5
    score_rate: float = 1.0
    threshold_rate: float = 0.1
    gate_momentum: float = 0.9
    rate: float = 5.0
    threshold_weight: float = 0.0
    clip: float = 5.0
    aim: float = 0.99
    floor: float = 0.97
    candidates: int = 8
    score_images: int | None = 1000
    calibration_images: int = 512
    measured: int = 2
    rounds: int = 6
    winner: TrainConfig | None = field(default_factory=TrainConfig)
    start: str = "scratch"
    weights: WeightConfig | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "candidates", "measured", "rounds")
        at_least(self, 2, "calibration_images")
        number_or_all(self, "score_images")
        above_0(self, "epochs", "prune_every", "score_rate", "threshold_rate", "clip")
        at_least(self, 0, "warmup_epochs", "rate", "threshold_weight")
        below_1(self, "gate_momentum")
        floor_and_aim(self)
        one_of(self, start=STARTS)
        if self.winner is None and self.start == "scratch":
            raise InputError("winner is None, but start is 'scratch': give a training, or start = 'masked'")
