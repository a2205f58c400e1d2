"""Read just enough of an ONNX file, as raw protobuf, to refuse one that points outside itself.

An ONNX tensor may say "my data lies in file X". A bundle's model must not: the loader promises that only files listed
in its manifest are read. The machine that verifies has no ``onnx`` package, so this walks the wire format directly.

Reference: onnx.proto3 (field numbers below) and the protobuf encoding guide.
"""

from __future__ import annotations

from collections.abc import Iterator

from hwsearch.errors import SchemaError

_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING = range(8)
#: message -> field number -> message inside it; every path on which a tensor can lie.
_INSIDE: dict[int, dict[int, int]] = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _TENSOR: {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_DEEPEST = 64


def refuse_external_data(model: bytes, name: str) -> None:
    """Raises SchemaError when the bytes are no ONNX model, or one whose tensors lie in other files.

    Example:
        >>> refuse_external_data(b"not a model", "model.onnx")
        Traceback (most recent call last):
        hwsearch.errors.SchemaError: model.onnx is not an ONNX model: it is damaged or something else
    """
    try:
        has_graph = _walk(memoryview(model), _MODEL, name, 0)
    except (IndexError, ValueError) as error:
        raise SchemaError(f"{name} is not an ONNX model: it is damaged or something else") from error
    if not has_graph:
        raise SchemaError(f"{name} holds no graph: it is not an ONNX model")


def _walk(message: memoryview, kind: int, name: str, depth: int) -> bool:
    """Visit all messages inside; True when a model has a graph."""
    if depth > _DEEPEST:
        raise SchemaError(f"{name} nests graphs more than {_DEEPEST} deep: refused")
    found = False
    for field, value in _fields(message):
        if kind == _TENSOR and (field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value != 0)):
            raise SchemaError(f"{name} keeps weights in another file: a bundle's model holds its weights inside")
        inner = _INSIDE[kind].get(field)
        if inner is not None:
            if not isinstance(value, memoryview):
                raise ValueError("a message is expected here")
            _walk(value, inner, name, depth + 1)
            found = found or field == 7
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) pairs: an integer, or the bytes of a length-delimited or fixed-size field."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        field, wire = key >> 3, key & 7
        value: int | memoryview
        if wire == 0:
            value, at = _varint(message, at)
        else:
            if wire == 2:
                size, at = _varint(message, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire}")
            value, at = message[at : at + size], at + size
        if at > end or field == 0:
            raise ValueError("truncated")
        yield field, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A protobuf varint of at most 64 bits and the place after it."""
    result = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise ValueError("varint too long")
