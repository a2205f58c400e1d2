"""8 bits: decibels by hand, schemes by processor, layers that really stay float, bundles that keep their promises."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from hwsearch.deploy.bundle import deploy
from hwsearch.deploy.int8 import judge_of
from hwsearch.deploy.layers import hold_in_float, layers_of, outputs_of
from hwsearch.deploy.quantise import Int8Scheme, Int8Settings, quantise, scheme_for
from hwsearch.deploy.quantised_report import WeightQuality, markdown, rounded_tensor, rounded_weight
from hwsearch.deploy.reader import Bundle, read_bundle
from hwsearch.deploy.verdict import sqnr_db
from hwsearch.deploy.verify import verify
from hwsearch.device.check import check_device
from hwsearch.device.runtime_onnxruntime import optimise
from hwsearch.device.spec import Device
from hwsearch.errors import CheckFailedError, InputError, SchemaError
from hwsearch.graph.onnx_build import export_onnx
from hwsearch.reparam.algebra import ConvShape
from hwsearch.reparam.fold import fold
from hwsearch.reparam.odbb import ODBB
from hwsearch.reparam.statistics import randomise
from hwsearch.train.data import split, synthetic_images
from hwsearch.train.task import Classification

torch.set_num_threads(1)
DEVICE = Device(name="toy", runtime="onnxruntime")
QUICK = Int8Settings(methods=("minmax",), images=24)


def block(channels_in: int, channels: int) -> ODBB:
    return ODBB(ConvShape(channels_in, channels, (3, 3), padding=((1, 1), (1, 1))), "repvgg")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Two blocks of branches, a residual-free convolution with a batch norm, a linear layer; sane random statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        block(1, 8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), block(12, 12), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    ).eval()  # fmt: skip
    randomise(model, torch.randn(8, 1, 12, 12), torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(40, 1, 12, 12, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def exported(network: nn.Module, images: Tensor) -> bytes:
    return export_onnx(fold(network, images[:1]), images[:1])


# --- formulas ---


def test_decibels_by_hand() -> None:
    assert sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 3.5])) == pytest.approx(20.0)  # 25 over 0.25
    assert sqnr_db(np.array([1.0, 1.0]), np.array([0.0, 0.0])) == pytest.approx(0.0)
    assert sqnr_db(np.array([1.0]), np.array([11.0])) == pytest.approx(-20.0)
    assert sqnr_db(np.zeros(3), np.zeros(3)) == 200.0
    assert sqnr_db(np.zeros(3), np.ones(3)) == -200.0
    assert sqnr_db(np.ones(3), np.array([1.0, np.nan, 1.0])) == -200.0
    assert sqnr_db(np.ones(3), np.ones(4)) == -200.0


def test_rounding_by_hand() -> None:
    weight = np.array([[127.0, 1.4], [1.27, 0.126]], np.float32)
    np.testing.assert_allclose(rounded_weight(weight, 127), [[127.0, 1.0], [1.27, 0.13]], rtol=1e-5)
    assert rounded_weight(weight, 127, per_channel=False).tolist() == [[127.0, 1.0], [1.0, 0.0]]
    assert rounded_tensor(np.array([-1.0, 0.0, 254.0])).tolist() == [-1.0, 0.0, 254.0]
    assert rounded_tensor(np.array([0.3, 255.0])).tolist() == [0.0, 255.0]
    assert not rounded_tensor(np.zeros(2)).any()


def test_spread_is_what_one_scale_wastes() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 8, 3, 3)).astype(np.float32)
    even = WeightQuality.of(weight, 127)
    weight[0] *= 16
    uneven = WeightQuality.of(weight, 127)
    assert uneven.spread == pytest.approx(16 * even.spread, rel=0.5)
    assert abs(uneven.weight_db - even.weight_db) < 4
    # sixteen times the step is 24 dB more noise in all other channels
    assert sqnr_db(weight[1:], rounded_weight(weight, 127, per_channel=False)[1:]) < even.weight_db_one_scale - 15


def test_the_processor_decides() -> None:
    assert scheme_for("sse4_2 avx avx2 fma") == Int8Scheme("uint8", reduce_range=True)
    assert scheme_for("avx2 avx_vnni") == scheme_for("avx512f avx512_vnni") == Int8Scheme("uint8", reduce_range=False)
    assert scheme_for("asimd asimddp i8mm") == Int8Scheme("int8", reduce_range=False)
    assert scheme_for("") == scheme_for("block8") == Int8Scheme("uint8", reduce_range=True)
    assert (Int8Scheme().half, Int8Scheme(reduce_range=False).half) == (64, 127)


# --- quantising ---


def test_methods_are_compared_and_the_best_is_taken(exported: bytes, images: Tensor) -> None:
    rough = images.clone()
    rough[0, 0, 0, 0] = 400.0  # one wild value: the smallest and largest tell nothing any more
    found = quantise(exported, rough[:24].numpy(), images[24:].numpy(), settings=Int8Settings(percentile=99.9))
    by_name = {result.method: result.sqnr_db for result in found.methods}
    assert set(by_name) == {"minmax", "percentile", "entropy"}
    assert found.method == max(by_name, key=by_name.__getitem__) != "minmax"
    assert found.sqnr_db == by_name[found.method] > by_name["minmax"] + 3
    again = quantise(exported, rough[:24].numpy(), images[24:].numpy(), settings=Int8Settings(percentile=99.9))
    assert again.onnx == found.onnx


def test_nothing_is_printed(exported: bytes, images: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    quantise(exported, images[:24].numpy(), images[24:].numpy(), settings=Int8Settings(methods=("percentile",)))
    assert capsys.readouterr().out == ""


def test_keeping_the_worst_layers_helps(exported: bytes, images: Tensor) -> None:
    """As many as are asked for, those that are named, or as many as it takes."""
    model = onnx.load_from_string(exported)
    names = [layer.name for layer in layers_of(model)]
    assert names == ["0", "2", "4", "8"]
    parts = images.numpy()
    plain = quantise(exported, parts[:24], parts[24:], settings=QUICK)
    worst = min(plain.alone_db, key=lambda name: plain.alone_db[name])
    one = quantise(exported, parts[:24], parts[24:], settings=Int8Settings(methods=("minmax",), keep_fp32=1))
    named = quantise(exported, parts[:24], parts[24:], settings=Int8Settings(methods=("minmax",), keep_fp32=(worst,)))
    assert one.kept == named.kept == (worst,)
    assert one.onnx == named.onnx
    assert one.sqnr_db > plain.sqnr_db
    wanted = plain.sqnr_db + 0.5 * (one.sqnr_db - plain.sqnr_db)
    auto = quantise(
        exported, parts[:24], parts[24:],
        settings=Int8Settings(methods=("minmax",), keep_fp32="auto", min_sqnr_db=wanted),
    )  # fmt: skip
    assert [step.kept for step in auto.steps] == [(), (worst,)]
    assert auto.sqnr_db >= wanted > auto.steps[0].sqnr_db


@pytest.mark.real
def test_a_kept_layer_is_float_where_it_runs(exported: bytes, images: Tensor) -> None:
    """ONNX Runtime would quantise it again, worse than before; a Relu, a Clip and nothing behind it are all held."""
    parts = images.numpy()
    for name, whole in (("0", 3), ("2", 3), ("4", 3), ("8", 3)):
        found = quantise(
            exported, parts[:24], parts[24:], settings=Int8Settings(methods=("minmax",), keep_fp32=(name,))
        )
        nodes = onnx.load_from_string(optimise(DEVICE, found.onnx)).graph.node
        eight = [node.op_type for node in nodes if node.op_type in ("QLinearConv", "QGemm")]
        assert len(eight) == whole, [node.op_type for node in nodes]
        assert found.kernels_db > 60


def test_holding_changes_no_answer(exported: bytes, images: Tensor) -> None:
    model = onnx.load_from_string(exported)
    hold_in_float(model, {layer.node for layer in layers_of(model)})
    held = model.SerializeToString()
    assert held != exported
    onnx.checker.check_model(model)
    assert np.abs(outputs_of(held, images.numpy()) - outputs_of(exported, images.numpy())).max() < 1e-5


def test_what_makes_no_sense_is_refused(exported: bytes, images: Tensor) -> None:
    parts = images.numpy()
    for wrong, message in (
        ({"keep_fp32": "most"}, "keep_fp32 is 'most': give \"auto\""),
        ({"keep_fp32": -1}, "keep_fp32 is -1"),
        ({"methods": ("magic",)}, r"methods are \['magic'\]"),
        ({"percentile": 20.0}, "percentile is 20"),
        ({"images": 0}, "images is 0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
    ):
        with pytest.raises(InputError, match=message):
            Int8Settings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="names 'nowhere', which is no layer; the layers are 0, 2, 4, 8"):
        quantise(exported, parts[:8], parts[8:], settings=Int8Settings(methods=("minmax",), keep_fp32=("nowhere",)))
    with pytest.raises(InputError, match="keeps all 4 layers"):
        quantise(exported, parts[:8], parts[8:], settings=Int8Settings(methods=("minmax",), keep_fp32=9))
    with pytest.raises(InputError, match="the images have shape"):
        quantise(exported, parts[:8, :, :5], parts[8:], settings=QUICK)
    never = Int8Settings(methods=("minmax",), keep_fp32="auto", min_sqnr_db=150.0)
    with pytest.raises(CheckFailedError, match="8 bits lose too much with any of the 4 layers"):
        quantise(exported, parts[:24], parts[24:], settings=never)


# --- bundles ---


@pytest.fixture(scope="module")
def bundle(network: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    return deploy(
        network, images[:1], DEVICE, folder, precision="int8", calibration=images, int8=QUICK, budget_ms=1000.0
    )


def test_a_bundle_says_what_it_is(bundle: Bundle, network: nn.Module) -> None:
    assert bundle.precision == "int8"
    assert bundle.promised_sqnr_db is not None
    assert bundle.promised_sqnr_db > 10
    assert 1e-4 <= bundle.relative_tolerance <= 0.1
    assert {node.op_type for node in onnx.load_from_string(bundle.model).graph.node} >= {"QuantizeLinear", "Conv"}
    for case in bundle.cases:
        with torch.no_grad():
            exact = network(torch.from_numpy(case.input.copy())).numpy()
        assert case.reference is not None
        assert np.abs(case.reference - exact).max() < 1e-4
        assert 0 < np.abs(case.reference - case.output).max() < 0.3 * np.abs(exact).max()
    report = bundle.report
    assert report is not None
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert list(layers) == ["0", "2", "4", "8"]
    assert [name for name, _ in layers["4"]["branches"]] == [
        "branches.kxk.conv", "branches.1x1.conv"
    ]  # fmt: skip
    assert [name for name, _ in layers["2"]["branches"]] == ["conv"]
    for layer in layers.values():
        assert 10 < layer["weight_db"] < 60
        assert layer["weight_db_one_scale"] < layer["weight_db"] + 1
        assert layer["network_db"] < layer["tensor_db"] + 1
        assert (layer["folded_db"] is None) == (layer["name"] == "8")
    text = markdown(report)
    assert "weights int8 of 7 bits" in text
    assert text.count("\n| ") == 5


def test_the_example_is_no_golden_case_and_the_device_decides(
    network: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    eight = Device(name="eight", runtime="onnxruntime", precision="int8", home=tmp_path)
    found = deploy(network, torch.zeros(1, 1, 12, 12), eight, tmp_path / "b", calibration=images, int8=QUICK, cases=2)
    assert found.precision == "int8"
    assert len(found.cases) == 2
    assert all(case.input.any() for case in found.cases)
    plain = deploy(network, images[:1], eight, tmp_path / "f", precision="float32")
    assert (plain.precision, plain.promised_sqnr_db, plain.report) == ("float32", None, None)
    with pytest.raises(InputError, match="8 bits need images to be calibrated on"):
        deploy(network, images[:1], eight, tmp_path / "n")
    with pytest.raises(InputError, match="precision is 'int4'"):
        deploy(network, images[:1], eight, tmp_path / "n", precision="int4")
    with pytest.raises(InputError, match="1 calibration images are too few"):
        deploy(network, images[:1], eight, tmp_path / "n", calibration=images[:1])


def test_a_task_gives_images_and_judges(network: nn.Module, tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x[:, :1, :12, :12])
            return out

    task = Classification(*split(synthetic_images(240, seed=1), 120, seed=0))
    example = task.valid.take(np.arange(1))[0]
    told: list[str] = []
    found = deploy(
        Small().eval(), example, DEVICE, tmp_path / "b", precision="int8", task=task, tell=told.append,
        int8=Int8Settings(methods=("minmax",), images=40, keep_fp32="auto", tolerance=0.5),
    )  # fmt: skip
    assert found.report is not None
    assert found.report["metric_name"] == task.metric_name
    assert told[-1].startswith("0 layers in float32")
    judged = judge_of(task, np.arange(40, 120))
    assert judged(found.model) == found.report["metric"]
    assert [case.input.tolist() for case in found.cases] == [
        task.valid.take(np.array([40 + i]))[0].tolist() for i in range(3)
    ]


@pytest.fixture
def device(home: Path) -> Device:
    device = Device.load("simulated")
    check_device(device, seconds=0.2, passes=2)
    return device


def test_verify_holds_it_to_both_promises(bundle: Bundle, device: Device, tmp_path: Path) -> None:
    import shutil

    verdict = verify(bundle, device)
    assert (verdict.status, verdict.precision) == ("pass", "int8")
    assert verdict.numerics.max_abs_error == 0.0
    assert verdict.sqnr_db == pytest.approx(bundle.promised_sqnr_db + 1, abs=0.2)  # type: ignore[operator]
    verdict.save(tmp_path / "verdict.json")
    assert type(verdict).load(tmp_path / "verdict.json") == verdict

    for name in ("model.onnx", "float_0.npy", "quantisation.json"):
        copy = tmp_path / name.replace(".", "_")
        shutil.copytree(bundle.folder, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(bytes(content))
        with pytest.raises(SchemaError, match=f"{name} does not have the SHA-256"):
            verify(copy, device)


def test_the_report_shows_what_8_bits_cost(bundle: Bundle, device: Device, tmp_path: Path) -> None:
    import shutil

    from hwsearch.report import report

    shutil.copytree(bundle.folder, tmp_path / "b")
    verify(tmp_path / "b", device).save(tmp_path / "b" / "verdict.json")
    page = report(tmp_path / "b", tmp_path / "page.html").read_text()
    assert "What do 8 bits cost?" in page
    assert "weights int8 of 7 bits" in page
    assert "dB are promised" in page
    mended(tmp_path / "b", "quantisation.json", b'{"schema": 3}')
    assert "is not a report of this release" in report(tmp_path / "b", tmp_path / "page.html").read_text()


def mended(folder: Path, name: str, content: bytes) -> None:
    """Change a file and its hash: only what it computes can tell."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_another_network_with_mended_hashes_fails(bundle: Bundle, device: Device, tmp_path: Path) -> None:
    import shutil

    from onnx import numpy_helper

    shutil.copytree(bundle.folder, tmp_path / "a")
    model = onnx.load_from_string(bundle.model)
    for tensor in model.graph.initializer:
        if tensor.name == "8.weight_quantized":
            values = numpy_helper.to_array(tensor).copy()
            values[..., 0] = -values[..., 0]
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    mended(tmp_path / "a", "model.onnx", model.SerializeToString())
    verdict = verify(tmp_path / "a", device)
    assert verdict.status == "fail"
    assert "differ from the golden ones" in verdict.reasons[0]

    # golden outputs of its own that agree, but not what the float network computes
    shutil.copytree(bundle.folder, tmp_path / "b")
    from hwsearch.deploy.arrays import npy_bytes

    for number, case in enumerate(bundle.cases):
        assert case.reference is not None
        mended(tmp_path / "b", f"float_{number}.npy", npy_bytes(case.reference * np.float32(1.5)))
    verdict = verify(tmp_path / "b", device)
    assert verdict.status == "fail"
    assert "dB are promised" in verdict.reasons[0]


def test_a_damaged_manifest_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    for number, (change, message) in enumerate((
        (lambda m: m["quantisation"].update(promised_sqnr_db="much"), "promised_sqnr_db is 'much'"),
        (lambda m: m["quantisation"].update(report="elsewhere.json"), "elsewhere.json"),
        (lambda m: m["cases"][0].update(reference=m["cases"][0]["input"]), "reference and output differ in shape"),
        (lambda m: m.update(quantisation=[]), "quantisation is"),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        shutil.copytree(bundle.folder, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(SchemaError, match=message):
            read_bundle(folder)


# --- a board ---

BOARD = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError("not on a board: " + name)

sys.meta_path.insert(0, Nothing())
sys.argv = ["board", *sys.argv[1:]]
from hwsearch.deploy.board import main
sys.exit(main())
"""
NOT_THERE = (
    "torch", "onnx", "onnxscript", "pydantic", "rich", "typer", "xgboost", "sklearn", "scipy", "pymoo", "plotly",
    "safetensors",
)  # fmt: skip


@pytest.mark.real
def test_a_board_needs_numpy_and_the_runtime_only(bundle: Bundle, tmp_path: Path) -> None:
    import shutil
    import subprocess
    import sys

    def board(folder: Path) -> subprocess.CompletedProcess[str]:
        code = BOARD.format(blocked=NOT_THERE)
        return subprocess.run(
            [sys.executable, "-c", code, str(folder), "--no-timing"], capture_output=True, text=True, check=False
        )

    done = board(bundle.folder)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert (verdict["status"], verdict["precision"]) == ("pass", "int8")
    assert verdict["sqnr_db"] >= verdict["promised_sqnr_db"]
    assert verdict["notes"] == ["milliseconds were not measured"]

    shutil.copytree(bundle.folder, tmp_path / "b")
    from hwsearch.deploy.arrays import npy_bytes

    mended(tmp_path / "b", "output_0.npy", npy_bytes(bundle.cases[0].output + np.float32(10)))
    broken = board(tmp_path / "b")
    assert broken.returncode == 1
    assert json.loads(broken.stdout)["status"] == "fail"
    (tmp_path / "b" / "model.onnx").write_bytes(b"")
    refused = board(tmp_path / "b")
    assert refused.returncode == 2
    assert refused.stderr.startswith("hwsearch: error: model.onnx has 0 bytes")
