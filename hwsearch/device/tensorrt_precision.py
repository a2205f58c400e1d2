"""A network in the precision of a TensorRT device: strongly typed, the graph itself says what is computed in what.

Runs on the device, with ``onnx``. Inputs and outputs stay float32, so that outputs can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hwsearch.errors import DeviceJobError, InputError


def typed(network: bytes, precision: str) -> bytes:
    """An ONNX network as a device of that precision computes it.

    ``float16`` rewrites a float network. ``int8`` rewrites an 8-bit network (QDQ) that was made for a CPU: TensorRT
    takes signed activations around zero and float biases only, so unsigned activations get the symmetric scale that
    holds their range, which is up to twice as coarse, and what the range cut off is cut off by a node of its own.
    ``float32`` is left as it is.

    Raises:
        InputError: TensorRT is not given that precision here.
        DeviceJobError: the network cannot be rewritten.
    """
    if precision == "float32":
        return network
    if precision not in ("float16", "int8"):
        raise InputError(f"precision {precision!r} is not made for TensorRT; use float32, float16 or int8")
    import onnx

    rewrite: Callable[[Any], Any] = _half if precision == "float16" else _symmetric
    try:
        return bytes(rewrite(onnx.load_from_string(network)).SerializeToString())
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DeviceJobError(f"the network cannot be written in {precision}: {reason}") from None


def _half(model: Any) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=True)


def _symmetric(model: Any) -> Any:
    """Signed quantisation around zero everywhere, and biases in float32; in place."""
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    added: dict[str, np.ndarray] = {}
    kept = []
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            kept.append(node)
            continue
        scale = constants[node.input[1]]
        zero = constants[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros(scale.shape, np.uint8)
        stored = constants.get(node.input[0])
        axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
        if stored is not None and stored.dtype == np.int32:  # a bias
            added[node.output[0]] = (stored * _along(scale, stored.ndim, axis)).astype(np.float32)
            continue
        if zero.dtype == np.uint8 or zero.any():
            middle, (low, high) = zero.astype(np.float32), _range(zero)
            reach = np.maximum(middle - low, high - middle)
            symmetric = (scale * reach / 127).astype(np.float32)
            if stored is not None:
                values = (stored.astype(np.float32) - _along(zero, stored.ndim, axis)) * _along(
                    scale, stored.ndim, axis
                )
                eight = np.clip(np.rint(values / _along(symmetric, stored.ndim, axis)), -127, 127).astype(np.int8)
                added[f"{node.input[0]}_signed"] = eight
                node.input[0] += "_signed"
            elif node.op_type == "QuantizeLinear":
                kept.append(_limits(node, float(scale.flat[0]), float(middle.flat[0]), (low, high), added))
            names = f"{node.input[1]}_signed", f"{node.input[1]}_signed_zero"
            added |= {names[0]: symmetric, names[1]: np.zeros(symmetric.shape, np.int8)}
            del node.input[1:]
            node.input.extend(names)
        kept.append(node)
    nodes = [type(node).FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in added.items())
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    kinds = [type(tensor).FromString(tensor.SerializeToString()) for tensor in left]
    del graph.initializer[:]
    graph.initializer.extend(kinds)
    del graph.value_info[:]  # they tell of unsigned tensors
    return model


def _limits(node: Any, scale: float, middle: float, ends: tuple[int, int], added: dict[str, np.ndarray]) -> Any:
    """What a range that is not symmetric cuts off, as a node of its own before ``node``: quantisers leave out a ReLU
    that such a range implies."""
    from onnx import helper

    source, name = node.input[0], f"{node.output[0]}_limited"
    node.input[0] = name
    if middle == ends[0]:
        return helper.make_node("Relu", [source], [name], name=name)
    limits = {f"{name}_{end}": np.float32((value - middle) * scale) for end, value in zip("lh", ends, strict=True)}
    added |= {key: np.asarray(value) for key, value in limits.items()}
    return helper.make_node("Clip", [source, *limits], [name], name=name)


def _range(zero: np.ndarray) -> tuple[int, int]:
    return (0, 255) if zero.dtype == np.uint8 else (-128, 127)


def _along(values: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """A scalar as it is; values of a channel axis so that they broadcast against a tensor of ``rank`` axes."""
    if values.size == 1:
        return values.reshape(()).astype(np.float32)
    return values.astype(np.float32).reshape([-1 if place == axis % rank else 1 for place in range(rank)])
