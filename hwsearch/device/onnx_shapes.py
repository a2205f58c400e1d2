"""``Tensors``: shape, layout, element type and, where it is constant, value of every tensor of an ONNX graph.

Shapes of operators without a rule in ``onnx_operators`` come from ONNX's own inference, one node at a time; whole
numbers that a graph computes from shapes (as the TorchScript exporter writes them) are computed on the way. Where
nothing tells a shape, that of the main input is taken and the guess is kept in ``guesses``, with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from hwsearch.errors import DeviceJobError

Shape: TypeAlias = tuple[int, ...]

NCHWC_DOMAIN = "com.microsoft.nchwc"
STANDARD_DOMAINS = ("", "ai.onnx")

_NAMES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16", 21: "uint4", 22: "int4",
}  # fmt: skip
_ELEMENTS = {name: code for code, name in _NAMES.items()}

#: Operators whose value is computed where all inputs are small constants: what exporters compute shapes with.
_SHAPE_ARITHMETIC = {
    "Add", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Flatten", "Floor", "Gather",
    "Identity", "Max", "Min", "Mod", "Mul", "Neg", "Range", "ReduceProd", "Reshape", "Slice", "Squeeze", "Sub",
    "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
_SMALL = 256


@dataclass(frozen=True)
class Node:
    """A node's texts and attributes as plain values.

    Attributes:
        proto: the node itself; subgraphs stay in it.
    """

    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    proto: Any

    @classmethod
    def of(cls, proto: Any) -> Node:
        """The node of a NodeProto."""
        import onnx

        values = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
        return cls(proto.op_type, proto.domain, tuple(proto.input), tuple(proto.output), values, proto)

    def input(self, index: int) -> str:
        """Name of an input, "" where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def number(self, name: str, default: int) -> int:
        """A whole-number attribute."""
        return int(self.attributes.get(name, default))

    def numbers(self, name: str) -> list[int] | None:
        """A list of whole numbers, or None where the attribute is not there."""
        values = self.attributes.get(name)
        return None if values is None else [int(value) for value in values]

    def text(self, name: str, default: str = "") -> str:
        """A text attribute."""
        value = self.attributes.get(name)
        return default if value is None else bytes(value).decode()

    @property
    def standard(self) -> bool:
        """Whether the operator is ONNX's own."""
        return self.domain in STANDARD_DOMAINS

    @property
    def blocked(self) -> bool:
        """Whether the operator is one of ORT's blocked ones."""
        return self.domain == NCHWC_DOMAIN


class Tensors:
    """What is known of the tensors met so far; a model's inputs and initialisers to begin with.

    Raises:
        DeviceJobError: an input has an open dimension.
    """

    def __init__(self, model: Any) -> None:
        import onnx

        self._onnx = onnx
        self.model = model
        self.opset = {item.domain: int(item.version) for item in model.opset_import}
        self.shapes: dict[str, Shape] = {}
        self.layouts: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}
        self.constants: dict[str, Any] = {}  # the TensorProto; turned into an array only where a value is needed
        # what the file claims about its tensors is asked last: ORT writes wrong sizes for some pools with ceil_mode
        self.declared: dict[str, Shape] = {}
        self.guesses: dict[str, str] = {}
        self.on_host: set[str] = set()  # in a graph for a GPU, tensors that its host holds
        self.channels_last = {
            node.input[0]
            for node in model.graph.node
            if node.op_type == "NhwcMaxPool" or any(a.name == "channels_last" and a.i == 1 for a in node.attribute)
            if node.op_type not in ("ReorderInput", "ReorderOutput")
        }
        self.add_graph(model.graph)
        self.block = self._block()
        for value in model.graph.input:
            if value.name in self.constants:
                continue
            sizes = sizes_of(value.type.tensor_type)
            if not all(sizes):
                raise DeviceJobError(f"input {value.name!r} has an open dimension; export with fixed sizes")
            self.set(value.name, sizes, dtype_name(value.type.tensor_type.elem_type))

    def add_graph(self, graph: Any) -> None:
        """The constants and declared sizes of a graph or subgraph."""
        for tensor in graph.initializer:
            self._constant(tensor.name, tensor)
        for value in [*graph.value_info, *graph.output]:
            tensor = value.type.tensor_type
            # An output without a shape reads like a scalar: it tells nothing.
            if tensor.HasField("shape") and value.name not in self.declared:
                self.declared[value.name] = sizes_of(tensor)

    def set(self, name: str, shape: Shape, dtype: str = "float32", layout: str = "nchw") -> None:
        """Make a tensor known."""
        self.shapes[name], self.dtypes[name], self.layouts[name] = shape, dtype, layout

    def shape(self, name: str) -> Shape:
        """A tensor's shape, () where it is unknown."""
        return self.shapes.get(name, ())

    def dtype(self, name: str) -> str:
        """A tensor's element type."""
        return self.dtypes.get(name, "float32")

    def layout(self, name: str) -> str:
        """A tensor's layout: ``nchw`` (plain), ``nchwc`` (blocked) or ``nhwc``."""
        return self.layouts.get(name, "nchw")

    def value(self, name: str) -> list[int]:
        """An integer constant's values, empty where the tensor is no constant."""
        tensor = self.constants.get(name)
        return [] if tensor is None else [int(item) for item in self._onnx.numpy_helper.to_array(tensor).ravel()]

    def padded(self, tensor: str, channels: int) -> int:
        """Channels of a blocked tensor: what the weight of a reader says, else the next multiple of the block."""
        for node in self.model.graph.node:
            if node.domain == NCHWC_DOMAIN and node.op_type == "Conv" and node.input[0] == tensor:
                groups = next((item.i for item in node.attribute if item.name == "group"), 1)
                return int(self.shapes[node.input[1]][1] * groups)
        # only convolutions pad; pooling and the like are blocked only where whole blocks come in
        return channels if channels % 8 == 0 else -(-channels // self.block) * self.block

    def _block(self) -> int:
        """Channels per block: the largest power of two up to 16 that divides every blocked convolution's outputs."""
        widths = [
            self.shapes[node.input[1]][0]
            for node in self.model.graph.node
            if node.domain == NCHWC_DOMAIN and node.op_type == "Conv"
        ]
        return math.gcd(16, *widths) if widths else 8

    def inferred(self, node: Node, main: Shape) -> Shape:
        """Shape of a node's first output, for an operator without a rule; its further outputs become known with it.

        Args:
            node: the node.
            main: the shape to guess where nothing tells.
        """
        reason = self.learn(node)
        first = node.outputs[0] if node.outputs else ""
        if first and first not in self.shapes:
            self.guesses[first] = f"{node.op}: {reason or 'its shape depends on values'}"
        return self.shapes.get(first, main)

    def learn(self, node: Node) -> str:
        """Whatever inference, arithmetic or the file itself tells of a node's outputs; what is missing, or ""."""
        self.calculate(node)
        reason = self._infer(node)
        for name in node.outputs:
            declared = self.declared.get(name)
            if name not in self.shapes and declared is not None and all(declared):
                self.shapes[name] = declared
        return reason

    def calculate(self, node: Node) -> None:
        """Make a node's output a constant where it is one: Constant nodes, and small sums made of shapes."""
        to_tensor = self._onnx.numpy_helper.from_array
        if node.op == "Constant" and node.standard:
            value = node.attributes.get("value")
            if value is None:
                plain = next((v for k, v in node.attributes.items() if k.startswith("value_")), None)
                if plain is None or isinstance(plain, bytes):
                    return
                whole = np.asarray(plain).dtype.kind in "iu"
                value = to_tensor(np.asarray(plain, np.int64 if whole else np.float32))
            self._constant(node.outputs[0], value)
        elif node.op == "Shape" and node.standard and node.inputs[0] in self.shapes:
            sizes = self.shapes[node.inputs[0]]
            part = sizes[slice(node.number("start", 0), node.attributes.get("end"))]
            self._constant(node.outputs[0], to_tensor(np.asarray(part, np.int64)))
        elif node.op in _SHAPE_ARITHMETIC and node.standard and len(node.outputs) == 1:
            names = [name for name in node.inputs if name]
            if not names or any(name not in self.constants for name in names):
                return
            if max(math.prod(self.shapes[name]) for name in names) > _SMALL:
                return
            found = self._evaluate(node, names)
            if found is not None and found.size <= _SMALL:
                self._constant(node.outputs[0], to_tensor(found))

    def _constant(self, name: str, tensor: Any) -> None:
        self.constants[name] = tensor
        self.shapes[name] = tuple(tensor.dims)
        self.dtypes[name] = dtype_name(tensor.data_type)

    def _evaluate(self, node: Node, names: Sequence[str]) -> np.ndarray | None:
        """A node's value by ONNX's reference, or None where the reference refuses."""
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        feeds = {name: self._onnx.numpy_helper.to_array(self.constants[name]) for name in names}
        inputs = [
            helper.make_tensor_value_info(name, self.constants[name].data_type, list(feeds[name].shape))
            for name in dict.fromkeys(names)
        ]
        graph = helper.make_graph([node.proto], "one", inputs, [helper.make_empty_tensor_value_info(node.outputs[0])])
        imports = [helper.make_opsetid("", self.opset.get("", 17))]
        try:
            (result,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=imports)).run(None, feeds)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None  # then its shape is still inferred, and guessed only where that fails
        return np.asarray(result)

    def _infer(self, node: Node) -> str:
        """ONNX's inference for one node's outputs; the reason where it gives nothing, else ""."""
        onnx = self._onnx
        if not node.standard:
            return f"no shape inference for {node.domain}"
        names = [name for name in node.inputs if name]
        if unknown := [name for name in names if name not in self.shapes]:
            return f"the shape of its input {unknown[0]!r} is not known"
        types = {
            name: onnx.helper.make_tensor_type_proto(_ELEMENTS.get(self.dtype(name), 1), self.shapes[name])
            for name in names
        }
        data = {name: self.constants[name] for name in names if name in self.constants}
        try:
            schema = onnx.defs.get_schema(node.op, self.opset.get("", 17), "")
            imports = list(self.model.opset_import)
            found = onnx.shape_inference.infer_node_outputs(schema, node.proto, types, data, opset_imports=imports)
        except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
            return " ".join(str(error).split())[:200]
        for name, kind in found.items():
            if kind.tensor_type.HasField("shape") and all(sizes_of(kind.tensor_type)):
                self.shapes[name] = sizes_of(kind.tensor_type)
            if kind.tensor_type.elem_type:
                self.dtypes.setdefault(name, dtype_name(kind.tensor_type.elem_type))
        return ""


def windows(space: Shape, kernel: Shape, node: Node) -> Shape:
    """Output positions of a sliding window over each spatial axis, by the node's strides, pads and rounding.

    Args:
        space: sizes of the spatial axes.
        kernel: the window, one size an axis.
    """
    rank = len(space)
    strides = node.numbers("strides") or [1] * rank
    dilations = node.numbers("dilations") or [1] * rank
    pads = node.numbers("pads") or [0] * (2 * rank)
    automatic = node.text("auto_pad", "NOTSET")
    up = bool(node.number("ceil_mode", 0))
    out = []
    for axis, size in enumerate(space):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        if automatic.startswith("SAME"):
            out.append(math.ceil(size / strides[axis]))
            continue
        padding = 0 if automatic == "VALID" else pads[axis] + pads[axis + rank]
        count = (math.ceil if up else math.floor)((size + padding - reach) / strides[axis]) + 1
        if up and (count - 1) * strides[axis] >= size + pads[axis]:
            count -= 1  # a window may not start in the padding at the end
        out.append(max(1, count))
    return tuple(out)


def spread(shape: Shape) -> tuple[int, int, int, int]:
    """Any shape as (batch, channels, height, width): missing ones are 1, more than two spatial ones are joined.

    Example:
        >>> spread((1, 10)), spread((2, 3, 4)), spread((1, 8, 2, 3, 4))
        ((1, 10, 1, 1), (2, 3, 4, 1), (1, 8, 6, 4))
    """
    if len(shape) == 0:
        return (1, 1, 1, 1)
    if len(shape) == 1:
        return (1, shape[0], 1, 1)
    space = shape[2:]
    return (
        shape[0],
        shape[1],
        math.prod(space[:-1]) if len(space) > 1 else (space[0] if space else 1),
        space[-1] if len(space) > 1 else 1,
    )


def channels_first(shape: Shape) -> Shape:
    """(N, spatial..., C) as (N, C, spatial...)."""
    return (shape[0], shape[-1], *shape[1:-1]) if len(shape) > 2 else shape


def channels_last(shape: Shape) -> Shape:
    """(N, C, spatial...) as (N, spatial..., C)."""
    return (shape[0], *shape[2:], shape[1]) if len(shape) > 2 else shape


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape that several broadcast to; the largest where they do not."""
    try:
        return tuple(int(size) for size in np.broadcast_shapes(*shapes))
    except ValueError:
        return max(shapes, key=math.prod)


def sizes_of(kind: Any) -> Shape:
    """Sizes of a tensor type; 0 for an open one."""
    return tuple(dim.dim_value for dim in kind.shape.dim)


def dtype_name(element: int) -> str:
    """Name of an ONNX element type."""
    return _NAMES.get(element, "other")
