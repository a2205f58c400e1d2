"""PaS: widths by gradient descent, in a few epochs beside the weights, until the network is on its budget in ms.

From a trained network every width group gets a binary mask (``pas_masks``). Weights and masks learn together; the loss
is the task's and a squared relative error to the budget (``pas_cost``), whose gradient pushes all masks of a group
alike, in proportion to the milliseconds that the group's next stair is worth, while the task's own says which of them
can go. Then the masks are snapped to stair edges and moved exactly onto the budget, the few choices that this leaves
open are judged on held-out examples, and the best is fine-tuned with its masks frozen, and sliced.

Reference: Li et al., "Pruning-as-Search", IJCAI 2022. The paper counts MACs, takes the last mask as it stands and has
no guard against an empty layer; ``PasConfig.published`` searches that way, on hwsearch's budget.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.baselines import uniform_choices
from hwsearch.search.cafenet import as_task, titled
from hwsearch.search.evolution import Candidate
from hwsearch.search.grid import WidthGrid, row_keys
from hwsearch.search.pas_config import PasConfig
from hwsearch.search.pas_cost import BudgetTerm, PolynomialSurrogate
from hwsearch.search.pas_gates import GatedNet
from hwsearch.search.pas_masks import START, THRESHOLD, MaskedNet, gated_space
from hwsearch.search.result import SearchResult
from hwsearch.search.searcher import NetworkSearcher
from hwsearch.search.settle import Settled, settle
from hwsearch.search.winner import finish, train_choice
from hwsearch.train.data import Batch, in_order, limit
from hwsearch.train.loop import OwnRate, Progress, background, evaluate, laid_out, run_steps, settings, train
from hwsearch.train.seeds import generator

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.budget import Budget
    from hwsearch.search.run_folder import RunFolder
    from hwsearch.train.loop import Step
    from hwsearch.train.task import Evaluation, Task

_POINTS = 64  # of the trajectory
_NEAR = 1.2  # uses of the budget from which a point of the trajectory is worth being moved onto it
_LANES = 6  # ways in which the final masks are moved onto the budget, and in which each earlier point is (a third)
_BATCH = 128  # of calibration


class PaS(NetworkSearcher[PasConfig]):
    """PaS as a searcher.

    Args:
        space: the allowed widths; of a network of branches (``ODBB``, RepVGG) those of its *folded* form, so that
            identities tie no layers.
        budget: what the found network must keep.
        config: see ``PasConfig``; its trainings carry seeds of their own.
        model: the network to be searched, trained unless ``config.warmup`` is given; by default the one that the space
            was made from; never changed. For a space of a folded form: the network with its branches.
        seed: of the masks' beginnings and of the moves onto the budget.
        folder: the run folder, see ``Searcher``.

    Example:
        >>> result = PaS(space, budget, folder="runs/first").search(train, valid)        # doctest: +SKIP
    """

    method: ClassVar[str] = "pas"
    defaults = PasConfig

    def _search(self, run: RunFolder, train: Any, valid: Any, progress: Progress | None) -> SearchResult:
        task = as_task(train, valid)
        space, fixed = gated_space(self.space, self.budget, run)
        job = _Job(self, run, space, task, progress)
        job.search()
        settled, candidates = job.settle()
        choice = settled.candidate.choice
        run.event("settled", widths=choice.widths, measured_ms=settled.measured_ms)
        kept = job.net.largest(choice)
        model, evaluation = job.winner(choice)
        extra = {
            "cost": self.config.cost,
            "trajectory": job.trajectory(),
            "kept_units": {name: units.tolist() for name, units in kept.items()},
            "fixed_groups": fixed,
            "log10_searched": space.log10_size,
        }
        return self._result(settled, candidates, (model, evaluation), task, extra)


class Steered(nn.Module):
    """Everything that changes during a search, so that a checkpoint holds it: weights, masks, the budget's weights, and
    the way so far (a row a point: step, widths, use of the budget, training loss)."""

    path: Tensor

    def __init__(self, net: MaskedNet, term: BudgetTerm, points: int) -> None:
        super().__init__()
        self.net, self.term = net, term
        self.register_buffer("path", torch.zeros(points, len(net.space.groups) + 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """The masked network's output."""
        return self.net(x)  # type: ignore[no-any-return]


class _Job:
    """One search at work."""

    def __init__(self, search: PaS, run: RunFolder, space: WidthSpace, task: Task, progress: Progress | None) -> None:
        self.config, self.budget, self.seed = search.config, search.budget, search.seed
        self.run, self.space, self.task, self.progress = run, space, task, progress
        self.grid = WidthGrid.of(space)
        self.full = copy.deepcopy(search.model)
        if self.config.warmup is not None:
            train(
                self.full, task, self.config.warmup, folder=run.state / "warmup", progress=titled(progress, "warm-up")
            )
        gated = GatedNet if self.config.gate == "threshold" else MaskedNet
        self.net = gated(self.full, space, jitter=self.config.jitter, seed=self.seed)
        if self.net.has_blocks and self.config.start != "masked":
            raise InputError(
                f"start is {self.config.start!r} but the network has blocks of branches, which are sliced after their "
                "training: use start = 'masked'"
            )
        total = self.config.training.total_steps(len(task.train))
        self.stride = max(total // _POINTS, 1)
        self.steered = Steered(self.net, self._term(), -(-total // self.stride))
        self.known: dict[tuple[int, ...], float] = {}
        examples = limit(task.train, self.config.calibration_images, self.config.training.seed)
        self.calibration = [laid_out(batch, self.config.training) for batch in in_order(examples, _BATCH)]
        self.judging = limit(task.valid, self.config.score_images, self.config.training.seed)

    def _term(self) -> BudgetTerm:
        """The budget's term in the loss, in what the configuration counts."""
        training, config = self.config.training, self.config
        total = training.total_steps(len(self.task.train))
        most = None
        if config.crossing:
            # Steps of SGD with momentum add up to rate / (1 - momentum) of a steady gradient.
            reach = training.learning_rate * config.mask_rate / (1 - config.mask_momentum) * config.crossing * total
            most = (START - THRESHOLD) / (reach * self.net.pace)
        weights: dict[str, Any] = {"pressure": config.pressure, "rate": config.pressure_rate / total, "most": most}
        if self.config.cost == "ms":
            return BudgetTerm.of(self.space, self.budget, aim=self.config.aim, **weights)
        count = self.space.macs_array if self.config.cost == "macs" else self.space.parameters_array
        scalings = uniform_choices(self.space)
        fits = np.flatnonzero(self.budget.feasible(scalings))
        like = scalings[fits[-1]] if len(fits) else self.budget.smallest_choice(self.space, enough=1.0)[0]
        target = self.config.aim * float(count(like[None])[0])
        return BudgetTerm(self.space, [PolynomialSurrogate(count)], [target], [None], **weights)

    def search(self) -> None:
        """Learn weights and masks together, on from the checkpoint where there is one."""
        config = self.config
        identity = {
            "kind": "pas", "space": self.grid.digest, "seed": self.seed, "jitter": config.jitter, "cost": config.cost,
            **({"gate": config.gate} if config.gate != "binary" else {}),
            "pressure": [config.pressure, config.pressure_rate, config.crossing, config.aim],
            "limits": [[limit.name, limit.max_ms] for limit in self.budget.limits],
        }  # fmt: skip
        own = OwnRate(config.mask_rate, config.mask_momentum)
        step = mask_step(self.steered, self.task, self.budget, self.stride)
        run_steps(
            self.steered, self.task.train, config.training, step, identity=identity,
            own={f"net.{name}": own for name in self.net.latent_names()},
            folder=self.run.state / "masks", progress=titled(self.progress, "masks"),
        )  # fmt: skip
        self.run.event("masks_learnt", widths=self.net.widths())

    def trajectory(self) -> list[dict[str, Any]]:
        """The way of the search: every point's step, widths (any number of units), use of the budget and loss."""
        return [
            {"step": int(row[0]), "widths": [int(w) for w in row[1:-2]], "use": row[-2], "loss": row[-1]}
            for row in self.steered.path.tolist()
        ]

    def settle(self) -> tuple[Settled, Sequence[Candidate]]:
        """Move the masks onto the budget; where it can measure, measure and do so again under the correction."""
        found: dict[tuple[int, ...], float] = {}

        def propose(corrected: Budget, seeds: Sequence[WidthChoice]) -> Sequence[Candidate]:
            tight = replace(corrected, floor=max(corrected.floor, self.config.floor))
            tight.check_reachable(self.space)
            keys = self.nearest(tight, seeds)
            found.update({key: self.loss(key) for key in keys})
            return _candidates(tight, {key: found[key] for key in keys})

        settled = settle(
            self.space,
            self.budget,
            propose,
            rounds=self.config.rounds,
            per_round=self.config.measured,
            journal=self.run.state / "readings.jsonl",
            progress=titled(self.progress, "measuring"),
        )
        return settled, _candidates(self.budget, found)

    def nearest(self, budget: Budget, seeds: Sequence[WidthChoice]) -> list[tuple[int, ...]]:
        """Choices on stair edges and on the budget that switch the fewest and least certain masks, nearest first.

        They come from the masks as they are at last and from points of the way that were near the budget: the last
        masks are not always the best.
        """
        rng = generator(self.seed, "propose")
        path = self.steered.path.numpy()
        near = path[(path[:, -2] <= _NEAR) & (path[:, 0] > path[-1, 0] / 2)][:, 1:-2]
        last = np.asarray([self.net.widths()], dtype=np.float64)
        rows = [np.repeat(last, _LANES, axis=0), np.repeat(np.unique(near, axis=0), _LANES // 3, axis=0)]
        rows += [np.asarray([choice.widths], dtype=np.float64) for choice in seeds]
        snapped = self.grid.take(self.grid.at_least(np.concatenate(rows)))
        repaired = np.unique(budget.repair(self.space, snapped, rng), axis=0)
        use = budget.use(repaired)
        full = float(budget.use(self.grid.full[None])[0])
        keys = [key for key, part in zip(row_keys(repaired), use, strict=True) if part <= 1.0]
        short = {key: full > 1.0 and part < budget.floor for key, part in zip(row_keys(repaired), use, strict=True)}
        order = sorted(keys, key=lambda key: (short[key], self.net.flips(WidthChoice(key)), key))
        filled = [key for key in order if not short[key]]
        return (filled or order)[: self.config.candidates]

    def loss(self, widths: tuple[int, ...]) -> float:
        """Held-out loss of the network that a choice leaves of the masked one, before any fine-tuning."""
        if widths not in self.known:
            small = self.sliced(WidthChoice(widths))
            self.known[widths] = evaluate(small, self.task, self.judging, self.config.training).loss
        return self.known[widths]

    def sliced(self, choice: WidthChoice) -> nn.Module:
        """The plain network of a choice, with batch-norm statistics of its own."""
        with settings(self.config.training):
            return self.net.sliced(choice, self.net.largest(choice), background(iter(self.calibration)))

    def winner(self, choice: WidthChoice) -> tuple[nn.Module, Evaluation]:
        """The found network, fine-tuned as the configuration says, and its evaluation on held-out examples."""
        config, folder, report = self.config.winner, self.run.state / "winner", titled(self.progress, "winner")
        if config is not None and self.config.start != "masked":
            scratch = self.config.start == "scratch"
            return train_choice(
                self.full, self.space, choice, self.task, config, scratch=scratch, folder=folder, progress=report
            )
        if config is not None and self.net.has_blocks:
            # Branches are worth having while they learn: the masked network is fine-tuned, then folded and sliced.
            self.net.set_masks(self.net.largest(choice), freeze=True)
            train(self.net, self.task, config, folder=folder, progress=report)
        small = self.sliced(choice)
        if config is not None and not self.net.has_blocks:
            return finish(small, self.task, config, folder=folder, progress=report)
        return small, evaluate(small, self.task, self.task.valid, config or self.config.training)


def mask_step(steered: Steered, task: Task, budget: Budget, stride: int = 1) -> Step:
    """The search's training step: a function of (step number, batch) that leaves gradients and returns the task's loss.

    1. the masks, and the masked network's loss on the batch; 2. plus the budget's term in the numbers of units that are
    on; 3. backward through both, straight through the masks; 4. the budget's weights move; every ``stride`` steps the
    widths are noted. Every step sees the next batch: masks and weights learn on the same stream of examples.
    """
    net, term = steered.net, steered.term
    grid = WidthGrid.of(net.space)

    def step(number: int, batch: Batch) -> Tensor:
        masks = net.masks()
        loss = task.loss(net(batch[0], masks), batch)
        widths = torch.stack([mask.sum() for mask in masks])
        (loss + term(widths)).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            counts = widths.cpu().double().numpy()
            term.update(counts)
            if number % stride == stride - 1 or number // stride == len(steered.path) - 1:
                use = float(budget.use(grid.take(grid.at_least(counts[None])))[0])
                row = [number + 1, *counts.tolist(), use, float(loss)]
                steered.path[number // stride] = torch.tensor(row, dtype=torch.float64)
        return loss.detach()

    return step


def _candidates(budget: Budget, found: Mapping[tuple[int, ...], float]) -> list[Candidate]:
    """Candidates with the budget's milliseconds, least loss first."""
    if not found:
        return []
    ranked = sorted(found.items(), key=lambda item: (item[1], item[0]))
    times = budget.evaluate(np.asarray([key for key, _ in ranked], dtype=np.int64)).tolist()
    return [Candidate(WidthChoice(key), loss, tuple(ms)) for (key, loss), ms in zip(ranked, times, strict=True)]


__all__ = ["PaS", "PasConfig", "Steered", "mask_step"]
