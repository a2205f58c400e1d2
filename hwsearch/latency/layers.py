"""Which layer of the model each executed kernel serves, and how many channels that layer really has.

A runtime fuses, renames and pads; an engineer thinks in layers. Names are followed from the *un-optimised* ONNX file: a
kernel belongs to the layer whose parameters it reads; an activation, a sum or a pool to the layer before it (it is that
layer's tail); a reorder to the layer after it, for which the layout is changed. So every kernel has exactly one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hwsearch.graph.kernel import Kernel

#: Position of the weight among the inputs, and the axis of its output channels (Gemm: of a transposed weight).
_WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": -1}
#: Families that read the parameters of a layer.
_PARAMETRIC = ("conv", "conv_first", "pointwise", "depthwise", "grouped", "conv_transpose", "gemm")


@dataclass(frozen=True)
class LayerNames:
    """What an ONNX file tells of its layers.

    Attributes:
        owner: node or tensor or parameter owner to the layer it belongs to.
        channels: output channels of each layer with a weight, as the model has them (not padded).
    """

    owner: dict[str, str]
    channels: dict[str, int]

    @classmethod
    def of(cls, onnx_bytes: bytes) -> LayerNames:
        """Read the names of an ONNX file, in any order of its exporter (weights behind casts and quantisation too)."""
        import onnx

        graph = onnx.load_from_string(onnx_bytes).graph
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        constant = {name: name for name in shapes}  # tensor made of parameters alone, to the first of them
        owner: dict[str, str] = {}
        place: dict[str, int] = {}
        channels: dict[str, int] = {}
        for number, node in enumerate(graph.node):
            if node.input and all(name in constant for name in node.input if name):
                # A parameter on its way: dequantised, transposed, cast.
                constant |= dict.fromkeys(node.output, next(constant[name] for name in node.input if name))
                continue
            parameters = [constant[name] for name in node.input if name in constant]
            layer = _layer(node, parameters)
            if layer is None:
                makers = [owner[name] for name in node.input if name in owner]
                # The latest: where two branches meet, the sum is the tail of the one that ends last.
                layer = max(makers, key=lambda name: place.get(name, -1), default=None)
            if layer is None:
                continue
            place.setdefault(layer, number)
            if (size := _out_channels(node, [shapes.get(name, ()) for name in parameters])) is not None:
                channels[layer] = size
            owner |= dict.fromkeys([layer, node.name, *node.output], layer)
        owner.pop("", None)
        return cls(owner, channels)

    def layers_of(self, kernels: Sequence[Kernel]) -> list[str]:
        """The layer of each kernel, in their order; "" where the network has no layer at all."""
        found = [self._own(kernel) for kernel in kernels]
        after: str | None = None
        for at in range(len(kernels) - 1, -1, -1):
            if kernels[at].family == "reorder":
                found[at] = after
            elif found[at] is not None:
                after = found[at]
        before: str | None = None
        for at, name in enumerate(found):
            before = name if name is not None else before
            found[at] = before
        first = next((name for name in found if name), "")
        return [name or first for name in found]

    def _own(self, kernel: Kernel) -> str | None:
        for name in kernel.source:
            if name in self.owner:
                return self.owner[name]
        # A layer of its own all the same: its parameters are read here and nowhere else.
        return kernel.source[0] if kernel.source and kernel.family in _PARAMETRIC else None


def _layer(node: Any, parameters: list[str]) -> str | None:
    """The layer that a node's own parameters belong to, or None."""
    dotted = [name.rpartition(".")[0] for name in parameters if "." in name and not name.startswith("/")]
    if dotted:
        return dotted[0]
    if node.op_type not in _WEIGHTED or not parameters:
        return None
    # Exporters that rename parameters keep the module's path in the node's name: /layer1/layer1.0/conv1/Conv.
    path = node.name.strip("/").removesuffix(f"/{node.op_type}")
    return str(path or node.output[0])


def _out_channels(node: Any, shapes: list[tuple[int, ...]]) -> int | None:
    """Output channels of a node with a weight, or None."""
    shape = next((shape for shape in shapes if len(shape) > 1), None)
    if shape is None or node.op_type not in _WEIGHTED:
        return None
    attributes = {item.name: item.i for item in node.attribute}
    if node.op_type == "Gemm" and attributes.get("transB"):
        return int(shape[0])
    groups = attributes.get("group", 1) if node.op_type == "ConvTranspose" else 1
    return int(shape[_WEIGHTED[node.op_type]]) * int(groups)
