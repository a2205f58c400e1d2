"""Fixed sizes for an ONNX file with dynamic ones: its inputs, and all that shares a named dimension with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from hwsearch.errors import InputError

Shape: TypeAlias = tuple[int, ...]

#: Key of a shape that was given without a name: it is meant for the only input.
ANY = ""
#: Operators that slide a window over their input.
_WINDOWS = ("Conv", "MaxPool", "AveragePool", "LpPool")


def pin_inputs(proto: Any, shapes: Mapping[str, Shape], name: str) -> dict[str, Shape]:
    """Give every input of a model its sizes, in place; the shape of each input by name.

    A dimension with a name ("batch") gets one size wherever it stands, so it is enough to give it once. What the file
    claims about tensors inside that still has open sizes is dropped: runtimes infer it again.

    Args:
        proto: the ModelProto.
        shapes: by input name, or under ``ANY`` for the only input; inputs of fixed shape may be left out.
        name: of the model, for messages.

    Raises:
        InputError: one line: a size is missing, does not agree with the file, or leads to a conflict further in.
    """
    graph = proto.graph
    constants = {item.name for item in graph.initializer}
    inputs = {value.name: value.type.tensor_type for value in graph.input if value.name not in constants}
    given = _named(shapes, list(inputs), name)
    symbols: dict[str, int] = {}
    for key, shape in given.items():
        _learn(key, inputs[key], shape, symbols, name)
    opened = False
    pinned = {}
    for key, tensor in inputs.items():
        if not tensor.HasField("shape") and key in given:
            for _ in given[key]:
                tensor.shape.dim.add()
        sizes = []
        for axis, dimension in enumerate(tensor.shape.dim):
            size = _fixed(dimension) or (given[key][axis] if key in given else symbols.get(dimension.dim_param))
            if size is None:
                what = f" ({dimension.dim_param})" if dimension.dim_param else ""
                form = _text([_fixed(d) or 1 for d in tensor.shape.dim])
                example = form if len(inputs) == 1 else f"{key}={form}"
                raise InputError(
                    f"input {key!r} of {name} has a dynamic size (axis {axis}{what}): add --input {example}"
                )
            opened = opened or not _fixed(dimension)
            dimension.dim_value = size
            sizes.append(size)
        pinned[key] = tuple(sizes)
    if opened:
        _inside(graph, symbols)
        _prove(proto, pinned, name)
    return pinned


def _named(shapes: Mapping[str, Shape], inputs: list[str], name: str) -> dict[str, Shape]:
    """The given shapes by the inputs' own names."""
    if ANY in shapes and len(inputs) != 1:
        listed = ", ".join(inputs) or "none"
        raise InputError(
            f"{name} has {len(inputs)} inputs ({listed}): name each, such as --input "
            + ",".join(f"{item}=1x3x224x224" for item in inputs[:2] or ["input"])
        )
    given = {inputs[0] if key == ANY else key: tuple(shape) for key, shape in shapes.items()}
    if unknown := sorted(set(given) - set(inputs)):
        raise InputError(f"{name} has no input {unknown[0]!r}; it has {', '.join(inputs) or 'none'}")
    return given


def _learn(key: str, tensor: Any, shape: Shape, symbols: dict[str, int], name: str) -> None:
    """Check one given shape against the file and note the sizes of its named dimensions."""
    dimensions = list(tensor.shape.dim)
    if tensor.HasField("shape") and len(shape) != len(dimensions):
        form = "x".join(str(_fixed(d) or d.dim_param or "?") for d in dimensions) or "a single number"
        raise InputError(f"input {key!r} of {name} takes {len(dimensions)} axes ({form}), --input has {len(shape)}")
    for axis, (dimension, size) in enumerate(zip(dimensions, shape, strict=False)):
        fixed = _fixed(dimension)
        if fixed and fixed != size:
            raise InputError(
                f"input {key!r} of {name} takes size {fixed} on axis {axis}, --input says {size}; "
                "give the shape it takes"
            )
        if not fixed and dimension.dim_param and symbols.setdefault(dimension.dim_param, size) != size:
            raise InputError(
                f"the size {dimension.dim_param!r} of {name} is {symbols[dimension.dim_param]} and {size}: axis {axis} "
                f"of input {key!r} must agree with the others"
            )


def _inside(graph: Any, symbols: Mapping[str, int]) -> None:
    """Named sizes of tensors inside; what stays open is forgotten."""
    for value in [*graph.value_info, *graph.output]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in symbols:
                dimension.dim_value = symbols[dimension.dim_param]
    known = [value for value in graph.value_info if all(_fixed(d) for d in value.type.tensor_type.shape.dim)]
    del graph.value_info[:]
    graph.value_info.extend(known)


def _prove(proto: Any, pinned: Mapping[str, Shape], name: str) -> None:
    """Whether the shapes run through the whole network; asked of ONNX's inference."""
    import onnx

    size = sum(len(item.raw_data) for item in proto.graph.initializer)
    if size > 1_500_000_000:
        return  # too large to be copied; the runtime will tell
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        reason = _wrong_channels(inferred)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())
        if _fails_anyway(proto, pinned):
            return  # not because of the sizes: some operator confuses the inference, and a runtime may know better
    if reason:
        shapes = ", ".join(f"{key} {_text(shape)}" for key, shape in pinned.items())
        raise InputError(f"{name} does not run on the shape {shapes}: {reason[:300]}; give another --input")


def _wrong_channels(proto: Any) -> str:
    """The first convolution whose weight has other channels than its input, which ONNX's inference overlooks; or ""."""
    graph = proto.graph
    weights = {item.name: tuple(item.dims) for item in graph.initializer}
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.input]
    }
    for node in graph.node:
        if node.op_type != "Conv" or node.input[1] not in weights or len(shapes.get(node.input[0], ())) < 3:
            continue
        groups = next((item.i for item in node.attribute if item.name == "group"), 1)
        found, wanted = shapes[node.input[0]][1], weights[node.input[1]][1] * groups
        if found and found != wanted:
            return f"the convolution {node.name or node.output[0]} takes {wanted} channels and would get {found}"
    # Only what a window makes has to be something; other operators may well give nothing.
    made = {name: node for node in graph.node if node.op_type in _WINDOWS for name in node.output}
    for value in [*graph.value_info, *graph.output]:
        sizes = value.type.tensor_type.shape.dim
        if value.name in made and any(size.HasField("dim_value") and size.dim_value < 1 for size in sizes):
            node = made[value.name]
            return f"the window of {node.op_type} {node.name or value.name} is larger than what it would slide over"
    return ""


def _fails_anyway(proto: Any, pinned: Mapping[str, Shape]) -> bool:
    """Whether inference fails with all input sizes open too."""
    import onnx

    free = onnx.ModelProto()
    free.CopyFrom(proto)
    del free.graph.value_info[:]
    for value in free.graph.input:
        if value.name in pinned:
            for dimension in value.type.tensor_type.shape.dim:
                dimension.Clear()
    for value in free.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        onnx.shape_inference.infer_shapes(free, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError):
        return True
    return False


def _fixed(dimension: Any) -> int | None:
    return int(dimension.dim_value) if dimension.HasField("dim_value") and dimension.dim_value > 0 else None


def _text(shape: tuple[int, ...] | list[int]) -> str:
    return "x".join(str(size) for size in shape)
