"""MGAS on an ordinary network: filters learn which of them stay, under a price of their own milliseconds.

Every width group gets a gate (``mgas_filters``), and weights, scores and thresholds learn together until the network is
on its budget (``mgas_filter_search``). Gates are then folded into batch norms, the few choices of widths that are near
and exactly on the budget are judged on held-out examples, and the best is measured where the budget can measure, and
trained: from scratch, or on from what the search leaves.

``MGAS`` is the same on a super-network of cells, whose operations are searched as well.

Reference: MGAS (arXiv 2310.15074), filter granularity; what is ours stands in ``mgas_filters`` and
``mgas_filter_search``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hwsearch.graph.widths import WidthChoice
from hwsearch.search.cafenet import as_task, titled
from hwsearch.search.evolution import Candidate, Progress
from hwsearch.search.grid import WidthGrid, row_keys
from hwsearch.search.mgas_config import MgasConfig, schedule
from hwsearch.search.mgas_filter_search import COLUMNS, Filters, FilterSearch
from hwsearch.search.mgas_filters import FilterNet
from hwsearch.search.mgas_weight_search import check_smallest, thinned
from hwsearch.search.mgas_widths_config import FilterConfig
from hwsearch.search.pas_masks import gated_space
from hwsearch.search.result import SearchResult
from hwsearch.search.searcher import NetworkSearcher, plain_settings
from hwsearch.search.settle import Settled, settle
from hwsearch.search.winner import finish, train_choice
from hwsearch.train.data import Shuffle, in_order, limit
from hwsearch.train.loop import OwnRate, background, evaluate, laid_out, run_steps, settings
from hwsearch.train.seeds import generator

if TYPE_CHECKING:
    from torch import nn

    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.budget import Budget
    from hwsearch.search.run_folder import RunFolder
    from hwsearch.train.task import Evaluation, Task

_POINTS = 64  # of the trajectory
_LANES = 6  # ways in which the found widths are moved onto the budget
_BATCH = 128  # of calibration


class MgasWidths(NetworkSearcher[FilterConfig]):
    """MGAS's filter gates as a searcher over the widths of any network.

    Args:
        space: the allowed widths.
        budget: what the found network must keep, on one device or on several.
        config: see ``FilterConfig``; its trainings carry seeds of their own.
        model: the network to be searched, trained or not; by default the one that the space was made from; never
            changed.
        seed: of the moves onto the budget.
        folder: the run folder, see ``Searcher``.

    Example:
        >>> result = MgasWidths(space, budget, folder="runs/first").search(train, valid)        # doctest: +SKIP
    """

    method: ClassVar[str] = "mgas"
    defaults = FilterConfig

    def _settings(self) -> Mapping[str, Any]:
        return {**plain_settings(self.config), "searches": "filters"}

    def _check(self) -> None:
        super()._check()
        check_smallest(self.config.weights, self.space)

    def _search(self, run: RunFolder, train: Any, valid: Any, progress: Progress | None) -> SearchResult:
        task = as_task(train, valid)
        space, fixed = gated_space(self.space, self.budget, run)
        job = _Job(self, run, space, task, progress)
        job.search()
        gated = evaluate(job.net, task, task.valid, job.training)
        settled, candidates = job.settle()
        choice = settled.candidate.choice
        run.event("settled", widths=choice.widths, measured_ms=settled.measured_ms)
        kept = job.net.largest(choice)
        model, evaluation = job.winner(choice)
        model, evaluation, thin = thinned(
            model, evaluation, task, self.config.weights, self.space, run, progress=titled(progress, "weights")
        )  # fmt: skip
        extra = {
            "gated_metric": gated.metric,
            "gated_loss": gated.loss,
            "trajectory": job.trajectory(),
            "cut_at_end": int(job.filters.control[2]),
            "kept_units": {name: units.tolist() for name, units in kept.items()},
            "fixed_groups": fixed,
            "log10_searched": space.log10_size,
            **thin,
        }
        return self._result(settled, candidates, (model, evaluation), task, extra)


class _Job:
    """One search at work."""

    def __init__(
        self, search: MgasWidths, run: RunFolder, space: WidthSpace, task: Task, progress: Progress | None
    ) -> None:
        self.config, self.budget, self.seed = search.config, search.budget, search.seed
        self.run, self.space, self.task, self.progress = run, space, task, progress
        config, self.full = search.config, copy.deepcopy(search.model)
        self.net = FilterNet(self.full, space)
        per_epoch = Shuffle(len(task.train), config.training.batch_size, 0).steps_per_epoch
        times = MgasConfig(
            stages=1, warmup_epochs=config.warmup_epochs, final_epochs=config.epochs, prune_every=config.prune_every
        )  # fmt: skip
        (phase,) = schedule(times, per_epoch, 1)
        self.training = replace(config.training, steps=phase.steps)
        self.filters = Filters(self.net, min(_POINTS, phase.steps))
        self.steps = FilterSearch(self.filters, task, self.budget, config, phase, tell=run.event)
        self.known: dict[tuple[int, ...], float] = {}
        examples = limit(task.train, config.calibration_images, config.training.seed)
        self.calibration = [laid_out(batch, config.training) for batch in in_order(examples, _BATCH)]
        self.judging = limit(task.valid, config.score_images, config.training.seed)

    def search(self) -> None:
        """Learn weights and gates together, on from the checkpoint where there is one."""
        config = self.config
        rate, moved = config.training.learning_rate, config.gate_momentum
        own = {
            f"net.gates.{index}.{name}": OwnRate(speed / rate, moved)
            for index, _ in self.net.searched()
            for name, speed in (("score", config.score_rate), ("threshold", config.threshold_rate))
        }
        plain = {
            name: value
            for name, value in plain_settings(config).items()
            if name not in ("training", "winner", "weights")
        }
        identity = {
            "kind": "mgas_filters", "space": WidthGrid.of(self.space).digest, "seed": self.seed, "config": plain,
            "limits": [[limit.name, limit.max_ms] for limit in self.budget.limits],
        }  # fmt: skip
        run_steps(
            self.filters, self.task.train, self.training, self.steps.step, identity=identity, own=own,
            folder=self.run.state / "filters", progress=titled(self.progress, "filters"),
        )  # fmt: skip

    def trajectory(self) -> list[dict[str, Any]]:
        """The way of the search, see ``COLUMNS``, with the units that were not committed as off."""
        count = len(COLUMNS)
        return [
            {**dict(zip(COLUMNS, row[:count], strict=True)), "widths": [int(width) for width in row[count:]]}
            for row in self.filters.path.tolist()
            if row[0]
        ]

    def settle(self) -> tuple[Settled, Sequence[Candidate]]:
        """Move the found widths onto the budget; where it can measure, measure and do so again under the correction."""
        config = self.config

        def propose(corrected: Budget, seeds: Sequence[WidthChoice]) -> Sequence[Candidate]:
            tight = replace(corrected, floor=max(corrected.floor, config.floor))
            tight.check_reachable(self.space)
            return self._candidates(tight, self._nearest(tight, seeds))

        settled = settle(
            self.space, self.budget, propose, rounds=config.rounds, per_round=config.measured,
            journal=self.run.state / "readings.jsonl", progress=titled(self.progress, "measuring"),
        )  # fmt: skip
        return settled, self._candidates(self.budget, list(self.known))

    def _nearest(self, budget: Budget, seeds: Sequence[WidthChoice]) -> list[tuple[int, ...]]:
        """Choices on the budget near the found widths, nearest first; the distance is the share of units switched."""
        found = self.steps.built(self.net.alive())
        rows = np.asarray([*[found] * _LANES, *(choice.widths for choice in seeds)], dtype=np.int64)
        repaired = np.unique(budget.repair(self.space, rows, generator(self.seed, "propose")), axis=0)
        grid = WidthGrid.of(self.space)
        uses, whole = budget.use(repaired), float(budget.use(grid.full[None])[0])
        near = sorted(
            (whole > 1.0 and use < budget.floor, float(np.abs(row - found).dot(1 / grid.full)), key)
            for row, key, use in zip(repaired, row_keys(repaired), uses, strict=True)
            if use <= 1.0
        )
        filled = [key for short, _, key in near if not short]
        return (filled or [key for _, _, key in near])[: self.config.candidates]

    def _candidates(self, budget: Budget, keys: Sequence[tuple[int, ...]]) -> list[Candidate]:
        """Candidates with the budget's milliseconds, least held-out loss first."""
        if not keys:
            return []
        ranked = sorted(keys, key=lambda key: (self._loss(key), key))
        times = budget.evaluate(np.asarray(ranked, dtype=np.int64)).tolist()
        return [Candidate(WidthChoice(key), self._loss(key), tuple(ms)) for key, ms in zip(ranked, times, strict=True)]

    def _loss(self, widths: tuple[int, ...]) -> float:
        """Held-out loss of what a choice leaves of the gated network, with batch-norm statistics of its own."""
        if widths not in self.known:
            small = self._physical(WidthChoice(widths))
            self.known[widths] = evaluate(small, self.task, self.judging, self.config.training).loss
        return self.known[widths]

    def _physical(self, choice: WidthChoice) -> nn.Module:
        with settings(self.config.training):
            return self.net.physical(choice, batches=background(iter(self.calibration)))

    def winner(self, choice: WidthChoice) -> tuple[nn.Module, Evaluation]:
        """The found network, trained as the configuration says, and its evaluation on held-out examples."""
        config, folder, report = self.config, self.run.state / "winner", titled(self.progress, "winner")
        if config.winner is None:
            small = self._physical(choice)
            return small, evaluate(small, self.task, self.task.valid, config.training)
        if config.start == "masked":
            return finish(self._physical(choice), self.task, config.winner, folder=folder, progress=report)
        return train_choice(self.full, self.space, choice, self.task, config.winner, folder=folder, progress=report)


__all__ = ["FilterConfig", "MgasWidths"]
