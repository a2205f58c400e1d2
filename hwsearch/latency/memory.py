"""``peak_memory``: how many bytes a network needs while it runs, from the graph that the runtime really executes.

ONNX Runtime plans its buffers once, from the static shapes, for one node after the other: an operator may write
over an input that nobody reads again, a view shares its input's buffer, and a buffer that became free is taken again by
the next tensor of exactly the same shape and element size (a dead buffer that waits for such a tensor stays allocated).
This module makes the same plan. Which operators write in place was asked of the CPU provider of version 1.31 itself.

Not counted: what an operator allocates for the time of its own run (the matrix that a plain convolution copies its
windows into), repacked copies of weights, and the arena's rounding up to 256 bytes and to whole regions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hwsearch.errors import DeviceJobError
from hwsearch.graph.kernel import element_bytes

#: Outputs that share the first input's buffer: they are the same bytes.
_VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
#: Operators that may write over an input, by its position.
_IN_PLACE = {
    **dict.fromkeys(
        (
            "Cast", "Celu", "Clip", "Elu", "HardSigmoid", "LeakyRelu", "LogSoftmax", "Relu", "ScatterElements",
            "ScatterND", "Selu", "Shrink", "Sigmoid", "Softmax", "Softplus", "Softsign", "Tanh", "ThresholdedRelu",
            "Trilu",
        ),
        0,
    ),
    # the sum that a convolution adds its result to
    "FusedConv": 3,
    "NhwcFusedConv": 3,
}  # fmt: skip
_BLOCKED_SUM = 3


@dataclass(frozen=True)
class Memory:
    """Bytes of a network at batch and shapes of its file.

    Attributes:
        peak_activation_bytes: activations alive at once at the worst node, the outputs among them, the inputs not.
        input_bytes: the network's inputs, which the caller holds during the whole run.
        weight_bytes: constants as they stand in the optimised graph, paddings included.
        node: the worst node, named as ``Kernel.node``.
    """

    peak_activation_bytes: int
    input_bytes: int
    weight_bytes: int
    node: str

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.peak_activation_bytes + self.input_bytes + self.weight_bytes


def peak_memory(optimised: bytes) -> Memory:
    """The memory of a network.

    Args:
        optimised: the graph that the runtime executes, as ``DeviceSession.optimise`` gives it; a plain ONNX file is
            read as it stands, with no operator merged into another.

    Raises:
        DeviceJobError: the bytes are no ONNX graph, or an input has no fixed shape.

    Example:
        >>> peak_memory(network).total_bytes                            # doctest: +SKIP
        1203456
    """
    from hwsearch.device.onnx_kernels import UNREADABLE, Reader, first_words, read_model

    reader = Reader(read_model(optimised))
    kernels = reader.kernels()
    tensors = reader.tensors
    sizes = {name: (shape, element_bytes(tensors.dtype(name))[0]) for name, shape in reader.shapes.items()}
    graph = reader.graph
    given = [value.name for value in graph.input if value.name not in reader.constants]
    try:
        peak, step = _peak(graph, {*given, *reader.constants}, sizes)
    except UNREADABLE as error:
        raise DeviceJobError(f"the graph is damaged ({first_words(error)}); export the model again") from None
    used = {name for node in _nodes(graph) for name in node.input}
    return Memory(
        peak_activation_bytes=peak,
        input_bytes=sum(_bytes(sizes[name]) for name in given),
        weight_bytes=sum(_bytes(sizes[name]) for name in reader.constants if name in used),
        node=kernels[step].node if kernels else "",
    )


_Size = tuple[tuple[int, ...], float]
_Sizes = Mapping[str, _Size]


def _bytes(size: tuple[tuple[int, ...], float]) -> int:
    return math.ceil(math.prod(size[0]) * size[1])


def _nodes(graph: Any) -> Iterable[Any]:
    """The nodes of a graph and of all graphs inside it."""
    for node in graph.node:
        yield node
        for body in _bodies(node):
            yield from _nodes(body)


def _bodies(node: Any) -> list[Any]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _from_outside(node: Any) -> list[str]:
    """Tensors that the bodies of a node read from the graph around it, once each."""
    found: dict[str, None] = {}
    for body in _bodies(node):
        own = {value.name for value in [*body.input, *body.initializer]}
        own.update(name for inner in body.node for name in inner.output)
        names = [name for inner in body.node for name in [*inner.input, *_from_outside(inner)]]
        found.update(
            dict.fromkeys(name for name in [*names, *(v.name for v in body.output)] if name and name not in own)
        )
    return list(found)


class _Plan:
    """Buffers of one graph while its nodes are walked in order; sizes are (shape, bytes an element)."""

    def __init__(self, graph: Any, lasting: set[str], sizes: _Sizes) -> None:
        self.sizes = sizes
        self.lasting = lasting
        self.results = {value.name for value in graph.output}
        self.uses: Counter[str] = Counter(lasting)  # one that never ends: the caller holds them
        for node in graph.node:
            self.uses.update(name for name in [*node.input, *_from_outside(node), *node.output] if name)
        self.uses.update(self.results)
        self.root: dict[str, str] = {name: name for name in lasting}  # whose buffer a tensor lives in
        self.free: dict[_Size | None, list[str]] = {}  # roots by size, the one that became free last is the last
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.read: set[str] = set()  # buffers are given back after a reader; without one they stay to the end

    def run(self, step: int, node: Any) -> None:
        """Give the node's outputs their buffers, then let go what nobody reads any more."""
        for place, name in enumerate(node.output):
            if name:
                root = name if name in self.results else self._shared(node, place) or self._dead(name) or name
                self.root[name] = root
                if name in self.lasting:
                    continue
                if root == name:
                    self.first[name] = step
                else:
                    self.uses[root] += self.uses[name]
        readers = len(node.input) + len(outside := _from_outside(node))
        for place, name in enumerate([*node.input, *outside, *node.output]):
            root = self.root.get(name, "")
            if not root:
                continue
            self.uses[root] -= 1
            self.last[root] = step
            if place < readers:
                self.read.add(root)
            if not self.uses[root] and root not in self.lasting:
                self.free.setdefault(self.sizes.get(root), []).append(root)

    def _shared(self, node: Any, place: int) -> str | None:
        """The buffer of an input that this output may or must share."""
        if place:
            return None
        if node.op_type in _VIEWS and node.input[0] in self.root:
            return self.root[node.input[0]]
        at = _IN_PLACE.get(node.op_type)
        if node.op_type == "Conv" and node.domain.endswith("nchwc"):
            at = _BLOCKED_SUM
        if at is None or at >= len(node.input) or node.input[at] not in self.root:
            return None
        root = self.root[node.input[at]]
        same = self.sizes.get(node.input[at]) == self.sizes.get(node.output[place])
        return root if same and self.uses[root] == 1 and root not in self.lasting else None

    def _dead(self, name: str) -> str | None:
        """A free buffer of exactly the same shape and element size, which is no longer free then."""
        wanted = self.sizes.get(name)
        free = self.free.get(wanted) if wanted is not None and wanted[0] else None
        return free.pop() if free else None


def _peak(graph: Any, lasting: set[str], sizes: _Sizes) -> tuple[int, int]:
    """(most bytes of buffers at once, at which node); bodies count at the node that runs them."""
    plan = _Plan(graph, lasting, sizes)
    inside = []
    for step, node in enumerate(graph.node):
        plan.run(step, node)
        parts = []
        for body in _bodies(node):
            own = {*lasting, *plan.root} | {value.name for value in [*body.input, *body.initializer]}
            if node.op_type == "If":
                own |= {value.name for value in body.output}  # written straight into the node's own outputs
            parts.append(_peak(body, own, sizes)[0])
        inside.append(max(parts, default=0))
    if not inside:
        return 0, 0
    change = [0] * (len(inside) + 1)
    for root, first in plan.first.items():
        size = _bytes(sizes.get(root, ((), 0.0)))
        change[first] += size
        # what the network gives back stays, and so does what nobody reads
        stays = root in plan.results or root not in plan.read
        change[len(inside) if stays else plan.last[root] + 1] -= size
    best, at, now = 0, 0, 0
    for step, more in enumerate(inside):
        now += change[step]
        if now + more > best:
            best, at = now + more, step
    return best, at
