"""``FilterNet``: any network whose width groups carry MGAS's filter gates, and the smaller plain network that is left.

Behind a batch norm a channel is multiplied by mask times score, m * s, which is the same as multiplying the norm's
scale and shift: that is what happens here, and what stays when gates are folded. All layers that a group ties together
(residual sums, concatenations, depth-wise convolutions) are under its one gate. Whatever reads the group reads it times
the mask as well, so that a unit that is off is silent whatever stands between; where a group meets no batch norm, the
score is there too.

Reference: MGAS (arXiv 2310.15074), whose gates stand in an operation behind its batch norm. Ours: the network begins as
the function that it came as, because norms are divided by the first scores (0.5).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.foldable import folding_blocks
from hwsearch.graph.surgery import named_tensors, shrink
from hwsearch.search.gates import DiscreteGate
from hwsearch.search.pas_masks import unmaskable
from hwsearch.train.batchnorm import recalibrate

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace
    from hwsearch.train.data import Batch


class FilterNet(nn.Module):
    """A copy of ``model`` with a ``DiscreteGate`` for every group of ``space``: one threshold, a score for each unit.

    Args:
        model: the full network, trained or not; never changed.
        space: the widths; a gate keeps its group's smallest. Groups that no gate can silence keep all units
            (``fixed``).

    Raises:
        InputError: blocks of branches, or no group that a gate can silence.
        UnsupportedModelError: a layer that reads a group cannot be found in the model.

    Example:
        >>> net = FilterNet(model, space)                                             # doctest: +SKIP
        >>> net.widths()                                                              # doctest: +SKIP
        (32, 64)
    """

    def __init__(self, model: nn.Module, space: WidthSpace) -> None:
        super().__init__()
        check_gateable(model)
        self.space, self.model = space, copy.deepcopy(model)
        self.fixed = unmaskable(space)
        self.gates = nn.ModuleList(
            DiscreteGate(group.units, least=group.units if index in self.fixed else group.widths[0], shared=True)
            for index, group in enumerate(space.groups)
        )
        for index in self.fixed:
            self.gate(index).requires_grad_(False)
        tensors = named_tensors(self.model)
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        self.gates.to(device)
        #: Per tensor the axis and the buffer of units that it is multiplied by, and whether their scores are in it.
        self._factors: dict[str, list[tuple[int, str, bool]]] = {}
        self._attach(tensors, device)
        with torch.no_grad():
            for name, factor in self._products(self._values()).items():
                tensors[name].copy_(tensors[name] / factor)  # all masks are on: only scores are in it

    # ---- the gated network ----

    def gate(self, index: int) -> DiscreteGate:
        """The gate of group number ``index``."""
        return cast(DiscreteGate, self.gates[index])

    def forward(self, x: Tensor) -> Tensor:
        """The gated network's output."""
        tensors = named_tensors(self.model)
        products = {name: tensors[name] * factor for name, factor in self._products(self._values()).items()}
        return functional_call(self.model, products, (x,))  # type: ignore[no-any-return]

    def searched(self) -> Iterator[tuple[int, DiscreteGate]]:
        """(number, gate) of every group that is searched."""
        for index in range(len(self.gates)):
            if index not in self.fixed:
                yield index, self.gate(index)

    def alive(self) -> tuple[int, ...]:
        """How many units of each group are not committed as off."""
        return tuple(int(self.gate(index).alive.sum()) for index in range(len(self.gates)))

    def widths(self) -> tuple[int, ...]:
        """How many units of each group are on at this moment."""
        return tuple(int(self.gate(index).mask().detach().sum()) for index in range(len(self.gates)))

    def observe(self) -> None:
        """Move the gates' moving averages, after a backward pass."""
        for _, gate in self.searched():
            gate.observe()

    # ---- what is left ----

    def on(self) -> dict[str, NDArray[np.int64]]:
        """The units (ascending) of every group that are on at this moment."""
        pairs = zip(self.space.groups, range(len(self.gates)), strict=True)
        return {g.name: np.flatnonzero(self.gate(index).mask().detach().cpu().numpy() > 0) for g, index in pairs}

    def largest(self, choice: WidthChoice) -> dict[str, NDArray[np.int64]]:
        """The units (ascending) of every group that a choice keeps: the living first, of them the largest averages."""
        kept = {}
        for index, (group, width) in enumerate(zip(self.space.groups, choice.widths, strict=True)):
            gate = self.gate(index)
            rank = np.lexsort((-gate.average.cpu().double().numpy(), ~gate.alive.cpu().numpy()))
            kept[group.name] = np.sort(rank[:width]).astype(np.int64)
        return kept

    @torch.no_grad()
    def physical(
        self,
        choice: WidthChoice,
        kept: Mapping[str, NDArray[np.int64]] | None = None,
        batches: Iterable[Batch] | None = None,
    ) -> nn.Module:
        """The smaller plain network of a choice, in evaluation mode: scores folded into batch norms, the rest cut out.

        With the units that are on (``on``) it computes what this network does in evaluation mode.

        Args:
            kept: units per group; by default ``largest``.
            batches: measure batch-norm statistics on them; None: the running ones are kept.
        """
        kept = self.largest(choice) if kept is None else kept
        model = copy.deepcopy(self.model)
        scores = [self.gate(index).scores() for index in range(len(self.gates))]
        scores = [torch.ones_like(s) if index in self.fixed else s for index, s in enumerate(scores)]
        tensors = named_tensors(model)
        ones = [torch.ones_like(score) for score in scores]
        for name, factor in self._products((ones, scores)).items():
            tensors[name].mul_(factor)
        for parameter in model.parameters():
            parameter.grad = None
        small = shrink(model, self.space, choice, dict(kept), check=False).eval()
        if batches is not None:
            recalibrate(small, batches)
        return small

    # ---- where gates stand ----

    def _values(self) -> tuple[list[Tensor], list[Tensor]]:
        """(masks, masks times scores) of all groups, each (units,)."""
        masks, scaled = [], []
        for index in range(len(self.gates)):
            gate = self.gate(index)
            if index in self.fixed:
                masks.append(torch.ones_like(gate.score))
                scaled.append(masks[-1])
                continue
            masks.append(gate.mask())
            scaled.append(masks[-1] * gate.scores())
        return masks, scaled

    def _products(self, values: tuple[list[Tensor], list[Tensor]]) -> dict[str, Tensor]:
        """Per tensor what it is multiplied by, broadcast to its shape."""
        tensors = named_tensors(self.model)
        one = values[0][0].new_ones(1)
        vectors = [torch.cat([*parts, one]) for parts in values]  # positions of no group read the 1 at the end
        found: dict[str, Tensor] = {}
        for name, factors in self._factors.items():
            for axis, units, scored in factors:
                shape = [1] * tensors[name].dim()
                shape[axis] = -1
                factor = vectors[scored].index_select(0, self.get_buffer(units)).to(tensors[name].dtype).view(shape)
                found[name] = found[name] * factor if name in found else factor
        return found

    def _attach(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Find the batch norms that every group passes, and what reads it."""
        starts = np.cumsum([0, *(group.units for group in self.space.groups)])
        norms = {name for name in tensors if f"{name.rpartition('.')[0]}.running_var" in tensors}
        axes: dict[tuple[str, int, bool], NDArray[np.int64]] = {}

        def stand(name: str, axis: int, positions: NDArray[np.int64], index: int, scored: bool) -> None:
            if name not in tensors or tensors[name].shape[axis] != self.space.network.shapes[name][axis]:
                raise UnsupportedModelError(
                    f"{name} carries a width group, but the model has no such weight: make the width space from this "
                    "model"
                )
            size = tensors[name].shape[axis]
            units = axes.setdefault((name, axis, scored), np.full(size, starts[-1], dtype=np.int64))
            units[positions.ravel()] = np.repeat(starts[index] + np.arange(positions.shape[0]), positions.shape[1])

        for index, group in enumerate(self.space.groups):
            if index in self.fixed:
                continue
            scaled = [s for s in group.slots if s.parameter in norms and s.parameter.endswith((".weight", ".bias"))]
            for slot in scaled:
                stand(slot.parameter, slot.axis, slot.positions, index, scored=True)
            for slot in group.slots:
                if slot.reads:
                    stand(slot.parameter, slot.axis, slot.positions, index, scored=not scaled)
        for number, ((name, axis, scored), units) in enumerate(axes.items()):
            self.register_buffer(f"_units_{number}", torch.from_numpy(units).to(device), persistent=False)
            self._factors.setdefault(name, []).append((axis, f"_units_{number}", scored))


def check_gateable(model: nn.Module) -> None:
    """Refuse a network whose norms are inside blocks that are folded before they are sliced.

    Raises:
        InputError: it has blocks of branches.
    """
    if folding_blocks(model):
        raise InputError(
            "filter gates stand behind batch norms, and this network has blocks of branches, whose norms are folded "
            'away: fold it first, or use method = "pas"'
        )
