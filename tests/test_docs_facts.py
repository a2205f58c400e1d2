"""What the documents say about the code: settings and their defaults, formats and their versions, complete examples."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from hwsearch.config import RunConfig, SearchSettings, TrainSettings
from hwsearch.device.spec import Device
from hwsearch.search.mgas_weights_config import WeightConfig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/[0-9][0-9]_*"))


def config(method: str) -> RunConfig:
    return RunConfig.from_dict(
        {
            "device": {"name": "simulated"},
            "model": {"factory": "hwsearch.models.vgg:vgg_small", "input": "1x1x28x28"},
            "search": {"budget": "50%", "method": method},
        }
    )


# ---------------------------------------------------------------------- settings


def defaults() -> dict[tuple[str, str], dict[str, Any]]:
    """(page, section of a config) to the settings that its table must hold, with what they are by default."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    train = config("cafenet").training()
    names = [f.name for f in fields(TrainSettings)]
    found["searching.md", "train"] = {name: getattr(train, name) for name in names}

    search, cafenet = SearchSettings(budget="50%"), config("cafenet").cafenet()
    found["searching.md", "search"] = {
        "method": search.method, "quantum": search.quantum, "minimum": search.minimum,
        "measured": cafenet.measured, "rounds": cafenet.rounds,
    }  # fmt: skip
    own = (
        "offset", "bin_units", "patterns", "full_steps", "distillation", "sharing", "complementary", "bins",
        "smallest_bin", "largest_bin", "refinements", "finalists", "finalist_share", "floor", "start",
    )  # fmt: skip
    found["search_cafenet.md", "search"] = {
        **{name: getattr(cafenet, name) for name in own},
        "population": cafenet.evolution.population,
        "generations": cafenet.evolution.generations,
        "candidates": cafenet.evolution.evaluations,
        "calibration_images": cafenet.scoring.calibration_images,
        "score_images": cafenet.scoring.images,
        "score_patterns": cafenet.scoring.patterns,
    }
    conet = config("conetv2").conetv2()
    own = ("accept", "trials", "momentum", "guard", "transfer", "adas", "stairs", "start")
    found["search_conetv2.md", "search"] = {name: getattr(conet, name) for name in own}

    setup = config("pas")
    pas = setup.pas()
    training = {name: getattr(pas.training, name) for name in ("epochs", "steps", "batch_size", "checkpoint_s")}
    other = {
        "learning_rate": pas.training.learning_rate, "rate": pas.mask_rate, "momentum": pas.mask_momentum,
        "warmup": setup.masks.warmup, "published": setup.masks.published,
    }  # fmt: skip
    own = tuple(name for name in asdict(setup.masks) if name not in {**training, **other})
    found["search_pas.md", "masks"] = {**training, **other, **{name: getattr(pas, name) for name in own}}

    setup = config("mgas")
    mgas = setup.mgas()
    training = {name: getattr(mgas.training, name) for name in ("batch_size", "learning_rate", "checkpoint_s")}
    other = {"published": setup.cells.published}
    own = tuple(name for name in asdict(setup.cells) if name not in {**training, **other})
    found["search_mgas.md", "cells"] = {**training, **other, **{name: getattr(mgas, name) for name in own}}

    setup = config("mgas")
    gates = setup.mgas_widths()
    training = {name: getattr(gates.training, name) for name in ("batch_size", "learning_rate", "checkpoint_s")}
    own = tuple(name for name in asdict(setup.filters) if name not in training)
    found["search_mgas.md", "filters"] = {**training, **{name: getattr(gates, name) for name in own}}

    weights = WeightConfig(max_parameters=1)
    training = {name: getattr(weights.training, name) for name in ("batch_size", "learning_rate", "checkpoint_s")}
    own = tuple(name for name in asdict(setup.weights) if name not in training)
    found["search_mgas.md", "weights"] = {**training, **{name: getattr(weights, name) for name in own}}
    found["search_mgas.md", "weights"]["max_parameters"] = None

    setup = config("repnas")
    repnas = setup.repnas()
    found["search_repnas.md", "branches"] = {
        "kinds": repnas.blocks.branches, "layers": repnas.blocks.layers, "border": repnas.blocks.border,
        "post_norm": repnas.blocks.post_norm, "budget": repnas.repnas.budget.kind, "limit": repnas.repnas.budget.limit,
        "published": setup.branches.published, "widths": setup.branches.widths,
        **{name: getattr(repnas.repnas, name) for name in ("warmup", "search", "restart", "whole")},
    }  # fmt: skip
    assert set(found["search_repnas.md", "branches"]) == set(asdict(setup.branches))
    return found


def tables(path: Path) -> dict[str, dict[str, str]]:
    """Section to {setting: default as written}, from the tables whose header names a section."""
    found: dict[str, dict[str, str]] = {}
    header = r"^\| `\[(\w+)\]` \| default \|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)"
    for section, body in re.findall(header, path.read_text(), re.M):
        rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", body, re.M)
        assert len(rows) == body.count("\n"), f"{path.name}: a row of [{section}] has no name or no default"
        found[section] = dict(rows)
    return found


def written(value: Any) -> str:
    """A default as a document has it."""
    return "none" if value is None else f"`{json.dumps(value)}`"


@pytest.mark.parametrize(("page", "section"), sorted(defaults()), ids=" ".join)
def test_settings_and_defaults_are_those_of_the_code(page: str, section: str) -> None:
    expected = {name: written(value) for name, value in defaults()[page, section].items()}
    assert tables(ROOT / "docs" / page)[section] == expected


def test_every_setting_of_a_search_is_on_a_page() -> None:
    documented = {"budget", "budget_ms", "budgets", "quantile"}  # budgets.md
    for (_, section), known in defaults().items():
        documented |= set(known) if section == "search" else set()
    assert documented == {f.name for f in fields(SearchSettings)}
    text = (ROOT / "docs" / "budgets.md").read_text()
    for name in ("budget", "budget_ms", "budgets", "quantile", "floor"):
        assert f"\n{name} = " in text


def toml_blocks() -> list[Any]:
    return [
        pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}")
        for path in DOCUMENTS
        for number, block in enumerate(re.findall(r"^```toml\n(.*?)^```", path.read_text(), re.M | re.S))
    ]


@pytest.mark.parametrize("block", toml_blocks())
def test_every_piece_of_toml_is_a_config_or_a_device(block: str, tmp_path: Path) -> None:
    """What a piece leaves out comes from the smallest config."""
    given = tomllib.loads(block)
    if "runtime" in given:
        path = tmp_path / "a-board.toml"
        path.write_text(block, encoding="utf-8")
        assert Device.load(path).runtime == given["runtime"]
        return
    whole: dict[str, Any] = {
        "device": {"name": "simulated"},
        "model": {"factory": "hwsearch.models.vgg:vgg_small", "input": "1x1x28x28"},
        "search": {},
    }
    for section, values in given.items():
        whole[section] = {**whole.get(section, {}), **values} if isinstance(values, dict) else values
    if not {"budget", "budget_ms", "budgets"} & set(whole["search"]):
        whole["search"]["budget"] = "50%"
    if "trial" in given or "cells" in given or "filters" in given or "masks" in given or "branches" in given:
        assert "method" in whole["search"], "a section of one method stands with its method"
    checked = RunConfig.from_dict(whole)
    getattr(checked, checked.search.method)()


# ---------------------------------------------------------------------- files


def test_every_schema_and_version_is_listed() -> None:
    declared = r'SCHEMA(?:, VERSION)? = (?:"[\w.]+", )?"(hwsearch\.[\w-]+)"(?:, |\nVERSION = )(\d+)'
    inline = r'"schema": "(hwsearch\.[\w-]+)", "version": (\d+)'
    in_code = {
        pair for path in ROOT.glob("hwsearch/**/*.py") for pair in re.findall(f"{declared}|{inline}", path.read_text())
    }
    # what agent and host tell each other is no file
    versions = {(a or c): int(b or d) for a, b, c, d in in_code if not (a or c).endswith("-graph")}
    listed = re.findall(r"^\| `(hwsearch\.[\w-]+)` \| (\d+) \|", (ROOT / "docs/file_formats.md").read_text(), re.M)
    assert {name: int(version) for name, version in listed} == versions
    assert len(versions) > 15


# ---------------------------------------------------------------------- pages and examples


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w]+\.md)", (ROOT / "docs/README.md").read_text()))
    assert linked == {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert "(docs/README.md)" in (ROOT / "README.md").read_text()


def test_the_numbered_examples_are_six_and_told() -> None:
    assert [path.name[:2] for path in EXAMPLES] == [f"{number:02}" for number in range(1, 7)]
    text = (ROOT / "examples/README.md").read_text()
    assert re.findall(r"\]\((\d\d_[\w.]+)\)", text) == [path.name for path in EXAMPLES]
    # runs are commands of a document, which executes them; the others are started below
    documents = "\n".join(path.read_text() for path in ROOT.glob("docs/*.md"))
    for path in EXAMPLES:
        assert path.suffix != ".toml" or f"\nhwsearch run examples/{path.name}\n" in documents
        assert path.suffix == ".toml" or os.access(path, os.X_OK)


@pytest.mark.long
@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.suffix != ".toml"], ids=lambda path: path.name)
def test_the_example_runs(path: Path, home: Path) -> None:
    """As it is, in a home of its own; its last line says what came out."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(path)] if path.suffix == ".py" else [str(path)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = {"01": "Why it is not faster:\n  ", "02": "Verdict: pass", "03": "verdict of simulated: pass"}
    assert expected[path.name[:2]] in done.stdout
