"""The simulated runtime's optimiser: ONNX -> fused, blocked kernels, saved as JSON of its own (host and agent alike).

It does what real CPU runtimes were seen to do, by shape:

* channels are padded to blocks: the stairs;
* a dense convolution runs blocked when its input channels are few (a stem) or a multiple of 4; a depth-wise one when
  its channels are a multiple of 4; grouped ones never. What leaves the blocked path gets reorder nodes around it;
* an activation is fused into the convolution before it; a residual add too, where both sides are blocked;
* batch normalisation is folded into the convolution before it;
* a layer between dequantised inputs (QDQ) runs in 8 bits, and the pairs around it are gone; a float weight stays float.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from hwsearch.device.onnx_kernels import UNREADABLE, Reader, first_words, spread
from hwsearch.errors import DeviceJobError
from hwsearch.graph.kernel import Kernel

SCHEMA = "hwsearch.simulated-graph"
#: Element types of a layer in 8 bits.
EIGHT_BITS = "uint8*int8"
_ACTIVATIONS = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"}
_DENSE = ("conv", "conv_first", "pointwise")
#: Families that run in whichever layout their input has.
_EITHER = ("elementwise", "pool", "global_pool", "concat")


@dataclass(eq=False)
class _Step:
    """A node, possibly several fused ones, before layouts are chosen."""

    position: int
    kernel: Kernel
    inputs: list[str]  # activations only
    output: str


def optimised_graph(network: bytes, *, block: int) -> bytes:
    """The optimised graph of an ONNX network, serialised.

    Raises:
        DeviceJobError: the bytes are no ONNX graph, hold no node, or an input has no fixed shape.
    """
    import onnx

    try:
        model = onnx.load_from_string(network)
    except Exception as error:
        raise DeviceJobError(f"no ONNX file: {' '.join(str(error).split()) or 'empty'}") from None
    if not model.graph.node:
        raise DeviceJobError("no ONNX file: the graph holds no node")
    try:
        eight = _merge_eight_bits(model)
        reader = Reader(model)
        kernels = _layouts(_fused(model, reader, eight), reader.shapes, block)
    except UNREADABLE as error:
        raise DeviceJobError(f"the graph is damaged ({first_words(error)}); export the model again") from None
    numbered = [replace(kernel, node=f"{index:03d}_{kernel.op}") for index, kernel in enumerate(kernels)]
    document = {"schema": SCHEMA, "version": 1, "kernels": [_plain(kernel) for kernel in numbered]}
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _merge_eight_bits(model: Any) -> set[str]:
    """Take quantising and dequantising nodes out of a QDQ graph, in place; outputs of the layers that run in 8 bits.

    Reading the input and writing the output in 8 bits costs nothing here: a pair at the border is dropped too.
    """
    import onnx
    from onnx import numpy_helper

    constants = {item.name: item for item in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    same: dict[str, str] = {}
    kept, eight = [], set()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            same[node.output[0]] = same.get(node.input[0], node.input[0])
            continue
        if node.op_type == "DequantizeLinear":
            source = node.input[0]
            if source in constants:
                weight = numpy_helper.to_array(constants[source]).astype("float32")
                model.graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
            else:
                same[node.output[0]] = same.get(source, source)
            continue
        wholes = [maker[name].op_type == "DequantizeLinear" for name in node.input[:2] if name in maker]
        if len(wholes) == 2 and all(wholes):
            eight.add(node.output[0])
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
        kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    if len(kept) < len(model.graph.node):
        results = {same[value.name]: value.name for value in model.graph.output if value.name in same}
        for node in kept:
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    names[place] = results.get(name, name)
        eight = {results.get(name, name) for name in eight}
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return eight


def read_graph(data: bytes) -> tuple[Kernel, ...]:
    """The kernels of a graph that :func:`optimised_graph` wrote.

    Raises:
        DeviceJobError: the bytes are something else.
    """
    try:
        document = json.loads(data)
        if document["schema"] != SCHEMA or document["version"] != 1:
            raise ValueError(f"schema {document['schema']} version {document['version']}")
        return tuple(_kernel(values) for values in document["kernels"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DeviceJobError(f"the optimised graph is not one of the simulated runtime ({error})") from None


def _plain(kernel: Kernel) -> dict[str, Any]:
    """As ``asdict``, which copies deeply and takes longer than all the rest."""
    return {field.name: getattr(kernel, field.name) for field in fields(kernel)}


def _kernel(values: dict[str, Any]) -> Kernel:
    return Kernel(**values | {"fused": tuple(values["fused"]), "source": tuple(values["source"])})


def _fused(model: Any, reader: Reader, eight: set[str]) -> list[_Step]:
    """Nodes with their tails merged, in an order in which every input exists; those that make ``eight`` in 8 bits."""
    steps: list[_Step] = []
    made_by: dict[str, _Step] = {}
    readers = Counter(name for node in model.graph.node for name in node.input)
    readers.update(value.name for value in model.graph.output)
    for node, kernel in zip(model.graph.node, reader.kernels(), strict=True):
        inputs = [name for name in node.input if name and name not in reader.constants]
        if node.output[0] in eight:
            kernel = replace(kernel, dtype=EIGHT_BITS)
        target, tail = _host(node.op_type, inputs, made_by, readers)
        if target is None:
            target = _Step(len(steps), kernel, inputs, node.output[0])
            steps.append(target)
        else:
            if tail == ("add",):
                target.inputs.append(inputs[0] if inputs[1] == target.output else inputs[1])
            # the source stays the convolution's: its tail has no parameters of its own
            target.kernel = replace(target.kernel, fused=target.kernel.fused + tail)
            target.output = node.output[0]
        for name in node.output:
            made_by[name] = target
    return steps


def _host(
    op: str, inputs: list[str], made_by: Mapping[str, _Step], readers: Mapping[str, int]
) -> tuple[_Step | None, tuple[str, ...]]:
    """(the convolution that takes this node in, or None; what it adds to the convolution's tail)."""
    makers = [made_by.get(name) for name in inputs]
    # an add goes into its later side: the earlier one exists by then and becomes a further input
    last = max((maker for maker in makers if maker is not None), key=lambda maker: maker.position, default=None)
    if last is None or last.kernel.family not in (*_DENSE, "depthwise", "grouped") or readers[last.output] != 1:
        return None, ()
    fused = last.kernel.fused
    if op == "BatchNormalization" and not fused:
        return last, ()
    if op in _ACTIVATIONS and fused in ((), ("add",)):
        return last, (op.lower(),)
    if (
        op == "Add"
        and len(inputs) == 2
        and not fused
        and last.kernel.family in _DENSE
        and all(map(_made_blocked, makers))
    ):
        return last, ("add",)
    return None, ()


def _blocked(kernel: Kernel) -> bool:
    """Whether a convolution runs in the blocked layout."""
    if kernel.family == "conv_first":
        return True
    if kernel.family in ("conv", "pointwise", "depthwise"):
        return kernel.in_channels % 4 == 0
    return False


def _made_blocked(step: _Step | None) -> bool:
    """Whether a tensor comes out of a blocked convolution (looking no further back)."""
    return step is not None and _blocked(step.kernel)


def _layouts(steps: list[_Step], shapes: Mapping[str, tuple[int, ...]], block: int) -> list[Kernel]:
    """Kernels with layouts and padded channels, reorders put in where a layout changes."""

    def padded(channels: int) -> int:
        return -(-channels // block) * block

    kernels: list[Kernel] = []
    layout: dict[str, str] = {}
    reordered: set[tuple[str, str]] = set()

    def want(name: str, wanted: str) -> None:
        """Puts a reorder before a reader of another layout, once per tensor."""
        have = layout.get(name, "nchw")
        if have == wanted or (name, wanted) in reordered:
            return
        reordered.add((name, wanted))
        batch, channels, height, width = spread(shapes.get(name, ()))
        to_blocked = wanted == "nchwc"
        kernels.append(
            Kernel(
                family="reorder",
                op="ReorderInput" if to_blocked else "ReorderOutput",
                layout_in=have,
                layout_out=wanted,
                batch=batch,
                in_channels=channels if to_blocked else padded(channels),
                in_height=height,
                in_width=width,
                out_channels=padded(channels) if to_blocked else channels,
                out_height=height,
                out_width=width,
                source=(name,),
            )
        )

    for step in steps:
        kernel = step.kernel
        out = "nchw"
        if kernel.family in _EITHER:
            blocked = bool(step.inputs) and all(layout.get(name) == "nchwc" for name in step.inputs)
            if kernel.family == "concat" and kernel.out_channels % block:
                blocked = False  # the seams of the parts would not lie on blocks
            out = "nchwc" if blocked else "nchw"
        elif _blocked(kernel):
            out = "nchwc"
        reads_plain = kernel.family == "conv_first"
        for position, name in enumerate(step.inputs):
            want(name, "nchw" if reads_plain and position == 0 else out)
        layout_in = "nchw" if reads_plain else out
        changes: dict[str, Any] = {"layout_in": layout_in, "layout_out": out}
        if out == "nchwc":
            changes["out_channels"] = padded(kernel.out_channels)
            if layout_in == "nchwc":
                changes["in_channels"] = padded(kernel.in_channels)
            if kernel.family == "depthwise":
                changes["groups"] = padded(kernel.groups)
        kernels.append(replace(kernel, **changes))
        layout[step.output] = out
    return kernels
