"""An ONNX graph, as a runtime optimised it, read as kernels (host side).

ONNX's own shape inference knows nothing of ORT's operators (blocked ``nchwc`` convolutions, reorders, fused
convolutions), so shapes are propagated by hand, node by node; what has no rule here is asked of ONNX's inference for
that one operator. Channel counts are those that run: a blocked tensor of 30 channels has 32.

Every node becomes a kernel. An operator that nobody mapped has the family ``other``: it is listed, never dropped.
"""

from __future__ import annotations

import math
import re
from typing import Any, TypeAlias

import numpy as np

from hwsearch.errors import DeviceJobError
from hwsearch.graph.kernel import Kernel

Shape: TypeAlias = tuple[int, ...]

_NCHWC = "com.microsoft.nchwc"

_UNARY = {
    "Abs", "BatchNormalization", "BiasGelu", "Cast", "Ceil", "Celu", "Clip", "Cos", "DequantizeLinear", "Elu", "Erf",
    "Exp", "FastGelu", "Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "Not", "PRelu",
    "QuantizeLinear", "QuickGelu", "Reciprocal", "Relu", "Round",
    "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
}  # fmt: skip
_BINARY = {
    "Add", "And", "BiasAdd", "Div", "Equal", "Greater", "Less", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub",
    "Sum", "Where", "Xor",
}  # fmt: skip
_FREE = {"Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze", "Dropout"}
_MOVE = {
    "DepthToSpace", "Expand", "Gather", "Pad", "Resize", "Slice", "SpaceToDepth", "Split", "Tile", "Transpose",
    "Upsample",
}  # fmt: skip
_REDUCE = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"}
_POOL = {"MaxPool", "AveragePool", "LpPool"}
_GLOBAL_POOL = {"GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"}
#: Position of the weight among the inputs of a convolution.
_CONV = {"Conv": 1, "FusedConv": 1, "ConvTranspose": 1, "QLinearConv": 3, "ConvInteger": 1}
_GEMM = {"Gemm": 1, "FusedGemm": 1, "MatMul": 1, "FusedMatMul": 1, "MatMulInteger": 1}


def kernels_of(data: bytes) -> tuple[Kernel, ...]:
    """The kernels of a serialised ONNX graph, one per node, in the order of its nodes.

    Raises:
        DeviceJobError: the bytes are no ONNX graph, or an input has no fixed shape.
    """
    import onnx

    try:
        model = onnx.load_from_string(data)
    except Exception as error:
        raise DeviceJobError(f"the optimised graph is no ONNX file ({' '.join(str(error).split())})") from None
    return Reader(model).kernels()


class Reader:
    """Walks one graph; knows shape, layout and element type of every tensor met so far."""

    def __init__(self, model: Any) -> None:
        import onnx

        self.model = model
        self.graph = model.graph
        self.opset = {item.domain: item.version for item in model.opset_import}
        self.shapes: dict[str, Shape] = {}
        self.layouts: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}
        self.constants: dict[str, Any] = {}  # the TensorProto; turned into an array only where a value is needed
        for tensor in self.graph.initializer:
            self.constants[tensor.name] = tensor
            self.shapes[tensor.name] = tuple(tensor.dims)
            self.dtypes[tensor.name] = _dtype(tensor.data_type)
        for value in self.graph.input:
            sizes = _sizes(value.type.tensor_type)
            if value.name in self.constants:
                continue
            if not all(sizes):
                raise DeviceJobError(f"input {value.name!r} has an open dimension; export with fixed sizes")
            self.shapes[value.name] = sizes
            self.dtypes[value.name] = _dtype(value.type.tensor_type.elem_type)
        # what the file claims about its tensors is asked last: ORT writes wrong sizes for some pools with ceil_mode
        self.declared = {value.name: _sizes(value.type.tensor_type) for value in self.graph.value_info}
        self._onnx = onnx
        self.block = self._block()

    def kernels(self) -> tuple[Kernel, ...]:
        """One kernel per node."""
        return tuple(self._kernel(index, node) for index, node in enumerate(self.graph.node))

    # ------------------------------------------------------------------ one node

    def _kernel(self, index: int, node: Any) -> Kernel:
        attributes = {item.name: self._onnx.helper.get_attribute_value(item) for item in node.attribute}
        family, fields, out_shape, layout = self._describe(node, attributes)
        main = node.input[0] if node.input else ""
        in_shape = fields.pop("in_shape", None) or self.shapes.get(main, out_shape)
        for position, name in enumerate(node.output):
            if name and (position == 0 or name not in self.shapes):
                self.shapes[name] = out_shape
            self.layouts[name] = layout
            self.dtypes.setdefault(name, self._dtype_out(node, attributes))
        batch, channels, height, width = spread(in_shape)
        _, out_channels, out_height, out_width = spread(fields.pop("out_shape", out_shape))
        values: dict[str, Any] = {
            "batch": batch, "in_channels": channels, "in_height": height, "in_width": width,
            "out_channels": out_channels, "out_height": out_height, "out_width": out_width,
        }  # fmt: skip
        values.update(fields)
        return Kernel(
            family=family,
            op=node.op_type,
            dtype=self.dtypes.get(main, "float32"),
            layout_in=self.layouts.get(main, "nchw"),
            layout_out=layout,
            node=f"{index:03d}_{node.op_type}",
            source=self._source(node),
            **values,
        )

    def _describe(self, node: Any, attributes: dict[str, Any]) -> tuple[str, dict[str, Any], Shape, str]:
        """(family, further fields of the kernel, shape of the first output, its layout)."""
        op, blocked = node.op_type, node.domain == _NCHWC
        main = self.shapes.get(node.input[0], ()) if node.input else ()
        layout = "nchwc" if blocked else self.layouts.get(node.input[0], "nchw") if node.input else "nchw"
        if op in _CONV:
            return self._conv(node, attributes, "nchwc" if blocked else "nchw")
        if op in ("ReorderInput", "ReorderOutput"):
            return self._reorder(node, attributes, main)
        if op in _GEMM:
            return self._gemm(node, attributes, main)
        if op in _POOL and len(main) == 4:
            kernel = _pair(attributes.get("kernel_shape"), 1)
            out = (main[0], main[1], *self._windows(main[2:], kernel, attributes))
            stride = _pair(attributes.get("strides"), 1)[0]
            return "pool", {"kernel_height": kernel[0], "kernel_width": kernel[1], "stride": stride}, out, layout
        if op in _GLOBAL_POOL:
            return "global_pool", {}, (*main[:2], *[1] * (len(main) - 2)), layout
        if op in _REDUCE:
            return self._reduce(node, attributes, main)
        if op in _UNARY:
            return "elementwise", {}, main, layout
        if op in _BINARY:
            return self._elementwise(node, layout)
        if op == "Concat":
            shapes = [self.shapes.get(name, ()) for name in node.input]
            axis = int(attributes.get("axis", 1))
            joined = list(main)
            if main and all(len(shape) == len(main) for shape in shapes):
                joined[axis] = sum(shape[axis] for shape in shapes)
            return "concat", {"inputs": len(node.input)}, tuple(joined), layout
        if blocked and op == "Upsample":
            scales = attributes.get("scales") or [1] * 4
            return "move", {}, tuple(int(size * scale) for size, scale in zip(main, scales, strict=False)), "nchwc"
        shape = self._inferred(node, main)
        if op in _FREE:
            return "free", {}, shape, "nchw"
        if op in _MOVE:
            return "move", {}, shape, layout
        return "other", {"inputs": max(1, len(node.input))}, shape, layout

    def _conv(self, node: Any, attributes: dict[str, Any], layout: str) -> tuple[str, dict[str, Any], Shape, str]:
        op = node.op_type
        weight = self.shapes.get(node.input[_CONV[op]], ())
        main = self.shapes.get(node.input[0], ())
        if len(weight) < 3 or len(main) != len(weight):
            return "other", {}, self._inferred(node, main), layout
        groups = int(attributes.get("group", 1))
        kernel = spread((1, 1, *weight[2:]))[2:]
        transposed = op == "ConvTranspose"
        out_channels = weight[1] * groups if transposed else weight[0]
        # what runs is what the weight says: a blocked convolution pads its input channels too
        in_channels = weight[0] if transposed else weight[1] * groups
        space = self._inferred(node, main)[2:] if transposed else self._windows(main[2:], weight[2:], attributes)
        fused = []
        if len(node.input) > 3 and node.input[3] and op in ("Conv", "FusedConv"):
            fused.append("add")
        if attributes.get("activation"):
            fused.append(bytes(attributes["activation"]).decode().lower())
        fields = {
            "in_shape": (main[0], in_channels, *main[2:]),
            "fused": tuple(fused),
            "kernel_height": kernel[0],
            "kernel_width": kernel[1],
            "stride": _pair(attributes.get("strides"), 1)[0],
            "dilation": _pair(attributes.get("dilations"), 1)[0],
            "groups": groups,
        }
        plain_in = self.layouts.get(node.input[0], "nchw") == "nchw"
        if transposed:
            family = "conv_transpose"
        elif groups > 1:
            family = "depthwise" if groups == in_channels else "grouped"
        elif kernel == (1, 1):
            family = "pointwise"
        elif plain_in and (layout == "nchwc" or in_channels <= 4):
            family = "conv_first"
        else:
            family = "conv"
        return family, fields, (main[0], out_channels, *space), layout

    def _reorder(self, node: Any, attributes: dict[str, Any], main: Shape) -> tuple[str, dict[str, Any], Shape, str]:
        if node.op_type == "ReorderInput":
            if attributes.get("channels_last"):
                main = (main[0], main[-1], *main[1:-1])
            out = (main[0], self._padded(node.output[0], main[1]), *main[2:])
            return "reorder", {"in_shape": main}, out, "nchwc"
        channels = int(attributes.get("channels", main[1]))
        shape = (main[0], channels, *main[2:])
        if attributes.get("channels_last"):
            return "reorder", {"out_shape": shape}, (shape[0], *shape[2:], channels), "nchw"
        return "reorder", {}, shape, "nchw"

    def _gemm(self, node: Any, attributes: dict[str, Any], main: Shape) -> tuple[str, dict[str, Any], Shape, str]:
        other = self.shapes.get(node.input[_GEMM[node.op_type]], ())
        if len(main) < 1 or len(other) < 1:
            return "other", {}, self._inferred(node, main), "nchw"
        for letter in "AB":
            shape = main if letter == "A" else other
            if attributes.get(f"transBatch{letter}") and len(shape) > 2:
                shape = (*shape[1:-1], shape[0], shape[-1])
            if attributes.get(f"trans{letter}") and len(shape) > 1:
                shape = (*shape[:-2], shape[-1], shape[-2])
            main, other = (shape, other) if letter == "A" else (main, shape)
        rows, columns = main[-2] if len(main) > 1 else 1, other[-1] if len(other) > 1 else 1
        stack = tuple(int(size) for size in np.broadcast_shapes(main[:-2], other[:-2]))
        fused = (bytes(attributes["activation"]).decode().lower(),) if attributes.get("activation") else ()
        # a linear layer's rows are its batch; in a stack of products the rows are positions
        fields: dict[str, Any] = {"fused": fused, "in_shape": (rows, main[-1]), "out_shape": (rows, columns)}
        if stack:
            batch = math.prod(stack)
            fields |= {"in_shape": (batch, main[-1], rows), "out_shape": (batch, columns, rows)}
        out = (*stack, *main[-2:-1], *((columns,) if len(other) > 1 else ()))
        return "gemm", fields, out, "nchw"

    def _reduce(self, node: Any, attributes: dict[str, Any], main: Shape) -> tuple[str, dict[str, Any], Shape, str]:
        axes = attributes.get("axes")
        if axes is None and len(node.input) > 1 and node.input[1]:
            axes = self._value(node.input[1])
        wanted = range(len(main)) if axes is None else axes
        axes = sorted(int(axis) % len(main) for axis in wanted) if main else []
        keep = int(attributes.get("keepdims", 1))
        full = tuple(1 if axis in axes else size for axis, size in enumerate(main))
        out = full if keep else tuple(size for axis, size in enumerate(main) if axis not in axes)
        spatial = len(main) == 4 and axes == [2, 3]
        family = "global_pool" if spatial and node.op_type in ("ReduceMean", "ReduceSum", "ReduceMax") else "other"
        return family, {"out_shape": full}, out, "nchw"

    def _elementwise(self, node: Any, layout: str) -> tuple[str, dict[str, Any], Shape, str]:
        """Broadcasting; ``inputs`` counts tensors of the full size, since scalars and weights cost nothing to read."""
        names = [name for name in node.input if name]
        shapes = [self.shapes.get(name, ()) for name in names]
        try:
            out = tuple(int(size) for size in np.broadcast_shapes(*shapes))
        except ValueError:
            out = max(shapes, key=math.prod)
        full = sum(
            1
            for name, shape in zip(names, shapes, strict=True)
            if math.prod(shape) == math.prod(out) and name not in self.constants
        )
        if any(self.layouts.get(name) == "nchwc" for name in names):
            layout = "nchwc"
        return "elementwise", {"inputs": max(1, full), "in_shape": out}, out, layout

    # ------------------------------------------------------------------ helpers

    def _windows(self, space: Shape, kernel: Shape, attributes: dict[str, Any]) -> Shape:
        """Output positions of a sliding window."""
        rank = len(space)
        strides = list(attributes.get("strides") or [1] * rank)
        dilations = list(attributes.get("dilations") or [1] * rank)
        pads = list(attributes.get("pads") or [0] * (2 * rank))
        automatic = bytes(attributes.get("auto_pad", b"NOTSET")).decode()
        rounding = math.ceil if attributes.get("ceil_mode") else math.floor
        out = []
        for axis, size in enumerate(space):
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            if automatic.startswith("SAME"):
                out.append(math.ceil(size / strides[axis]))
                continue
            padding = 0 if automatic == "VALID" else pads[axis] + pads[axis + rank]
            count = rounding((size + padding - reach) / strides[axis]) + 1
            if attributes.get("ceil_mode") and (count - 1) * strides[axis] >= size + pads[axis]:
                count -= 1  # a window may not start in the padding at the end
            out.append(max(1, count))
        return tuple(out)

    def _padded(self, tensor: str, channels: int) -> int:
        """Channels of a blocked tensor: what the weight of a reader says, else the next multiple of the block."""
        for node in self.graph.node:
            if node.domain == _NCHWC and node.op_type == "Conv" and node.input[0] == tensor:
                weight = self.shapes[node.input[1]]
                groups = next((item.i for item in node.attribute if item.name == "group"), 1)
                return int(weight[1] * groups)
        # only convolutions pad; pooling and the like are blocked only where whole blocks come in
        return channels if channels % 8 == 0 else -(-channels // self.block) * self.block

    def _block(self) -> int:
        """Channels per block: the largest power of two up to 16 that divides every blocked convolution's outputs."""
        widths = [
            self.shapes[node.input[1]][0]
            for node in self.graph.node
            if node.domain == _NCHWC and node.op_type == "Conv"
        ]
        return math.gcd(16, *widths) if widths else 8

    def _inferred(self, node: Any, main: Shape) -> Shape:
        """Output shape of an operator without a rule here, and of its further outputs.

        By ONNX's inference, else what the file declares, else the main input's.
        """
        names = [name for name in node.input if name]
        if node.domain in ("", "ai.onnx") and all(name in self.shapes for name in names):
            for name, kind in self._types(node, names).items():
                if kind.tensor_type.HasField("shape") and all(_sizes(kind.tensor_type)):
                    self.shapes[name] = _sizes(kind.tensor_type)
                    self.dtypes.setdefault(name, _dtype(kind.tensor_type.elem_type))
        for name in node.output:
            if name not in self.shapes and name in self.declared and all(self.declared[name]):
                self.shapes[name] = self.declared[name]
        return self.shapes.get(node.output[0], main)

    def _types(self, node: Any, names: list[str]) -> dict[str, Any]:
        """ONNX's inference for one node; nothing where it fails, each operator in its own way."""
        onnx = self._onnx
        types = {
            name: onnx.helper.make_tensor_type_proto(_element(self.dtypes.get(name, "float32")), self.shapes[name])
            for name in names
        }
        data = {name: self.constants[name] for name in names if name in self.constants}
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset.get("", 17), "")
            imports = list(self.model.opset_import)
            return dict(onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=imports))
        except Exception:
            return {}

    def _value(self, name: str) -> list[int]:
        """An integer constant's values, empty where the tensor is no constant."""
        tensor = self.constants.get(name)
        return [] if tensor is None else [int(item) for item in self._onnx.numpy_helper.to_array(tensor).ravel()]

    def _dtype_out(self, node: Any, attributes: dict[str, Any]) -> str:
        if node.op_type == "Cast":
            return _dtype(int(attributes["to"]))
        if node.op_type == "DequantizeLinear":
            return "float32"
        if node.op_type == "QuantizeLinear":
            return self.dtypes.get(node.input[2], "uint8") if len(node.input) > 2 else "uint8"
        return self.dtypes.get(node.input[0], "float32") if node.input else "float32"

    def _source(self, node: Any) -> tuple[str, ...]:
        """The layers a node came from: owners of its parameters, else its own name without what ORT added."""
        owners = [
            name.rpartition(".")[0]
            for name in node.input
            if name in self.constants and "." in name and not name.startswith("reorder")
        ]
        own = re.sub(r"(_nchwc|_token_\d+)+$", "", node.name)
        return tuple(dict.fromkeys(owners)) or ((own,) if own else ())


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


def _pair(values: Any, default: int) -> tuple[int, int]:
    """An attribute of one number per spatial axis as (height, width); a missing width counts as ``default``."""
    numbers = [*(int(value) for value in values or ()), default, default]
    return (numbers[0], numbers[1])


def _sizes(kind: Any) -> Shape:
    """Sizes of a TensorProto type; 0 for an open one."""
    return tuple(dim.dim_value for dim in kind.shape.dim)


def _dtype(element: int) -> str:
    return _NAMES.get(element, "other")


_NAMES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
}


def _element(dtype: str) -> int:
    return next((code for code, name in _NAMES.items() if name == dtype), 1)
