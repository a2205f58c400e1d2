"""The benchmark of PaS: every method makes its line once, at the same budget, and the table says what the lines say."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.graph.widths import WidthSpace
from hwsearch.train.data import synthetic_images
from hwsearch.train.task import Classification


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("bench_pas")


class Milliseconds:
    """A smooth time of two neighbouring widths."""

    def evaluate(self, choices: Any) -> np.ndarray:
        rows = np.asarray(choices, dtype=np.float64).reshape(-1, 2)
        return np.asarray(0.1 + 0.01 * rows[:, 0] * (1 + rows[:, 1]))


@pytest.fixture(scope="module")
def tiny(tool: ModuleType) -> Any:
    """A setting of the tool's own kind on synthetic images."""
    settings = sys.modules["search_settings"]

    class Tiny(settings.Ready):  # type: ignore[misc,name-defined]
        def task(self, seed: int) -> Any:
            train, held_out, test = (synthetic_images(64, classes=4, shape=(1, 8, 8), seed=s) for s in (1, 2, 3))
            return Classification(train, held_out), test

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2),
            nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip

    setting = settings.Setting(model, 8, 1, 2, 64, 64, 4, 20, batch=16, shares=(0.5,))
    torch.manual_seed(0)
    net = model().eval()
    space = WidthSpace.from_model(net, torch.zeros(1, 1, 8, 8), minimum=2)
    full_ms = float(Milliseconds().evaluate([space.full().widths])[0])
    return Tiny("tiny", setting, net, space, Milliseconds(), full_ms, "none")


def test_every_method_makes_its_line_once_and_is_told(
    tool: ModuleType, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pas.csv"
    for _ in range(2):
        tool.search(tiny, tool.Rows(path, float("inf")), 2, (), ())
    rows = list(tool.Rows(path, float("inf")).known.values())
    assert [row["method"] for row in rows] == [*tool.METHODS] * 2
    assert len(path.read_text().splitlines()) == 1 + len(rows)
    for row in rows:
        used = float(row["predicted_ms"]) / (0.5 * tiny.full_ms)
        assert used <= 1
        if row["method"].startswith("PaS"):
            assert used >= 0.97
        assert float(row["gmacs"]) > 0
    capsys.readouterr()
    tool.report(path)
    table = capsys.readouterr().out
    ours, other = (
        np.array([float(row["accuracy"]) for row in rows if row["method"] == name]) for name in ("PaS, ms", "PaS, MACs")
    )
    assert f"| 0.5 | PaS, ms | 2 | {np.mean([float(r['predicted_ms']) for r in rows[::7]]):.4f} |" in table
    assert f"| {100 * (ours - other).mean():+.2f} ± " in table
    assert "tiny: predicted ms" in table


def test_the_plan_says_what_a_search_costs(tool: ModuleType, tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tool.plan(tiny, 3)
    text = capsys.readouterr().out
    full = tiny.space.macs(tiny.space.full())
    assert f"the full network, once: {3e-9 * 16 * 16 * full:.0f}" in text
    assert "of CafeNet's" in text
    assert "with 3 seeds" in text


def test_uniform_scaling_is_asked_at_the_same_milliseconds(tool: Any) -> None:
    def row(method: str, seed: str, widths: str, accuracy: float, ms: float) -> dict[str, str]:
        return {"setting": "s", "part": "pas", "method": method, "seed": seed, "widths": widths, "share": "0.4",
                "accuracy": str(accuracy), "predicted_ms": str(ms), "note": ""}  # fmt: skip

    ours = row("PaS, ms", "0", "3", 0.86, 3.0)
    lines = [ours, row("uniform", "0", "2", 0.80, 2.0), row("uniform", "0", "4", 0.84, 4.0),
             row("uniform", "0", "5", 0.70, 5.0), row("uniform", "1", "2", 0.1, 2.0)]  # fmt: skip
    found = tool.Found.of(lines, "s", "pas")
    assert found.kind == "predicted"
    assert found.above_uniform([ours]) == pytest.approx([0.04])
    beyond = row("PaS, ms", "0", "9", 0.86, 9.0)
    assert found.above_uniform([beyond]) == pytest.approx([0.02])  # a wider one that is worse is not used
    times = {"2": 1.0, "4": 2.0, "5": 3.0, "3": 2.0}
    measured = [{**row("", "", widths, 0, ms), "part": "measured", "note": f"{ms} ms measured"}
                for widths, ms in times.items()]  # fmt: skip
    found = tool.Found.of([*lines, *measured], "s", "pas")
    assert found.kind == "measured"
    assert found.above_uniform([ours]) == pytest.approx([0.02])
    assert tool.Found.of([*lines, *measured[:2]], "s", "pas").kind == "predicted"
    assert tool.spread([0.01, 0.03]) == "+2.00 ± 1.00"
    assert (tool.spread([0.01]), tool.spread([])) == ("+1.00", "")
