"""8-bit networks without calibration: the same kernels as a calibrated one, from any float network of a search."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from hwsearch.device.onnx_kernels import Reader
from hwsearch.errors import InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.graph.onnx_build import OnnxTemplate
from hwsearch.graph.widths import WidthSpace
from hwsearch.latency import random_networks
from hwsearch.latency.quantising import QuantisedTemplate, Scheme, quantise_network
from hwsearch.latency.random_quantised import FAMILIES, random_family, random_network

CONVOLUTIONAL = [family for family in ("vgg", "resnet", "mobile", "se", "separable", "dense") if family in FAMILIES]


def optimised(network: bytes, folder: Path, *, run: bool = True) -> bytes:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    if run:
        feed = {value.name: np.ones(value.shape, np.float32) for value in session.get_inputs()}
        assert all(np.isfinite(values).all() for values in session.run(None, feed))
    return (folder / "optimised.onnx").read_bytes()


def lowered(network: bytes, folder: Path) -> tuple[Kernel, ...]:
    reader = Reader(onnx.load_from_string(optimised(network, folder)))
    found = reader.executed()
    assert not reader.guesses
    return found


class Random(CalibrationDataReader):
    """Two random images for ORT's own quantiser."""

    def __init__(self, network: bytes) -> None:
        value = onnx.load_from_string(network).graph.input[0]
        shape = [size.dim_value for size in value.type.tensor_type.shape.dim]
        rng = np.random.default_rng(0)
        self.images = iter([{value.name: rng.standard_normal(shape).astype(np.float32)} for _ in range(2)])

    def get_next(self) -> dict | None:
        return next(self.images, None)


@pytest.mark.real
@pytest.mark.parametrize("family", CONVOLUTIONAL)
@pytest.mark.parametrize("seed", [0, 1])
def test_kernels_are_those_of_a_calibrated_network(family: str, seed: int, tmp_path: Path) -> None:
    network = random_networks.random_network(family, np.random.default_rng(seed))
    (tmp_path / "float.onnx").write_bytes(network)
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "eight.onnx", Random(network), quant_format=QuantFormat.QDQ,
        per_channel=True, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
    )  # fmt: skip
    wanted = lowered((tmp_path / "eight.onnx").read_bytes(), tmp_path)
    found = lowered(quantise_network(network), tmp_path)
    assert Counter(kernel.key for kernel in found) == Counter(kernel.key for kernel in wanted)


@pytest.mark.real
@pytest.mark.parametrize("family", FAMILIES)
def test_random_networks_run(family: str, tmp_path: Path) -> None:
    for seed in range(3):
        network = random_network(family, np.random.default_rng(seed))
        assert network == random_network(family, np.random.default_rng(seed))
        kernels = lowered(network, tmp_path)
        assert not [kernel.op for kernel in kernels if kernel.family == "other"]
        macs = sum(kernel.macs for kernel in kernels)
        eight = sum(kernel.macs for kernel in kernels if kernel.dtype.startswith(("uint8", "int8")))
        assert eight > 0.8 * macs, family


def test_families_are_drawn() -> None:
    rng = np.random.default_rng(0)
    assert {random_family(rng) for _ in range(200)} == set(FAMILIES)


def small() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 24, 3, 2, 1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(24, 10),
    ]  # fmt: skip
    return torch.nn.Sequential(*layers).eval(), torch.zeros(1, 3, 16, 16)


@pytest.mark.real
def test_a_width_space_in_eight_bits(tmp_path: Path) -> None:
    module, example = small()
    space = WidthSpace.from_model(module, example)
    template = QuantisedTemplate(OnnxTemplate(space, module, example))
    assert template.space is space
    for choice in (space.full(), space.smallest()):
        heavy = [kernel for kernel in lowered(template.slice(choice), tmp_path) if kernel.macs]
        assert [kernel.op for kernel in heavy] == ["QLinearConv", "QLinearConv", "QGemm"]
        assert {kernel.dtype for kernel in heavy} == {"uint8*int8"}
        assert [kernel.out_channels for kernel in heavy[:2]] == list(choice.widths)


@pytest.mark.real
def test_weights_are_kept_to_within_half_a_step(tmp_path: Path) -> None:
    module, example = small()
    network = OnnxTemplate(WidthSpace.from_model(module, example), module, example, check=False)
    eight = onnx.load_from_string(quantise_network(network.slice(network.space.full())))
    values = {item.name: numpy_helper.to_array(item) for item in eight.graph.initializer}
    weight = next(name for name in values if name.endswith("_eight") and values[name].ndim == 4)
    scale = values[weight.replace("_eight", "_scale")]
    exact = dict(module.named_parameters())["0.weight"].detach().numpy()
    assert values[weight].dtype == np.int8
    back = values[weight] * scale[:, None, None, None]
    assert np.abs(back - exact).max() <= 0.5 * scale.max() * (1 + 1e-5)


@pytest.mark.real
@pytest.mark.parametrize(("scheme", "dtype"), [(Scheme(), "uint8*int8"), (Scheme("uint8", per_channel=False), "uint8")])
def test_schemes(scheme: Scheme, dtype: str, tmp_path: Path) -> None:
    network = random_networks.random_network("vgg", np.random.default_rng(3))
    heavy = [kernel for kernel in lowered(quantise_network(network, scheme=scheme), tmp_path) if kernel.macs]
    assert {kernel.dtype for kernel in heavy} == {dtype}


def test_what_cannot_be_quantised_is_told() -> None:
    model = onnx.load_from_string(random_networks.random_network("vgg", np.random.default_rng(0)))
    model.opset_import[0].version = 11
    with pytest.raises(InputError, match="operator set 11"):
        quantise_network(model.SerializeToString())
    with pytest.raises(InputError, match="no ONNX file"):
        quantise_network(b"\xff\xff\xff")
    with pytest.raises(InputError, match="'int5'"):
        Scheme("int5")
