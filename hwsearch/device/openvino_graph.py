"""``ExecutionGraph``: what OpenVINO made of a network, layer by layer, and the operators each layer came from.

Written on the device from a compiled network, read on the host from JSON. Standard library only: the live objects of
openvino are asked for plain values here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from hwsearch.errors import DeviceJobError

SCHEMA, VERSION = "hwsearch.openvino-graph", 1
Shape: TypeAlias = tuple[int, ...]

#: Layers that stand for tensors: nothing is executed for them.
_TENSORS = ("Input", "Output", "Parameter", "Result")
#: Operators that only pass a constant on: what is behind them is the parameter.
_ON_CONSTANTS = ("Convert", "FakeQuantize", "FakeConvert", "Multiply", "Reshape", "Subtract", "Transpose", "Unsqueeze")


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor between two layers: shape, element type as OpenVINO names it (``f32``), memory format (``aBcd8b``)."""

    shape: Shape
    dtype: str
    form: str
    constant: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """A node of the execution graph.

    Attributes:
        name: unique in the graph.
        type: what it does, as OpenVINO names it (``Convolution``, ``Reorder``, ``Subgraph``).
        kernel: the implementation that OpenVINO chose (``jit_avx2_dw_f32``).
        precision: element type that it computes in.
        origins: operators of the network that were merged into it.
        parameters: constants that it reads, by the names that they have in the network.
        inputs, outputs: its tensors.
    """

    name: str
    type: str
    kernel: str
    precision: str
    origins: tuple[str, ...]
    parameters: tuple[str, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator of the network: what the execution graph no longer tells.

    Attributes:
        type: as OpenVINO names it (``GroupConvolution``).
        named: whether its name is the network's; OpenVINO numbers those that it makes, another way each time.
        out_shape: of its first output.
        weight: shape of its second input, () where it has none.
        activations: how many of its inputs are no constants.
        parameters: names of the constants behind its inputs.
        strides, dilations, kernel, axes: its attributes, () where it has none.
        mode: how it interpolates, "" elsewhere.
    """

    type: str
    named: bool
    out_shape: Shape
    weight: Shape = ()
    activations: int = 1
    parameters: tuple[str, ...] = ()
    strides: Shape = ()
    dilations: Shape = ()
    kernel: Shape = ()
    axes: Shape = ()
    mode: str = ""


@dataclass(frozen=True)
class ExecutionGraph:
    """Layers that are executed at every inference, in order, and operators by name."""

    layers: tuple[Layer, ...]
    operators: Mapping[str, Operator]


def write_graph(model: Any, runtime_model: Any) -> bytes:
    """A compiled network's execution graph as JSON.

    Args:
        model: the ``openvino.Model`` that was compiled.
        runtime_model: what ``get_runtime_model`` of the compiled network returned.
    """
    nodes = runtime_model.get_ordered_ops()
    known: dict[str, tuple[str, ...]] = {}  # constants, and what is computed from them when the network is loaded
    found: list[tuple[int, Layer]] = []
    for node in nodes:
        facts = _facts(node)
        sources = [port.get_source_output().get_node().get_friendly_name() for port in node.inputs()]
        kind = facts.get("layerType", node.get_type_name())
        if kind == "Const":
            known[node.get_friendly_name()] = (node.get_friendly_name(),)
        elif sources and all(source in known for source in sources):
            known[node.get_friendly_name()] = tuple(name for source in sources for name in known[source])
        elif kind not in _TENSORS:
            found.append((int(facts.get("execOrder") or -1), _layer(node, facts, known)))
    layers = [layer for _, layer in sorted(found, key=lambda item: item[0])]
    wanted = {name for layer in layers for name in (*layer.origins, *layer.parameters)}
    operators = {
        node.get_friendly_name(): asdict(_operator(node))
        for node in model.get_ordered_ops()
        if node.get_friendly_name() in wanted and node.get_type_name() != "Constant"
    }
    document = {"schema": SCHEMA, "version": VERSION, "layers": [asdict(x) for x in layers], "operators": operators}
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def read_graph(data: bytes) -> ExecutionGraph:
    """The inverse of :func:`write_graph`.

    Raises:
        DeviceJobError: the bytes are something else.
    """
    try:
        document = json.loads(data)
        if document["schema"] != SCHEMA or document["version"] != VERSION:
            raise ValueError(f"schema {document['schema']} version {document['version']}")
        layers = tuple(
            Layer(**_tuples(item) | {side: tuple(Value(**_tuples(v)) for v in item[side]) for side in _SIDES})
            for item in document["layers"]
        )
        return ExecutionGraph(layers, {name: Operator(**_tuples(item)) for name, item in document["operators"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeviceJobError(f"the optimised graph is not one of OpenVINO ({error})") from None


_SIDES = ("inputs", "outputs")


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _layer(node: Any, facts: Mapping[str, str], constants: Mapping[str, tuple[str, ...]]) -> Layer:
    inputs: list[Value] = []
    parameters: list[str] = []
    for port in node.inputs():
        source = port.get_source_output()
        maker = source.get_node()
        value = _values(maker.outputs(), _facts(maker))[source.get_index()]
        behind = constants.get(maker.get_friendly_name())
        parameters += behind or ()
        inputs.append(Value(value.shape, value.dtype, value.form, behind is not None))
    return Layer(
        name=node.get_friendly_name(),
        type=facts.get("layerType", node.get_type_name()),
        kernel=facts.get("primitiveType", "unknown"),
        precision=facts.get("runtimePrecision", ""),
        origins=tuple(name for name in facts.get("originalLayersNames", "").split(",") if name),
        parameters=tuple(parameters),
        inputs=tuple(inputs),
        outputs=_values(node.outputs(), facts),
    )


def _facts(node: Any) -> dict[str, str]:
    """The runtime information of a node as texts."""
    return {name: str(getattr(value, "value", value)) for name, value in node.get_rt_info().items()}


def _values(ports: Any, facts: Mapping[str, str]) -> tuple[Value, ...]:
    """Each output port; where all have one format, it is told once."""
    forms = (facts.get("outputLayouts") or "undef").split(",")
    values = []
    for index, port in enumerate(ports):
        shape = port.get_partial_shape()
        sizes = tuple(dim.get_length() if dim.is_static else 0 for dim in shape) if shape.rank.is_static else ()
        form = forms[index] if index < len(forms) else forms[0]
        values.append(Value(sizes, port.get_element_type().get_type_name(), form))
    return tuple(values)


def _operator(node: Any) -> Operator:
    attributes = node.get_attributes()
    sources = [port.get_source_output().get_node() for port in node.inputs()]
    constants = [_constant(source) for source in sources]
    weight = node.input(1).get_partial_shape() if len(sources) > 1 else None
    shape = node.output(0).get_partial_shape()
    axes: Shape = ()
    if node.get_type_name().startswith("Reduce") and len(sources) > 1 and sources[1].get_type_name() == "Constant":
        axes = tuple(int(axis) for axis in sources[1].get_vector())
    return Operator(
        type=node.get_type_name(),
        named=node.get_friendly_name() != node.get_name(),
        out_shape=tuple(shape.to_shape()) if shape.is_static else (),
        weight=tuple(weight.to_shape()) if weight is not None and weight.is_static else (),
        activations=sum(constant is None for constant in constants),
        parameters=tuple(constant for constant in constants if constant),
        strides=_whole(attributes.get("strides")),
        dilations=_whole(attributes.get("dilations")),
        kernel=_whole(attributes.get("kernel")),
        axes=axes,
        mode=str(attributes.get("mode", "")),
    )


def _whole(values: Any) -> Shape:
    return tuple(int(value) for value in values) if values is not None else ()


def _constant(node: Any) -> str | None:
    """Name of the constant that a node passes on, None where it computes on an activation."""
    for _ in range(8):
        if node.get_type_name() == "Constant":
            return str(node.get_friendly_name())
        if node.get_type_name() not in _ON_CONSTANTS or not node.inputs():
            return None
        node = node.input(0).get_source_output().get_node()
    return None
