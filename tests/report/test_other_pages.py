"""Reports of a latency table and of a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.deploy.bundle import Bundle, deploy
from hwsearch.deploy.verdict import Numerics, Verdict
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.errors import SchemaError
from hwsearch.graph.kernel import Kernel
from hwsearch.latency.table import LatencyTable, NetworkSample
from hwsearch.report import report

torch.set_num_threads(1)
FINGERPRINT = Fingerprint("AMD EPYC <b>", "AVX2", "onnxruntime", "1.31.1", 1, "float32", "Linux", "unknown")


def make_table(networks: int = 60) -> LatencyTable:
    """Random networks of two sources whose times follow their MACs, more or less."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(networks):
        kernels = tuple(
            Kernel(family, "Conv", in_channels=int(c), out_channels=int(c), out_height=14, out_width=14)
            for family, c in zip(("conv", "pointwise", "depthwise", "conv"), rng.integers(4, 128, 4), strict=True)
        )  # fmt: skip
        node_ms = tuple(float(k.macs / 2e7 * rng.uniform(0.7, 1.6) + 0.002) for k in kernels)
        total = sum(node_ms)
        source = ("random:resnet", "random:mobile & <co>")[number % 2]
        samples.append(
            NetworkSample(f"n{number:03d}", source, kernels, node_ms, total, total * 1.02, total * 1.2, 0.012, 30)
        )
    return LatencyTable("x86-ort-1t", FINGERPRINT, 0.63, 0.043, tuple(samples))


def test_a_table_page(tmp_path: Path) -> None:
    make_table().save(tmp_path / "x86-ort-1t")
    page = report(tmp_path / "x86-ort-1t").read_text()
    for words in (
        "60 networks measured",
        "240 executed kernels",
        "4.3 %",
        "AMD EPYC &lt;b&gt;",
        "depthwise",
        "No device check",
    ):
        assert words in page, words
    assert "<co>" not in page
    assert page.count('class="figure"') == 2


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    make_table().save(tmp_path / "t")
    path = tmp_path / "t" / "networks.csv"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(SchemaError, match="networks"):
        report(tmp_path / "t")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()
    device = Device(name="simulated", runtime="simulated", home=tmp_path_factory.mktemp("home"))
    folder = tmp_path_factory.mktemp("made") / "bundle"
    return deploy(model, torch.zeros(1, 1, 8, 8), device, folder, budget_ms=2.0, predicted_ms=1.9, name="<found>")


def test_a_bundle_page_before_and_after_verification(bundle: Bundle, tmp_path: Path) -> None:
    before = report(bundle, tmp_path / "before.html").read_text()
    assert "1.90 ms predicted for a 2.00 ms budget; not measured yet" in before
    assert "has not been verified" in before
    assert bundle.sha256["model.onnx"] in before
    assert "<found>" not in before
    assert "plotly.js" not in before

    numerics = Numerics(True, 1e-6, 2e-7, 1e-4, 3)
    verdict = Verdict("pass", (), (), "found", "simulated", numerics, 2.0, 1.9, 1.95, 1.97, 2.1, 0.01, 30, 0.05)
    verdict.save(bundle.folder / "verdict.json")
    after = report(bundle.folder, tmp_path / "after.html").read_text()
    assert "1.95 ms measured, inside the 2.00 ms budget" in after
    assert 'class="pill pass"' in after
    (bundle.folder / "verdict.json").unlink()


def test_a_bundle_is_explained_where_its_predictor_is_at_hand(bundle: Bundle, home: Path, tmp_path: Path) -> None:
    from hwsearch.latency.predictor import LatencyPredictor
    from hwsearch.latency.profile import profile

    assert "No predictor of simulated is at hand" in report(bundle.folder, tmp_path / "without.html").read_text()
    device = Device.load("simulated")
    table = profile(device, minutes=60, networks=24)
    LatencyPredictor(rounds=5, folds=2).fit(table).save(device.table_folder / "predictor")
    page = report(bundle.folder, tmp_path / "with.html").read_text()
    assert "Why it is not faster" in page
    assert "No stair edges: an ONNX file has no width space." in page
    assert page.count('class="figure"') == 1
    manifest = device.table_folder / "predictor" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"runtime_version": "1"', '"runtime_version": "0"'))
    again = report(bundle.folder, tmp_path / "other.html").read_text()
    assert "Its time cannot be taken apart here" in again
    assert "runtime_version" in again


def test_a_changed_bundle_has_no_page(bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle.folder, copy)
    (copy / "model.onnx").write_bytes(b"x")
    with pytest.raises(SchemaError, match=r"model\.onnx has 1 bytes"):
        report(copy)
