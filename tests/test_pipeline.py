"""The whole path on the simulated device: what it leaves behind, and the same bytes after kills at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from garment_files import make_garments

from hwsearch import family as family_module
from hwsearch.config import RunConfig
from hwsearch.console import Console
from hwsearch.errors import InputError
from hwsearch.family import run_family
from hwsearch.graph.control import GroupRule
from hwsearch.graph.model_folder import load_model
from hwsearch.models.repvgg import repvgg_small
from hwsearch.pipeline import run
from hwsearch.preparation import predictor_of, width_space
from hwsearch.reparam.fold import fold

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
        [sys.executable, "-m", "hwsearch", "run", config, "--json"],
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
def test_a_run_delivers_the_better_network(unbroken: Path) -> None:
    outcome = json.loads((unbroken / "output.json").read_text())
    rows = {row["name"]: row for row in outcome["rows"]}
    name = "uniform" if rows["uniform"]["held_out"] > rows["found"]["held_out"] else "found"  # as this CPU rounds
    assert outcome["delivered"] == name
    folder = unbroken / "runs/chain"
    result = json.loads((folder / "result.json").read_text())
    assert result["widths"] == rows["found"]["widths"]
    kept = json.loads((folder / "model/model.json").read_text())["widths"]
    assert [kept[group] for group in result["groups"]] == rows[name]["widths"]
    assert outcome["verdict"]["measured_ms"] == rows[name]["measured_ms"]
    weights = sum(p.numel() for p in load_model(folder / "model").parameters())
    assert weights == rows[name]["parameters"]
    assert ("Uniform scaling is delivered" in (folder / "report.html").read_text()) is (name == "uniform")


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


@pytest.mark.long
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


# ---- masks: networks of branches, families from one parent, tasks beyond classes ----

MASKS = """
[run]
name = "masks"
[device]
name = "simulated"
[profile]
minutes = 0.03
[model]
factory = "hwsearch.models.repvgg:repvgg_small"
input = "1x1x28x28"
kwargs = { widths = [16, 24, 32, 32] }
[data]
kind = "synthetic"
limit = 200
valid = 60
[search]
method = "pas"
budget = "45%"
quantum = 2
minimum = 0.25
[masks]
steps = 12
rate = 20.0
jitter = 0.3
batch_size = 32
score_images = 60
calibration_images = 64
[train]
steps = 6
batch_size = 32
"""


def masked(**sections: Any) -> RunConfig:
    """``MASKS`` with other sections, or with other settings where a section is changed by a mapping."""
    data = tomllib.loads(MASKS)
    for section, settings in sections.items():
        data[section] = {**data.get(section, {}), **settings}
        data[section] = {name: value for name, value in data[section].items() if value is not None}
    return RunConfig.from_dict(data)


def quiet() -> Console:
    return Console(json=True)


@pytest.fixture
def home(unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same home for runs in this process; the predictor that lies there serves for other models as well."""

    def as_it_lies(device: Any, _: Any, session: Any, __: Any) -> tuple[Any, str]:
        return predictor_of(device, session.fingerprint), ""

    monkeypatch.setenv("HWSEARCH_HOME", str(unbroken))
    monkeypatch.chdir(unbroken)
    monkeypatch.setattr("hwsearch.preparation._fitted", as_it_lies)
    torch.set_num_threads(1)
    return unbroken


@pytest.mark.slow
def test_a_network_of_branches_is_searched_over_the_widths_of_its_folded_form(home: Path) -> None:
    data = {**tomllib.loads(MASKS), "groups": [{"pattern": "stages.1.1.0", "freeze": True}]}
    outcome = run(RunConfig.from_dict(data), quiet())
    assert outcome.exit_code == 0
    result = json.loads((home / "runs/masks/result.json").read_text())
    widths = dict(zip(result["groups"], result["widths"], strict=True))
    assert len(widths) == 6, "of seven blocks one is frozen; with identities between them whole stages would be"
    assert result["limits"][0]["measured_ms"] <= result["limits"][0]["max_ms"]
    rows = {row.name: row for row in outcome.rows}
    assert list(rows) == ["full", "uniform", "found"]
    assert rows["uniform"].measured_ms <= 1.01 * rows["uniform"].budget_ms
    manifest = json.loads((home / "runs/masks/bundle/manifest.json").read_text())
    assert manifest["parameters"] == result["parameters"] == rows["found"].parameters
    found = load_model(home / "runs/masks/model", fold=fold)
    assert not any(type(module).__name__ in ("ODBB", "BatchNorm2d") for module in found.modules())
    kept = {
        name: found.get_submodule(name).weight.shape[0] for name in ("stages.1.0.0", "stages.1.1.0", "stages.1.2.0")
    }
    assert kept == {**{name: widths.get(name) for name in kept}, "stages.1.1.0": 32}
    assert min(kept.values()) < 32, "layers of one stage differ in width"
    assert found(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_groups_of_a_config_are_those_that_its_method_searches() -> None:
    model, example = repvgg_small(widths=(4, 6, 6, 6)).eval(), torch.zeros(1, 1, 8, 8)
    for search, names, same in (
        ({}, ["stem.0", *(f"stages.{s}.{b}.0" for s, b in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)))], True),
        ({"method": "cafenet"}, ["stem.0", "stages.0.0.0", "stages.1.0.0"], False),
    ):
        sections = {"masks": dict.fromkeys(tomllib.loads(MASKS)["masks"])} if search else {}
        space, full = width_space(masked(search=search, **sections), model, example)
        assert [group.name for group in space.groups] == names
        assert full is model
        assert (space.model is not model) == same
        frozen = [GroupRule("stem.*", freeze=True)]
        assert len(width_space(masked(search=search, **sections), model, example, frozen)[0].groups) == len(names) - 1


@pytest.mark.slow
def test_a_maximum_of_a_network_of_branches_is_refused_in_one_line(home: Path) -> None:
    data = {**tomllib.loads(MASKS), "groups": [{"pattern": "stages.1.*", "maximum": 0.5}]}
    data["run"] = {"name": "bounded"}
    with pytest.raises(InputError, match="widths of its own in kwargs"):
        run(RunConfig.from_dict(data), quiet())


class Killed(Exception):
    """Stands for a kill behind the parent's training."""


@pytest.mark.long
def test_a_family_is_one_parent_and_a_network_a_budget_whenever_it_is_stopped(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = masked(run={"name": "family"}, search={"budget": None, "budgets": ["75%", "50%"]})
    real = family_module.finish

    def mortal(*_: Any) -> Any:
        raise Killed

    monkeypatch.setattr(family_module, "finish", mortal)
    with pytest.raises(Killed):
        run_family(asked, quiet())
    folder = home / "runs/family"
    parent = folder / "state/parent/checkpoint.safetensors"
    before, written = parent.read_bytes(), parent.stat().st_mtime_ns
    monkeypatch.setattr(family_module, "finish", real)
    found = run_family(asked, quiet())
    assert (parent.read_bytes(), parent.stat().st_mtime_ns) == (before, written), "the parent is trained once"
    assert found.exit_code == 0
    assert [row.name for row in found.rows] == [
        "full", "uniform budget-75", "found budget-75", "uniform budget-50", "found budget-50",
    ]  # fmt: skip
    full, _, large, _, small = found.rows
    assert large.budget_ms == pytest.approx(1.5 * small.budget_ms)
    assert full.measured_ms > large.measured_ms > small.measured_ms
    assert large.measured_ms <= large.budget_ms
    assert small.measured_ms <= small.budget_ms
    summary = json.loads((folder / "summary.json").read_text())
    assert [(member["folder"], member["status"]) for member in summary["members"]] == [
        ("budget-75", "pass"), ("budget-50", "pass"),
    ]  # fmt: skip
    page = (folder / "report.html").read_text()
    assert "2 networks of one parent, 2 inside their budgets" in page
    assert 'href="budget-50/report.html"' in page
    assert (folder / "budget-50/bundle/model.onnx").is_file()
    assert not (folder / "budget-50/state/warmup").exists(), "no member trains a parent of its own"
    assert len({row.metric for row in (*found.members[0].rows[:1], *found.members[1].rows[:1])}) == 1


@pytest.mark.long
def test_a_budget_that_comes_later_leaves_the_others_as_they_are(home: Path) -> None:
    run_family(masked(run={"name": "grown"}, search={"budget": None, "budgets": ["75%", "50%"]}), quiet())
    folder = home / "runs/grown"
    before = {path: path.read_bytes() for path in folder.glob("budget-*/result.json")}
    assert len(before) == 2
    more = masked(run={"name": "grown"}, search={"budget": None, "budgets": ["75%", "50%", "90%"]})
    found = run_family(more, quiet())
    assert len(found.members) == 3
    assert {path: path.read_bytes() for path in before} == before


def test_budgets_that_make_no_family_are_refused() -> None:
    for search, words in (
        ({"budget": None, "budgets": ["60%"]}, "two or more different budgets"),
        ({"budget": None, "budgets": ["60%", "60.0 %"]}, "two or more different budgets"),
        ({"budget": None, "budgets": ["60%", "0%"]}, "above 0%"),
        ({"budgets": ["60%", "40%"]}, "budgets and a budget"),
        ({"budget": None, "budgets": ["60%", 1.5], "method": "cafenet"}, 'for method = "pas", not cafenet'),
        ({"budget": None, "budgets": ["60", 1.5]}, r'such as \["60%", "40%"\]'),
    ):
        sections = {"masks": dict.fromkeys(tomllib.loads(MASKS)["masks"])} if "method" in search else {}
        with pytest.raises(InputError, match=words):
            masked(search=search, **sections)
    both = masked(search={"budget": None, "budgets": ["60%", 1.5]})
    assert both.search.budgets == ("60%", 1.5)
    assert both.identity() == replace(both, search=replace(both.search, budgets=("60%", 1.5, "20%"))).identity()


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "factory", "metric"),
    [
        ("translation", "hwsearch.models.translator:translator_small", "PSNR"),
        ("segmentation", "hwsearch.models.segmenter:segmenter_small", "mIoU"),
        ("detection", "hwsearch.models.detector:detector_small", "AP at IoU 0.5"),
    ],
)  # fmt: skip
def test_a_config_names_its_task(home: Path, kind: str, factory: str, metric: str) -> None:
    make_garments(home / "garments")
    asked = masked(
        run={"name": kind},
        model={"factory": factory, "kwargs": {}},
        data={"kind": kind, "folder": "garments", "limit": 60, "valid": 20},
        search={"budget": "75%"},
        train={"learning_rate": 0.01},
    )
    outcome = run(asked, quiet())
    assert outcome.exit_code == 0
    assert outcome.metric_name == metric
    found = next(row for row in outcome.rows if row.name == "found")
    assert found.measured_ms <= found.budget_ms
    summary = json.loads((home / f"runs/{kind}/summary.json").read_text())
    assert summary["metric_name"] == metric
    model = load_model(home / f"runs/{kind}/model")
    assert sum(p.numel() for p in model.parameters()) >= found.parameters
