"""The whole path in 8 bits: a device whose table is INT8, a search priced in it, a bundle that keeps its promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hwsearch.config import RunConfig
from hwsearch.deploy.reader import read_bundle
from hwsearch.errors import InputError

CONFIG = """
[run]
name = "eight"
[device]
name = "eight"
[profile]
minutes = 0.1
[model]
factory = "hwsearch.models.vgg:vgg_small"
input = "1x1x28x28"
kwargs = { width = 0.75 }
[data]
kind = "synthetic"
limit = 300
valid = 100
[search]
budget = "80%"
quantum = 4
candidates = 8
population = 4
score_images = 64
calibration_images = 64
[supernet]
steps = 6
[train]
steps = 12
[deploy]
keep_fp32 = 1
images = 40
methods = ["minmax", "percentile"]
"""


def hwsearch(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hwsearch", *words], cwd=home, env={**os.environ, "HWSEARCH_HOME": str(home)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def answer(home: Path, *words: str) -> dict[str, Any]:
    done = hwsearch(home, *words, "--json")
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "devices").mkdir()
    text = (Path(__file__).resolve().parent.parent / "devices" / "simulated.toml").read_text()
    (folder / "devices" / "simulated.toml").write_text(text)
    (folder / "devices" / "eight.toml").write_text(text.replace('"float32"', '"int8"'))
    (folder / "eight.toml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def outcome(home: Path) -> dict[str, Any]:
    return answer(home, "run", "eight.toml")


@pytest.mark.long
def test_a_run_is_priced_and_deployed_in_eight_bits(home: Path, outcome: dict[str, Any]) -> None:
    verdict = outcome["verdict"]
    assert verdict["numerics"]["ok"], verdict
    assert verdict["precision"] == "int8"
    assert verdict["sqnr_db"] >= verdict["promised_sqnr_db"]
    bundle = read_bundle(home / "runs" / "eight" / "bundle")
    assert bundle.precision == "int8"
    assert bundle.report is not None
    assert len(bundle.report["kept"]) == 1
    assert [method["method"] for method in bundle.report["methods"]] == ["minmax", "percentile"]
    # those of the network as it is written; its float layer is of a kind that the device was not profiled with
    assert bundle.predicted_ms == pytest.approx(bundle.measured_ms, rel=0.5)
    assert bundle.measured_ms == pytest.approx(verdict["measured_ms"], rel=0.02)
    kernels = (home / "latency_tables" / "eight" / "kernels.csv").read_text()
    assert kernels.count("uint8*int8") > 100


@pytest.mark.long
def test_the_verbs_look_at_a_float_model_in_eight_bits(home: Path, outcome: dict[str, Any]) -> None:
    model = ("hwsearch.models.repvgg:repvgg_small", "--input", "1x1x28x28")
    done = hwsearch(home, "estimate", *model, "--device", "eight", "--json", "--explain")
    assert done.returncode == 0, done.stderr
    assert "is folded first: 7 blocks of branches" in done.stderr
    assert "is looked at in 8 bits" in done.stderr
    found = json.loads(done.stdout)
    assert found["coverage"] > 0.9
    eight, unfolded = (
        answer(home, "measure", *model, "--device", "eight", *flag) for flag in ((), ("--allow-unfolded",))
    )
    plain = answer(home, "measure", *model, "--device", "simulated")
    assert eight["measured_ms"] < plain["measured_ms"]
    assert unfolded["measured_ms"] > 1.5 * eight["measured_ms"]
    assert found["predicted_ms"] == pytest.approx(eight["measured_ms"], rel=0.25)


@pytest.mark.long
def test_deploying_the_found_network_again(home: Path, outcome: dict[str, Any]) -> None:
    """The run's own data calibrate; the device's predictor and stopwatch fill in what is known."""
    found = answer(home, "deploy", "runs/eight", "--device", "eight", "--output", "again", "--measure")
    assert found["precision"] == "int8"
    assert found["predicted_ms"] == pytest.approx(found["measured_ms"], rel=0.2)
    assert found["quantisation"]["metric_name"] == "accuracy"
    assert answer(home, "verify", "again", "--device", "eight")["status"] in ("pass", "conditional")
    shown = hwsearch(
        home, "deploy", "runs/eight", "--device", "simulated", "--output", "auto", "--precision", "int8",
        "--keep-fp32", "auto", "--tolerance", "1", "--data", "synthetic",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "Layers in float32: none" in shown.stdout
    assert "features.0" in shown.stdout


@pytest.mark.long
def test_what_does_not_go_together_is_one_line(home: Path) -> None:
    model = ("hwsearch.models.repvgg:repvgg_small", "--input", "1x1x28x28", "--output", "nothing")
    for words, message in (
        (("--device", "simulated", "--precision", "int8"), "add --data"),
        (("--device", "simulated", "--data", "synthetic"), "--data is for 8 bits"),
        (("--device", "simulated", "--precision", "int4"), "--precision is 'int4'"),
        (
            ("--device", "eight", "--data", "synthetic", "--keep-fp32", "stem.9"),
            "keep_fp32 names 'stem.9', which is no layer; the layers are stem.0",
        ),
    ):
        done = hwsearch(home, "deploy", *model, *words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (home / "nothing").exists()
    (home / "float.toml").write_text(CONFIG.replace("keep_fp32 = 1\nimages = 40\n", 'precision = "float32"\n').replace(
        'methods = ["minmax", "percentile"]\n', ""))  # fmt: skip
    done = hwsearch(home, "run", "float.toml")
    assert done.returncode == 2
    assert "the search is in 8-bit milliseconds" in done.stderr
    (home / "small.toml").write_text(CONFIG.replace("1x1x28x28", "1x1x16x16"))
    done = hwsearch(home, "run", "small.toml")
    assert done.returncode == 2
    assert "model.input is 1x1x16x16, but the data's images are 1x28x28" in done.stderr


def test_settings_of_the_file() -> None:
    def deploy(**settings: Any) -> Any:
        return RunConfig.from_dict({
            "device": {"name": "eight"}, "model": {"factory": "hwsearch.models.vgg:vgg_small", "input": "1x1x28x28"},
            "search": {"budget": "50%"}, "deploy": settings,
        }).deploy  # fmt: skip

    assert deploy(keep_fp32="auto", tolerance=0.01).int8().keep_fp32 == "auto"
    assert deploy(keep_fp32=["a", "b"]).int8().keep_fp32 == ("a", "b")
    assert deploy(precision="int8", methods=["entropy"]).int8().methods == ("entropy",)
    for settings, message in (
        ({"keep_fp32": "some"}, 'deploy.keep_fp32 is .*a number of layers, "auto", or a list'),
        ({"keep_fp32": -2}, "deploy.keep_fp32 is"),
        ({"precision": "int4"}, "deploy.precision is"),
        ({"precision": "float32", "tolerance": 0.1}, "deploy.tolerance is for 8 bits"),
    ):
        with pytest.raises(InputError, match=message):
            deploy(**settings)
    with pytest.raises(InputError, match="calibration methods are"):
        deploy(methods=["magic"]).int8()
