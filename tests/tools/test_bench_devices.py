"""The comparison of one network for two devices with the network of each alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from hwsearch.config import RunConfig
from hwsearch.console import Console

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("bench_devices")


def test_three_runs_differ_in_their_devices_only(tool: ModuleType) -> None:
    config = RunConfig.load(ROOT / "examples/simulated.toml")
    runs = tool.variants(config, ["simulated", "other"], "60%")
    assert list(runs) == ["simulated", "other", "both"]
    assert [(run.device.name, [further.name for further in run.devices]) for run in runs.values()] == [
        ("simulated", []),
        ("other", []),
        ("simulated", ["other"]),
    ]
    assert len({run.run_folder for run in runs.values()}) == 3
    assert all(run.search.max_ms(10.0) == 6.0 for run in runs.values())
    assert all(further.max_ms(10.0) == 6.0 for run in runs.values() for further in run.devices)
    assert all(run.train == config.train for run in runs.values())


def test_a_run_that_is_there_is_read(tool: ModuleType, tmp_path: Path) -> None:
    plain = RunConfig.load(ROOT / "examples/simulated.toml")
    config = tool.variants(plain, ["a", "b"], "50%")["both"]
    config = tool.dataclasses.replace(config, run=tool.dataclasses.replace(config.run, folder=str(tmp_path)))
    config.run_folder.mkdir()
    times = [{"device": "a", "budget_ms": 2.0}, {"device": "b", "budget_ms": 3.0}]
    row = {"name": "found", "widths": [4, 8], "metric": 0.75, "devices": times}
    (config.run_folder / "summary.json").write_text(json.dumps({"rows": [row]}))
    found = tool.done("both", config, Console())
    assert (found.widths, found.metric, found.budgets) == ((4, 8), 0.75, {"a": 2.0, "b": 3.0})
