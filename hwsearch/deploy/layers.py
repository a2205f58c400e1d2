"""An ONNX network's layers, and its outputs on many inputs: what quantising and its report both ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hwsearch.errors import DeviceJobError, InputError

#: Axis of the output channels in the weight.
_AXES = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
_LIMITS = ("Relu", "Clip")


@dataclass(frozen=True)
class Layer:
    """A node with constant weights.

    Attributes:
        name: of the module it came from, else the node's.
        node: the node's name.
        weight: float32, output channels first.
        output: the tensor that it hands on: behind its Relu or Clip, where nothing else reads what is before.
    """

    name: str
    node: str
    op: str
    weight: np.ndarray = field(compare=False, repr=False)
    output: str


def layers_of(model: Any) -> tuple[Layer, ...]:
    """The layers of a ModelProto in the order of its nodes; its nodes have names."""
    from onnx import numpy_helper

    constants = {item.name: item for item in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    follower = {node.input[0]: node for node in model.graph.node if node.op_type in _LIMITS}
    found: list[Layer] = []
    names: Counter[str] = Counter()
    for node in model.graph.node:
        axis = _AXES.get(node.op_type)
        if axis is None or len(node.input) < 2 or node.input[1] not in constants:
            continue
        weight = np.asarray(numpy_helper.to_array(constants[node.input[1]]), np.float32)
        if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
            axis = 0
        owner = node.input[1].rpartition(".")[0] or node.name
        names[owner] += 1  # a layer that runs twice has two scales
        name = owner if names[owner] == 1 else f"{owner}#{names[owner]}"
        output = node.output[0]
        after = follower.get(output)
        if after is not None and readers[output] == 1:
            output = after.output[0]
        found.append(Layer(name, node.name, node.op_type, np.moveaxis(weight, min(axis, weight.ndim - 1), 0), output))
    return tuple(found)


def outputs_of(network: bytes, inputs: np.ndarray, *, exact: bool = False) -> np.ndarray:
    """The network's first output for inputs (N, ...), batch by batch on this CPU, (N, ...) float64.

    Args:
        exact: without the runtime's optimisations: quantised nodes are computed in float32, so nothing overflows.
    Raises:
        DeviceJobError: the runtime rejects the network.
        InputError: fewer inputs than the network's batch.
    """
    session = session_of(network, exact=exact)
    value = session.get_inputs()[0]
    batch = int(value.shape[0])
    if len(inputs) < batch:
        raise InputError(f"the network takes {batch} inputs at once, {len(inputs)} are there: give more images")
    found = [
        session.run(None, {value.name: np.ascontiguousarray(inputs[start : start + batch], np.float32)})[0]
        for start in range(0, len(inputs) // batch * batch, batch)
    ]
    return np.concatenate(found).astype(np.float64)


def session_of(network: bytes, *, exact: bool = False) -> Any:
    """A session of one thread on this CPU."""
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if exact else levels.ORT_ENABLE_ALL
    try:
        return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise DeviceJobError(f"the runtime rejects the network: {text}") from None


def hold_in_float(model: Any, nodes: Collection[str]) -> None:
    """Make sure that the runtime leaves these layers of a QDQ ModelProto in float32; changes it in place.

    ONNX Runtime puts a float layer between a dequantised input and a quantised output back into 8 bits, with one scale
    for the whole weight and all 8 bits of it: more loss than ever. It does so when nothing but Relu or Clip stands
    before the quantising. So a Relu becomes the LeakyRelu of slope 0 that it is, and elsewhere one of slope 1 is put in
    (the identity): both are fused into the layer and cost nothing.
    """
    from onnx import helper

    readers = Counter(name for node in model.graph.node for name in node.input)
    for node in [node for node in model.graph.node if node.name in nodes]:
        after = [other for other in model.graph.node if node.output[0] in other.input]
        if len(after) == 1 and after[0].op_type == "Relu" and readers[node.output[0]] == 1:
            after[0].op_type = "LeakyRelu"
            after[0].attribute.append(helper.make_attribute("alpha", 0.0))
        elif after:
            name = node.output[0]
            node.output[0] = f"{name}_float"
            same = helper.make_node("LeakyRelu", [node.output[0]], [name], name=f"{node.name}_float", alpha=1.0)
            place = next(index for index, other in enumerate(model.graph.node) if other.name == node.name)
            model.graph.node.insert(place + 1, same)
