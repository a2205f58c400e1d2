"""``MgasConfig``: everything that MGAS can be told, and its published settings; ``schedule``: its phases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hwsearch.errors import InputError
from hwsearch.search.checks import above_0, at_least, below_1, one_of, shares, up_to
from hwsearch.search.mgas_weights_config import WeightConfig
from hwsearch.train.loop import TrainConfig

#: What sets the weight of the cost.
CONTROLLERS = ("dual", "goldnas")


def _steady() -> TrainConfig:
    return TrainConfig(learning_rate=0.05, final_rate=0.05, warmup=0.0, weight_decay=3e-4, nesterov=False)


def _from_scratch() -> TrainConfig:
    # sums of many operations are not normalised: without a clip they diverge at rates that other networks take
    return TrainConfig(learning_rate=0.05, weight_decay=3e-4, clip=5.0)


@dataclass(frozen=True)
class MgasConfig:
    """Everything that MGAS can be told; ``MgasConfig.published()`` is what its code does.

    Args:
        training: of weights and gates together; its epochs and steps are set by the phases below.
        stages: the cells are divided among so many; each stage searches those up to its end, under a head there. With
            one there is only the last phase.
        warmup_epochs: of weights alone at the beginning of every phase.
        stage_epochs, final_epochs: of weights and gates, in every stage and in the last phase over all cells.
        prune_every: epochs between two commits of the masks.
        stage_share: what a stage leaves of the milliseconds that its cells have when nothing is pruned. None: the
            budget's share of the whole network's, times ``slack``.
        slack: see ``stage_share``.
        regrow: operations that come back at the end of a stage (but the first), over those it pruned; 0: none.
        filters: whether filters are searched, or operations alone.
        quantum: channels that are built and priced come in multiples of this.
        least: channels that every width keeps.
        score_rate, threshold_rate, gate_momentum: of SGD on the gates; there is no weight decay on them.
        controller: ``dual``, a multiplier that follows how far a ramped target is missed; ``goldnas``, one that grows
            while little is pruned.
        rate: of ``dual``: what the multiplier gains in one phase that misses its target by all of it.
        prune_goal: of ``goldnas``: operations to be pruned between two commits.
        rho, mu: what an operation costs in the loss: rho + mu times its share of the milliseconds.
        threshold_weight: of exp(-threshold), which pushes all thresholds up whatever they stand for.
        clip: the weights' gradient is clipped to this norm.
        aim: the share of the budget that the search ends at, before its result is moved exactly onto it.
        candidates: choices of widths near the found ones that are considered there.
        measured, rounds: candidates measured in a round and rounds at most, where the budget can measure.
        winner: training of the found network from scratch.
        weights: search of the found network's single weights, after its training; None: they are all kept.
    """

    training: TrainConfig = field(default_factory=_steady)
    stages: int = 3
    warmup_epochs: float = 1.0
    stage_epochs: float = 3.0
    final_epochs: float = 4.0
    prune_every: float = 1.0
    stage_share: float | None = None
    slack: float = 1.0
    regrow: float = 0.2
    filters: bool = True
    quantum: int = 4
    least: int = 4
    score_rate: float = 1.0
    threshold_rate: float = 0.1
    gate_momentum: float = 0.9
    controller: str = "dual"
    rate: float = 20.0
    prune_goal: int = 12
    rho: float = 0.0
    mu: float = 1.0
    threshold_weight: float = 0.0
    clip: float = 5.0
    aim: float = 0.97
    candidates: int = 8
    measured: int = 2
    rounds: int = 6
    winner: TrainConfig = field(default_factory=_from_scratch)
    weights: WeightConfig | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "stages", "quantum", "least", "prune_goal", "candidates", "measured", "rounds")
        above_0(self, "stage_epochs", "final_epochs", "prune_every", "slack", "score_rate", "threshold_rate", "clip")
        at_least(self, 0, "warmup_epochs", "rate", "rho", "mu", "threshold_weight")
        one_of(self, controller=CONTROLLERS)
        below_1(self, "gate_momentum")
        up_to(self, 1, "regrow")
        shares(self, "aim")
        if self.stage_share is not None and not 0 < self.stage_share <= 1:
            raise InputError(f"stage_share is {self.stage_share}; give a share above 0 and up to 1, or leave it out")

    @classmethod
    def published(cls, **changes: Any) -> MgasConfig:
        """The settings of the published code: no cost in the loss but the thresholds', a multiplier that grows while
        little is pruned, 30 % left by every stage; ``changes`` override any field.

        There a phase lasts until its target is reached; here it has so many epochs and is cut to its target at the end.

        Example:
            >>> MgasConfig.published(stage_epochs=2).controller
            'goldnas'
        """
        training = TrainConfig(
            batch_size=96, learning_rate=0.01, final_rate=0.01, warmup=0.0, weight_decay=3e-4, nesterov=False
        )
        settings: dict[str, Any] = {
            "training": training, "warmup_epochs": 5.0, "stage_epochs": 20.0, "final_epochs": 20.0, "prune_every": 2.0,
            "stage_share": 0.3, "controller": "goldnas", "rho": 1.0, "mu": 0.0, "threshold_weight": 1.0, "quantum": 2,
            "winner": TrainConfig(
                epochs=600, batch_size=96, learning_rate=0.025, weight_decay=3e-4, nesterov=False, clip=5.0
            ),
        }  # fmt: skip
        return cls(**{**settings, **changes})


@dataclass(frozen=True)
class Phase:
    """One stretch of the search.

    Attributes:
        stage: whose head is trained, and which cells are searched.
        start, steps: its first step and how many it has; the first ``warm`` of them learn weights alone.
        commits: steps of the phase after which masks are committed; the last one is the phase's end.
        final: whether its target is the budget.
    """

    stage: int
    start: int
    steps: int
    warm: int
    commits: tuple[int, ...]
    final: bool


def schedule(config: MgasConfig, steps_per_epoch: int, stages: int) -> tuple[Phase, ...]:
    """The phases of a search, in order.

    Example:
        >>> [(p.stage, p.start, p.steps, p.final) for p in schedule(MgasConfig(), 10, 2)]
        [(0, 0, 40, False), (1, 40, 40, False), (1, 80, 50, True)]
    """

    def steps(epochs: float, least: int = 1) -> int:
        return max(round(epochs * steps_per_epoch), least)

    found: list[Phase] = []
    warm, every = steps(config.warmup_epochs, 0), steps(config.prune_every)
    for stage, final in [*((k, False) for k in range(stages if stages > 1 else 0)), (stages - 1, True)]:
        length = steps(config.final_epochs if final else config.stage_epochs)
        commits = tuple(warm + at for at in range(every, length - every // 2, every))
        start = found[-1].start + found[-1].steps if found else 0
        found.append(Phase(stage, start, warm + length, warm, (*commits, warm + length), final))
    return tuple(found)
