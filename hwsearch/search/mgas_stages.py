"""The search of MGAS itself: stage after stage, weights and gates learn together under a growing price of milliseconds.

Every step is a function of its number and of what stands in ``Stages``, so a search goes on from any step as if it had
never been stopped. What a phase does:

1. thresholds go back to 0; weights learn alone for a while;
2. weights, scores and thresholds learn under L = task + multiplier * (operations + filters + thresholds), in which each
   unit stands with its milliseconds as they were at the last commit;
3. now and then masks are committed, and everything left is priced again;
4. at its end the phase is cut to its target, if it has not arrived; some of the operations that it pruned come back.

Reference: MGAS (arXiv 2310.15074) and its published code; the controllers are those of GOLD-NAS (arXiv 2007.03331) and
our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hwsearch.search.gates import DiscreteGate
from hwsearch.search.mgas_config import MgasConfig, Phase
from hwsearch.search.mgas_cost import CellCost, Sized, Unit, Worth, rounded, without, worth
from hwsearch.search.mgas_net import CellSuperNet
from hwsearch.train.data import Batch
from hwsearch.train.seeds import generator, torch_seed

if TYPE_CHECKING:
    from hwsearch.models.cells import Genotype
    from hwsearch.train.task import Task

#: Of GOLD-NAS's controller: where the multiplier begins, by how much it is divided, and its highest value.
_LAMBDA, _DIVISOR, _CAP = 1e-5, 2.0, 100.0
#: The share of a phase's searching steps after which the ramped target is the phase's own.
_RAMP = 0.8
#: Columns of the way that a search keeps.
COLUMNS = ("step", "stage", "ms", "target_ms", "multiplier", "operations", "filters", "loss")
_POINTS = 128


class Stages(nn.Module):
    """Everything that changes during a search, so that a checkpoint holds it.

    Buffers: ``control`` (multiplier, its step, its cap, milliseconds at the phase's beginning, operations pruned in the
    phase, units cut at phases' ends, operations regrown), ``path`` (points, columns) the way so far.
    """

    control: Tensor
    path: Tensor

    def __init__(self, net: CellSuperNet, points: int) -> None:
        super().__init__()
        self.net = net
        start = [0.0, _LAMBDA, _CAP, 0.0, 0.0, 0.0, 0.0]
        self.register_buffer("control", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("path", torch.zeros(points, len(COLUMNS), dtype=torch.float64))

    def forward(self, x: Tensor, stage: int | None = None) -> Tensor:
        """The gated network's logits."""
        return self.net(x, stage)  # type: ignore[no-any-return]


class StageSearch:
    """The search as a step of the training loop.

    Args:
        stages: what changes.
        cost: milliseconds, of the whole network and of each unit.
        max_ms: what the last phase aims at.
        phases: see ``schedule``.
        tell: told of commits and ends of phases by name and values.
    """

    def __init__(
        self,
        stages: Stages,
        task: Task,
        cost: CellCost,
        max_ms: float,
        config: MgasConfig,
        phases: tuple[Phase, ...],
        *,
        seed: int,
        tell: Callable[..., None],
    ) -> None:
        self.stages, self.net, self.task, self.cost = stages, stages.net, task, cost
        self.max_ms, self.config, self.phases, self.seed, self.tell = max_ms, config, phases, seed, tell
        self._worth: tuple[Any, Worth] | None = None
        self._targets: dict[int, float] = {}
        gates = {id(p) for gate in self.net.modules() if isinstance(gate, DiscreteGate) for p in gate.parameters()}
        self._weights = [p for p in self.net.parameters() if id(p) not in gates]
        self._gates = [p for p in self.net.parameters() if id(p) in gates]
        total = phases[-1].start + phases[-1].steps
        self._stride = max(-(-total // len(stages.path)), 1)

    # ---- the step ----

    def step(self, number: int, batch: Batch) -> Tensor:
        """Gradients of one batch; returns the task's loss."""
        phase = next(p for p in reversed(self.phases) if p.start <= number)
        place, cells = number - phase.start, self.net.stages[phase.stage]
        control = self.stages.control
        if place == 0:
            self.net.reset_thresholds(cells)
            control[3], control[4] = self.worth(cells).ms, 0.0
            control[0], control[1], control[2] = 0.0, _LAMBDA, _CAP
        loss: Tensor = self.task.loss(self.stages(batch[0], phase.stage), batch)
        if place < phase.warm:
            loss.backward()  # type: ignore[no-untyped-call]
            for parameter in self._gates:
                parameter.grad = None
        else:
            cost, ms = self.penalty(cells)
            (loss + float(control[0]) * cost).backward()  # type: ignore[no-untyped-call]
            self.net.observe(cells)
            target = self.target(phase, place)
            if self.config.controller == "dual":
                gain = self.config.rate / max(phase.steps - phase.warm, 1) * (ms / target - 1)
                control[0] = max(float(control[0]) + gain, 0.0)
            else:
                self._cap(phase, float(loss.detach()), float(cost.detach()))
        nn.utils.clip_grad_norm_(self._weights, self.config.clip)
        if place + 1 in phase.commits:
            self._commit(phase, number)
        if number % self._stride == self._stride - 1 or place + 1 == phase.steps:
            self._note(phase, number, float(loss.detach()))
        return loss.detach()

    def penalty(self, cells: int) -> tuple[Tensor, float]:
        """What the loss counts of the first cells, about 1 to 2 while everything is on; and their milliseconds as the
        masks are at this moment, to first order."""
        known = self.worth(cells)
        config, net = self.config, self.net
        device = self._weights[0].device
        total, ms, pushes = torch.zeros((), device=device), known.ms, torch.zeros((), device=device)
        for c in range(cells):
            for n, units in enumerate(net.of_node):
                gate = net.operation_gate(c, n)
                shares = [known.operations.get((c, e, name), 0.0) / known.ms for e, name in units]
                share = torch.tensor(shares, device=device)
                mask, scores = gate.mask(), gate.scores() * gate.alive
                spread = torch.log1p(int(gate.alive.sum()) * scores / scores.sum()) / math.log(2)
                total = total + (mask * spread * (config.rho + config.mu * share)).sum()
                ms -= known.ms * float(((1 - mask.detach()) * gate.alive * share).sum())
                pushes = pushes + torch.exp(-gate.threshold[gate.alive]).sum()
        for tied, each in known.filters.items():
            mask = net.masks_of(tied)
            total = total + config.mu * each / known.ms * mask.sum()
            ms -= each * float(net.filter_gate(tied[0]).alive.sum() - mask.detach().sum())
            pushes = pushes + torch.exp(-net.filter_gate(tied[0]).threshold).sum()
        return total + config.threshold_weight * pushes, max(ms, 0.05 * known.ms)

    def target(self, phase: Phase, place: int) -> float:
        """The milliseconds to be at by now: from those at the phase's beginning down to its own, geometrically."""
        own, start = self.own_target(phase), float(self.stages.control[3])
        done = min((place - phase.warm + 1) / max(_RAMP * (phase.steps - phase.warm), 1.0), 1.0)
        return start * (own / start) ** done if own < start else own

    def own_target(self, phase: Phase) -> float:
        """The milliseconds that a phase ends at."""
        if phase.final:
            return self.max_ms
        if phase.stage not in self._targets:
            whole = self.net.whole
            parts = [whole.upto(self.net.stages[phase.stage]), whole]
            stage, full = self.cost.ms([(genotype, genotype.widths()) for genotype in parts])
            share = self.config.stage_share or min(self.config.slack * self.max_ms / full, 1.0)
            self._targets[phase.stage] = float(stage * share)
        return self._targets[phase.stage]

    # ---- what is left, and what it costs ----

    def sized(self, cells: int) -> Sized:
        """What is alive of the first cells, with widths as they would be built."""
        genotype = self.net.genotype(cells)
        return genotype, rounded(self.net.widths(genotype), genotype.widths(), self.config.quantum)

    def worth(self, cells: int) -> Worth:
        """Milliseconds of what is alive of the first cells, and of its units."""
        genotype, widths = self.sized(cells)
        key = (genotype.kept, tuple(widths.items()))
        if self._worth is None or self._worth[0] != key:
            config = self.config
            found = worth(self.cost, (genotype, widths), config.quantum, least=config.least, filters=config.filters)
            self._worth = (key, found)
        return self._worth[1]

    def project(self, cells: int, target: float) -> int:
        """Cut the units with the least margin over their thresholds for the milliseconds they cost, one after another,
        until the first cells are at ``target``; how many that were. Stops where nothing is left that can go."""
        cut = 0
        while (known := self.worth(cells)).ms > target and (unit := self._weakest(cells, known)) is not None:
            if isinstance(unit[0], int):
                self.net.close(*unit)  # type: ignore[arg-type]
            else:
                self._narrow(unit)  # type: ignore[arg-type]
            cut += 1
        return cut

    def _weakest(self, cells: int, known: Worth) -> Unit | tuple[str, ...] | None:
        """The operation or tie whose next part is worth least for its milliseconds."""
        sized = self.sized(cells)
        offers: list[tuple[float, int, Unit | tuple[str, ...]]] = []
        for unit, ms in known.operations.items():
            node = self.net.blueprint.edges()[unit[1]][1]
            margin = float(self.net.operation_gate(unit[0], node).average[self.net.of_node[node].index(unit[1:])])
            if without(sized, unit) is not None:
                offers.append((max(margin, 1e-3) / max(ms, 1e-9), len(offers), unit))
        for tied, each in known.filters.items():
            off = self._next_off(tied)
            if len(off):
                margin = float(self.net.filter_gate(tied[0]).average[off].sum()) / self.config.quantum
                offers.append((max(margin, 1e-3) / max(each * self.config.quantum, 1e-9), len(offers), tied))
        return min(offers)[2] if offers else None

    def _next_off(self, tied: tuple[str, ...]) -> Tensor:
        """The weakest filters of a tie, as many as one quantum less leaves out; none where it is at its smallest."""
        gate, config = self.net.filter_gate(tied[0]), self.config
        alive = torch.nonzero(gate.alive).flatten()
        left = (-(-len(alive) // config.quantum) - 1) * config.quantum
        if left < max(config.least, 1):
            return alive[:0]
        return alive[torch.sort(gate.average[alive], stable=True).indices[: len(alive) - left]]

    def _narrow(self, tied: tuple[str, ...]) -> None:
        off = self._next_off(tied).tolist()
        for name in tied:
            self.net.filter_gate(name).close(off)

    # ---- commits and ends of phases ----

    def commit_needed(self, cells: int, target: float) -> tuple[int, int]:
        """Commit what is off on average, what is furthest below its threshold first, until the first cells are at the
        target to first order; (operations, filters) that are off from now on.

        Filters of a group fall together, and all that fell between two commits would often be more than was asked for;
        what is left of them may come back.
        """
        known, net = self.worth(cells), self.net
        offers: list[tuple[float, int, float, list[DiscreteGate], int]] = []
        for (c, e, name), ms in known.operations.items():
            node = net.blueprint.edges()[e][1]
            gate, at = net.operation_gate(c, node), net.of_node[node].index((e, name))
            offers.append((float(gate.average[at]), len(offers), ms, [gate], at))
        for tied, each in known.filters.items():
            gates = [net.filter_gate(name) for name in tied]
            for at in torch.nonzero(gates[0].alive).flatten().tolist():
                offers.append((float(gates[0].average[at]), len(offers), each, gates, at))
        left, fallen = known.ms, [0, 0]
        for margin, _, ms, gates, at in sorted(offers, key=lambda offer: offer[:2]):
            if margin > 0 or left <= target:
                break
            if all(int(gate.alive.sum()) > gate.least for gate in gates):
                for gate in gates:
                    gate.close([at])
                left -= ms
                fallen[int(len(gates[0].threshold) == 1)] += 1
        return fallen[0], fallen[1]

    def _commit(self, phase: Phase, number: int) -> None:
        cells, control = self.net.stages[phase.stage], self.stages.control
        if self.config.controller == "dual":
            operations, filters = self.commit_needed(cells, self.target(phase, number - phase.start))
        else:
            operations, filters = self.net.commit(cells)
        control[4] += operations
        if self.config.controller == "goldnas":
            self._goldnas(operations)
        last = number + 1 == phase.start + phase.steps
        cut = self.project(cells, self.own_target(phase)) if last else 0
        control[5] += cut
        left = self.net.genotype(cells)
        self.tell(
            "committed", step=number + 1, stage_number=phase.stage, final=phase.final, operations=operations,
            filters=filters, cut=cut, left=left.count, predicted_ms=self.worth(cells).ms, multiplier=float(control[0]),
        )  # fmt: skip
        if last and phase.stage > 0 and not phase.final and self.config.regrow:
            before = self.net.whole.upto(cells).count - left.count
            count = min(int(self.config.regrow * float(control[4] + cut)), before)
            regrown = regrow(self.net, cells, count, self.seed, phase.start)
            control[6] += len(regrown)
            self.tell("regrown", step=number + 1, units=[list(unit) for unit in regrown])

    def _goldnas(self, pruned: int) -> None:
        """The multiplier after a commit: divided where much was pruned, raised faster and faster where little was."""
        control, goal = self.stages.control, self.config.prune_goal
        value, growth, cap = (float(x) for x in control[:3])
        if pruned >= 4 * goal:
            value, growth = value / _DIVISOR, _LAMBDA
        elif pruned < 2 * goal and value != cap:
            growth *= _DIVISOR**2
            value += growth
        control[0], control[1] = min(value, cap), growth

    def _cap(self, phase: Phase, loss: float, cost: float) -> None:
        """The multiplier stops growing where the cost outweighs the task."""
        control = self.stages.control
        if float(control[2]) == _CAP and loss < (0.5 if phase.final else 1.0) * float(control[0]) * cost:
            control[2] = float(control[0])

    def _note(self, phase: Phase, number: int, loss: float) -> None:
        cells = self.net.stages[phase.stage]
        place = min(number // self._stride, len(self.stages.path) - 1)
        widths = self.net.widths(self.net.genotype(cells))
        row = [
            number + 1, phase.stage, self.worth(cells).ms, self.own_target(phase), float(self.stages.control[0]),
            self.net.genotype(cells).count, sum(widths.values()), loss,
        ]  # fmt: skip
        self.stages.path[place] = torch.tensor(row, dtype=torch.float64)


def regrow(net: CellSuperNet, cells: int, count: int, seed: int, stream: int) -> list[Unit]:
    """Put ``count`` operations back into the first cells, where scores and their momenta say that it is worth most.

    A cell's mass is the mean of its share of the cells' score momenta and of their scores, a kind of operation's
    likewise within its cell; kinds without a living instance there get half of the least.

    Reference: MGAS's published code (``train_search.py``).
    """
    rng, found = generator(seed, "regrow", stream), []
    for number in range(count):
        masses: dict[tuple[int, str], float] = {}
        genotype = net.genotype()
        dead = _dead(net, genotype, cells)
        of_cell = _importance([[(pull, score) for _, pull, score in _living(net, c)] for c in range(cells)])
        for c in range(cells):
            living = _living(net, c)
            kinds = list(net.blueprint.operations)
            of_kind = _importance([[(pull, score) for name, pull, score in living if name == kind] for kind in kinds])
            for kind, mass in zip(kinds, of_kind, strict=True):
                if (c, kind) in dead:
                    masses[c, kind] = of_cell[c] * mass
        chances = np.asarray(list(masses.values()))
        cell, kind = list(masses)[int(rng.choice(len(masses), p=chances / chances.sum()))]
        edges = dead[cell, kind]
        unit = (cell, edges[int(rng.integers(len(edges)))], kind)
        net.regrow(*unit, seed=torch_seed(seed, "regrown", stream, number))
        found.append(unit)
    return found


def _dead(net: CellSuperNet, genotype: Genotype, cells: int) -> dict[tuple[int, str], list[int]]:
    """Edges without an operation, by cell and operation."""
    found: dict[tuple[int, str], list[int]] = {}
    for c in range(cells):
        for e, name in net.units:
            if name not in genotype.kept[c][e]:
                found.setdefault((c, name), []).append(e)
    return found


def _living(net: CellSuperNet, cell: int) -> list[tuple[str, float, float]]:
    """(operation, size of its score's momentum, score) of everything alive in a cell."""
    found = []
    for n, units in enumerate(net.of_node):
        gate = net.operation_gate(cell, n)
        rows = zip(units, gate.alive.tolist(), gate.pull.abs().tolist(), gate.scores().tolist(), strict=True)
        found += [(name, pull, score) for (_, name), alive, pull, score in rows if alive]
    return found


def _importance(parts: list[list[tuple[float, float]]]) -> list[float]:
    """Half the share of the mean momenta and half that of the mean scores; empty parts get half of the least."""
    means = [np.mean(part, axis=0) if part else None for part in parts]
    known = np.asarray([mean for mean in means if mean is not None])
    sums = np.maximum(known.sum(axis=0), 1e-12)
    shares = [None if mean is None else float((0.5 * mean / sums).sum()) for mean in means]
    least = min(share for share in shares if share is not None)
    return [least / 2 if share is None else max(share, 1e-12) for share in shares]


__all__ = ["COLUMNS", "StageSearch", "Stages", "regrow"]
