"""A float network as an 8-bit one without calibration: for its milliseconds, never for its answers.

A runtime chooses its kernels by element types and by what stands next to what, not by the values of scales. So a
candidate of a width search can be priced in 8 bits the moment it is cut: weights get the scales that they ask for
(symmetric, one an output channel), activations get plausible ones. Nodes are put in as ``onnxruntime.quantization``
puts them in for ``QuantFormat.QDQ`` with its defaults, so the same operators run in 8 bits as would after calibration.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.errors import InputError

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice
    from hwsearch.latency.sample import NetworkTemplate

_OLDEST_OPSET = 13  # the first that knows a scale for each channel
#: Inputs and outputs of these are quantised; a constant operand too.
_PLAIN = {"Add", "ArgMax", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid", "Softmax", "Where"}
#: These hand on what they get: their output has their input's scale, and stays float where the input does.
_PASSING = {
    "AveragePool", "Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip
#: These disappear into the rounding of the operator before them.
_REMOVABLE = {"Relu", "Clip"}
#: Weight and bias by position; axis of the output channels in the weight.
_WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}


#: Operators by which an 8-bit network is known, beside those whose names begin with QLinear.
_EIGHT = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}


@dataclass(frozen=True)
class Scheme:
    """How weights are kept: ``int8`` (symmetric) or ``uint8``, with a scale for each output channel or one for all."""

    weights: str = "int8"
    per_channel: bool = True

    def __post_init__(self) -> None:
        if self.weights not in ("int8", "uint8"):
            raise InputError(f"weights are {self.weights!r}; use int8 or uint8")


def quantise_network(onnx: bytes, seed: int = 0, scheme: Scheme | None = None) -> bytes:
    """An 8-bit network of the same structure, with quantising and dequantising nodes (QDQ) around its operators.

    Args:
        onnx: a float network, operator set 13 or later; batch normalisation folded (what is left of it stays float).
        seed: decides the activations' scales; the same network and seed give the same bytes.
        scheme: of the weights; None is int8, one scale a channel.

    Raises:
        InputError: the operator set is too old, or the bytes are no ONNX file.

    Example:
        >>> eight = quantise_network(template.slice(choice))            # doctest: +SKIP
    """
    import onnx as library
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    model = library.ModelProto()
    try:
        model.ParseFromString(onnx)
    except DecodeError:
        raise InputError("the network to quantise is no ONNX file; export it again") from None
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if opset < _OLDEST_OPSET:
        raise InputError(f"the network has operator set {opset}; 8 bits need {_OLDEST_OPSET} or later: export it again")
    _Quantiser(model, np.random.default_rng(seed), scheme or Scheme()).run()
    return bytes(model.SerializeToString(deterministic=True))


def is_quantised(onnx: bytes) -> bool:
    """Whether a network has 8-bit operators already (QDQ, or whole-number ones).

    Raises:
        InputError: the bytes are no ONNX file.
    """
    import onnx as library
    from google.protobuf.message import DecodeError

    model = library.ModelProto()
    try:
        model.ParseFromString(onnx)
    except DecodeError:
        raise InputError("the network is no ONNX file; export it again") from None
    return any(node.op_type in _EIGHT or node.op_type.startswith("QLinear") for node in model.graph.node)


def template_for(template: NetworkTemplate, precision: str) -> NetworkTemplate:
    """A template whose slices are what a device of this precision runs."""
    return QuantisedTemplate(template) if precision == "int8" else template


@dataclass(frozen=True)
class QuantisedTemplate:
    """A template whose slices are 8-bit networks: a width search, or a campaign, in 8-bit milliseconds.

    Args:
        template: gives the float network of each choice.
    """

    template: NetworkTemplate
    seed: int = 0
    scheme: Scheme = Scheme()

    @property
    def space(self) -> Any:
        """The width space of the float template."""
        return self.template.space

    def slice(self, choice: WidthChoice) -> bytes:
        """The 8-bit network of these widths."""
        return quantise_network(self.template.slice(choice), self.seed, self.scheme)


class _Quantiser:
    """Rewrites one model in place."""

    def __init__(self, model: Any, rng: np.random.Generator, scheme: Scheme) -> None:
        self.model = model
        self.graph = model.graph
        self.rng = rng
        self.scheme = scheme
        self.constants = {item.name: item for item in self.graph.initializer}
        self.results = {value.name for value in self.graph.output}
        self.readers = Counter(name for node in self.graph.node for name in node.input)
        self.new: list[Any] = []  # nodes of the rewritten graph
        self.scales: dict[str, tuple[float, int]] = {}  # quantised tensor: (scale, zero point)
        self.provider: dict[str, str] = {}  # quantised tensor: the one whose scale it has
        self.given: dict[str, str] = {}  # original name: what its readers read instead
        self.written: set[str] = set()  # tensors whose scale is in the file

    def run(self) -> None:
        """Decide what is quantised, in the order of the nodes, then write the nodes around it."""
        nodes = self._mark(list(self.graph.node))
        del self.graph.node[:]
        for value in self.graph.input:
            self._around(value.name)
        for node in nodes:
            self._node(node)
        self.graph.node.extend(self.new)
        left = {name for node in self.graph.node for name in node.input}
        kept = [item for item in self.graph.initializer if item.name in left or item.name not in self.constants]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        del self.graph.value_info[:]

    def _mark(self, nodes: list[Any]) -> list[Any]:
        kept: list[Any] = []
        floats = self._floats(nodes)
        for node in nodes:
            first = node.input[0] if node.input else ""
            if node.op_type in _REMOVABLE and first in self.scales:
                if self._swallowed(node, kept):
                    continue
                self._quantised(first, node)
            elif node.op_type in _WEIGHTED:
                self._quantised(first, node)
                if node.op_type == "MatMul" and node.input[1] not in self.constants:
                    self._quantised(node.input[1], node)
                self._quantised(node.output[0], node)
            elif node.op_type in _PLAIN:
                for name in [*node.input, *node.output]:
                    if name in floats:
                        self._quantised(name, node)
            elif node.op_type in _PASSING and first in self.scales:
                for name in node.output:
                    self.scales[name] = self.scales[first]
                    self.provider[name] = self.provider.get(first, first)
            kept.append(node)
        return kept

    def _floats(self, nodes: list[Any]) -> set[str]:
        """Names of float tensors, as far as the constants tell: whole numbers and truth values stay what they are."""
        whole = {name for name, item in self.constants.items() if item.data_type != 1}
        for node in nodes:
            if node.op_type in ("Shape", "ArgMax", "Equal", "Greater", "Less", "Not"):
                whole.update(node.output)
        names = {name for node in nodes for name in [*node.input, *node.output] if name}
        return names - whole

    def _swallowed(self, node: Any, kept: list[Any]) -> bool:
        """Whether a limit can be dropped: its input has no other reader, and takes its name and its range."""
        first, out = node.input[0], node.output[0]
        if self.readers[first] != 1 or first in self.results or first in self.provider:
            return False
        maker = next((other for other in reversed(kept) if first in other.output), None)
        if maker is None:
            return False
        places = list(maker.output)
        maker.output[places.index(first)] = out
        del self.scales[first]
        self.scales[out] = (6.0 / 255.0, 0)
        return True

    def _quantised(self, name: str, node: Any) -> None:
        """Mark a tensor, with a plausible scale: from zero where it cannot be negative, around zero elsewhere."""
        if not name or name in self.scales:
            return
        if name in self.constants:
            values = self._array(name)
            low, high = min(0.0, float(values.min(initial=0))), max(0.0, float(values.max(initial=0)))
            scale = (high - low) / 255.0 or 1.0 / 255.0
            self.scales[name] = (scale, int(np.clip(round(-low / scale), 0, 255)))
        elif node.op_type in ("Sigmoid", "Softmax") and name in node.output:
            self.scales[name] = (1.0 / 256.0, 0)
        else:
            self.scales[name] = (float(8.0 / 255.0 * self.rng.uniform(0.5, 1.5)), 128)

    def _node(self, node: Any) -> None:
        """A node with its quantised inputs, and what follows it."""
        axis = _WEIGHTED.get(node.op_type)
        if axis is not None:
            self._weights(node, 0 if node.op_type == "Gemm" and _whole(node, "transB") else axis)
        for place, name in enumerate(node.input):
            if name in self.constants and name in self.scales and name not in self.given:
                self._constant(name)
            if name in self.given:
                node.input[place] = self.given[name]
        self.new.append(node)
        for place, name in enumerate(node.output):
            if name in self.scales and name in self.results:
                node.output[place] = f"{name}_float"
                self._pair(name, f"{name}_float", name)
            else:
                self._around(name)

    def _around(self, name: str) -> None:
        """Quantise a tensor and back; its readers read the result."""
        if name in self.scales and name not in self.constants:
            self.given[name] = f"{name}_dequantised"
            self._pair(name, name, self.given[name])

    def _pair(self, name: str, source: str, target: str) -> None:
        scale, zero = self._parameters(name)
        self._add("QuantizeLinear", [source, scale, zero], f"{name}_eight")
        self._add("DequantizeLinear", [f"{name}_eight", scale, zero], target)

    def _parameters(self, name: str) -> tuple[str, str]:
        """Names of a tensor's scale and zero point, made where they are not there yet."""
        owner = self.provider.get(name, name)
        scale, zero = f"{owner}_scale", f"{owner}_zero"
        if owner not in self.written:
            self.written.add(owner)
            self._initializer(scale, np.array(self.scales[owner][0], np.float32))
            self._initializer(zero, np.array(self.scales[owner][1], np.uint8))
        return scale, zero

    def _constant(self, name: str) -> None:
        """A constant operand, kept in 8 bits."""
        scale, zero = self.scales[name]
        values = np.clip(np.rint(self._array(name) / scale) + zero, 0, 255).astype(np.uint8)
        self._initializer(f"{name}_eight", values)
        self.given[name] = f"{name}_dequantised"
        self._add("DequantizeLinear", [f"{name}_eight", *self._parameters(name)], self.given[name])

    def _weights(self, node: Any, axis: int) -> None:
        """A weight in 8 bits and its bias in 32, which has the product of both scales."""
        name = node.input[1]
        if name not in self.constants:
            return
        array = self._array(name)
        if node.op_type == "ConvTranspose" and _whole(node, "group", 1) > 1:
            axis = 0
        if node.op_type == "MatMul" and array.ndim != 2:
            axis = array.ndim  # only a single matrix has a scale for each of its columns
        scales = self._weight_scales(array, axis)
        if name not in self.given:
            self._weight(name, array, axis, scales)
        bias = node.input[2] if len(node.input) > 2 else ""
        # a bias without a quantised input has no scale to be kept in
        if bias in self.constants and bias not in self.given and node.input[0] in self.scales:
            step = np.asarray(self.scales[self.provider.get(node.input[0], node.input[0])][0] * scales, np.float32)
            values = np.clip(np.rint(self._array(bias) / step), -(2.0**31), 2.0**31 - 1).astype(np.int32)
            self._initializer(f"{bias}_eight", values)
            self._initializer(f"{bias}_scale", step.reshape(() if step.size == 1 else (-1,)))
            self._initializer(f"{bias}_zero", np.zeros(() if step.size == 1 else step.shape, np.int32))
            self.given[bias] = f"{bias}_dequantised"
            self._add("DequantizeLinear", [f"{bias}_eight", f"{bias}_scale", f"{bias}_zero"], self.given[bias], axis=0)

    def _weight_scales(self, array: np.ndarray, axis: int) -> np.ndarray:
        """Scale of each output channel, (C,), or of all, (1,)."""
        wide = 127.0 if self.scheme.weights == "int8" else 127.5
        if self.scheme.per_channel and array.ndim > 1 and axis < array.ndim:
            others = tuple(place for place in range(array.ndim) if place != axis)
            largest = np.maximum(array.max(axis=others), -array.min(axis=others))
        else:
            largest = np.array([max(float(array.max()), -float(array.min()))])
        return np.asarray(np.where(largest > 0, largest, 1.0) / wide, np.float32)

    def _weight(self, name: str, array: np.ndarray, axis: int, scales: np.ndarray) -> None:
        shape = [-1 if place == axis and scales.size > 1 else 1 for place in range(array.ndim)]
        values = np.rint(array * (1.0 / scales).reshape(shape if scales.size > 1 else (1,) * array.ndim))
        signed = self.scheme.weights == "int8"
        zero = 0 if signed else 128
        kind = np.int8 if signed else np.uint8
        eight = np.clip(values + zero, -127 if signed else 0, 127 if signed else 255).astype(kind)
        self._initializer(f"{name}_eight", eight)
        form = scales.shape if scales.size > 1 else ()
        self._initializer(f"{name}_scale", scales.reshape(form))
        self._initializer(f"{name}_zero", np.full(form, zero, kind))
        self.given[name] = f"{name}_dequantised"
        self._add(
            "DequantizeLinear",
            [f"{name}_eight", f"{name}_scale", f"{name}_zero"],
            self.given[name],
            axis=axis if scales.size > 1 else None,
        )

    def _add(self, op: str, inputs: list[str], output: str, axis: int | None = None) -> None:
        from onnx import NodeProto

        node = NodeProto(op_type=op, name=f"{output}_{op}", input=inputs, output=[output])
        if axis is not None:
            attribute = node.attribute.add()
            attribute.name, attribute.type, attribute.i = "axis", 2, axis
        self.new.append(node)

    def _initializer(self, name: str, values: np.ndarray) -> None:
        from hwsearch.graph.onnx_slicing import add_initializer

        add_initializer(self.model, name, values)

    def _array(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self.constants[name]), np.float32)


def _whole(node: Any, name: str, default: int = 0) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)
