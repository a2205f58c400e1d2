"""CafeNet: search widths with locally free weight sharing.

A super-network is trained so that each width is represented by the best of several patterns of its units; evolution
then looks for the widths of least held-out loss inside the budget, the best are measured, and the winner is trained.

Reference: Su et al., "Locally Free Weight Sharing for Network Width Search", ICLR 2021. Min-min: the weights minimise
the expectation over widths of the smallest training loss over patterns; stochastically, of m patterns drawn for one
width vector only the one of least loss on the batch is stepped. Budgets are milliseconds here, not FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hwsearch.errors import InputError
from hwsearch.search.baselines import importances, knapsack, uniform_choices
from hwsearch.search.bins import levels, reduce_space
from hwsearch.search.cafenet_config import SHARINGS, STARTS, CafeNetConfig
from hwsearch.search.evolution import Candidate, evolve
from hwsearch.search.fan_out import Candidates
from hwsearch.search.finalists import Finalists, unlike
from hwsearch.search.floor import fastest_above, front
from hwsearch.search.grid import WidthGrid, Widths
from hwsearch.search.result import SearchResult
from hwsearch.search.scoring import Scorer
from hwsearch.search.searcher import NetworkSearcher
from hwsearch.search.settle import Settled, measured_once, settle
from hwsearch.search.supernet import SuperNet
from hwsearch.search.supernet_training import min_min_step, train_supernet
from hwsearch.search.winner import finish, train_choice
from hwsearch.train.data import Examples
from hwsearch.train.loop import Progress, evaluate
from hwsearch.train.seeds import generator
from hwsearch.train.task import Classification, Evaluation, Task

if TYPE_CHECKING:
    import os

    from hwsearch.graph.widths import WidthChoice, WidthSpace
    from hwsearch.search.budget import Budget
    from hwsearch.search.run_folder import RunFolder

__all__ = [
    "SHARINGS", "STARTS", "CafeNet", "CafeNetConfig", "as_task", "min_min_step", "score_candidates", "titled",
    "train_supernet",
]  # fmt: skip

#: Candidates that the recorded training losses propose to evolution, beside uniform scaling and the knapsack.
_RECORDED = 4


def score_candidates(
    net: SuperNet, task: Task, choices: NDArray[np.int64], config: CafeNetConfig | None = None
) -> NDArray[np.float64]:
    """Held-out losses (N,) of widths (N, G) under shared weights; for many calls keep a ``Scorer``."""
    return _scorer(net, task, config or CafeNetConfig())(choices)


class CafeNet(NetworkSearcher[CafeNetConfig]):
    """CafeNet as a searcher.

    Args:
        space: the allowed widths.
        budget: what the found network must keep.
        config: see ``CafeNetConfig``; its trainings carry seeds of their own.
        model: the model that the space was made from, by default the very one; never changed.
        seed: of the evolution.
        folder: the run folder, see ``Searcher``.
        supernet: a trained one of the space as the configuration cuts it, for a search under another budget; it is
            then not trained here.
        say: told, before anything is trained, how far the space was cut and what it still reaches.

    Example:
        >>> result = CafeNet(space, budget, folder="runs/first").search(train, valid)    # doctest: +SKIP
    """

    method: ClassVar[str] = "cafenet"
    defaults = CafeNetConfig

    def __init__(
        self,
        space: WidthSpace,
        budget: Budget,
        config: CafeNetConfig | None = None,
        *,
        model: nn.Module | None = None,
        seed: int = 0,
        folder: str | os.PathLike[str] | RunFolder | None = None,
        say: Callable[[str], None] | None = None,
        supernet: SuperNet | None = None,
    ) -> None:
        super().__init__(space, budget, config, model=model, seed=seed, folder=folder)
        self.say, self.supernet = say, supernet

    def _search(self, run: RunFolder, train: Any, valid: Any, progress: Progress | None) -> SearchResult:
        task = as_task(train, valid)
        cut = reduce_space(
            self.space, self.budget, self.config.bins,
            smallest=self.config.smallest_bin, largest=self.config.largest_bin,
        )  # fmt: skip
        space = cut.space
        run.event("space_reduced", rule=cut.rule, summary=cut.summary())
        if self.say:
            self.say(f"  {cut.summary()}")
        if self.supernet is None:
            net = train_supernet(
                space, self.model, task, self.config, run.state / "supernet", titled(progress, "super-network")
            )
        elif WidthGrid.of(self.supernet.space).digest != WidthGrid.of(space).digest:
            raise InputError("the super-network was trained on another space than this search cuts: train it anew")
        else:
            net = self.supernet
        run.event("supernet_trained")
        job = _Job(self, run, space, net, _scorer(net, task, self.config), task, progress)
        settled, candidates = job.settle() if self.config.floor is None else job.fewest()
        choice = settled.candidate.choice
        run.event("settled", widths=choice.widths, measured_ms=settled.measured_ms)
        model, evaluation, starts = job.winner(choice)
        extra = {
            "log10_searched": space.log10_size,
            "finalists": [{"widths": list(key), "loss": loss} for key, loss in sorted(job.finalists.known.items())],
            "starts": starts,
        }
        return self._result(settled, candidates, (model, evaluation), task, extra)


class _Job:
    """One search at work: evolution, finalists, measuring and the winner around one trained super-network."""

    def __init__(
        self,
        search: CafeNet,
        run: RunFolder,
        space: WidthSpace,
        net: SuperNet,
        scorer: Scorer,
        task: Task,
        progress: Progress | None,
    ) -> None:
        self.config, self.budget, self.seed, self.model = search.config, search.budget, search.seed, search.model
        self.run, self.space, self.net, self.scorer, self.task, self.progress = run, space, net, scorer, task, progress
        self.digest = scorer.digest()
        self.found: dict[tuple[int, ...], Candidate] = {}
        short = self.config.winner or self.config.training
        steps = max(round(short.total_steps(len(task.train)) * self.config.finalist_share), 1)
        self.short = replace(short, steps=steps)
        belongs = {"context": self.digest, "steps": steps}
        path = run.state / "finalists.jsonl" if self.config.finalists else None
        doing = Candidates(scorer, self.short, titled(progress, "finalists"))
        crew = doing.crew()
        if crew is not None:
            scorer.spread = partial(crew, "loss")
        self.finalists = Finalists(doing.trained, path, belongs, crew)

    def settle(self) -> tuple[Settled, Sequence[Candidate]]:
        """Evolve under the budget; where it can measure, measure the best and search again under the correction."""

        def propose(corrected: Budget, seeds: Sequence[WidthChoice]) -> Sequence[Candidate]:
            plain = self.plain_answers(corrected)
            candidates = self.evolve(corrected, [*seeds, *self.space.choices(plain), *self.recorded(corrected)])
            return self.shortlist(candidates, plain) if self.config.finalists else candidates

        settled = settle(
            self.space,
            self.budget,
            propose,
            rounds=self.config.rounds,
            per_round=self.config.measured,
            journal=self.run.state / "readings.jsonl",
            progress=titled(self.progress, "measuring"),
        )
        return settled, self.told()

    def fewest(self) -> tuple[Settled, Sequence[Candidate]]:
        """The fewest milliseconds above the floor: the front of loss and time, and a bisection of trained networks."""
        assert self.config.floor is not None
        wide = replace(self.budget, floor=0.0)  # nothing is gained by filling the budget
        candidates = self.evolve(wide, self.space.choices(uniform_choices(self.space)[::-1]), minimise_ms=True)
        use = wide.use(np.asarray([c.choice.widths for c in candidates], dtype=np.int64)).tolist()

        def judge(candidate: Candidate) -> Evaluation:
            evaluation = self.winner(candidate.choice)[1]
            self.run.event("floor_trial", widths=candidate.choice.widths, metric=evaluation.metric)
            return evaluation

        fastest, _ = fastest_above(
            front(candidates, use), judge, self.config.floor, higher_is_better=self.task.higher_is_better
        )
        return measured_once(self.budget, fastest, self.run.state / "readings.jsonl"), self.told()

    def evolve(self, budget: Budget, initial: Sequence[WidthChoice], minimise_ms: bool = False) -> Sequence[Candidate]:
        """Candidates inside the budget, best first: level by level from coarse widths to fine ones."""
        steps = levels(self.space, self.config.refinements)
        settings = replace(self.config.evolution, minimise_ms=minimise_ms or self.config.evolution.minimise_ms)
        if len(steps) > 1:
            settings = replace(settings, evaluations=max(settings.most // len(steps), 1))
        candidates: Sequence[Candidate] = ()
        for level, space in enumerate(steps):
            result = evolve(
                space,
                budget,
                self.scorer,
                settings,
                self.seed,
                journal=self.run.state / ("losses.jsonl" if level == len(steps) - 1 else f"losses-{level}.jsonl"),
                progress=titled(self.progress, "evolution"),
                initial=[*(c.choice for c in candidates[: settings.population // 2]), *initial],
                context=self.digest,
            )
            candidates = result.candidates
            self.found.update({candidate.choice.widths: candidate for candidate in candidates})
        return candidates

    def plain_answers(self, budget: Budget) -> Widths:
        """Uniform scaling and the latency knapsack, filled up to the budget, int64 (2, G)."""
        rng = generator(self.seed, "plain")
        scalings = uniform_choices(self.space)
        fits = np.flatnonzero(budget.feasible(scalings))
        scaled = scalings[fits[-1]] if len(fits) else scalings[0]
        sizes = importances(self.space, self.net.plain())
        packed = np.asarray(knapsack(self.space, budget, sizes).choice.widths, dtype=np.int64)
        return budget.repair(self.space, np.stack([scaled, packed]), rng)

    def recorded(self, budget: Budget) -> list[WidthChoice]:
        """Choices drawn towards widths whose training losses were small (BCNet), inside the budget."""
        rng, grid = generator(self.seed, "recorded"), WidthGrid.of(self.space)
        columns = []
        for allowed, losses in zip(grid.allowed, self.net.recorded_losses(), strict=True):
            own = losses[: len(allowed)]
            weight = np.exp(-(own - own.min()) / max(float(own.std()), 1e-9))
            columns.append(rng.choice(allowed, size=_RECORDED, p=weight / weight.sum()))
        rows = budget.repair(self.space, np.stack(columns, axis=1).astype(np.int64), rng)
        return self.space.choices(rows)

    def shortlist(self, candidates: Sequence[Candidate], plain: Widths) -> list[Candidate]:
        """The finalists after their short training, best first."""
        scored = {candidate.choice.widths: candidate for candidate in candidates}
        forced = [scored[key] for key in dict.fromkeys(map(tuple, plain.tolist())) if key in scored]
        forced = forced[: max(self.config.finalists - 1, 0)]
        others = [candidate for candidate in candidates if candidate not in forced]
        rest = unlike(others, self.config.finalists - len(forced), self.space.full().widths, forced)
        return self.finalists.ranked([*rest, *forced])

    def told(self) -> Sequence[Candidate]:
        """All scored candidates under the budget as it was given, so that they are told alike, best first."""
        times = self.budget.evaluate(np.asarray(list(self.found), dtype=np.int64)).tolist()
        plain = [
            Candidate(candidate.choice, candidate.loss, tuple(ms))
            for candidate, ms in zip(self.found.values(), times, strict=True)
        ]
        return sorted(plain, key=lambda candidate: (candidate.loss, candidate.ms, candidate.choice.widths))

    def winner(self, choice: WidthChoice) -> tuple[nn.Module, Evaluation, dict[str, float]]:
        """The network, trained as the configuration says, its evaluation, and the held-out metric by start."""
        starts = STARTS if self.config.start == "all" and self.config.winner else (self.config.start,)
        trained = {start: self.started(choice, start, alone=len(starts) == 1) for start in starts}
        better: Callable[[str], float] = lambda start: trained[start][1].metric  # noqa: E731
        best = max(starts, key=better) if self.task.higher_is_better else min(starts, key=better)
        return (*trained[best], {start: evaluation.metric for start, (_, evaluation) in trained.items()})

    def started(self, choice: WidthChoice, start: str, alone: bool) -> tuple[nn.Module, Evaluation]:
        """The network trained from one start, on from its checkpoint where there is one."""
        config, report = self.config.winner, titled(self.progress, "winner")
        folder = self.run.state / ("winner" if alone else f"winner-{start}")
        if self.config.floor is not None:  # several choices are trained: one folder each
            folder = folder / "-".join(map(str, choice.widths))
        if config is not None and start != "supernet":
            scratch = start == "scratch"
            return train_choice(
                self.model, self.space, choice, self.task, config, scratch=scratch, folder=folder, progress=report
            )
        small = self.net.extract(self.scorer.pattern(choice), self.scorer.calibration())
        if config is not None:
            return finish(small, self.task, config, folder=folder, progress=report)
        return small, evaluate(small, self.task, self.task.valid, self.config.training)


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
    return Scorer(
        net,
        task,
        config.scoring,
        config.training,
        offset=config.offset,
        bin_units=config.bin_units,
        bilateral=config.sharing == "bilateral",
    )
