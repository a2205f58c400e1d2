"""Runs of MGAS, of cells and of filters, from a bare simulated device to a verified bundle, and their settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from hwsearch.config import RunConfig
from hwsearch.errors import InputError
from hwsearch.granularity import check_granularity
from hwsearch.graph.model_folder import load_model
from hwsearch.graph.onnx_packed import unpack
from hwsearch.model_argument import load_model_argument
from hwsearch.models.cells import Genotype

CONFIG = """
[run]
name = "cells"
[device]
name = "simulated"
[profile]
minutes = 0.12
[model]
factory = "hwsearch.models.cells:cells_full"
input = "1x1x16x16"
kwargs = { in_channels = 1, channels = 8, cells = 2, nodes = 1, operations = ["skip", "sep3", "max3"], stem_stride = 2 }
[data]
kind = "synthetic"
limit = 300
valid = 100
[search]
method = "mgas"
budget = "45%"
[cells]
stages = 2
warmup_epochs = 0.5
stage_epochs = 1
final_epochs = 1
prune_every = 0.5
batch_size = 32
quantum = 2
least = 2
checkpoint_s = 0.2
[train]
steps = 8
checkpoint_s = 0.2
"""
SMALLEST: dict[str, Any] = {
    "device": {"name": "simulated"},
    "model": {"factory": "hwsearch.models.cells:cells_small", "input": "1x1x28x28"},
    "search": {"method": "mgas", "budget": "50%"},
}


@pytest.mark.long
def test_cells_are_searched_deployed_and_verified(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).resolve().parent.parent / "devices", tmp_path / "devices")
    (tmp_path / "cells.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "hwsearch", "run", "cells.toml", "--json"]
    environment = {**os.environ, "HWSEARCH_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["verdict"]["status"] == "pass"
    rows = {row["name"]: row for row in outcome["rows"]}
    assert list(rows) == ["full", "uniform", "found"]
    run = tmp_path / "runs/cells"
    result = json.loads((run / "result.json").read_text())
    assert result["method"] == "mgas"
    assert 0.8 * result["limits"][0]["max_ms"] < result["limits"][0]["measured_ms"] <= result["limits"][0]["max_ms"]
    assert rows["found"]["measured_ms"] <= rows["found"]["budget_ms"]
    assert rows["found"]["parameters"] == result["parameters"]
    genotype = Genotype.from_dict(result["extra"]["genotype"])
    model = load_model(run / "model")
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]
    assert model(torch.zeros(1, 1, 16, 16)).shape == (1, 10)
    assert genotype.count < Genotype.full(genotype.blueprint).count
    page = (run / "report.html").read_text()
    assert "Cells" in page
    assert "node 0" in page


def test_cells_have_a_section_of_their_own() -> None:
    cells = {"stages": 2, "final_epochs": 3, "learning_rate": 0.03, "controller": "goldnas", "batch_size": 32}
    search = {**SMALLEST["search"], "measured": 3}
    config = RunConfig.from_dict({**SMALLEST, "search": search, "cells": cells, "train": {"epochs": 3}})
    found = config.mgas()
    assert (found.stages, found.final_epochs, found.controller, found.measured) == (2, 3.0, "goldnas", 3)
    assert (found.training.learning_rate, found.training.final_rate, found.training.batch_size) == (0.03, 0.03, 32)
    assert found.winner.epochs == 3
    paper = RunConfig.from_dict({**SMALLEST, "cells": {"published": True}}).mgas()
    assert (paper.controller, paper.mu, paper.winner.epochs) == ("goldnas", 0.0, 600)
    for changes, message in (
        ({"search": {"budget": "40%"}, "cells": {"stages": 2}}, '[cells] is for method = "mgas", not cafenet'),
        ({"search": {**search, "offset": 1}}, "search.offset is no setting of the method mgas"),
        ({"search": {**search, "start": "model"}}, "search.start is no setting of the method mgas"),
        ({"cells": {"controller": "x"}}, "cells.controller is 'x': give one of 'dual', 'goldnas'"),
    ):
        with pytest.raises(InputError) as refused:
            RunConfig.from_dict({**SMALLEST, **changes})
        assert message in str(refused.value)
    with pytest.raises(InputError, match=r"\[cells\]: aim is 0.0; give a share"):
        RunConfig.from_dict({**SMALLEST, "cells": {"aim": 0.0}}).mgas()


# ---------------------------------------------------------------------- filters of an ordinary network

ORDINARY: dict[str, Any] = {
    "device": {"name": "simulated"},
    "model": {"factory": "hwsearch.models.vgg:vgg_small", "input": "1x1x28x28"},
    "search": {"method": "mgas", "budget": "50%"},
}


@pytest.mark.long
def test_filters_are_searched_deployed_and_verified(tmp_path: Path) -> None:
    """The example, with a size budget beside its milliseconds."""
    root = Path(__file__).resolve().parent.parent
    shutil.copytree(root / "devices", tmp_path / "devices")
    sized = "\n[weights]\nmax_parameters = 8000\nepochs = 2\ntuning_epochs = 1\n"
    (tmp_path / "filters.toml").write_text((root / "examples/filters.toml").read_text() + sized)
    command = [sys.executable, "-m", "hwsearch", "run", "filters.toml", "--json"]
    environment = {**os.environ, "HWSEARCH_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["verdict"]["status"] == "pass"
    result = json.loads((tmp_path / "runs/filters/result.json").read_text())
    assert result["method"] == "mgas"
    limit = result["limits"][0]
    assert 0.9 * limit["max_ms"] < limit["measured_ms"] <= limit["max_ms"]
    assert "genotype" not in result["extra"]
    events = [json.loads(line) for line in (tmp_path / "runs/filters/events.jsonl").read_text().splitlines()]
    committed = [event for event in events if event["event"] == "committed"]
    assert committed[-1]["predicted_ms"][0] <= limit["max_ms"] < committed[0]["predicted_ms"][0]
    assert outcome["delivered"] == "found"
    assert result["extra"]["weights"]["parameters"] <= 8000 < result["parameters"]
    packed = (tmp_path / "runs/filters/model.packed").read_bytes()
    bundled = (tmp_path / "runs/filters/bundle/model.onnx").read_bytes()
    for file in (unpack(packed), bundled):
        tensors = [numpy_helper.to_array(t) for t in onnx.load_from_string(file).graph.initializer]
        assert sum(int(np.count_nonzero(t)) for t in tensors if t.dtype == np.float32) <= 8000
    assert len(packed) < 0.7 * len(bundled)


def test_filters_have_a_section_of_their_own() -> None:
    filters = {"epochs": 2, "learning_rate": 0.03, "start": "masked", "batch_size": 32}
    search = {**ORDINARY["search"], "measured": 3}
    config = RunConfig.from_dict({**ORDINARY, "search": search, "filters": filters, "train": {"epochs": 3}})
    found = config.mgas_widths()
    assert (found.epochs, found.start, found.measured) == (2.0, "masked", 3)
    assert (found.training.learning_rate, found.training.final_rate, found.training.batch_size) == (0.03, 0.03, 32)
    assert found.winner == config.training()
    assert "checkpoint_s" not in config.identity()["filters"]
    with pytest.raises(InputError, match=r'\[filters\] is for method = "mgas", not pas'):
        RunConfig.from_dict({**ORDINARY, "search": {**search, "method": "pas"}, "filters": filters})
    with pytest.raises(InputError, match=r"\[filters\]: floor is 0.97 and aim 0.0"):
        RunConfig.from_dict({**ORDINARY, "filters": {"aim": 0.0}}).mgas_widths()


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            ORDINARY,
            {"cells": {"stages": 2}},
            "[cells] is for a super-network of cells, and hwsearch.models.vgg:vgg_small",
        ),
        (SMALLEST, {"filters": {"epochs": 2}}, "[filters] is for ordinary networks"),
        (SMALLEST, {"devices": [{"name": "b", "budget": "40%"}]}, "cells are searched for one device"),
        (
            ORDINARY,
            {"model": {"factory": "hwsearch.models.repvgg:repvgg_small", "input": "1x1x28x28"}},
            "has blocks of branches",
        ),
    ],
)
def test_settings_for_another_kind_of_network_are_refused_at_once(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    asked = RunConfig.from_dict({**config, **changes})
    module = load_model_argument(asked.model.factory, asked.model.input_shape, {}).need_module()
    with pytest.raises(InputError) as refused:
        check_granularity(asked, module)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
