"""CafeNet: search widths with locally free weight sharing.

A super-network is trained so that each width is represented by the best of several patterns of its units; evolution
then looks for the widths of least held-out loss inside the budget, the best are measured, and the winner is trained.

Reference: Su et al., "Locally Free Weight Sharing for Network Width Search", ICLR 2021. Min-min: the weights minimise
the expectation over widths of the smallest training loss over patterns; stochastically, of m patterns drawn for one
width vector only the one of least loss on the batch is stepped. Budgets are milliseconds here, not FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwsearch.errors import InputError
from hwsearch.search.evolution import Candidate, EvolutionSettings, evolve
from hwsearch.search.grid import WidthGrid
from hwsearch.search.patterns import Pattern, bins_of, draw
from hwsearch.search.result import SearchResult
from hwsearch.search.scoring import Scorer, ScoringConfig
from hwsearch.search.searcher import Searcher, limit_outcomes
from hwsearch.search.settle import Settled, settle
from hwsearch.search.stairs import stair_edges
from hwsearch.search.supernet import SuperNet
from hwsearch.search.winner import finish, train_choice
from hwsearch.train.data import Batch, Examples
from hwsearch.train.loop import Progress, Step, TrainConfig, evaluate, run_steps
from hwsearch.train.seeds import generator, torch_seed
from hwsearch.train.task import Classification, Evaluation, Task

if TYPE_CHECKING:
    import os

    from hwsearch.graph.widths import WidthChoice, WidthSpace
    from hwsearch.search.budget import Budget
    from hwsearch.search.run_folder import RunFolder

#: What the winner's weights start from.
STARTS = ("scratch", "model", "supernet")


@dataclass(frozen=True)
class CafeNetConfig:
    """Everything that CafeNet can be told.

    Args:
        offset: r, bins that the free zone goes to either side of a width; 0 is slimmable training.
        bin_units: units a bin; ``None``: each group's own quantum.
        patterns: m, patterns drawn for each sampled width vector, of which the best is stepped; 1: a random one.
        full_steps: every other step trains the full network.
        distillation: share of the loss by which a sub-network imitates the full one on the same batch, 0 to 1.
        stairs: search only widths that no larger width matches in time.
        training: of the super-network.
        scoring: how sub-networks are judged.
        evolution: how long and how widely to search.
        measured: candidates measured in a round, where the budget can measure.
        rounds: rounds of measuring at most.
        winner: training of the found network; ``None``: it keeps its shared weights.
        start: what the winner's weights start from: ``scratch`` (the paper), ``model`` (those that came in) or
            ``supernet``.
    """

    offset: int = 1
    bin_units: int | None = None
    patterns: int = 2
    full_steps: bool = True
    distillation: float = 0.0
    stairs: bool = True
    training: TrainConfig = field(default_factory=TrainConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)
    measured: int = 2
    rounds: int = 6
    winner: TrainConfig | None = field(default_factory=TrainConfig)
    start: str = "scratch"

    def __post_init__(self) -> None:
        for name, low in (("offset", 0), ("patterns", 1), ("measured", 1), ("rounds", 1)):
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}; give {low} or more")
        if self.bin_units is not None and self.bin_units < 1:
            raise InputError(f"bin_units is {self.bin_units}; give 1 or more, or leave it out")
        if not 0 <= self.distillation <= 1:
            raise InputError(f"distillation is {self.distillation}; give a share from 0 to 1")
        if self.start not in STARTS:
            raise InputError(f"start is {self.start!r}; give one of {', '.join(STARTS)}")


def train_supernet(
    space: WidthSpace,
    model: nn.Module,
    task: Task,
    config: CafeNetConfig | None = None,
    checkpoint_folder: Path | None = None,
    progress: Progress | None = None,
) -> SuperNet:
    """Train a super-network of ``model`` over ``space``, from the model's own weights on.

    A call with the same folder goes on after a kill and ends with the same bits.

    Raises:
        InputError: the checkpoint belongs to another training, or the loss is not finite.
        UnsupportedModelError: a layer that would change its width has no elastic form.
    """
    config = config or CafeNetConfig()
    net = SuperNet(model, space)
    identity = {
        "kind": "supernet",
        "space": WidthGrid.of(space).digest,
        "bins": list(bins_of(space, config.bin_units)),
        **{name: getattr(config, name) for name in ("offset", "patterns", "full_steps", "distillation")},
    }
    run_steps(
        net,
        task.train,
        config.training,
        min_min_step(net, task, config),
        identity=identity,
        folder=checkpoint_folder,
        progress=progress,
    )
    return net


def min_min_step(net: SuperNet, task: Task, config: CafeNetConfig) -> Step:
    """The training step: a function of (step number, batch) that leaves gradients and returns the loss.

    1. draw widths uniformly; 2. draw m patterns; 3. loss of each without gradient, on the same batch in the same
    batch-norm mode; 4. forward and backward of the best only. Even steps train the full network where ``full_steps``.
    """
    bins, seed = bins_of(net.space, config.bin_units), config.training.seed

    def step(number: int, batch: Batch) -> Tensor:
        if config.full_steps and number % 2 == 0:
            net.activate(None)
            return _backward(task.loss(net(batch[0]), batch))
        rng = generator(seed, "pattern", number)
        choice = net.space.sample(rng)
        patterns = [draw(net.space, choice, config.offset, bins, rng) for _ in range(config.patterns)]
        same_noise = torch_seed(seed, "torch", number)  # dropout must not decide which pattern is best
        teacher = None
        if config.distillation:
            teacher = _output(net, None, batch, same_noise)
        best = patterns[0]
        if config.patterns > 1 and config.offset > 0:
            losses = [float(task.loss(_output(net, pattern, batch, same_noise), batch)) for pattern in patterns]
            best = patterns[int(np.argmin(losses))]
        net.activate(best)
        torch.manual_seed(same_noise)
        output = net(batch[0])
        loss = task.loss(output, batch)
        if teacher is not None:
            loss = (1 - config.distillation) * loss + config.distillation * task.imitate(output, teacher)
        return _backward(loss)

    return step


def score_candidates(
    net: SuperNet, task: Task, choices: NDArray[np.int64], config: CafeNetConfig | None = None
) -> NDArray[np.float64]:
    """Held-out losses (N,) of widths (N, G) under shared weights; for many calls keep a ``Scorer``."""
    return _scorer(net, task, config or CafeNetConfig())(choices)


class CafeNet(Searcher):
    """CafeNet as a searcher.

    Args:
        space: the allowed widths.
        budget: what the found network must keep.
        config: see ``CafeNetConfig``; its trainings carry seeds of their own.
        model: the model that the space was made from, by default the very one; never changed.
        seed: of the evolution.
        folder: the run folder, see ``Searcher``.

    Example:
        >>> result = CafeNet(space, budget, folder="runs/first").search(train, valid)    # doctest: +SKIP
    """

    method: ClassVar[str] = "cafenet"

    def __init__(
        self,
        space: WidthSpace,
        budget: Budget,
        config: CafeNetConfig | None = None,
        *,
        model: nn.Module | None = None,
        seed: int = 0,
        folder: str | os.PathLike[str] | RunFolder | None = None,
    ) -> None:
        super().__init__(space, budget, seed=seed, folder=folder)
        full = model if model is not None else space.model
        if full is None:
            raise InputError("CafeNet needs the model that the space was made from: give model=")
        self.config, self.model = config or CafeNetConfig(), full

    def _settings(self) -> Mapping[str, Any]:
        settings = asdict(self.config)
        for name in ("training", "winner"):
            if settings[name] is not None:
                del settings[name]["checkpoint_s"]
        return settings

    def _search(self, run: RunFolder, train: Any, valid: Any, progress: Progress | None) -> SearchResult:
        task = as_task(train, valid)
        stairs = stair_edges(self.space, self.budget) if self.config.stairs else None
        space = stairs.space if stairs else self.space
        if stairs:
            run.event("stairs", summary=stairs.summary())
        net = train_supernet(
            space, self.model, task, self.config, run.state / "supernet", titled(progress, "super-network")
        )
        run.event("supernet_trained")
        scorer = _scorer(net, task, self.config)
        settled, candidates = self._settle(run, space, scorer, progress)
        run.event("settled", widths=settled.candidate.choice.widths, measured_ms=settled.measured_ms)
        model, evaluation = self._winner(run, space, net, scorer, settled.candidate.choice, task, progress)
        choice = settled.candidate.choice
        return SearchResult(
            method=self.method,
            seed=self.seed,
            groups=tuple(group.name for group in self.space.groups),
            choice=choice,
            limits=limit_outcomes(self.budget, settled.candidate, settled),
            loss=settled.candidate.loss,
            metric=evaluation.metric,
            macs=self.space.macs(choice),
            parameters=self.space.parameters(choice),
            candidates=tuple(candidates),
            extra={
                "metric_name": task.metric_name,
                "winner_loss": evaluation.loss,
                "within_band": settled.within,
                "log10_space": self.space.log10_size,
                "log10_searched": space.log10_size,
            },
            model=model,
        )

    def _settle(
        self, run: RunFolder, space: WidthSpace, scorer: Scorer, progress: Progress | None
    ) -> tuple[Settled, Sequence[Candidate]]:
        """Evolve under the budget; where it can measure, measure the best and search again under the correction."""
        found: dict[tuple[int, ...], Candidate] = {}
        digest = scorer.digest()

        def propose(corrected: Budget, seeds: Sequence[WidthChoice]) -> Sequence[Candidate]:
            result = evolve(
                space,
                corrected,
                scorer,
                self.config.evolution,
                self.seed,
                journal=run.state / "losses.jsonl",
                progress=titled(progress, "evolution"),
                initial=seeds,
                context=digest,
            )
            found.update({candidate.choice.widths: candidate for candidate in result.candidates})
            return result.candidates

        settled = settle(
            space,
            self.budget,
            propose,
            rounds=self.config.rounds,
            per_round=self.config.measured,
            journal=run.state / "readings.jsonl",
            progress=titled(progress, "measuring"),
        )
        rows = np.asarray(list(found), dtype=np.int64)
        times = self.budget.evaluate(rows).tolist()  # uncorrected, so that all candidates are told alike
        plain = [
            Candidate(candidate.choice, candidate.loss, tuple(ms))
            for candidate, ms in zip(found.values(), times, strict=True)
        ]
        return settled, sorted(plain, key=lambda candidate: (candidate.loss, candidate.ms, candidate.choice.widths))

    def _winner(
        self,
        run: RunFolder,
        space: WidthSpace,
        net: SuperNet,
        scorer: Scorer,
        choice: WidthChoice,
        task: Task,
        progress: Progress | None,
    ) -> tuple[nn.Module, Evaluation]:
        """The found network, trained as the configuration says, and its evaluation on held-out examples."""
        config = self.config.winner
        folder, report = run.state / "winner", titled(progress, "winner")
        if config is not None and self.config.start != "supernet":
            scratch = self.config.start == "scratch"
            return train_choice(
                self.model, space, choice, task, config, scratch=scratch, folder=folder, progress=report
            )
        small = net.extract(scorer.pattern(choice), scorer.calibration())
        if config is not None:
            return finish(small, task, config, folder=folder, progress=report)
        return small, evaluate(small, task, task.valid, self.config.training)


def as_task(train: Any, valid: Any) -> Task:
    """A task as it came, or classification on two sets of examples.

    Raises:
        InputError: neither a task nor examples; or a task together with other held-out examples.
    """
    if isinstance(train, Task):
        if valid is not None and valid is not train.valid:
            raise InputError("a task brings its own held-out examples; give its own, or None, as valid")
        return train
    if not isinstance(train, Examples) or not isinstance(valid, Examples):
        kinds = f"{type(train).__name__} and {type(valid).__name__}"
        raise InputError(f"search needs a Task, or training and held-out Examples, not {kinds}")
    return Classification(train, valid)


def titled(progress: Progress | None, title: str) -> Progress | None:
    """The same callback, told first what it hears about."""
    if progress is None:
        return None
    hear = progress
    return lambda done, total, text: hear(done, total, f"{title}: {text}")


def _scorer(net: SuperNet, task: Task, config: CafeNetConfig) -> Scorer:
    return Scorer(net, task, config.scoring, config.training, offset=config.offset, bin_units=config.bin_units)


def _output(net: SuperNet, pattern: Pattern | None, batch: Batch, noise: int) -> Tensor:
    """Output of one sub-network without gradient, in training mode, its dropout fixed by ``noise``."""
    net.activate(pattern)
    torch.manual_seed(noise)
    with torch.no_grad():
        output: Tensor = net(batch[0])
    return output


def _backward(loss: Tensor) -> Tensor:
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()
