"""The plain network that a gated network of cells is now: gates folded into batch norms, what is off cut out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hwsearch.models.cells import Cell, CellNetwork, Pointwise, place
from hwsearch.search.mgas_net import CellSuperNet, Cut


class Scaled(nn.Module):
    """A factor per channel: what is left of the gates of an operation without weights, which nothing can be folded
    into."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` times the factor (C,)."""
        return x * self.factor


@torch.no_grad()
def physical(net: CellSuperNet, stage: int | None = None) -> CellNetwork:
    """The smaller plain network, in evaluation mode, that computes what ``net`` does in evaluation mode.

    Units that are off at this moment are cut out, whether committed or not.

    Args:
        stage: whose head it has, and which cells; by default the last.

    Example:
        >>> small = physical(net)                                                     # doctest: +SKIP
        >>> torch.allclose(small(x), net.eval()(x), atol=1e-5)                        # doctest: +SKIP
        True
    """
    stage = len(net.stages) - 1 if stage is None else stage
    cells = net.stages[stage]
    cuts = {}
    for name, (mask, scores) in net.masks(net.genotype(cells)).items():
        index = torch.nonzero(mask).flatten()
        cuts[name] = Cut(index, scores.index_select(0, index))
    on = net.genotype(now=True)
    genotype = on if cells == on.blueprint.cells else on.upto(cells)
    widths = {name: len(cuts[name].factor) for name in genotype.widths()}
    small = CellNetwork(genotype, widths).to(net.plain.classifier.weight.device).eval()
    _copy(net.plain.stem, small.stem, Cut(None, torch.empty(0)), [cuts["stem"]])
    pieces: list[list[str]] = [["stem"], ["stem"]]
    for c in range(cells):
        _copy_cell(net, small, c, [_side_by_side(net, names, cuts) for names in pieces[-2:]], cuts)
        pieces.append([f"{c}.node{n}" for n in range(genotype.blueprint.nodes)])
    head = net.plain.classifier if stage == len(net.stages) - 1 else cast(nn.Linear, net.heads[stage])
    small.classifier.weight.copy_(_side_by_side(net, pieces[-1], cuts).of(head.weight, 1))
    small.classifier.bias.copy_(head.bias)
    return small


def _copy_cell(net: CellSuperNet, small: CellNetwork, c: int, inputs: Sequence[Cut], cuts: Mapping[str, Cut]) -> None:
    big, cell = cast(Cell, net.plain.cells[c]), cast(Cell, small.cells[c])
    for i, read in enumerate(inputs):
        if str(i) in cell.pre:
            _copy(
                cast(nn.Sequential, big.pre[str(i)]), cast(nn.Sequential, cell.pre[str(i)]), read, [cuts[f"{c}.pre{i}"]]
            )
    for n, units in enumerate(net.of_node):
        weights = net.operation_gate(c, n).scores()
        node = cuts[f"{c}.node{n}"]
        for position, (e, name) in enumerate(units):
            edge = cast(nn.ModuleDict, cell.edges[e])
            if name not in edge:
                continue
            factor = node.factor * weights[position]
            module = cast(nn.Sequential, edge[name])
            if not any(isinstance(layer, Pointwise) for layer in module):
                edge[name] = nn.Sequential(*copy.deepcopy(module), Scaled(factor))
                continue
            inner = [cuts[f"{c}.{e}.{name}"]] if f"{c}.{e}.{name}" in cuts else []
            read = cuts[place(c, net.blueprint.edges()[e][0])]
            _copy(big.edges[e][name], module, read, [*inner, Cut(node.index, factor)])  # type: ignore[index]


def _copy(big: nn.Sequential, small: nn.Sequential, read: Cut, written: Sequence[Cut]) -> None:
    """What is left of one operation: dense convolutions write one after another of ``written``."""
    at, left = read, list(written)
    for source, target in zip(big, small, strict=True):
        if isinstance(source, nn.Conv2d):
            weight = at.of(source.weight, 0 if _depthwise(source) else 1)
            if not _depthwise(source):
                at = left.pop(0)
                weight = at.of(weight)
            cast(nn.Conv2d, target).weight.copy_(weight)
        elif isinstance(source, nn.BatchNorm2d):
            norm = cast(nn.BatchNorm2d, target)
            norm.weight.copy_(at.of(source.weight) * at.factor)
            norm.bias.copy_(at.of(source.bias) * at.factor)
            for name in ("running_mean", "running_var"):
                getattr(norm, name).copy_(at.of(getattr(source, name)))


def _depthwise(layer: nn.Conv2d) -> bool:
    """Whether a convolution has one filter a channel; the stem of one input channel does not."""
    return layer.groups > 1 and layer.groups == layer.in_channels


def _side_by_side(net: CellSuperNet, names: Sequence[str], cuts: Mapping[str, Cut]) -> Cut:
    """The positions of some widths in their concatenation."""
    start, found = 0, []
    for name in names:
        index = cuts[name].index
        assert index is not None
        found.append(start + index)
        start += net.full_widths[name]
    return Cut(torch.cat(found), torch.empty(0))
