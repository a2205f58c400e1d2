"""Arrays as plain ``.npy`` files: numbers and a shape, never pickle, parsed without trusting a byte."""

from __future__ import annotations

import math
import re
from io import BytesIO

import numpy as np

from hwsearch.errors import SchemaError

_HEADER = re.compile(
    r"\{'descr': '[<|]([fi])([0-9])', 'fortran_order': False, 'shape': \(((?:\d{1,9}, ?)*(?:\d{1,9})?)\), \} *\n",
    re.ASCII,
)
DTYPES = ("float16", "float32", "float64", "int32", "int64")


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of a ``.npy`` file, version 1.0."""
    file = BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def parse_npy(content: bytes, name: str) -> np.ndarray:
    """An array from the bytes of a ``.npy`` file: version 1.0, C order, plain numbers; never pickle.

    Raises:
        SchemaError: anything else, naming the file. Nothing is allocated before the size has been checked.
    """
    match = re.match(rb"\x93NUMPY\x01\x00(..)", content, re.DOTALL)
    end = 10 + int.from_bytes(match[1], "little") if match else 0
    header = _HEADER.fullmatch(content[10:end].decode("latin-1"))
    if not header:
        raise SchemaError(f"{name} is not a plain .npy array of numbers in C order: refused")
    dtype = np.dtype(f"<{header[1]}{header[2]}")
    shape = tuple(int(size) for size in re.findall("[0-9]+", header[3]))
    if dtype.name not in DTYPES or len(shape) > 8 or math.prod(shape) * dtype.itemsize != len(content) - end:
        raise SchemaError(f"{name} holds {dtype.name} {shape} by its header, but {len(content) - end} bytes of data")
    return np.frombuffer(content, dtype=dtype, offset=end).reshape(shape)
