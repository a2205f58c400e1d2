"""The benchmark of PaS beyond classification: each method's line once, at one budget, in the task's own metric."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from garment_files import make_garments

from hwsearch.graph.widths import WidthSpace
from hwsearch.models import translator_small
from hwsearch.train.garments import load_garments


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("bench_pas_tasks")


class Milliseconds:
    """The sum of all widths."""

    def evaluate(self, choices: Any) -> np.ndarray:
        rows = np.atleast_2d(np.asarray(choices, dtype=np.float64))
        return np.asarray(0.1 + 0.01 * rows.sum(axis=1))


@pytest.fixture(scope="module")
def tiny(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The translator's setting on few, made-up pictures."""
    folder = make_garments(tmp_path_factory.mktemp("garments"))

    class Tiny(tool.TaskReady):  # type: ignore[misc,name-defined]
        def task(self, seed: int) -> Any:
            return load_garments("translation", folder, count=48, valid=16, test=16, seed=seed)

    settings = sys.modules["search_settings"]
    setting = settings.Setting(
        lambda: translator_small(widths=(4, 6, 8), blocks=1), 28, 1, 2, 32, 16, 2, 0, batch=16, shares=(0.5,)
    )
    torch.manual_seed(0)
    net = setting.model().eval()
    space = WidthSpace.from_model(net, torch.zeros(1, 1, 28, 28), minimum=2)
    full_ms = float(Milliseconds().evaluate([space.full().widths])[0])
    return Tiny("translation", setting, net, space, Milliseconds(), full_ms, "none")


def test_every_method_makes_its_line_once_and_is_told(
    tool: ModuleType, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tasks.csv"
    for _ in range(2):
        tool.search(tiny, tool.Rows(path, float("inf")), 2, (), ())
    rows = list(tool.Rows(path, float("inf")).known.values())
    assert [row["method"] for row in rows] == [*tool.COMPARED] * 2
    assert len(path.read_text().splitlines()) == 1 + len(rows)
    for row in rows:
        assert 0.9 < float(row["predicted_ms"]) / (0.5 * tiny.full_ms) <= 1
        assert float(row["accuracy"]) > 1, "a ratio in dB"
    capsys.readouterr()
    tool.report(path)
    table = capsys.readouterr().out
    ours, other = (
        np.array([float(row["accuracy"]) for row in rows if row["method"] == name]) for name in ("PaS, ms", "uniform")
    )
    assert "| ms share | method | n | ms | PSNR, dB | over uniform |" in table
    assert f"| {(ours - other).mean():+.4f} ± " in table
    assert "translation: predicted ms" in table


def test_the_plan_says_what_it_costs(tool: ModuleType, tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gmacs = tool.plan(tiny, 3)
    text = capsys.readouterr().out
    assert gmacs > 0
    assert f"with 3 seeds {3 * gmacs:.0f}" in text


def test_settings_learn_at_their_own_rates_and_bench_pas_as_before(tool: ModuleType, tiny: Any) -> None:
    assert tiny.training(0).learning_rate == tool.RATES["translation"]
    bench = sys.modules["bench_pas"]
    plain = sys.modules["search_settings"].Ready(
        "x", tiny.setting, tiny.model, tiny.space, tiny.latency, tiny.full_ms, "none"
    )
    config = bench.pas_config(plain, 0, "ms")
    assert (config.training.learning_rate, config.training.final_rate) == (0.02, 0.02)
    assert config.winner.learning_rate == 0.05
    assert set(tool.SETTINGS) == set(tool.RATES) == set(tool.METRICS)
