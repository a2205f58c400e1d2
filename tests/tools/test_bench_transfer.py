"""The benchmark tool itself: resumable rows, HELP's trimming, cells as numbers, one line when the data is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hwsearch.errors import InputError


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("bench_transfer")


def test_help_trims_a_tenth_on_both_sides(tool: ModuleType) -> None:
    ms = np.arange(100.0)[::-1]
    assert sorted(tool.middle(np.arange(20), ms)) == list(range(2, 18))


def test_a_cell_as_numbers(tool: ModuleType) -> None:
    """The 3x3 convolution hangs on a node that nothing reaches: counted, but not among what is reached."""
    text = "|none~0|+|nor_conv_1x1~0|nor_conv_3x3~1|+|skip_connect~0|none~1|avg_pool_3x3~2|"
    counts, reached, places, live = (group[0] for group in tool.cell_features([text]))
    assert counts.tolist() == [1, 1, 1, 1]
    assert reached.tolist() == [1, 1, 0, 1, 1, 2, 1, 1, 1]
    assert places.sum() == 4
    assert live.sum() == 3
    with pytest.raises(InputError, match="no cell of NAS-Bench-201"):
        tool.cell_features(["|none~0|"])


def test_missing_data_is_told(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HWSEARCH_DATA", raising=False)
    output = ["--output", str(tmp_path / "rows.csv")]
    with pytest.raises(InputError, match=r"--data or \$HWSEARCH_DATA"):
        tool.main(["help", *output])
    with pytest.raises(InputError, match=r"conv_Tesla_T4\.csv"):
        tool.main(["neusight", "--data", str(tmp_path), *output])


def test_rows_are_appended_once_and_summed_up(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.csv"
    ran: list[tuple[str, int]] = []

    def job(case: str, repeat: int) -> dict[str, float]:
        ran.append((case, repeat))
        return {"spearman": 0.9 + repeat / 10 + (0.01 if case.endswith("b") else 0.0)}

    def jobs() -> Iterator[tuple[str, int, Callable[[], dict[str, float]]]]:
        for repeat in range(2):
            for case in ("chosen/a", "chosen/b"):
                yield case, repeat, partial(job, case, repeat)

    assert not tool.measure("help", jobs(), path, -1.0)
    assert tool.measure("help", jobs(), path, 60.0)
    assert tool.measure("help", jobs(), path, 60.0)
    assert ran == [("chosen/a", 0), ("chosen/b", 0), ("chosen/a", 1), ("chosen/b", 1)]
    found = {row["case"]: row for row in tool.summary(tool.read_rows(path))}
    assert found["chosen/mean"]["mean"] == pytest.approx(0.955)
    assert found["chosen/mean"]["n"] == 2
    assert found["chosen/mean"]["sd"] == pytest.approx(0.1 / np.sqrt(2))
    assert tool.main(["report", "--output", str(path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    path.write_text("other,columns\n")
    with pytest.raises(InputError):
        tool.main(["report", "--output", str(path)])
