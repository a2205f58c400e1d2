"""The bench of the tool itself: what it starts, what it tells, and what a bare start must not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from hwsearch.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "onnx", "onnxruntime", "xgboost", "sklearn", "scipy", "plotly", "pymoo", "numpy", "rich")


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("bench_cli")


@pytest.mark.parametrize("words", [["--help"], ["device", "--help"], ["estimate", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys, hwsearch.cli as cli\n"
        f"sys.argv = ['hwsearch', *{words!r}]\n"
        "try:\n    cli.main()\nfinally:\n"
        f"    print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"


def test_every_command_is_counted_equally_often(tool: ModuleType) -> None:
    commands = {"nothing": ([sys.executable, "-c", "pass"], None), "hwsearch": (tool.hwsearch("--help"), 0.5)}
    rows = tool.bench(commands, dict(os.environ), 2)
    assert [(row.command, row.n, row.aim_s) for row in rows] == [("nothing", 2, None), ("hwsearch", 2, 0.5)]
    assert all(0 < row.fastest_s <= row.median_s <= row.slowest_s for row in rows)
    assert "| hwsearch | 2 | " in tool.markdown(rows)
    assert "below 0.5 |" in tool.markdown(rows)


def test_a_command_that_fails_is_told_and_not_timed(tool: ModuleType) -> None:
    with pytest.raises(InputError, match=r"ended with 3: no such thing"):
        tool.seconds([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"], {})


@pytest.mark.long
def test_the_whole_bench_on_a_small_network(tool: ModuleType, home: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "bench_cli.py"), "--quick", "--busy", "--rounds", "1", "--json"]
    done = subprocess.run(
        [*command, "--device", "simulated"], cwd=home, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["rows"]) == 4
    assert found["rows"][3]["median_s"] > found["rows"][0]["median_s"]
    without = subprocess.run(
        [*command, "--device", "x86-ort-1t"], cwd=home, capture_output=True, text=True, check=False, timeout=300
    )
    assert without.returncode == 2
    assert "x86-ort-1t has no predictor: run hwsearch profile" in without.stderr
