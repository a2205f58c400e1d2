"""ONNX files on the command line: their inputs by --input, whatever exporter wrote them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hwsearch.device.onnx_kernels import kernels_of
from hwsearch.errors import InputError
from hwsearch.model_argument import load_model_argument, parse_inputs

sys.path.insert(0, str(Path(__file__).parent / "graph"))

from test_onnx_pinning import image_model, pair_model


def test_inputs_are_read() -> None:
    assert parse_inputs("1x3x8x8") == (1, 3, 8, 8)
    assert parse_inputs("a=1x2, b/c:0=3x4") == {"a": (1, 2), "b/c:0": (3, 4)}


@pytest.mark.parametrize("text", ["a=", "=1x2", "a=1x2,a=1x3", "a=1x2,3x4", "a=0x2", "axb"])
def test_inputs_that_make_no_sense(text: str) -> None:
    with pytest.raises(InputError):
        parse_inputs(text)


def test_several_inputs_of_an_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "pair.onnx"
    path.write_bytes(pair_model().SerializeToString())
    argument = load_model_argument(str(path), parse_inputs("ids=2x7,mask=2x7"))
    assert argument.input_shape == (2, 7)
    assert [kernel.op for kernel in kernels_of(argument.to_onnx())] == ["Gather", "Unsqueeze", "Mul"]
    with pytest.raises(InputError, match="dynamic size"):
        load_model_argument(str(path))


def test_one_input_of_an_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "image.onnx"
    path.write_bytes(image_model("n", 3, 6, 6).SerializeToString())
    argument = load_model_argument(str(path), (4, 3, 6, 6))
    assert argument.input_shape == (4, 3, 6, 6)
    assert kernels_of(argument.to_onnx())[0].batch == 4


def test_named_inputs_are_for_onnx_files() -> None:
    with pytest.raises(InputError, match="has one input"):
        load_model_argument("hwsearch.models.resnet:resnet_small", {"input": (1, 1, 28, 28)})


@pytest.mark.parametrize(
    ("name", "words"),
    [("leaf.py", r"is Python code: name a function .*, leaf:FUNCTION"), ("leaf.pt", "holds weights, no network")],
)
def test_a_file_of_another_kind_is_told_what_to_give(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("x = 1\n")
    with pytest.raises(InputError, match=words):
        load_model_argument(name, (1, 3, 8, 8))
