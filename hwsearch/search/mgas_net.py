"""``CellSuperNet``: a network of cells whose operations and filters have gates, run as the small network that is left.

Every node has a gate over the operations that enter it, every width (stem, inputs and nodes of a cell, the inside of a
separable convolution) one over its filters; widths that a skip or a pool ties are on together until that operation is
gone. What was committed as off is neither computed nor stored: weights are cut to what is alive on their way into every
forward pass, so parameters keep their shapes (and checkpoints and momenta theirs) while passes shrink.

A stage is the first cells with a head of their own; the cells behind it are never run.

Reference: MGAS (arXiv 2310.15074) and its published code. Not followed: its filters are gated operation by operation
and then averaged to one width a cell; here a node's filters are gated where its operations have been added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hwsearch.errors import InputError
from hwsearch.models.cells import Blueprint, Cell, CellNetwork, Genotype, Pointwise, place, weightless
from hwsearch.search.gates import DiscreteGate, commit_jointly, joint_mask, observe_jointly


@dataclass(frozen=True)
class Cut:
    """What is left of a width: positions (kept,), None for all of them, and the factor (kept,) of each."""

    index: Tensor | None
    factor: Tensor

    def of(self, tensor: Tensor, axis: int = 0) -> Tensor:
        """The part of a tensor that is left along an axis of this width."""
        return tensor if self.index is None else tensor.index_select(axis, self.index)


class CellSuperNet(nn.Module):
    """All of a blueprint, gated.

    Args:
        stages: numbers of cells at the end of each stage, such as (1, 2, 3); the last one is all of them.
        least: channels that every width keeps.
        filters: whether filters are searched as well as operations.

    Example:
        >>> net = CellSuperNet(Blueprint(cells=2, reductions=(1,), channels=4), stages=(1, 2)).eval()
        >>> tuple(net(torch.zeros(2, 1, 28, 28), stage=0).shape), net.genotype().count
        ((2, 10), 40)
    """

    def __init__(self, blueprint: Blueprint, *, stages: Sequence[int], least: int = 1, filters: bool = True) -> None:
        super().__init__()
        if list(stages) != sorted(set(stages)) or not stages or stages[0] < 1 or stages[-1] != blueprint.cells:
            raise InputError(f"stages end after {list(stages)} cells; give rising numbers up to {blueprint.cells}")
        self.blueprint, self.stages, self.filters = blueprint, tuple(stages), filters
        self.whole = Genotype.full(blueprint)
        self.plain = CellNetwork(self.whole)
        self.heads = nn.ModuleList(
            nn.Linear(blueprint.nodes * blueprint.width(end - 1), blueprint.classes) for end in self.stages[:-1]
        )
        edges = blueprint.edges()
        #: Per cell and node: (edge, operation) of every unit of the node's gate.
        self.units = [
            (e, name) for e in range(len(edges)) for name in blueprint.operations
        ]  # fmt: skip
        self.of_node = [[unit for unit in self.units if edges[unit[0]][1] == n] for n in range(blueprint.nodes)]
        self.operation_gates = nn.ModuleDict({
            f"{c}-{n}": DiscreteGate(len(units))
            for c in range(blueprint.cells) for n, units in enumerate(self.of_node)
        })  # fmt: skip
        self.full_widths = self.whole.widths()
        self.filter_gates = nn.ModuleDict({
            _key(name): DiscreteGate(width, least=min(least, width), shared=True)
            for name, width in self.full_widths.items()
        })  # fmt: skip

    # ---- gates ----

    def operation_gate(self, cell: int, node: int) -> DiscreteGate:
        """The gate over the operations that enter a node."""
        return cast(DiscreteGate, self.operation_gates[f"{cell}-{node}"])

    def filter_gate(self, name: str) -> DiscreteGate:
        """The gate of a width."""
        return cast(DiscreteGate, self.filter_gates[_key(name)])

    def genotype(self, cells: int | None = None, *, now: bool = False) -> Genotype:
        """The operations that are alive in the first cells (all by default); ``now``: that are on at this moment."""
        kept = []
        for c in range(self.blueprint.cells):
            edges: list[list[str]] = [[] for _ in self.blueprint.edges()]
            for n, units in enumerate(self.of_node):
                gate = self.operation_gate(c, n)
                on = gate.mask().detach().bool() if now else gate.alive
                for (edge, name), alive in zip(units, on.tolist(), strict=True):
                    if alive:
                        edges[edge].append(name)
            kept.append(tuple(map(tuple, edges)))
        found = Genotype(self.blueprint, tuple(kept))
        return found if cells is None or cells == self.blueprint.cells else found.upto(cells)

    def masks(self, genotype: Genotype) -> dict[str, tuple[Tensor, Tensor]]:
        """(mask, scores) of every width of a genotype: those that it ties are the same tensors."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for tied in genotype.ties():
            if self.filters:
                pair = joint_mask([self.filter_gate(name) for name in tied])
            else:
                alive = self.filter_gate(tied[0]).alive.to(self.plain.classifier.weight.dtype)
                pair = (alive, torch.ones_like(alive))
            found |= dict.fromkeys(tied, pair)
        return found

    def masks_of(self, tied: Sequence[str]) -> Tensor:
        """The mask (units,) of some tied widths."""
        return joint_mask([self.filter_gate(name) for name in tied])[0]

    def widths(self, genotype: Genotype, *, now: bool = False) -> dict[str, int]:
        """Living filters of every width of a genotype; ``now``: those that are on at this moment."""
        if now:
            return {name: int(mask.detach().sum()) for name, (mask, _) in self.masks(genotype).items()}
        return {name: int(self.filter_gate(name).alive.sum()) for name in genotype.widths()}

    def gates_upto(self, cells: int) -> tuple[list[DiscreteGate], list[list[DiscreteGate]]]:
        """The first cells' gates: of operations, and of filters that are alive, by ties."""
        nodes = range(self.blueprint.nodes)
        operations = [self.operation_gate(c, n) for c in range(cells) for n in nodes]
        ties = self.genotype(cells).ties() if self.filters else []
        return operations, [[self.filter_gate(name) for name in tied] for tied in ties]

    def observe(self, cells: int) -> None:
        """Move the gates' averages, after a backward pass."""
        operations, tied = self.gates_upto(cells)
        for gate in operations:
            gate.observe()
        for gates in tied:
            observe_jointly(gates)

    def commit(self, cells: int) -> tuple[int, int]:
        """Commit the first cells' gates: (operations, filters) that are off from now on."""
        operations, tied = self.gates_upto(cells)
        fallen = sum(gate.commit() for gate in operations)
        if self.filters:  # by the ties that are left
            tied = self.gates_upto(cells)[1]
        return fallen, sum(commit_jointly(gates) for gates in tied)

    def reset_thresholds(self, cells: int) -> None:
        """Thresholds of the first cells back to 0."""
        operations, tied = self.gates_upto(cells)
        for gate in [*operations, *(gate for gates in tied for gate in gates)]:
            gate.reset_threshold()

    def close(self, cell: int, edge: int, operation: str) -> None:
        """Commit one operation as off."""
        node = self.blueprint.edges()[edge][1]
        self.operation_gate(cell, node).close([self.of_node[node].index((edge, operation))])

    def regrow(self, cell: int, edge: int, operation: str, seed: int) -> None:
        """Put an operation that was off back, with weights drawn by ``seed``.

        Where it ties widths that have parted, all of them get every filter that any of them has.
        """
        node = self.blueprint.edges()[edge][1]
        self.operation_gate(cell, node).regrow([self.of_node[node].index((edge, operation))])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in self._cell(cell).edges[edge][operation].modules():  # type: ignore[index]
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]
        inner = f"{cell}.{edge}.{operation}"
        if inner in self.full_widths:
            with torch.no_grad():
                self.filter_gate(inner).alive.fill_(True)
                self.filter_gate(inner).score.zero_()
            self.filter_gate(inner).reset_threshold()
        if weightless(operation, self.blueprint.stride(cell, edge)):
            self.even()

    @torch.no_grad()
    def even(self) -> None:
        """Give tied widths every filter that any of them has; new ones stand where the others do."""
        for tied in self.genotype().ties():
            gates = [self.filter_gate(name) for name in tied]
            union = torch.stack([gate.alive for gate in gates]).any(0)
            for gate in gates:
                gate.average[union & ~gate.alive] = gate.average[gate.alive].mean()
                gate.alive.copy_(union)

    # ---- the forward pass ----

    def forward(self, x: Tensor, stage: int | None = None) -> Tensor:
        """Images to logits ``(N, classes)`` of a stage's head; by default of the last."""
        stage = len(self.stages) - 1 if stage is None else stage
        cells = self.stages[stage]
        genotype = self.genotype(cells)
        cuts = self._cuts(genotype)
        stem = cuts["stem"]
        first = cast(nn.Conv2d, self.plain.stem[0])
        x = functional.conv2d(x, stem.of(first.weight), None, self.blueprint.stem_stride, 1)
        x = _normalised(cast(nn.BatchNorm2d, self.plain.stem[1]), x, stem)
        parts = [(x, [("stem", stem)])] * 2
        for c in range(cells):
            parts.append(self._run_cell(genotype, c, parts[-2], parts[-1], cuts))
        last, pieces = parts[-1]
        head = self.plain.classifier if stage == len(self.stages) - 1 else cast(nn.Linear, self.heads[stage])
        columns = self._joined(pieces)
        weight = head.weight if columns is None else head.weight.index_select(1, columns)
        return functional.linear(last.mean((2, 3)), weight, head.bias)

    def _cuts(self, genotype: Genotype) -> dict[str, Cut]:
        cuts = {}
        for name, (mask, scores) in self.masks(genotype).items():
            alive = self.filter_gate(name).alive
            factor = mask * scores
            index = None if bool(alive.all()) else torch.nonzero(alive).flatten()
            cuts[name] = Cut(index, factor if index is None else factor.index_select(0, index))
        return cuts

    def _run_cell(
        self,
        genotype: Genotype,
        c: int,
        before: tuple[Tensor, list[tuple[str, Cut]]],
        last: tuple[Tensor, list[tuple[str, Cut]]],
        cuts: Mapping[str, Cut],
    ) -> tuple[Tensor, list[tuple[str, Cut]]]:
        cell, states = self._cell(c), {}
        for i, (x, pieces) in enumerate((before, last)):
            if genotype.reads(c, i):
                read = Cut(self._joined(pieces), torch.empty(0))
                states[i] = run_living(cell.pre[str(i)], x, read, [cuts[f"{c}.pre{i}"]])  # type: ignore[arg-type]
        edges = self.blueprint.edges()
        for n, units in enumerate(self.of_node):
            gate, out, total = self.operation_gate(c, n), cuts[f"{c}.node{n}"], None
            weights = gate.scores() * gate.mask()
            for position, (e, name) in enumerate(units):
                if name not in genotype.kept[c][e]:
                    continue
                source = edges[e][0]
                written = Cut(out.index, torch.empty(0))  # the node's own factor comes once, after the sum
                inner = [cuts[f"{c}.{e}.{name}"]] if f"{c}.{e}.{name}" in cuts else []
                module = cell.edges[e][name]  # type: ignore[index]
                y = run_living(module, states[source], cuts[place(c, source)], [*inner, written])
                y = y * weights[position]
                total = y if total is None else total + y
            assert total is not None
            states[n + 2] = total * out.factor.view(1, -1, 1, 1)
        pieces = [(f"{c}.node{n}", cuts[f"{c}.node{n}"]) for n in range(self.blueprint.nodes)]
        return torch.cat([states[n + 2] for n in range(self.blueprint.nodes)], dim=1), pieces

    def _joined(self, pieces: Sequence[tuple[str, Cut]]) -> Tensor | None:
        """Positions (kept,) of what is left of widths side by side; None for all of them."""
        if all(cut.index is None for _, cut in pieces):
            return None
        start, found = 0, []
        for name, cut in pieces:
            size = self.full_widths[name]
            found.append(start + (torch.arange(size, device=cut.factor.device) if cut.index is None else cut.index))
            start += size
        return torch.cat(found)

    def _cell(self, cell: int) -> Cell:
        return cast(Cell, self.plain.cells[cell])


def run_living(module: nn.Sequential, x: Tensor, read: Cut, written: Sequence[Cut]) -> Tensor:
    """One operation on what is left: ``x`` has the channels of ``read``; each dense convolution writes the next of
    ``written``, whose factor (where it has one) follows the batch norm."""
    at, left = read, list(written)
    for layer in module:
        if isinstance(layer, Pointwise):
            following = left.pop(0)
            weight = following.of(at.of(layer.weight, 1))
            x = functional.conv2d(x[:, :, :: layer.step, :: layer.step] if layer.step > 1 else x, weight)
            at = following
        elif isinstance(layer, nn.Conv2d):  # depth-wise
            weight = at.of(layer.weight)
            x = functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, len(weight))  # type: ignore[arg-type]
        elif isinstance(layer, nn.BatchNorm2d):
            x = _normalised(layer, x, at)
        else:
            x = layer(x)
    return x


def _normalised(norm: nn.BatchNorm2d, x: Tensor, cut: Cut) -> Tensor:
    """Batch norm of the living channels, whose factor is taken into its affine part."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = cut.of(norm.weight), cut.of(norm.bias)
    if len(cut.factor):
        weight, bias = weight * cut.factor, bias * cut.factor
    if cut.index is None or not norm.training:
        mean, var = cut.of(norm.running_mean), cut.of(norm.running_var)
        return functional.batch_norm(x, mean, var, weight, bias, norm.training, norm.momentum or 0.1, norm.eps)
    mean, var = norm.running_mean[cut.index], norm.running_var[cut.index]
    x = functional.batch_norm(x, mean, var, weight, bias, True, norm.momentum or 0.1, norm.eps)
    norm.running_mean[cut.index], norm.running_var[cut.index] = mean, var
    return x


def _key(name: str) -> str:
    """A width's name as a module's, which must not have dots."""
    return name.replace(".", "-")


__all__ = ["CellSuperNet", "Cut", "run_living"]
