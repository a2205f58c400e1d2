"""``FilterConfig``: everything that MGAS can be told about the filters of an ordinary network."""

from __future__ import annotations

from dataclasses import dataclass, field

from hwsearch.errors import InputError
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
        for name, low in (("candidates", 1), ("calibration_images", 2), ("measured", 1), ("rounds", 1)):
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}; give {low} or more")
        if self.score_images is not None and self.score_images < 2:
            raise InputError(f"score_images is {self.score_images}; give 2 or more, or leave it out for all")
        for name in ("epochs", "prune_every", "score_rate", "threshold_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; give a number above 0")
        for name in ("warmup_epochs", "rate", "threshold_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more")
        if not 0 <= self.gate_momentum < 1:
            raise InputError(f"gate_momentum is {self.gate_momentum}; give 0 or more and below 1")
        if not 0 < self.floor <= self.aim <= 1 or self.floor == 1:
            raise InputError(f"floor is {self.floor} and aim {self.aim}; give 0 < floor <= aim <= 1, floor below 1")
        if self.start not in STARTS:
            raise InputError(f"start is {self.start!r}; give one of {', '.join(STARTS)}")
        if self.winner is None and self.start == "scratch":
            raise InputError("winner is None, but start is 'scratch': give a training, or start = 'masked'")
