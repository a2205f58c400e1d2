"""``WeightConfig``: how single weights are searched, under a size budget or in blocks of four."""

from __future__ import annotations

from dataclasses import dataclass, field

from hwsearch.errors import InputError
from hwsearch.search.checks import above_0, at_least, below_1, shares
from hwsearch.train.loop import TrainConfig

#: Where zeros may stand: anywhere, or two in every four consecutive input weights.
PATTERNS = ("free", "2:4")


def steady() -> TrainConfig:
    """How weights and masks learn by default."""
    return TrainConfig(learning_rate=0.02)


@dataclass(frozen=True)
class WeightConfig:
    """How single weights are searched.

    Args:
        pattern: ``free``: a weight is on while its size is above its layer's learnt threshold. ``2:4``: of every four
            consecutive input weights of a dense layer the two largest are on.
        max_parameters: numbers that are not zero, of the network as it is deployed (folded).
        max_bytes: of that network's packed file (``hwsearch.graph.onnx_packed``), in float32.
        training: of both parts below, one cosine over them.
        epochs: of weights and thresholds.
        tuning_epochs: with masks frozen.
        prune_every: epochs between two commits.
        least: the share of its weights that every layer keeps.
        threshold_rate, threshold_momentum: of SGD on the thresholds.
        rate: what the price's multiplier gains in a search that misses its target by all of it.
        clip: the weights' gradient is clipped to this norm.

    Raises:
        InputError: zeros anywhere without a size budget: no kernel of a runtime is faster for them.
    """

    pattern: str = "free"
    max_parameters: int | None = None
    max_bytes: int | None = None
    training: TrainConfig = field(default_factory=steady)
    epochs: float = 2.0
    tuning_epochs: float = 2.0
    prune_every: float = 0.25
    least: float = 0.05
    threshold_rate: float = 0.001
    threshold_momentum: float = 0.9
    rate: float = 20.0
    clip: float = 5.0

    def __post_init__(self) -> None:
        check_size_budget(self.pattern, self.max_parameters, self.max_bytes)
        above_0(self, "epochs", "prune_every", "threshold_rate", "clip")
        at_least(self, 0, "tuning_epochs", "rate")
        shares(self, "least")
        below_1(self, "threshold_momentum")

    @property
    def sized(self) -> bool:
        """Whether a size budget decides how many weights are kept."""
        return self.pattern == "free"


def check_size_budget(pattern: str, max_parameters: int | None, max_bytes: int | None) -> None:
    """Refuse what cannot be meant.

    Raises:
        InputError: see ``WeightConfig``.
    """
    if pattern not in PATTERNS:
        raise InputError(f"pattern is {pattern!r}; give one of {', '.join(PATTERNS)}")
    for name, value in (("max_parameters", max_parameters), ("max_bytes", max_bytes)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; give 1 or more")
    if pattern == "free" and max_parameters is None and max_bytes is None:
        raise InputError(
            "single weights cannot be searched for milliseconds: dense kernels take the same time with zeros in them; "
            'give max_parameters or max_bytes, or pattern = "2:4" for sparse tensor cores'
        )
    if pattern == "2:4" and (max_parameters is not None or max_bytes is not None):
        raise InputError(
            'pattern = "2:4" leaves exactly two of four, whatever the size: leave max_parameters and max_bytes out'
        )
