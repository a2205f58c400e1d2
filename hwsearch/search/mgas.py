"""MGAS: operations, filters and their thresholds learnt together, in stages, under a budget in milliseconds.

A super-network of cells is searched a few cells at a time (``mgas_stages``), each unit against the milliseconds that
the device would take for it. The genotype that is left becomes an ordinary network with ordinary width groups; its
widths are moved exactly onto the budget, measured where the budget can measure, and it is trained from scratch.

Weights one by one are searched for a size budget only, on the found network (``mgas_weight_search``): no runtime of
ours is faster with zeros in dense kernels, so they cost nothing in milliseconds.

Reference: MGAS (arXiv 2310.15074) and its published code, whose cost term is switched off; ``MgasConfig.published``
searches by its settings. Ours: milliseconds, a multiplier that follows a target, gates on a node's filters, commits
from moving averages, held-out examples instead of the test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from hwsearch.errors import AnswerIsNo, InfeasibleBudgetError, InputError
from hwsearch.graph.widths import WidthChoice
from hwsearch.models.cells import Blueprint, CellNetwork, Genotype
from hwsearch.search.cafenet import as_task, titled
from hwsearch.search.evolution import Candidate, Progress
from hwsearch.search.grid import WidthGrid, row_keys
from hwsearch.search.mgas_config import MgasConfig, schedule
from hwsearch.search.mgas_cost import CellCost, Narrowed, cheapest
from hwsearch.search.mgas_net import CellSuperNet
from hwsearch.search.mgas_stages import COLUMNS, Stages, StageSearch
from hwsearch.search.mgas_weight_search import thinned
from hwsearch.search.result import SearchResult
from hwsearch.search.searcher import Searcher, limit_outcomes, plain_settings
from hwsearch.search.settle import Settled, settle
from hwsearch.search.winner import train_choice
from hwsearch.train.data import Shuffle
from hwsearch.train.loop import OwnRate, evaluate, run_steps
from hwsearch.train.seeds import generator, torch_seed

if TYPE_CHECKING:
    import os

    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.budget import Budget
    from hwsearch.search.run_folder import RunFolder
    from hwsearch.train.task import Task

_POINTS = 128  # of the trajectory
_LANES = 8  # ways in which the found widths are moved onto the budget
_TRIES = 4  # genotypes that are measured at most, each cut further than the one before
_CLOSER = 0.75  # the next one's milliseconds over the last one's


class MGAS(Searcher):
    """MGAS as a searcher.

    Args:
        space: the widths of the super-network as a plain network, which names the search.
        budget: what the found network must keep; one limit.
        config: see ``MgasConfig``; its trainings carry seeds of their own.
        model: the super-network as a plain network (``CellNetwork`` with everything kept); by default the one that the
            space was made from. Its weights are not used.
        cost: milliseconds of networks of cells, such as ``DeviceCost``.
        seed: of first weights, of what is regrown, and of the moves onto the budget.
        folder: the run folder, see ``Searcher``.

    The result's ``groups`` and ``choice`` are those of the found genotype, which stands in ``extra["genotype"]``.

    Example:
        >>> result = MGAS(space, budget, cost=cost, folder="runs/first").search(train, valid)    # doctest: +SKIP
    """

    method: ClassVar[str] = "mgas"

    def __init__(
        self,
        space: WidthSpace,
        budget: Budget,
        config: MgasConfig | None = None,
        *,
        cost: CellCost,
        model: CellNetwork | None = None,
        seed: int = 0,
        folder: str | os.PathLike[str] | RunFolder | None = None,
    ) -> None:
        super().__init__(space, budget, seed=seed, folder=folder)
        whole = model if model is not None else space.model
        if not isinstance(whole, CellNetwork) or whole.genotype != Genotype.full(whole.genotype.blueprint):
            raise InputError(
                "MGAS searches a super-network of cells: give one with everything kept, such as "
                "hwsearch.models.cells:cells_small"
            )
        if len(budget.limits) != 1:
            raise InputError(f"MGAS keeps one limit, and the budget has {len(budget.limits)}: give one")
        self.config, self.cost, self.blueprint = config or MgasConfig(), cost, whole.genotype.blueprint
        if self.config.stages > self.blueprint.cells:
            raise InputError(
                f"{self.config.stages} stages cannot divide {self.blueprint.cells} cells: give as many at most"
            )

    def _settings(self) -> Mapping[str, Any]:
        return {**plain_settings(self.config), "blueprint": Genotype.full(self.blueprint).to_dict()}

    def _check(self) -> None:
        limit, config = self.budget.limits[0], self.config
        _, ms = cheapest(self.cost, Genotype.full(self.blueprint), config.quantum, config.least)
        if ms > config.aim * limit.max_ms:
            raise InfeasibleBudgetError(
                f"no network of these cells keeps {limit.max_ms:g} ms on {limit.name}: the plainest is predicted at "
                f"{ms:.4g} ms; give a budget of at least {ms / config.aim * 1.01:.3g} ms",
                smallest_ms=ms,
            )

    def _search(self, run: RunFolder, train: Any, valid: Any, progress: Progress | None) -> SearchResult:
        task = as_task(train, valid)
        job = _Job(self, run, task, progress)
        job.search()
        gated = evaluate(job.net, task, task.valid, job.training)
        narrowed, settled, genotype = job.settle()
        choice, space = settled.candidate.choice, narrowed.space
        run.event("settled", widths=choice.widths, measured_ms=settled.measured_ms, operations=genotype.count)
        assert space.model is not None
        model, evaluation = train_choice(
            space.model, space, choice, task, self.config.winner,
            folder=run.state / "winner", progress=titled(progress, "winner"),
        )  # fmt: skip
        model, evaluation, thin = thinned(
            model, evaluation, task, self.config.weights, space, run, progress=titled(progress, "weights")
        )  # fmt: skip
        return SearchResult(
            method=self.method,
            seed=self.seed,
            groups=tuple(group.name for group in space.groups),
            choice=choice,
            limits=limit_outcomes(narrowed.budget, settled.candidate, settled),
            loss=settled.candidate.loss,
            metric=evaluation.metric,
            macs=space.macs(choice),
            parameters=space.parameters(choice),
            extra={
                "genotype": genotype.to_dict(),
                "metric_name": task.metric_name,
                "winner_loss": evaluation.loss,
                "gated_metric": gated.metric,
                "gated_loss": gated.loss,
                "within_band": settled.within,
                "trajectory": job.trajectory(),
                "cut_at_ends": int(job.stages.control[5]),
                "regrown": int(job.stages.control[6]),
                **thin,
            },
            model=model,
        )


class _Job:
    """One search at work."""

    def __init__(self, search: MGAS, run: RunFolder, task: Task, progress: Progress | None) -> None:
        self.config, self.budget, self.seed, self.cost = search.config, search.budget, search.seed, search.cost
        self.run, self.task, self.progress = run, task, progress
        config, cells = self.config, search.blueprint.cells
        ends = [-(-cells * (k + 1) // config.stages) for k in range(config.stages)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.seed, "weights"))
            self.net = CellSuperNet(search.blueprint, stages=ends, least=config.least, filters=config.filters)
        per_epoch = Shuffle(len(task.train), config.training.batch_size, 0).steps_per_epoch
        phases = schedule(config, per_epoch, len(ends))
        self.training = replace(config.training, steps=phases[-1].start + phases[-1].steps)
        self.stages = Stages(self.net, min(_POINTS, phases[-1].start + phases[-1].steps))
        self.aim = config.aim * self.budget.limits[0].max_ms
        self.steps = StageSearch(
            self.stages, task, self.cost, self.aim, config, phases, seed=self.seed, tell=run.event
        )  # fmt: skip

    def search(self) -> None:
        """All phases, on from the checkpoint where there is one."""
        config, names = self.config, dict(self.stages.named_parameters())
        rate = config.training.learning_rate
        own = {
            name: OwnRate(speed / rate, config.gate_momentum)
            for end, speed in (("score", config.score_rate), ("threshold", config.threshold_rate))
            for name in names
            if name.endswith(f".{end}")
        }
        limit = self.budget.limits[0]
        settings = {
            name: value
            for name, value in plain_settings(config).items()
            if name not in ("training", "winner", "weights")
        }
        identity = {"kind": "mgas", "seed": self.seed, "max_ms": limit.max_ms, "config": settings}
        run_steps(
            self.stages, self.task.train, self.training, self.steps.step, identity=identity, own=own,
            folder=self.run.state / "stages", progress=titled(self.progress, "stages"),
        )  # fmt: skip

    def trajectory(self) -> list[dict[str, float]]:
        """The way of the search, see ``COLUMNS``; milliseconds are those of the stage's cells at its last commit."""
        return [dict(zip(COLUMNS, row, strict=True)) for row in self.stages.path.tolist() if row[0]]

    def settle(self) -> tuple[Narrowed, Settled, Genotype]:
        """Move the found widths onto the budget; where it can measure, measure and do so again under the correction.

        A genotype that is too slow at any widths, as measured, is cut further.
        """
        net, config = self.net, self.config
        cells = net.blueprint.cells
        for attempt in range(_TRIES):
            genotype, widths = self.steps.sized(cells)
            narrowed = self.cost.narrowed(CellNetwork(genotype), self.budget, config.quantum)
            found = start_of(narrowed.space, genotype, widths)

            def propose(corrected: Budget, seeds: Sequence[WidthChoice]) -> Sequence[Candidate]:
                corrected.check_reachable(narrowed.space)  # noqa: B023  (called inside this turn only)
                return self._near(corrected, narrowed.space, found, seeds)  # noqa: B023

            try:
                settled = settle(
                    narrowed.space, narrowed.budget, propose, rounds=config.rounds, per_round=config.measured,
                    journal=self.run.state / f"readings-{attempt}.jsonl", progress=titled(self.progress, "measuring"),
                )  # fmt: skip
            except (InfeasibleBudgetError, AnswerIsNo):
                if attempt == _TRIES - 1 or not self.steps.project(cells, _CLOSER * self.steps.worth(cells).ms):
                    raise
                self.run.event("cut_further", operations=net.genotype().count)
                continue
            return narrowed, settled, genotype
        raise AssertionError("unreachable")

    def _near(
        self, budget: Budget, space: WidthSpace, found: Sequence[int], seeds: Sequence[WidthChoice]
    ) -> list[Candidate]:
        """Choices on the budget near the found widths, nearest first; the distance is the share of units switched."""
        rows = np.asarray([*[found] * _LANES, *(choice.widths for choice in seeds)], dtype=np.int64)
        repaired = np.unique(budget.repair(space, rows, generator(self.seed, "propose")), axis=0)
        uses, units = budget.use(repaired), WidthGrid.of(space).full
        near = [
            (float(np.abs(row - np.asarray(found)).dot(1 / units)), key)
            for row, key, use in zip(repaired, row_keys(repaired), uses, strict=True)
            if use <= 1.0
        ]
        near = sorted(near)[: self.config.candidates]
        times = budget.evaluate(np.asarray([key for _, key in near], dtype=np.int64).reshape(len(near), -1)).tolist()
        return [Candidate(WidthChoice(key), away, tuple(ms)) for (away, key), ms in zip(near, times, strict=True)]


def start_of(space: WidthSpace, genotype: Genotype, widths: Mapping[str, int]) -> tuple[int, ...]:
    """The choice of a genotype's width space that stands for widths by name."""
    writers = genotype.writers()
    found = []
    for group in space.groups:
        names = [writers[slot.parameter] for slot in group.slots if slot.axis == 0 and slot.parameter in writers]
        width = widths[names[0]] if names else group.units
        found.append(min(group.widths, key=lambda allowed: (allowed < width, abs(allowed - width))))
    return tuple(found)


__all__ = ["MGAS", "Blueprint", "MgasConfig", "start_of"]
