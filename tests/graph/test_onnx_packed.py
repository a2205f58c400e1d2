"""Packed files: zeros take a bit, everything comes back, and what is damaged is told."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from hwsearch.errors import InputError, SchemaError
from hwsearch.graph.onnx_export import export_onnx
from hwsearch.graph.onnx_packed import pack, packed_bytes, unpack

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def file() -> bytes:
    """A convolution that is mostly zeros, some of them negative, and a dense linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    with torch.no_grad():
        model[0].weight[torch.rand(8, 1, 3, 3) < 0.8] = -0.0  # type: ignore[index,operator]
    return export_onnx(model, torch.zeros(1, 1, 4, 4))


def numbers(file: bytes) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(file).graph.initializer}


def test_what_was_packed_comes_back_number_for_number(file: bytes) -> None:
    packed = pack(file)
    back = unpack(packed)
    before, after = numbers(file), numbers(back)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert np.array_equal(values, after[name]), name
    assert pack(back) == packed
    onnx.checker.check_model(onnx.load_from_string(back))
    floats = [values for values in before.values() if values.dtype == np.float32]
    saved = sum(1 + values.nbytes - packed_bytes(values.size, np.count_nonzero(values)) for values in floats)
    assert saved > 150
    dense = file if all(np.all(v != 0) for v in floats) else None
    assert dense is None, "there are zeros to pack"
    assert len(packed) < len(file) - saved + 100


@pytest.mark.parametrize(("count", "nonzero"), [(1, 1), (9, 0), (9, 9), (64, 60), (64, 63), (1000, 5)])
def test_a_tensor_is_stored_the_smaller_way(count: int, nonzero: int) -> None:
    assert packed_bytes(count, nonzero) == 1 + min(4 * count, (count + 7) // 8 + 4 * nonzero)


def test_what_is_no_packed_file_is_refused(file: bytes) -> None:
    packed = pack(file)
    for bad in (b"", b"x" * 50, packed[:-3], packed + b"1", packed[:40]):
        with pytest.raises(SchemaError, match="no packed network, or a damaged one"):
            unpack(bad)
    with pytest.raises(InputError, match="no ONNX file"):
        pack(b"\xff\xff\xff")
