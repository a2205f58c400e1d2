"""The comparison with other tools: what is counted, what the report says, and the tools themselves where installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hwsearch.config import RunConfig
from hwsearch.models.resnet import resnet_small

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SEARCH = "supernet 400, scored 20, finalists 30, winner 90"
ROWS = f"""part,setting,method,share,seed,widths,accuracy,nll,predicted_ms,gmacs,note
search,resnet-14,"hwsearch, CafeNet",0.4,0,8-8,0.84,0.5,0.041,900,"{SEARCH}; cpu 60.0 s, peak 700 MiB"
search,resnet-14,"hwsearch, CafeNet",0.4,1,8-8,0.83,0.5,0.041,900,"{SEARCH}; cpu 70.0 s, peak 720 MiB"
search,resnet-14,uniform,0.4,0,8-10,0.82,0.5,0.040,90,"9 MACs; cpu 12.0 s, peak 600 MiB"
search,resnet-14,uniform,0.4,1,8-10,0.825,0.5,0.040,90,"9 MACs; cpu 12.0 s, peak 600 MiB"
search,resnet-14,"Torch-Pruning, multiples of 8",0.4,0,,,,,,"no ratio keeps the budget; cpu 12.0 s, peak 600 MiB"
measured,resnet-14,,,,8-8,,,0.041,,0.0390000 ms measured
measured,resnet-14,,,,8-10,,,0.040,,0.0380000 ms measured
"""


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("bench_peers")


def test_the_report_pairs_seeds_at_measured_milliseconds(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "peers.csv").write_text(ROWS)
    tool.report(tmp_path / "peers.csv")
    lines = capsys.readouterr().out.splitlines()
    assert "measured ms" in lines[3]
    ours, uniform = lines[5], lines[6]
    assert ours.startswith("| hwsearch, CafeNet | 2 | 0.0390 | 0.8350 | +1.25 ± 0.75 |")
    assert "| 65 | 710 |" in ours
    assert uniform.startswith("| uniform | 2 | 0.0380 |")
    assert len(lines) == 7


def test_lines_are_those_a_user_writes(tool: ModuleType) -> None:
    text = (TOOLS / "peers/with_hwsearch.toml").read_text()
    assert RunConfig.load(TOOLS / "peers/with_hwsearch.toml").search.method == "cafenet"
    assert int(tool.written("hwsearch, CafeNet")) == sum(
        bool(line) and not line.startswith("#") for line in text.splitlines()
    )
    assert 10 < int(tool.written("Torch-Pruning")) < int(tool.written("ModelOpt FastNAS")) < 40
    assert tool.written("uniform") == ""


def test_a_trial_budget_is_what_the_search_cost(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "peers.csv").write_text(ROWS)
    rows = tool.Rows(tmp_path / "peers.csv", float("inf"))
    ready = type("Ready", (), {"name": "resnet-14"})()
    assert tool.searched_gmacs(rows, ready, 0.4, 1) == 450


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="Optuna is not installed")
def test_optuna_keeps_the_budget(tool: ModuleType) -> None:
    peer = importlib.import_module("peers.with_optuna")
    tried: list[list[int]] = []

    def loss(widths: list[int]) -> float:
        tried.append(widths)
        return -float(widths[0])

    found = peer.search({"a": [1, 2, 3, 4], "b": [1, 2, 3, 4]}, sum, 5.0, loss, lambda: len(tried) >= 20, 0)
    assert found == [4, 1]
    assert len(tried) == 20
    assert all(sum(widths) <= 5 for widths in tried)


@pytest.mark.skipif(importlib.util.find_spec("torch_pruning") is None, reason="Torch-Pruning is not installed")
def test_torch_pruning_stops_at_the_first_ratio_that_keeps_the_budget(tool: ModuleType) -> None:
    peer = importlib.import_module("peers.with_torch_pruning")

    def size(model: torch.nn.Module) -> float:
        return float(sum(parameter.numel() for parameter in model.parameters()))

    model = resnet_small()
    pruned = peer.prune(model, torch.zeros(1, 1, 28, 28), ["classifier"], size, 0.5 * size(model))
    assert 0.4 * size(model) < size(pruned) <= 0.5 * size(model)
    assert pruned(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    assert peer.prune(model, torch.zeros(1, 1, 28, 28), ["classifier"], size, 1.0) is None
