"""Is a network unfolded? Its milliseconds would say nothing of the network that is deployed (up to 47 times as many).

Looked for in the graph itself, so it does not matter which tool wrote the file: a sum of linear branches that start at
one tensor (convolutions, batch norms, average pooling, paddings, in any order) and fit into the largest convolution
among them is one convolution, which no runtime finds out by itself. A residual sum is none: a path of it has an
activation, or nothing at all. A batch norm alone behind a convolution is told but not refused: runtimes fold that pair
when they load the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hwsearch.errors import InputError

_SAME = ("Identity", "QuantizeLinear", "DequantizeLinear", "Dropout")
_AFFINE = ("Add", "Sub", "Mul", "Div")
#: Inputs without which one of these nodes is none.
_NEEDED = {"Conv": 2, **dict.fromkeys((*_SAME, *_AFFINE, "BatchNormalization", "AveragePool", "Pad", "Sum"), 1)}


@dataclass(frozen=True)
class Unfolded:
    """What folding would remove: ``blocks`` of branches and batch norms behind convolutions, by name."""

    blocks: tuple[str, ...]
    norms: tuple[str, ...]


@dataclass(frozen=True)
class _Branch:
    """A linear path: extent and stride along both axes, and of its convolutions dilations and groups."""

    extent: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilations: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    convolutions: int = 0
    bare: bool = True

    def then(self, node: Any) -> _Branch:
        """This path with one more node in front of it."""
        if node.op_type not in ("Conv", "AveragePool"):
            bare = self.bare and node.op_type in ("Pad", *_AFFINE)
            return _Branch(self.extent, self.stride, self.dilations, self.groups, self.convolutions, bare)
        kernel, stride, dilation = (_pair(node, name) for name in ("kernel_shape", "strides", "dilations"))
        spatial = max(kernel) > 1
        conv = node.op_type == "Conv"
        return _Branch(
            tuple(e + d * (k - 1) for e, d, k in zip(self.extent, dilation, kernel, strict=True)),  # type: ignore[arg-type]
            tuple(a * b for a, b in zip(self.stride, stride, strict=True)),  # type: ignore[arg-type]
            self.dilations | (set(dilation) if spatial and conv else set()),
            self.groups | ({_number(node, "group")} if conv else set()),
            self.convolutions + conv,
            False,
        )


def find_unfolded(network: bytes) -> Unfolded:
    """Blocks of branches and batch norms that folding would remove from an ONNX network.

    Of bytes that are no ONNX file it finds nothing: the runtime will say what is wrong with them.

    Example:
        >>> find_unfolded(export_onnx(repvgg_small(), x)).blocks                            # doctest: +SKIP
        ('stem.0 (2 branches)', ...)
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    model = onnx.ModelProto()
    try:
        model.ParseFromString(network)
    except DecodeError:
        return Unfolded((), ())
    if not _in_order(model.graph):
        return Unfolded((), ())
    return _Search(model.graph).run()


def _in_order(graph: Any) -> bool:
    """Whether every node has the inputs that its operator needs, made before it: a graph in a circle has no end."""
    later = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        if node.op_type in _NEEDED and (len(node.input) < _NEEDED[node.op_type] or not node.output):
            return False
        if any(name in later for name in node.input):
            return False
        later.difference_update(node.output)
    return True


def refuse_unfolded(network: bytes, name: str) -> Unfolded:
    """Raises InputError when the network holds unfolded blocks of branches; what else folding would remove."""
    found = find_unfolded(network)
    if found.blocks:
        count = f"{len(found.blocks)} blocks of branches" if len(found.blocks) > 1 else "a block of branches"
        raise InputError(
            f"{name} holds {count} that folding makes one convolution each (the first: {found.blocks[0]}): its "
            "milliseconds would not be those of the deployed network: fold it first (`hwsearch fold`, hwsearch.fold) "
            "and export it again, or allow it (--allow-unfolded, allow_unfolded=True) to look at it as it stands"
        )
    return found


class _Search:
    """One graph."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self._drop_same()
        self.maker = {name: node for node in graph.node for name in node.output}
        self.readers = Counter(name for node in graph.node for name in node.input)
        self.readers.update(value.name for value in graph.output)
        self.constants = {item.name for item in graph.initializer}
        for node in graph.node:  # constants that are computed from constants, a dequantised weight among them
            if node.op_type == "Constant" or (
                node.input and all(name in self.constants for name in node.input if name)
            ):
                self.constants.update(node.output)

    def _drop_same(self) -> None:
        """Take out the nodes that hand on what they get; their readers read what they did."""
        first = {node.output[0]: node.input[0] for node in self.graph.node if node.op_type in _SAME}

        def origin(name: str) -> str:
            while name in first:
                name = first[name]
            return name

        kept = [node for node in self.graph.node if node.op_type not in _SAME]
        for node in kept:
            for place, name in enumerate(node.input):
                node.input[place] = origin(name)
        for value in self.graph.output:
            value.name = origin(value.name)
        kept = [type(node).FromString(node.SerializeToString()) for node in kept]
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def run(self) -> Unfolded:
        """Every sum that no other sum takes in, and every batch norm."""
        inner = {
            name for node in self.graph.node if self._is_sum(node) for name in node.input
            if self.readers[name] == 1 and self._is_sum(self.maker.get(name))
        }  # fmt: skip
        blocks: list[str] = []
        norms: list[str] = []
        for node in self.graph.node:
            if self._is_sum(node) and node.output[0] not in inner:
                blocks += self._blocks(node)
            if node.op_type == "BatchNormalization":
                before = self.maker.get(node.input[0])
                if before is not None and before.op_type == "Conv" and self.readers[node.input[0]] == 1:
                    norms.append(self._owner(node) or node.name or node.output[0])
        return Unfolded(tuple(blocks), tuple(norms))

    def _is_sum(self, node: Any) -> bool:
        if node is None or node.op_type not in ("Add", "Sum"):
            return False
        return len(node.input) > 1 and not any(name in self.constants for name in node.input)

    def _leaves(self, node: Any) -> Iterator[str]:
        """The tensors that a tree of sums adds up."""
        # no recursion: a chain of sums may be longer than Python's stack is deep
        waiting = list(reversed(node.input))
        while waiting:
            name = waiting.pop()
            maker = self.maker.get(name)
            if self.readers[name] == 1 and maker is not None and self._is_sum(maker):
                waiting += reversed(maker.input)
            else:
                yield name

    def _blocks(self, node: Any) -> Iterator[str]:
        """The sum's branches that start at one tensor and are linear up to it, where they fit into one convolution."""
        chains = [dict(self._chain(name)) for name in self._leaves(node)]
        shared = Counter(origin for chain in chains for origin, branch in chain.items() if not branch.bare)
        taken: set[int] = set()
        for origin, times in shared.items():
            mine = [
                index for index, chain in enumerate(chains)
                if index not in taken and origin in chain and not chain[origin].bare
            ]  # fmt: skip
            if times < 2 or len(mine) < 2 or not _fit([chains[index][origin] for index in mine]):
                continue
            taken.update(mine)
            count = len(mine) + sum(
                origin in chain and chain[origin].bare for index, chain in enumerate(chains) if index not in mine
            )
            yield f"{self._label(node)} ({count} branches)"

    def _chain(self, name: str) -> Iterator[tuple[str, _Branch]]:
        """(tensor, the linear path from it to ``name``), from ``name`` on backwards."""
        branch = _Branch()
        yield name, branch
        while self.readers[name] == 1 and (node := self.maker.get(name)) is not None:
            source = self._linear(node)  # what others read too cannot be folded away
            if source is None:
                return
            branch, name = branch.then(node), source
            yield name, branch

    def _linear(self, node: Any) -> str | None:
        """The one input that a node is linear in, or None."""
        if node.op_type in ("BatchNormalization", "AveragePool", "Pad"):
            return str(node.input[0])
        if node.op_type == "Conv":
            return str(node.input[0]) if node.input[1] in self.constants else None
        if node.op_type in _AFFINE:
            variable = [name for name in node.input if name not in self.constants]
            if len(variable) == 1 and (node.op_type != "Div" or node.input[0] == variable[0]):
                return str(variable[0])
        return None

    def _owner(self, node: Any) -> str:
        """The module that a node's parameters belong to."""
        owners = [name.rpartition(".")[0] for name in node.input if name in self.constants and "." in name]
        return owners[0] if owners else ""

    def _label(self, node: Any) -> str:
        """The longest name that the modules of a sum's branches share, else that of the sum."""
        owners = []
        for name in self._leaves(node):
            maker = self.maker.get(name)
            while maker is not None:
                owner = self._owner(maker)
                if owner:
                    owners.append(owner.split("."))
                    break
                source = self._linear(maker)
                maker = None if source is None else self.maker.get(source)
        parts: list[str] = []
        for level in zip(*owners, strict=False):
            if len(set(level)) > 1:
                break
            parts.append(level[0])
        return ".".join(parts) or str(node.name or node.output[0])


def _fit(branches: list[_Branch]) -> bool:
    """Whether branches are one convolution of the size of the largest among them."""
    hosts = [b for b in branches if b.convolutions == 1]
    if not hosts:
        return False
    host = max(hosts, key=lambda b: b.extent[0] * b.extent[1])
    dilations = host.dilations or {1}
    return all(
        b.stride == host.stride
        and b.extent[0] <= host.extent[0]
        and b.extent[1] <= host.extent[1]
        and b.dilations <= dilations | ({1} if max(dilations) == 1 else set())
        and (not b.groups or b.groups == host.groups)
        for b in branches
    )


def _pair(node: Any, name: str) -> tuple[int, int]:
    """A spatial attribute along both axes; 1 where it is left out."""
    values = next((list(item.ints) for item in node.attribute if item.name == name), [])
    values = [*values, 1, 1] if len(values) < 2 else values
    return int(values[0]), int(values[1])


def _number(node: Any, name: str) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), 1)
