"""The benchmark tool itself: fixed widths, rows that survive a kill, tables that say what the rows say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from hwsearch.errors import InputError


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("bench_conetv2")


def test_the_widths_are_fixed_and_the_equal_ones_are_equal(tool: ModuleType) -> None:
    _, space = tool.model_and_space("resnet")
    parts = {part: tool.claim_choices(space, part) for part in ("unequal", "equal")}
    assert parts == {part: tool.claim_choices(space, part) for part in parts}
    macs = {part: np.array([space.macs(choice) for choice in found]) for part, found in parts.items()}
    assert all(len(set(found)) >= 20 for found in parts.values())
    most = tool.EQUAL_SHARE * space.macs(space.full())
    assert (macs["equal"] <= most).all()
    assert (macs["equal"] >= tool.EQUAL_FLOOR * most).all()
    assert macs["unequal"].max() > 2 * macs["unequal"].min()


def test_the_networks_are_what_they_are_called(tool: ModuleType) -> None:
    for build in tool.NETWORKS.values():
        model = build().eval()
        assert model(torch.zeros(tool.INPUT)).shape == (1, 10)
        assert sum(p.numel() for p in model.parameters()) < 300_000


def test_a_torn_row_is_cut_off_and_rows_read_back(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.csv"
    assert tool.rows_of(path) == []
    for number in range(2):
        tool.append(path, ("a", "b"), (number, "x y"))
    with path.open("a") as file:
        file.write("2,half")
    assert tool.rows_of(path) == [{"a": "0", "b": "x y"}, {"a": "1", "b": "x y"}]
    tool.append(path, ("a", "b"), (2, "z"))
    assert [row["a"] for row in tool.rows_of(path)] == ["0", "1", "2"]


def test_the_tables_say_what_the_rows_say(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "RESAMPLES", 100)
    claim = [
        {"network": "resnet", "part": "equal", "accuracy": str(0.8 + 0.01 * n), "macs": "1e6",
         "parameters": str(100 - n), "quality": str(n), "published_quality": str(-n), "rank": str(n % 2),
         "gain": str(n), "stable_rank": str(n)}
        for n in range(8)
    ]  # fmt: skip
    line = tool.claim_table(claim)[-1]
    assert "| resnet | equal | 8 | 1.00 to 1.00 |" in line
    assert "| +1.00 (+1.00 to +1.00) | -1.00 (-1.00 to -1.00) |" in line
    search = [
        {"network": "resnet", "device": "d", "budget_ms": "0.5", "seed": str(seed), "method": method, "widths": "",
         "predicted_ms": "0.49", "macs": "2e6", "parameters": "9", "accuracy": str(0.8 + better * (seed + 1) / 100)}
        for seed in range(3)
        for method, better in (("uniform", 0), ("metropolis", 1))
    ]  # fmt: skip
    table = tool.search_table(search, [])
    assert "predicted ms" in table[0]
    timed = tool.search_table(search, [{"network": "resnet", "device": "d", "widths": "", "measured_ms": "0.51"}])
    assert "measured ms" in timed[0]
    assert "| 0.5100 (0.5100 to 0.5100) |" in timed[2]
    assert table[2].endswith("| 0.8000 ± 0.0000 |  |  |")
    assert table[3].endswith("| +2.00 ± 1.00 points | 3 of 3 |")


def test_what_is_missing_is_told(tool: ModuleType, home: Path) -> None:
    with pytest.raises(InputError, match="run claim or search first"):
        tool.main(["report", "--output", str(home / "build")])
    with pytest.raises(InputError, match="no predictor"):
        tool.latency_on("simulated", None, None)
