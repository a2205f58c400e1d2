"""ONNX files in which zeros take no room: a mask of one bit a number, and the numbers that are not zero.

Runtimes read dense tensors, so this is how a network with many zeros is stored or sent, not how it runs: ``unpack``
gives the file back, number for number (a negative zero as a zero). A tensor is stored densely where that is smaller.

Layout: ``MAGIC``; four bytes, the graph's length (little-endian); the ONNX file without its float tensors' numbers; for
every float tensor, in the file's order, one byte (0 dense, 1 sparse), then a sparse one's mask, and its numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from hwsearch.errors import InputError, SchemaError

MAGIC = b"hwsearch.packed.1\n"
_LENGTH = struct.Struct("<I")


def pack(onnx_file: bytes) -> bytes:
    """The packed form of an ONNX file.

    Raises:
        InputError: it is no ONNX file.

    Example:
        >>> len(pack(file)) < len(file)                                               # doctest: +SKIP
        True
    """
    proto, parts = _read(onnx_file), []
    for tensor in _tensors(proto):
        values = np.frombuffer(tensor.raw_data, dtype="<f4")
        parts.append(_packed(values))
        tensor.ClearField("raw_data")
    graph = proto.SerializeToString(deterministic=True)
    return b"".join([MAGIC, _LENGTH.pack(len(graph)), graph, *parts])


def unpack(packed: bytes) -> bytes:
    """The ONNX file that was packed.

    Raises:
        SchemaError: it is no packed file, or damaged.
    """
    try:
        if not packed.startswith(MAGIC):
            raise ValueError("magic")
        at = len(MAGIC)
        (length,) = _LENGTH.unpack_from(packed, at)
        at += _LENGTH.size
        proto = _read(packed[at : at + length])
        at += length
        for tensor in _tensors(proto):
            values, at = _unpacked(packed, at, int(np.prod(tensor.dims)))
            tensor.raw_data = values.tobytes()
        if at != len(packed):
            raise ValueError("length")
    except (ValueError, IndexError, struct.error, InputError) as error:
        raise SchemaError("this is no packed network, or a damaged one: pack the ONNX file again") from error
    return bytes(proto.SerializeToString(deterministic=True))


def packed_bytes(numbers: int, nonzero: int) -> int:
    """Bytes of one tensor in a packed file, of so many numbers of which some are not zero.

    Example:
        >>> packed_bytes(100, 100), packed_bytes(100, 20)
        (401, 94)
    """
    return 1 + min(4 * numbers, -(-numbers // 8) + 4 * nonzero)


def _packed(values: np.ndarray) -> bytes:
    bits = values != 0
    sparse = packed_bytes(len(values), int(bits.sum())) < 1 + 4 * len(values)
    if not sparse:
        return bytes(b"\x00" + values.tobytes())
    return bytes(b"\x01" + np.packbits(bits).tobytes() + values[bits].tobytes())


def _unpacked(packed: bytes, at: int, numbers: int) -> tuple[np.ndarray, int]:
    kind, at = packed[at], at + 1
    if kind == 0:
        return np.frombuffer(packed, dtype="<f4", count=numbers, offset=at), at + 4 * numbers
    if kind != 1:
        raise ValueError(f"kind {kind}")
    mask = np.frombuffer(packed, dtype=np.uint8, count=-(-numbers // 8), offset=at)
    at += len(mask)
    on = np.unpackbits(mask, count=numbers).astype(bool)
    found = np.frombuffer(packed, dtype="<f4", count=int(on.sum()), offset=at)
    values = np.zeros(numbers, dtype="<f4")
    values[on] = found
    return values, at + 4 * len(found)


def _tensors(proto: Any) -> Iterator[Any]:
    """The float tensors whose numbers are packed, in the file's order."""
    for tensor in proto.graph.initializer:
        if tensor.data_type == 1 and not tensor.float_data:
            yield tensor


def _read(file: bytes) -> Any:
    import onnx

    try:
        return onnx.load_from_string(file)
    except Exception as error:  # whatever the protocol buffers say
        raise InputError("this is no ONNX file: give one that export_onnx wrote") from error
