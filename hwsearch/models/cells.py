"""Networks of cells (DARTS, MGAS): operations on edges between nodes, any of which may be left out.

A ``Blueprint`` says what there is to choose from, a ``Genotype`` which operations are kept, ``CellNetwork`` is the
plain network of a genotype, at any widths. The super-network of a search has the genotype that keeps everything.

A cell has two inputs (the outputs of the two cells before it), ``nodes`` nodes, each the sum of the operations on the
edges from everything before it, and puts out its nodes side by side. Cells are not shared. Reference: Liu et al.,
"DARTS", ICLR 2019; MGAS (arXiv 2310.15074) and its published code. Not followed: a skip over a stride is one 1x1
convolution (theirs, two on shifted pixels, needs even sides), auxiliary heads are a mean and a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hwsearch.errors import InputError

#: The factories that a saved model folder may name.
FACTORIES = ("cells_small", "cells_full", "cell_network")

#: Every operation that an edge can have.
OPERATIONS = ("skip", "sep3", "sep5", "dil3", "dil5", "avg3", "max3")
_SMALL = ("skip", "sep3", "dil3", "max3")

#: Per cell, per edge: the operations that are kept.
Kept = tuple[tuple[tuple[str, ...], ...], ...]


@dataclass(frozen=True)
class Blueprint:
    """What a super-network of cells offers.

    Args:
        channels: of a node in the first cell; doubled at every cell of ``reductions``, which halves the side.
        stem_stride: of the first 3x3 convolution, which has ``channels`` outputs.
    """

    in_channels: int = 1
    classes: int = 10
    channels: int = 16
    cells: int = 3
    nodes: int = 2
    reductions: tuple[int, ...] = (1, 2)
    operations: tuple[str, ...] = _SMALL
    stem_stride: int = 2

    def __post_init__(self) -> None:
        for name in ("in_channels", "classes", "channels", "cells", "nodes", "stem_stride"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give 1 or more")
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown or not self.operations or len(set(self.operations)) < len(self.operations):
            raise InputError(f"operations are {list(self.operations)}; give different ones of {', '.join(OPERATIONS)}")
        if any(not 0 <= cell < self.cells for cell in self.reductions):
            raise InputError(f"reductions are {list(self.reductions)}; give cells from 0 to {self.cells - 1}")

    def width(self, cell: int) -> int:
        """Channels of a node of this cell at full width."""
        return int(self.channels * 2 ** sum(at <= cell for at in self.reductions))

    def edges(self) -> list[tuple[int, int]]:
        """(source, node) of every edge of a cell in order; sources 0 and 1 are the cell's inputs, 2 its first node."""
        return [(source, node) for node in range(self.nodes) for source in range(node + 2)]

    def stride(self, cell: int, edge: int) -> int:
        """2 on the edges from the inputs of a reducing cell."""
        return 2 if cell in self.reductions and self.edges()[edge][0] < 2 else 1


@dataclass(frozen=True)
class Genotype:
    """Which operations of a blueprint are kept.

    Example:
        >>> genotype = Genotype.full(Blueprint(cells=1, nodes=1, reductions=(), operations=("skip", "sep3")))
        >>> genotype.kept, genotype.count
        (((('skip', 'sep3'), ('skip', 'sep3')),), 4)
    """

    blueprint: Blueprint
    kept: Kept

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", tuple(tuple(tuple(edge) for edge in cell) for cell in self.kept))
        edges = self.blueprint.edges()
        if len(self.kept) != self.blueprint.cells or any(len(cell) != len(edges) for cell in self.kept):
            raise InputError(
                f"a genotype of this blueprint needs {self.blueprint.cells} cells of {len(edges)} edges, got "
                f"{[len(cell) for cell in self.kept]}"
            )
        for at, names in ((c, edge) for c, edges_ in enumerate(self.kept) for edge in edges_):
            if any(name not in self.blueprint.operations for name in names):
                raise InputError(f"cell {at} has {list(names)}; the blueprint has {list(self.blueprint.operations)}")
        for c, cell in enumerate(self.kept):
            for node in range(self.blueprint.nodes):
                if not any(kept for kept, (_, end) in zip(cell, edges, strict=True) if end == node):
                    raise InputError(f"node {node} of cell {c} has no operation: every node needs one")

    @classmethod
    def full(cls, blueprint: Blueprint) -> Genotype:
        """Everything kept: the super-network."""
        return cls(blueprint, ((blueprint.operations,) * len(blueprint.edges()),) * blueprint.cells)

    @property
    def count(self) -> int:
        """Operations that are kept."""
        return sum(len(edge) for cell in self.kept for edge in cell)

    def operations(self) -> Iterator[tuple[int, int, str]]:
        """(cell, edge, operation) of all that are kept, in order."""
        for c, cell in enumerate(self.kept):
            for e, names in enumerate(cell):
                for name in names:
                    yield c, e, name

    def without(self, cell: int, edge: int, operation: str) -> Genotype:
        """The same with one operation less.

        Raises:
            InputError: it is the last one of its node.
        """
        changed = [[list(names) for names in edges] for edges in self.kept]
        changed[cell][edge].remove(operation)
        return Genotype(self.blueprint, tuple(tuple(map(tuple, edges)) for edges in changed))

    def upto(self, cells: int) -> Genotype:
        """The first cells alone, as a network of their own."""
        blueprint = self.blueprint
        reductions = tuple(cell for cell in blueprint.reductions if cell < cells)
        return Genotype(replace(blueprint, cells=cells, reductions=reductions), self.kept[:cells])

    def reads(self, cell: int, source: int) -> bool:
        """Whether anything in a cell reads this source of its edges."""
        return any(
            names and at == source for names, (at, _) in zip(self.kept[cell], self.blueprint.edges(), strict=True)
        )

    def widths(self) -> dict[str, int]:
        """Every width of the network, at full size: ``stem``, ``C.preI`` (inputs), ``C.nodeN``, ``C.E.OP`` (inside)."""
        found, blueprint = {"stem": self.blueprint.channels}, self.blueprint
        for c in range(blueprint.cells):
            width = blueprint.width(c)
            found |= {f"{c}.pre{i}": width for i in (0, 1) if self.reads(c, i)}
            for e, names in enumerate(self.kept[c]):
                found |= {f"{c}.{e}.{name}": width for name in names if name.startswith("sep")}
            found |= {f"{c}.node{n}": width for n in range(blueprint.nodes)}
        return found

    def ties(self) -> list[tuple[str, ...]]:
        """Widths that must be equal, because an operation without weights stands between them; every width once."""
        parent = {name: name for name in self.widths()}

        def root(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        for cell, edge, operation in self.operations():
            if weightless(operation, self.blueprint.stride(cell, edge)):
                source, node = self.blueprint.edges()[edge]
                parent[root(place(cell, source))] = root(f"{cell}.node{node}")
        tied: dict[str, list[str]] = {}
        for name in parent:
            tied.setdefault(root(name), []).append(name)
        return [tuple(names) for names in tied.values()]

    def writers(self) -> dict[str, str]:
        """The dense convolutions' weights of ``CellNetwork`` by name, and which width each one's outputs are."""
        found, edges = {"stem.0.weight": "stem"}, self.blueprint.edges()
        for c in range(self.blueprint.cells):
            found |= {f"cells.{c}.pre.{i}.1.weight": f"{c}.pre{i}" for i in (0, 1) if self.reads(c, i)}
        for c, e, name in self.operations():
            at, node = f"cells.{c}.edges.{e}.{name}", f"{c}.node{edges[e][1]}"
            if name.startswith("sep"):
                found |= {f"{at}.2.weight": f"{c}.{e}.{name}", f"{at}.6.weight": node}
            elif not weightless(name, self.blueprint.stride(c, e)):
                found[f"{at}.{1 if name == 'skip' else 2}.weight"] = node
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the arguments of ``cell_network``."""
        blueprint = self.blueprint
        return {
            "kept": [[list(edge) for edge in cell] for cell in self.kept],
            "in_channels": blueprint.in_channels, "classes": blueprint.classes, "channels": blueprint.channels,
            "nodes": blueprint.nodes, "reductions": list(blueprint.reductions),
            "operations": list(blueprint.operations), "stem_stride": blueprint.stem_stride,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Genotype:
        """The genotype of ``to_dict``.

        Raises:
            InputError: values that do not go together.
        """
        settings = dict(data)
        kept = settings.pop("kept")
        for name in ("reductions", "operations"):
            if name in settings:
                settings[name] = tuple(settings[name])
        return cls(Blueprint(cells=len(kept), **settings), kept)


def place(cell: int, source: int) -> str:
    """The name of a source's width: an input of the cell or one of its nodes."""
    return f"{cell}.pre{source}" if source < 2 else f"{cell}.node{source - 2}"


def weightless(operation: str, stride: int) -> bool:
    """Whether an operation hands its channels on as they are."""
    return operation in ("avg3", "max3") or (operation == "skip" and stride == 1)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution without a bias; ``step`` is its stride, whoever thins its input."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__(inside, outside, 1, stride, bias=False)
        self.step = stride


def operation_module(name: str, inside: int, middle: int, outside: int, stride: int) -> nn.Sequential:
    """One operation: ``(N, inside, H, W)`` to ``(N, outside, H/stride, W/stride)``; ``middle`` is the inner width of a
    separable convolution."""
    if name == "skip":
        layers = [] if stride == 1 else [nn.ReLU(), Pointwise(inside, outside, stride), nn.BatchNorm2d(outside)]
        return nn.Sequential(*layers)
    size = int(name[-1])
    if name.startswith("avg"):
        return nn.Sequential(nn.AvgPool2d(size, stride, size // 2, count_include_pad=False))
    if name.startswith("max"):
        return nn.Sequential(nn.MaxPool2d(size, stride, size // 2))
    spread = 2 if name.startswith("dil") else 1

    def half(read: int, written: int, step: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(read, read, size, step, spread * (size // 2), spread, groups=read, bias=False)
        return [nn.ReLU(), depthwise, Pointwise(read, written), nn.BatchNorm2d(written)]

    if name.startswith("dil"):
        return nn.Sequential(*half(inside, outside, stride))
    return nn.Sequential(*half(inside, middle, stride), *half(middle, outside, 1))


class Cell(nn.Module):
    """One cell: what is kept of it."""

    def __init__(self, genotype: Genotype, index: int, inputs: tuple[int, int], widths: Mapping[str, int]) -> None:
        super().__init__()
        blueprint = genotype.blueprint
        self.nodes, self.ends = blueprint.nodes, blueprint.edges()
        self.pre = nn.ModuleDict()
        for i, channels in enumerate(inputs):
            if genotype.reads(index, i):
                stride = 2 if i == 0 and index - 1 in blueprint.reductions else 1
                width = widths[f"{index}.pre{i}"]
                self.pre[str(i)] = nn.Sequential(nn.ReLU(), Pointwise(channels, width, stride), nn.BatchNorm2d(width))
        self.edges = nn.ModuleList()
        for e, names in enumerate(genotype.kept[index]):
            source, node = self.ends[e]
            inside = widths.get(place(index, source), 0)
            outside, stride = widths[f"{index}.node{node}"], blueprint.stride(index, e)
            self.edges.append(nn.ModuleDict({
                name: operation_module(name, inside, widths.get(f"{index}.{e}.{name}", 0), outside, stride)
                for name in names
            }))  # fmt: skip

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """Outputs of the two cells before it to ``(N, nodes * width, H, W)``."""
        states = {i: self.pre[str(i)](x) for i, x in enumerate((before, last)) if str(i) in self.pre}
        for (source, node), edge in zip(self.ends, self.edges, strict=True):
            for module in edge.values():  # type: ignore[operator,union-attr]
                x = module(states[source])
                states[node + 2] = states[node + 2] + x if node + 2 in states else x
        return torch.cat([states[n + 2] for n in range(self.nodes)], dim=1)


class CellNetwork(nn.Module):
    """The plain network of a genotype: a stem, cells, a global mean and one linear layer.

    Args:
        widths: see ``Genotype.widths``; by default the full ones.

    Raises:
        InputError: widths that an operation without weights ties differ.

    Example:
        >>> network = CellNetwork(Genotype.full(Blueprint()))
        >>> tuple(network.eval()(torch.zeros(2, 1, 28, 28)).shape)
        (2, 10)
    """

    def __init__(self, genotype: Genotype, widths: Mapping[str, int] | None = None) -> None:
        super().__init__()
        full = genotype.widths()
        widths = full if widths is None else widths
        if sorted(widths) != sorted(full) or any(not 1 <= widths[name] <= full[name] for name in full):
            raise InputError(f"this genotype needs widths from 1 up to {full}, got {dict(widths)}")
        for tied in genotype.ties():
            if len({widths[name] for name in tied}) > 1:
                raise InputError(f"the widths {', '.join(tied)} are tied by a skip or a pool: make them equal")
        self.genotype = genotype
        blueprint = genotype.blueprint
        self.stem = nn.Sequential(
            nn.Conv2d(blueprint.in_channels, widths["stem"], 3, blueprint.stem_stride, 1, bias=False),
            nn.BatchNorm2d(widths["stem"]),
        )
        outputs = [widths["stem"]] * 2
        self.cells = nn.ModuleList()
        for c in range(blueprint.cells):
            self.cells.append(Cell(genotype, c, (outputs[-2], outputs[-1]), widths))
            outputs.append(sum(widths[f"{c}.node{n}"] for n in range(blueprint.nodes)))
        self.classifier = nn.Linear(outputs[-1], blueprint.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        logits: Tensor = self.classifier(last.mean((2, 3)))
        return logits


def cells_small(in_channels: int = 1, classes: int = 10, channels: int = 16) -> CellNetwork:
    """All of the super-network that suits two CPU cores: three cells of two nodes, four operations, 14x14 pixels."""
    return CellNetwork(Genotype.full(Blueprint(in_channels, classes, channels)))


def cells_full(
    in_channels: int = 3,
    classes: int = 10,
    channels: int = 16,
    cells: int = 8,
    nodes: int = 4,
    operations: Sequence[str] = OPERATIONS,
    stem_stride: int = 1,
) -> CellNetwork:
    """All of the paper's super-network by default: eight cells of four nodes, seven operations, for a GPU."""
    third = (cells // 3, 2 * cells // 3)
    blueprint = Blueprint(
        in_channels, classes, channels, cells, nodes, tuple(sorted({*third} - {0})), tuple(operations), stem_stride
    )
    return CellNetwork(Genotype.full(blueprint))


def cell_network(kept: Sequence[Sequence[Sequence[str]]], **settings: Any) -> CellNetwork:
    """The network that a search found, from plain values (``Genotype.to_dict``)."""
    return CellNetwork(Genotype.from_dict({"kept": kept, **settings}))


__all__ = ["OPERATIONS", "Blueprint", "Cell", "CellNetwork", "Genotype", "cell_network", "cells_full", "cells_small"]
