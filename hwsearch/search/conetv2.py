"""CONetV2: search widths by the quality of the layers' weights, without scoring a single network on data.

A network is trained for a few epochs, the quality of every layer is read off its weights, each width group grows or
shrinks by what its layers show, the weights are carried over, and so on. ``accept`` says how widths follow quality:

* ``conetv2``: the published rule, which looks at no cost: ``momentum`` sets how large networks become. What it found is
  moved into the budget at the end, by scaling and repair.
* ``greedy``: the same without the random push.
* ``metropolis``: ours. Quality says what width is worth (``WidthWorth``), the budget's prediction what it costs;
  between two trainings widths are annealed under both and projected onto the budget, so that every network that is
  trained already keeps it.

Reference: CONetV2 (Hosseini et al., arXiv 2110.06830) and its published code. Not followed: its adjacency lists (the
groups of ``WidthSpace`` take their place), and its silence on layers with more outputs than inputs times kernel (they
are measured).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hwsearch.errors import InputError
from hwsearch.graph.foldable import folding_blocks
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.cafenet import as_task, titled
from hwsearch.search.conetv2_config import ConetConfig
from hwsearch.search.conetv2_rules import Annealed, Published, Rule
from hwsearch.search.evolution import Candidate
from hwsearch.search.result import SearchResult
from hwsearch.search.searcher import NetworkSearcher
from hwsearch.search.settle import Settled, settle
from hwsearch.search.stairs import stair_edges
from hwsearch.search.transfer import carry_over
from hwsearch.search.trials import Trial, TrialLog, train_trial
from hwsearch.search.winner import finish, reset, train_choice
from hwsearch.train import checkpoint, processes
from hwsearch.train.loop import Progress, TrainConfig
from hwsearch.train.seeds import generator

if TYPE_CHECKING:
    from torch import nn

    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.budget import Budget
    from hwsearch.search.run_folder import RunFolder
    from hwsearch.train.task import Evaluation, Task

_CANDIDATES = 16  # proposals that are handed on for measuring


class ConetV2(NetworkSearcher[ConetConfig]):
    """CONetV2 as a searcher.

    Args:
        space: the allowed widths; its full widths are the widest that any mode grows to.
        budget: what the found network must keep.
        config: see ``ConetConfig``; its trainings carry seeds of their own.
        model: the model that the space was made from, by default the very one; never changed.
        seed: of annealing, of the published rule's chance, and of first and repeated weights.
        folder: the run folder, see ``Searcher``. ``state/quality.jsonl`` holds every layer's metrics after every epoch.

    Example:
        >>> result = ConetV2(space, budget, folder="runs/first").search(train, valid)    # doctest: +SKIP
    """

    method: ClassVar[str] = "conetv2"
    defaults = ConetConfig

    def _check(self) -> None:
        super()._check()
        if folding_blocks(self.model):
            raise InputError(
                "CONetV2 reads the quality of layers off their weights, and a block of branches has none of its own: "
                "search the plain network, and give its winner blocks afterwards (hwsearch.RepNASSearch)"
            )

    def _search(self, run: RunFolder, train: Any, valid: Any, progress: Progress | None) -> SearchResult:
        task = as_task(train, valid)
        ours = self.config.accept == "metropolis"
        space = self.space
        if ours if self.config.stairs is None else self.config.stairs:
            stairs = stair_edges(space, self.budget)
            space = stairs.space
            self.budget.check_reachable(space)
            run.event("stairs", summary=stairs.summary())
        rule = (Annealed if ours else Published)(space, self.config, self.seed)
        trials, last = self._trials(run, space, rule, task, progress)
        settled, candidates = self._settle(run, space, rule, trials, progress)
        run.event("settled", widths=settled.candidate.choice.widths, measured_ms=settled.measured_ms)
        choice = settled.candidate.choice
        model, evaluation = self._winner(run, space, last, trials[-1].choice, choice, task, progress)
        extra = {
            "accept": self.config.accept,
            "trials": [{"widths": list(t.choice.widths), "quality": t.mean(self.config.guard)} for t in trials],
            "log10_searched": space.log10_size,
        }
        return self._result(settled, candidates, (model, evaluation), task, extra)

    def _trials(
        self, run: RunFolder, space: WidthSpace, rule: Rule, task: Task, progress: Progress | None
    ) -> tuple[list[Trial], nn.Module]:
        """All trials, those that an earlier process finished read back; and the last trained network."""
        config = self.config
        log = TrialLog.open(run.state, self.identity())
        # The last trial of a killed run goes on from its checkpoint; should that be missing, from the one before.
        last = max(len(log.started) - 1, 0)
        kept = (run.state / f"trial-{last}" / checkpoint.NAME).exists()
        first = processes.from_first(last if kept else max(last - 1, 0))
        linear = any(all(not _is_convolution(space, name) for name, _ in sides) for sides in rule.sides)
        network: nn.Module | None = None
        for number in range(first, config.trials):
            if number < len(log.started):
                choice = WidthChoice(log.started[number])
                space.validate(choice)
            else:
                choice = rule.following(log.trials(number), self.budget)
                log.start(number, choice)
            if network is None:
                network = shrink(self.model, space, choice, check=False)
                reset(network, self.seed)
            else:
                before = WidthChoice(log.started[number - 1])
                network = carry_over(
                    self.model, space, network, before, choice, how=config.transfer, seed=self.seed * 1009 + number
                )
            train_trial(
                network,
                task,
                self._training(number),
                log,
                number,
                beta=config.adas_beta if config.adas else None,
                linear=linear,
                folder=run.state / f"trial-{number}",
                progress=titled(progress, f"trial {number + 1} of {config.trials}"),
            )
            trial = log.trials(number + 1)[-1]
            run.event("trial", number=number, widths=choice.widths, quality=trial.mean(config.guard))
            if number > 0:
                shutil.rmtree(run.state / f"trial-{number - 1}", ignore_errors=True)
        assert network is not None
        return log.trials(config.trials), network

    def _training(self, number: int) -> TrainConfig:
        """A trial's training: every trial sees batches in an order of its own."""
        training = self.config.training
        return replace(training, seed=int(generator(training.seed, "trial", number).integers(2**31)))

    def _settle(
        self, run: RunFolder, space: WidthSpace, rule: Rule, trials: Sequence[Trial], progress: Progress | None
    ) -> tuple[Settled, Sequence[Candidate]]:
        """Where the budget can measure, measure the best and propose again under the correction: no training."""
        found: dict[tuple[int, ...], float] = {}

        def propose(corrected: Budget, seeds: Sequence[WidthChoice]) -> Sequence[Candidate]:
            corrected.check_reachable(space)
            ranked = rule.propose(trials, corrected, seeds)[:_CANDIDATES]
            found.update(ranked)
            return _candidates(corrected, ranked)

        settled = settle(
            space,
            self.budget,
            propose,
            rounds=self.config.rounds,
            per_round=self.config.measured,
            journal=run.state / "readings.jsonl",
            progress=titled(progress, "measuring"),
        )
        # Uncorrected, so that all candidates are told alike.
        plain = _candidates(self.budget, sorted(found.items(), key=lambda item: (item[1], item[0])))
        return settled, plain

    def _winner(
        self,
        run: RunFolder,
        space: WidthSpace,
        last: nn.Module,
        before: WidthChoice,
        choice: WidthChoice,
        task: Task,
        progress: Progress | None,
    ) -> tuple[nn.Module, Evaluation]:
        """The found network, trained as the configuration says, and its evaluation on held-out examples."""
        config, folder, report = self.config.winner, run.state / "winner", titled(progress, "winner")
        if config is not None and self.config.start != "trial":
            scratch = self.config.start == "scratch"
            return train_choice(
                self.model, space, choice, task, config, scratch=scratch, folder=folder, progress=report
            )
        small = carry_over(self.model, space, last, before, choice, how=self.config.transfer, seed=self.seed)
        return finish(small, task, config or self._training(self.config.trials), folder=folder, progress=report)


def _candidates(budget: Budget, ranked: Sequence[tuple[tuple[int, ...], float]]) -> list[Candidate]:
    if not ranked:
        return []
    times = budget.evaluate(np.asarray([key for key, _ in ranked], dtype=np.int64)).tolist()
    return [
        Candidate(WidthChoice(key), loss if math.isfinite(loss) else math.inf, tuple(ms))
        for (key, loss), ms in zip(ranked, times, strict=True)
    ]


def _is_convolution(space: WidthSpace, parameter: str) -> bool:
    return len(space.network.shapes[parameter]) > 2
