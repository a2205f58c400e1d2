"""An ONNX graph, as a runtime optimised it, read as kernels (host side).

ONNX's own shape inference knows nothing of ORT's operators (blocked ``nchwc`` convolutions, reorders, fused
convolutions, 8-bit operators), so shapes are propagated node by node (``onnx_operators``, ``onnx_products``); what has
no rule there is asked of ONNX's inference for that one operator (``onnx_shapes``). Channel counts are those that run: a
blocked tensor of 30 channels has 32.

Every node becomes a kernel. An operator that nobody mapped has the family ``other``: it is listed, never dropped. So
has a node with a graph inside it (If, Loop, Scan), since what it runs depends on values: it is followed by the kernels
of its body, the heavier branch of an If and as many rounds of a Loop as a constant says, at least one.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from hwsearch.device.onnx_operators import describe
from hwsearch.device.onnx_shapes import Node, Tensors, channels_first, spread
from hwsearch.errors import DeviceJobError
from hwsearch.graph.kernel import Kernel

__all__ = ["Reader", "kernels_of", "spread"]

_WITH_BODIES = ("If", "Loop", "Scan")
#: Rounds of a loop that are listed at most; a longer one is as unknown as one that depends on values.
_MOST_ROUNDS = 64


#: What reading a graph that breaks ONNX's own rules ends with.
UNREADABLE = (LookupError, ValueError, TypeError, ArithmeticError, AttributeError, RecursionError)


def first_words(error: BaseException) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.150}"


def kernels_of(data: bytes) -> tuple[Kernel, ...]:
    """The kernels of a serialised ONNX graph, one per node, in the order of its nodes; bodies follow their nodes.

    Raises:
        DeviceJobError: the bytes are no ONNX graph, or an input has no fixed shape.
    """
    return Reader(read_model(data)).executed()


def read_model(data: bytes) -> Any:
    """The ModelProto of a serialised ONNX graph.

    Raises:
        DeviceJobError: the bytes are no ONNX graph.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_from_string(data)
    except DecodeError as error:
        raise DeviceJobError(f"the optimised graph is no ONNX file ({' '.join(str(error).split())})") from None
    return model


class Reader:
    """Walks one graph; knows shape, layout and element type of every tensor met so far.

    Attributes:
        tensors: what is known of each tensor; complete after ``kernels``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.graph = model.graph
        try:
            self.tensors = Tensors(model)
        except UNREADABLE as error:
            raise DeviceJobError(f"the graph is damaged ({first_words(error)}); export the model again") from None
        self._bodies: dict[str, tuple[Kernel, ...]] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor met so far."""
        return self.tensors.shapes

    @property
    def constants(self) -> dict[str, Any]:
        """TensorProto of each constant met so far."""
        return self.tensors.constants

    @property
    def guesses(self) -> dict[str, str]:
        """Tensors whose shape is a guess, and why; their kernels are ``other``."""
        return self.tensors.guesses

    def kernels(self) -> tuple[Kernel, ...]:
        """One kernel per node of the graph itself."""
        return tuple(self._kernel(f"{index:03d}_", node) for index, node in enumerate(self.graph.node))

    def executed(self) -> tuple[Kernel, ...]:
        """One kernel per node that is executed: bodies of If, Loop and Scan after the node that runs them."""
        found: list[Kernel] = []
        for kernel in self.kernels():
            found += [kernel, *self._bodies.get(kernel.node, ())]
        return tuple(found)

    def _kernel(self, prefix: str, proto: Any) -> Kernel:
        """The kernel of a node.

        Raises:
            DeviceJobError: the node is not what its operator asks for: no such input, a stride of 0, another rank.
        """
        label = f"{prefix}{proto.op_type}"
        try:
            return self._described(label, prefix, proto)
        except UNREADABLE as error:
            name = f"{label} ({proto.name})" if proto.name else label
            raise DeviceJobError(f"the node {name} is damaged ({first_words(error)}); export the model again") from None

    def _described(self, label: str, prefix: str, proto: Any) -> Kernel:
        tensors, node = self.tensors, Node.of(proto)
        if node.op in _WITH_BODIES and node.standard:
            self._bodies[label] = self._body(label, node)
        found = describe(node, tensors)
        main = node.input(found.main)
        layout_in = found.layout_in or tensors.layout(main)
        layout = found.layout or layout_in
        read = tensors.dtype(main)
        # what inference found for the output comes before the rule that outputs are as inputs
        written = found.dtype_out or tensors.dtypes.get(node.outputs[0] if node.outputs else "") or read
        fields = dict(found.fields)
        in_shape = fields.pop("in_shape", None) or _logical(tensors.shapes.get(main, found.out), layout_in)
        out_shape = fields.pop("out_shape", None) or _logical(found.out, layout)
        values = {**_dimensions(in_shape, out_shape), **fields}
        kernel = Kernel(
            family=found.family,
            op=node.op,
            dtype=_dtype(node, tensors, read, found.weight, written),
            layout_in=layout_in,
            layout_out=layout,
            node=label,
            source=self._source(node),
            **values,
        )
        for position, name in enumerate(node.outputs):
            if name and (position == 0 or name not in tensors.shapes):
                tensors.shapes[name] = found.out
            tensors.layouts[name] = layout
            if position == 0:
                tensors.dtypes[name] = written
            else:
                tensors.dtypes.setdefault(name, written)
        return kernel

    def _body(self, label: str, node: Node) -> tuple[Kernel, ...]:
        """The kernels that a node with graphs inside it runs, as far as constants tell."""
        graphs = {name: value for name, value in node.attributes.items() if hasattr(value, "node")}
        lists = {}
        for name, graph in graphs.items():
            self.tensors.add_graph(graph)
            self._enter(node, graph)
            kernels: list[Kernel] = []
            for index, proto in enumerate(graph.node):
                kernel = self._kernel(f"{label}.{name}.{index:03d}_", proto)
                kernels += [kernel, *self._bodies.get(kernel.node, ())]
            lists[name] = kernels
            self._leave(node, graph)
        if node.op == "If":
            return tuple(max(lists.values(), key=lambda kernels: sum(k.macs + k.memory_bytes for k in kernels)))
        rounds = self._rounds(node)
        return tuple(
            replace(kernel, node=f"{kernel.node}#{turn}") if turn else kernel
            for turn in range(rounds)
            for kernel in lists["body"]
        )

    def _enter(self, node: Node, graph: Any) -> None:
        """Make a body's inputs known: counter, condition and carried values of a Loop; states and slices of a Scan."""
        tensors = self.tensors
        given = [value.name for value in graph.input]
        if node.op == "Loop":
            for name, kind in zip(given[:2], ("int64", "bool"), strict=False):
                tensors.set(name, (), kind)
            outer, given = node.inputs[2:], given[2:]
        else:
            outer = node.inputs
        slices = node.number("num_scan_inputs", 0)
        axes = node.numbers("scan_input_axes") or [0] * slices
        for place, (inner, name) in enumerate(zip(given, outer, strict=False)):
            shape = tensors.shape(name)
            scanned = place - (len(outer) - slices)
            if node.op == "Scan" and scanned >= 0 and shape:
                axis = axes[scanned] % len(shape)
                shape = shape[:axis] + shape[axis + 1 :]
            tensors.set(inner, shape, tensors.dtype(name))

    def _leave(self, node: Node, graph: Any) -> None:
        """Sizes of the node's outputs from those of its body: as they are, or stacked over the rounds."""
        tensors = self.tensors
        results = [value.name for value in graph.output][1 if node.op == "Loop" else 0 :]
        if node.op == "If":
            carried = len(results)
        elif node.op == "Loop":
            carried = len(node.inputs) - 2
        else:
            carried = len(node.inputs) - node.number("num_scan_inputs", 0)
        for place, (name, inner) in enumerate(zip(node.outputs, results, strict=False)):
            if inner in tensors.shapes:
                shape = tensors.shapes[inner] if place < carried else (self._rounds(node), *tensors.shapes[inner])
                tensors.set(name, shape, tensors.dtype(inner))

    def _rounds(self, node: Node) -> int:
        """How often a body runs: what a constant or the scanned size says, else once."""
        if node.op == "Scan":
            slices = node.number("num_scan_inputs", 1)
            shape = self.tensors.shape(node.inputs[len(node.inputs) - slices])
            axis = (node.numbers("scan_input_axes") or [0])[0]
            count = shape[axis] if shape else 1
        else:
            count = next(iter(self.tensors.value(node.input(0))), 1)
        return count if 0 < count <= _MOST_ROUNDS else 1

    def _source(self, node: Node) -> tuple[str, ...]:
        """The layers a node came from: owners of its parameters, else its own name without what ORT added.

        A reorder is named after the tensor that it packs or unpacks: neither order nor name of its node say which.
        """
        if node.op in ("ReorderInput", "ReorderOutput"):
            tensor = node.inputs[0] if node.op == "ReorderInput" else node.outputs[0]
            return (re.sub(r"(_token_\d+)+$", "", tensor),)
        owners = [
            name.rpartition(".")[0]
            for name in node.inputs
            if name in self.constants and "." in name and not name.startswith("reorder")
        ]
        own = re.sub(r"(_nchwc|_token_\d+)+$", "", node.proto.name)
        return tuple(dict.fromkeys(owners)) or ((own,) if own else ())


def _logical(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """A tensor's shape with its channels second."""
    return channels_first(shape) if layout == "nhwc" else shape


def _dimensions(in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> dict[str, Any]:
    """The kernel's fields of two shapes; where they differ in the batch, all axes are counted behind it."""
    if spread(in_shape)[0] != spread(out_shape)[0]:
        in_shape, out_shape = (1, *in_shape), (1, *out_shape)
    batch, channels, height, width = spread(in_shape)
    _, out_channels, out_height, out_width = spread(out_shape)
    return {
        "batch": batch, "in_channels": channels, "in_height": height, "in_width": width,
        "out_channels": out_channels, "out_height": out_height, "out_width": out_width,
    }  # fmt: skip


def _dtype(node: Node, tensors: Tensors, read: str, weight: int | None, written: str) -> str:
    """A kernel's ``dtype``: element types of input, weights and output, those left out that are the input's."""
    text = read
    if node.op == "MatMulNBits":
        text += f"*int{node.number('bits', 4)}"
    elif weight is not None and node.input(weight) in tensors.dtypes and tensors.dtype(node.input(weight)) != read:
        text += f"*{tensors.dtype(node.input(weight))}"
    return text if written == read else f"{text}>{written}"
