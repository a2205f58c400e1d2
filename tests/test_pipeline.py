"""The whole path on the simulated device: what it leaves behind, and the same bytes after kills at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = """
[run]
name = "chain"
[device]
name = "simulated"
[profile]
minutes = 0.12
[model]
factory = "hwsearch.models.vgg:vgg_small"
input = "1x1x16x16"
kwargs = { width = 0.5 }
[data]
kind = "synthetic"
limit = 300
valid = 100
[[groups]]
pattern = "features.0"
freeze = true
[[groups]]
pattern = "features.3"
maximum = 0.75
[search]
budget = "50%"
quantum = 2
minimum = 0.25
candidates = 12
population = 6
score_images = 64
calibration_images = 64
[supernet]
steps = 12
checkpoint_s = 0.2
[train]
steps = 8
checkpoint_s = 0.2
"""
# What a run must leave the same byte for byte, whatever happened on the way.
SAME = (
    "runs/chain/result.json",
    "runs/chain/summary.json",
    "runs/chain/model/model.json",
    "runs/chain/model/weights.safetensors",
    "runs/chain/bundle/manifest.json",
    "runs/chain/bundle/model.onnx",
    "latency_tables/simulated/networks.csv",
    "latency_tables/simulated/kernels.csv",
    "latency_tables/simulated/manifest.json",
    "latency_tables/simulated/predictor/manifest.json",
)
# A kill in each stage: the file whose appearance (or growth) tells that the stage is under way.
STAGES = {
    "profile": "latency_tables/simulated/journal.sqlite",
    "super-network": "runs/chain/state/supernet/checkpoint.safetensors",
    "search": "runs/chain/state/losses.jsonl",
    "measuring": "runs/chain/state/readings.jsonl",
    "winner": "runs/chain/state/winner/checkpoint.safetensors",
    "comparison": "runs/chain/state/full/checkpoint.safetensors",
}


def make_home(folder: Path) -> Path:
    import shutil

    folder.mkdir()
    shutil.copytree(Path(__file__).resolve().parent.parent / "devices", folder / "devices")
    (folder / "chain.toml").write_text(CONFIG)
    return folder


def start(home: Path, config: str = "chain.toml") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hwsearch.cli", "run", config, "--json"],
        cwd=home,
        env={**os.environ, "HWSEARCH_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_home(tmp_path_factory.mktemp("unbroken") / "home")
    process = start(home)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    (home / "output.json").write_text(output)
    return home


@pytest.mark.slow
def test_a_run_keeps_its_budget_and_says_so(unbroken: Path) -> None:
    outcome = json.loads((unbroken / "output.json").read_text())
    assert outcome["verdict"]["status"] == "pass"
    rows = {row["name"]: row for row in outcome["rows"]}
    assert list(rows) == ["full", "uniform", "found"]
    assert rows["found"]["measured_ms"] <= rows["found"]["budget_ms"]
    assert rows["uniform"]["measured_ms"] <= rows["uniform"]["budget_ms"] * 1.01
    assert rows["full"]["measured_ms"] == pytest.approx(2 * rows["found"]["budget_ms"], rel=0.03)
    assert rows["found"]["macs"] < rows["full"]["macs"]
    assert (unbroken / "runs/chain/report.html").stat().st_size > 1_000_000
    space = json.loads((unbroken / "runs/chain/space.json").read_text())
    assert "frozen by the user (features.0)" in space["frozen"]
    assert [group["units"] for group in space["groups"] if group["name"] in ("features.0", "features.3")] == [12]
    assert (unbroken / "latency_tables/simulated/predictor/card.md").read_text().startswith("# ")


@pytest.mark.slow
def test_the_same_command_again_changes_nothing(unbroken: Path) -> None:
    before = {name: (unbroken / name).read_bytes() for name in SAME}
    process = start(unbroken)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert {name: (unbroken / name).read_bytes() for name in SAME} == before


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_bytes(unbroken: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    killed = []
    for stage, file in STAGES.items():
        process = start(home)
        deadline = time.monotonic() + 200
        while process.poll() is None and not (home / file).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed.append(stage)
        process.communicate()
        if process.returncode == 0:
            break
    process = start(home)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(killed) >= 4, killed
    for name in SAME:
        assert (home / name).read_bytes() == (unbroken / name).read_bytes(), name


@pytest.mark.slow
def test_a_run_folder_of_other_settings_is_refused(unbroken: Path) -> None:
    text = (unbroken / "chain.toml").read_text()
    try:
        (unbroken / "chain.toml").write_text(text.replace("candidates = 12", "candidates = 13"))
        process = start(unbroken)
        _, errors = process.communicate(timeout=300)
    finally:
        (unbroken / "chain.toml").write_text(text)
    assert process.returncode == 2
    assert "candidates" in errors.splitlines()[-1]
    assert "Traceback" not in errors


@pytest.mark.slow
def test_masks_find_a_network_inside_the_budget(unbroken: Path) -> None:
    text = CONFIG.replace('name = "chain"', 'name = "masked"')
    before, rest = text.split("candidates = 12", 1)
    after = rest[rest.index("[train]") :]
    (unbroken / "masked.toml").write_text(before + 'method = "pas"\n[masks]\nsteps = 12\ncheckpoint_s = 0.2\n' + after)
    process = start(unbroken, "masked.toml")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    outcome = json.loads(output)
    assert outcome["verdict"]["status"] == "pass"
    result = json.loads((unbroken / "runs/masked/result.json").read_text())
    assert result["method"] == "pas"
    assert result["limits"][0]["measured_ms"] <= result["limits"][0]["max_ms"]
    assert [point["step"] for point in result["extra"]["trajectory"]] == list(range(1, 13))
    assert (unbroken / "runs/masked/state/warmup/checkpoint.safetensors").is_file()


@pytest.mark.slow
def test_another_method_on_the_same_device_finds_the_table_fitted(unbroken: Path) -> None:
    text = CONFIG.replace('name = "chain"', 'name = "conet"')
    before, rest = text.split("candidates = 12", 1)
    after = rest[rest.index("[train]") :]
    trial = 'method = "conetv2"\ntrials = 2\n[trial]\nsteps = 4\ncheckpoint_s = 0.2\n'
    (unbroken / "conet.toml").write_text(before + trial + after)
    predictor = unbroken / "latency_tables/simulated/predictor/manifest.json"
    fitted = predictor.stat().st_mtime_ns
    process = start(unbroken, "conet.toml")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    outcome = json.loads(output)
    assert outcome["verdict"]["status"] == "pass"
    assert [row["name"] for row in outcome["rows"]] == ["full", "uniform", "found"]
    assert (unbroken / "runs/conet/state/quality.jsonl").is_file()
    assert predictor.stat().st_mtime_ns == fitted, "the table has not changed since"


@pytest.mark.slow
def test_branches_on_searched_widths_are_folded_deployed_and_verified(unbroken: Path) -> None:
    """A plain network: widths by uniform scaling, then blocks at these widths, their branches searched."""
    text = CONFIG.replace('name = "chain"', 'name = "branches"')
    before, rest = text.split("candidates = 12", 1)
    training = rest[rest.index("[train]") :].replace("steps = 8", "steps = 20")
    branches = 'method = "repnas"\n[branches]\nwidths = "uniform"\nlimit = 12\n'
    (unbroken / "branches.toml").write_text(before + branches + training)
    process = start(unbroken, "branches.toml")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    outcome = json.loads(output)
    rows = {row["name"]: row for row in outcome["rows"]}
    assert outcome["verdict"]["status"] == "pass"
    assert rows["found"]["widths"] == rows["uniform"]["widths"]
    assert rows["found"]["measured_ms"] == pytest.approx(rows["uniform"]["measured_ms"], rel=0.02)
    result = json.loads((unbroken / "runs/branches/result.json").read_text())
    assert (result["method"], result["extra"]["widths_by"]) == ("repnas", "uniform")
    assert sum(map(sum, result["extra"]["branches"]["mask"])) == 12
    deployed = json.loads((unbroken / "runs/branches/bundle/manifest.json").read_text())
    assert deployed["macs"] == rows["found"]["macs"]
    assert deployed["parameters"] <= rows["uniform"]["parameters"]
