"""The benchmark tool itself: one network compared, rows that resume, and the counts of the table."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("bench_dependencies")


def test_a_network_is_shrunk_grown_and_compared(tool: ModuleType) -> None:
    row = tool.compare("own:squeezenet", *tool.networks()["own:squeezenet"], 100)
    assert (row["ours"], row["groups"], row["frozen_by_check"]) == ("ok", 7, 0)
    assert float(row["shrunk"]) < 1e-5
    assert float(row["grown"]) < 1e-5
    if importlib.util.find_spec("torch_pruning") is None:
        assert row["theirs"].startswith("ModuleNotFoundError")
    else:
        assert (row["theirs"], row["finer"], row["coarser"]) == ("ok", 7, 0)


def test_the_table_counts_what_both_could_do(tool: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"network": "own:a", "ours": "ok", "groups": 3, "theirs": "ok", "finer": 3, "coarser": 0},
        {"network": "own:b", "ours": "ok", "groups": 2, "theirs": "IndexError: index 16"},
        {"network": "timm:c", "ours": "no width can change", "theirs": "ok", "finer": 1, "coarser": 1},
    ]
    with open(tmp_path / "dependencies.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, tool.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    lines = tool.write_table(tmp_path).splitlines()
    assert "| own | 2 | 2 | 1 | 3 of 3 |" in lines
    assert "| timm | 1 | 0 | 1 | 1 of 2 |" in lines
    assert "| all | 3 | 2 | 2 | 4 of 5 |" in lines
