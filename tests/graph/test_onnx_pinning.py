"""Dynamic sizes of ONNX files: pinned everywhere, and refused in one line where they do not fit."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hwsearch.errors import InputError
from hwsearch.graph.onnx_pinning import ANY, pin_inputs


def image_model(*shape: int | str | None) -> onnx.ModelProto:
    """Convolution of 3 channels, flattened to a layer of 8 * 6 * 6 values."""
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["a"], ["flat"]),
        helper.make_node("Gemm", ["flat", "v"], ["output"]),
    ]
    weights = {"w": np.zeros((8, 3, 3, 3), np.float32), "v": np.zeros((288, 5), np.float32)}
    graph = helper.make_graph(
        nodes,
        "image",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [shape[0] if shape else None, 5])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
        value_info=[
            helper.make_tensor_value_info("a", TensorProto.FLOAT, [shape[0] if shape else None, 8, None, None])
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pair_model() -> onnx.ModelProto:
    """Ids and a mask of one batch and one length."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["embedded", "wide"], ["output"]),
    ]
    weights = {"table": np.zeros((10, 4), np.float32), "last": np.array([2], np.int64)}
    graph = helper.make_graph(
        nodes,
        "pair",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"]),
            helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", "length"]),
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "length", 4])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def output_shape(proto: onnx.ModelProto) -> list:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.get_outputs()[0].shape


def test_a_batch_is_pinned_wherever_it_stands() -> None:
    proto = image_model("batch", 3, 6, 6)
    assert pin_inputs(proto, {ANY: (2, 3, 6, 6)}, "net.onnx") == {"image": (2, 3, 6, 6)}
    onnx.checker.check_model(proto, full_check=True)
    assert output_shape(proto) == [2, 5]


def test_a_file_of_fixed_shape_needs_nothing() -> None:
    proto = image_model(1, 3, 6, 6)
    before = proto.SerializeToString()
    assert pin_inputs(proto, {}, "net.onnx") == {"image": (1, 3, 6, 6)}
    assert proto.SerializeToString() == before


def test_one_input_tells_the_other() -> None:
    proto = pair_model()
    assert pin_inputs(proto, {"ids": (2, 7)}, "net.onnx") == {"ids": (2, 7), "mask": (2, 7)}
    assert output_shape(proto) == [2, 7, 4]


@pytest.mark.parametrize(
    ("model", "shapes", "message"),
    [
        (image_model("batch", 3, 6, 6), {}, r"of net has a dynamic size \(axis 0 \(batch\)\): add --input 1x3x6x6"),
        (image_model(None, 3, None, 6), {}, r"'image' of net has a dynamic size \(axis 0\): add --input 1x3x1x6"),
        (image_model("n", 3, 6, 6), {ANY: (1, 4, 6, 6)}, "takes size 3 on axis 1, --input says 4"),
        (image_model("n", 3, 6, 6), {ANY: (1, 3, 6)}, r"takes 4 axes \(nx3x6x6\), --input has 3"),
        (image_model("n", 3, 6, 6), {"picture": (1, 3, 6, 6)}, "no input 'picture'; it has image"),
        (image_model("n", 3, "h", "w"), {ANY: (1, 3, 7, 7)}, "does not run on the shape image 1x3x7x7: .*give another"),
        (image_model("n", "c", 6, 6), {ANY: (1, 2, 6, 6)}, "does not run on the shape image 1x2x6x6"),
        (pair_model(), {}, r"'ids' of net has a dynamic size \(axis 0 \(batch\)\): add --input ids=1x1"),
        (pair_model(), {ANY: (1, 2)}, r"has 2 inputs \(ids, mask\): name each, such as --input ids="),
        (pair_model(), {"ids": (1, 2), "mask": (1, 3)}, "the size 'length' of net is 2 and 3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_one_line(model: onnx.ModelProto, shapes: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        pin_inputs(model, shapes, "net")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shape_is_not_blamed_for_what_fails_anyway() -> None:
    proto = image_model("n", 3, 6, 6)
    # a declared output that contradicts the graph whatever the batch is
    proto.graph.node.append(helper.make_node("Concat", ["w", "v"], ["odd"], axis=0))
    assert pin_inputs(proto, {ANY: (1, 3, 6, 6)}, "net") == {"image": (1, 3, 6, 6)}
