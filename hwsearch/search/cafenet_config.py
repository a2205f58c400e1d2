"""``CafeNetConfig``: everything that the CafeNet search can be told, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from hwsearch.errors import InputError
from hwsearch.search.bins import RULES
from hwsearch.search.checks import at_least, one_of, shares, up_to
from hwsearch.search.evolution import EvolutionSettings
from hwsearch.search.scoring import ScoringConfig
from hwsearch.train.loop import TrainConfig

#: What the winner's weights start from.
STARTS = ("scratch", "model", "supernet")

#: How a width shares the super-network's weights.
SHARINGS = ("local", "bilateral")


@dataclass(frozen=True)
class CafeNetConfig:
    """Everything that CafeNet can be told.

    Args:
        offset: r, bins that the free zone goes to either side of a width; 0 is slimmable training.
        bin_units: units a bin; ``None``: each group's own quantum.
        patterns: m, patterns drawn for each sampled width vector, of which the best is stepped; 1: a random one.
        full_steps: every other step trains the full network.
        distillation: share of the loss by which a sub-network imitates the full one on the same batch, 0 to 1.
        sharing: ``local`` (CafeNet: base and free units), or ``bilateral`` (BCNet: every width is trained, and judged,
            from the left and from the right; offset and patterns are not used).
        complementary: with bilateral sharing, every second draw is what the one before left over.
        bins: what cuts the space: ``ms`` keeps widths that no larger width matches in time, ``macs`` CafeNet's bins of
            about equal MACs, ``none`` nothing.
        smallest_bin, largest_bin: units of a bin by MACs.
        refinements: search a coarser space first, and so often one of twice the widths, seeded with what was found.
        training: of the super-network.
        scoring: how sub-networks are judged.
        evolution: how long and how widely to search.
        finalists: candidates of a round that are trained for a short while, uniform scaling and the knapsack among
            them, so that the order of the best rests on more than shared weights; 0: none (the paper).
        finalist_share: their training, as a share of the winner's steps.
        measured: candidates measured in a round, where the budget can measure.
        rounds: rounds of measuring at most.
        winner: training of the found network; ``None``: it keeps its shared weights.
        start: what the winner's weights start from: ``scratch`` (the paper), ``model`` (those that came in) or
            ``supernet``; ``all`` trains one of each, side by side, and keeps the best on held-out examples.
        floor: the other objective: the fewest milliseconds of a network whose held-out metric, trained as the winner
            is, is at least this (at most, where a smaller metric is better); ``None``: the most accuracy in the budget.
    """

    offset: int = 1
    bin_units: int | None = None
    patterns: int = 2
    full_steps: bool = True
    distillation: float = 0.0
    sharing: str = "local"
    complementary: bool = True
    bins: str = "ms"
    smallest_bin: int = 2
    largest_bin: int = 64
    refinements: int = 0
    training: TrainConfig = field(default_factory=TrainConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)
    finalists: int = 4
    finalist_share: float = 0.125
    measured: int = 2
    rounds: int = 6
    winner: TrainConfig | None = field(default_factory=TrainConfig)
    start: str = "scratch"
    floor: float | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "offset", "refinements", "finalists")
        at_least(self, 1, "patterns", "measured", "rounds", "smallest_bin", "largest_bin")
        if self.bin_units is not None and self.bin_units < 1:
            raise InputError(f"bin_units is {self.bin_units}; give 1 or more, or leave it out")
        up_to(self, 1, "distillation")
        one_of(self, start=(*STARTS, "all"), sharing=SHARINGS, bins=RULES)
        if self.floor is not None and self.winner is None:
            raise InputError("floor judges trained networks: give winner, the training")
        shares(self, "finalist_share")
