"""How an exported ONNX file depends on the widths: its weights, its grouped convolutions, and its shape constants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.errors import HwsearchError
from hwsearch.graph.onnx_export import export_onnx
from hwsearch.graph.surgery import shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Source:
    """The parameter that an initialiser holds, and for each of its axes the parameter's axis (None: added, size 1)."""

    parameter: str
    layout: tuple[int | None, ...]


@dataclass(frozen=True)
class Constant:
    """A whole-number constant that follows the widths: ``value - sum_g per_unit[g] * dropped[g]``, elementwise."""

    name: str
    value: np.ndarray
    per_unit: np.ndarray  # (groups, *value.shape)


def find_sources(
    proto: Any, random: Mapping[str, np.ndarray], aliases: Mapping[str, str]
) -> tuple[dict[str, Source], list[Any]]:
    """Initialisers that are parameters, found by name, else by their (random, hence unique) content; and the others."""
    import onnx

    sources: dict[str, Source] = {}
    fixed = []
    for initializer in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(initializer)
        named = aliases.get(initializer.name, initializer.name)
        for candidate in [named, *random] if array.dtype.kind == "f" else []:
            layout = _layout(random[candidate], array) if candidate in random else None
            if layout is not None:
                sources[initializer.name] = Source(candidate, layout)
                break
        else:
            fixed.append(initializer)
    return sources, fixed


def _layout(parameter: np.ndarray, array: np.ndarray) -> tuple[int | None, ...] | None:
    """How ``array`` holds ``parameter``: as it is, transposed, or with axes of size 1 added or dropped; else None."""
    if parameter.size != array.size or parameter.dtype != array.dtype:
        return None
    if parameter.shape == array.shape:
        return tuple(range(array.ndim)) if np.array_equal(parameter, array) else None
    if parameter.ndim == 2 and parameter.T.shape == array.shape:
        return (1, 0) if np.array_equal(parameter.T, array) else None
    long = [axis for axis, size in enumerate(parameter.shape) if size > 1]
    if [parameter.shape[axis] for axis in long] != [size for size in array.shape if size > 1]:
        return None
    if not np.array_equal(parameter.ravel(), array.ravel()):
        return None
    order = iter(long)
    return tuple(next(order) if size > 1 else None for size in array.shape)


def laid_out(array: np.ndarray, layout: tuple[int | None, ...]) -> np.ndarray:
    if layout == tuple(range(array.ndim)):
        return array
    order = [axis for axis in layout if axis is not None]
    rest = [axis for axis in range(array.ndim) if axis not in order]
    shape = [1 if axis is None else array.shape[axis] for axis in layout]
    return array.transpose([*order, *rest]).reshape(shape)


def without_weights(proto: Any, fixed: list[Any]) -> Any:
    import onnx

    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(proto)
    del skeleton.graph.initializer[:]
    del skeleton.graph.value_info[:]
    skeleton.graph.initializer.extend(fixed)
    return skeleton


def find_depthwise(
    proto: Any, sources: Mapping[str, Source], arrays: Mapping[str, np.ndarray]
) -> list[tuple[int, str, int]]:
    """``(node index, weight, channel multiplier)`` of every depth-wise convolution."""
    found = []
    for index, node in enumerate(proto.graph.node):
        if node.op_type not in ("Conv", "ConvTranspose") or node.input[1] not in sources:
            continue
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        shape = arrays[sources[node.input[1]].parameter].shape
        if node.op_type == "Conv" and groups > 1 and shape[1] == 1:
            found.append((index, sources[node.input[1]].parameter, shape[0] // groups))
        elif node.op_type == "ConvTranspose" and groups > 1 and shape[0] == groups:
            found.append((index, sources[node.input[1]].parameter, 1))
    return found


def with_open_reshapes(proto: Any, skeleton: Any) -> Any:
    """The skeleton with reshapes that fit every width: leading axes copied (0), one changed axis computed (-1)."""
    import onnx

    shapes = {
        info.name: tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        for info in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    }
    opened = onnx.ModelProto()
    opened.CopyFrom(skeleton)
    constants = {item.name: item for item in skeleton.graph.initializer}
    for node in opened.graph.node:
        if node.op_type != "Reshape" or node.input[1] not in constants or node.input[0] not in shapes:
            continue
        target = onnx.numpy_helper.to_array(constants[node.input[1]])
        pattern = _open_shape(shapes[node.input[0]], tuple(int(size) for size in target))
        _replace_constant(opened, node, 1, np.asarray(pattern, dtype=np.int64))
        for attribute in node.attribute:
            if attribute.name == "allowzero":
                attribute.i = 0
    return opened


def _open_shape(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    """A reshape target for any width: 0 for the leading axes that stay, -1 for the last axis of the first changed run.

    >>> _open_shape((1, 128, 7, 7), (1, 6272))
    (0, -1)
    >>> _open_shape((2, 12, 8, 8), (2, 3, 4, 8, 8))
    (0, 3, -1, 8, 8)
    """
    if -1 in new or 0 in new or 0 in old or math.prod(old) != math.prod(new):
        return new
    equal = 0
    while equal < min(len(old), len(new)) and old[equal] == new[equal]:
        equal += 1
    target = [0] * equal + list(new[equal:])
    left = right = 1
    i = j = equal
    while (i < len(old) or j < len(new)) and (left != right or left == 1):
        if i < len(old) and (left <= right or j == len(new)):
            left *= old[i]
            i += 1
        else:
            right *= new[j]
            j += 1
    changed = [axis for axis in range(equal, j) if new[axis] > 1]
    if changed:
        target[changed[-1]] = -1
    return tuple(target)


def learn_constants(
    skeleton: Any, space: WidthSpace, probe: nn.Module, example: Tensor
) -> tuple[bytes, tuple[Constant, ...]] | None:
    """Export once per group, one step narrower, and read off how whole numbers move; None when that is not possible."""
    import onnx

    full = _constant_inputs(onnx.load_from_string(export_onnx(probe, example)))
    moved: dict[tuple[int, int], np.ndarray] = {}
    for index, group in enumerate(space.groups):
        if len(group.widths) < 2:
            continue
        widths = WidthChoice(tuple(g.widths[-2] if g is group else g.units for g in space.groups))
        try:
            narrow = _constant_inputs(onnx.load_from_string(export_onnx(shrink(probe, space, widths), example)))
        except HwsearchError:
            return None
        if narrow.keys() != full.keys() or any(narrow[key].shape != full[key].shape for key in full):
            return None  # the exporter took another path
        for key, value in full.items():
            step, rest = np.divmod(value - narrow[key], group.units - group.widths[-2])
            if rest.any():
                return None
            if step.any():
                moved.setdefault(key, np.zeros((len(space.groups), *value.shape), dtype=np.int64))[index] = step
    learnt = onnx.ModelProto()
    learnt.CopyFrom(skeleton)
    constants = []
    for (node, place), table in moved.items():
        name = _replace_constant(learnt, learnt.graph.node[node], place, None)
        constants.append(Constant(name, full[node, place], table))
    return bytes(learnt.SerializeToString()), tuple(constants)


def _constant_inputs(proto: Any) -> dict[tuple[int, int], np.ndarray]:
    """Whole-number constants by (node, input): names will not do, because the exporter merges equal constants."""
    import onnx

    constants = {
        item.name: onnx.numpy_helper.to_array(item)
        for item in proto.graph.initializer
        if item.data_type == onnx.TensorProto.INT64
    }
    return {
        (index, place): constants[name]
        for index, node in enumerate(proto.graph.node)
        for place, name in enumerate(node.input)
        if name in constants
    }


def _replace_constant(proto: Any, node: Any, place: int, value: np.ndarray | None) -> str:
    """Give a node a constant of its own at an input; without a value it is to be added later."""
    import onnx

    name = f"{node.name or node.output[0]}_constant_{place}"
    if value is not None:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    node.input[place] = name
    return name


def take(array: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """``array`` at ``positions`` along ``axis``; a leading run is a view, which costs nothing."""
    count = len(positions)
    if count and positions[-1] == count - 1:
        index = [slice(None)] * array.ndim
        index[axis] = slice(0, count)
        return array[tuple(index)]
    return np.take(array, positions, axis=axis)


def add_initializer(proto: Any, name: str, array: np.ndarray) -> None:
    from onnx import helper

    tensor = proto.graph.initializer.add()
    tensor.name = name
    tensor.dims.extend(array.shape)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.raw_data = array.tobytes()
