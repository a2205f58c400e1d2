"""The benchmark of MGAS: its lines, its random cells inside the budget, and a table that says what the lines say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hwsearch.models.cells import Blueprint, CellNetwork, Genotype
from hwsearch.train.data import synthetic_images
from hwsearch.train.loop import TrainConfig
from hwsearch.train.task import Classification

BLUEPRINT = Blueprint(classes=4, channels=8, cells=2, nodes=1, reductions=(1,), operations=("skip", "sep3", "max3"))


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("bench_mgas")


class Parameters:
    """Thousands of parameters in the place of milliseconds."""

    def ms(self, networks: Any) -> np.ndarray:
        found = [CellNetwork(genotype, widths) for genotype, widths in networks]
        return np.asarray([sum(p.numel() for p in network.parameters()) / 1e3 for network in found])


@pytest.fixture(scope="module")
def tiny(tool: ModuleType) -> Any:
    class Tiny(tool.Ready):  # type: ignore[misc,name-defined]
        def task(self, seed: int) -> Any:
            train, held_out, test = (synthetic_images(64, classes=4, shape=(1, 8, 8), seed=s) for s in (1, 2, 3))
            return Classification(train, held_out), test

    whole, cost = Genotype.full(BLUEPRINT), Parameters()
    return Tiny(BLUEPRINT, None, None, None, cost, float(cost.ms([(whole, whole.widths())])[0]))


def test_random_cells_use_most_of_the_budget_and_no_more(tool: ModuleType, tiny: Any) -> None:
    rng, found = np.random.default_rng(0), 0
    for _ in range(12):
        sized = tool.narrowed(tiny, tool.random_genotype(BLUEPRINT, rng), 0.4 * tiny.full_ms, nearest=0.5)
        if sized is not None:
            found += 1
            assert 0.2 * tiny.full_ms <= tiny.cost.ms([sized])[0] <= 0.4 * tiny.full_ms
    assert found > 2


def test_every_network_is_a_line_and_the_table_tells_them(
    tool: ModuleType, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = TrainConfig(steps=4, batch_size=16, checkpoint_s=0)
    monkeypatch.setattr(tool, "training", lambda seed: quick)
    monkeypatch.setattr(tool, "INPUT", (1, 1, 8, 8))
    monkeypatch.setattr(tool, "BATCH", 32)
    # seconds each; a sum of weights tells networks apart as well
    monkeypatch.setattr(
        tool, "export_onnx", lambda net, _: str(sum(p.detach().sum().item() for p in net.parameters())).encode()
    )
    base = tool.MgasConfig
    short = {"stages": 2, "warmup_epochs": 0.5, "stage_epochs": 0.5, "final_epochs": 0.5, "quantum": 2, "least": 2}
    monkeypatch.setattr(tool, "MgasConfig", lambda **changes: base(**{**short, **changes}))
    rows = tool.Rows(tmp_path / "mgas.csv", float("inf"))
    torch.set_num_threads(1)
    for method in ("random", "single path"):
        tool.search(tiny, rows, 1, [method], [0.6])
    lines = tool.Rows(tmp_path / "mgas.csv", float("inf")).known
    assert sorted(key[2] for key in lines) == ["random 0", "random 1", "single path"]
    for row in lines.values():
        assert (tmp_path / "mgas" / "networks" / f"{row['widths']}.onnx").is_file()
        kept = json.loads(row["note"])["genotype"]
        assert float(row["predicted_ms"]) <= 0.6 * tiny.full_ms
        if row["method"] == "single path":
            assert all(len(edge) == 1 for cell in kept for edge in cell)
    before = (tmp_path / "mgas.csv").read_bytes()
    tool.search(tiny, rows, 1, ["random"], [0.6])
    assert (tmp_path / "mgas.csv").read_bytes() == before
    capsys.readouterr()
    tool.report(tmp_path / "mgas.csv")
    told = capsys.readouterr().out
    assert "| 0.6 | random | 1 |" in told
    assert "| 0.6 | single path | 1 |" in told


def test_memory_of_stages_is_told_over_that_of_the_whole(
    load_tool: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool("bench_mgas_memory")
    rows = tool.Rows(tmp_path / "memory.csv", float("inf"))
    for phase, (mb, seconds) in enumerate([(50.0, 1.0), (60.0, 2.0)]):
        note = {"number": phase, "mb": mb, "seconds": seconds, "steps": 10, "resident_mb": 100}
        rows.add(("memory", tool.NAME, "3 stages", "", phase, ""), note=json.dumps(note))
    whole = {"number": 0, "mb": 120.0, "seconds": 3.0, "steps": 20, "resident_mb": 200}
    rows.add(("memory", tool.NAME, "1 stages", "", 0, ""), note=json.dumps(whole))
    tool.report(tmp_path / "memory.csv")
    assert "staged over whole: memory 0.500, seconds a step 0.500" in capsys.readouterr().out
