"""The report of a family: its front, its members' own reports, and a page whatever its summary is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hwsearch.report import report


def family_row(name: str, ms: float, metric: float) -> dict[str, Any]:
    return {"name": name, "predicted_ms": ms, "measured_ms": ms, "budget_ms": 1.0, "macs": 1e6, "parameters": 1e4,
            "metric": metric}  # fmt: skip


def make_family(folder: Path, **changes: Any) -> Path:
    """Two members, the second of which misses its budget."""
    members = [
        {"folder": name, "status": status, "rows": [family_row("full", 2.0, 0.9), family_row("uniform", ms, 0.8),
                                                    family_row("found", ms, 0.85)]}
        for name, status, ms in (("budget-60", "pass", 0.9), ("budget-28.5", "fail", 1.1))
    ]  # fmt: skip
    summary = {"schema": "hwsearch.family", "version": 1, "device": "simulated", "model": "a:b", "metric_name": "mIoU",
               "higher_is_better": True, "members": members, **changes}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_family_has_a_front_and_a_way_to_every_member(tmp_path: Path) -> None:
    page = report(make_family(tmp_path / "family")).read_text()
    assert "2 networks of one parent, 1 inside their budgets" in page
    assert 'href="budget-60/report.html"' in page
    assert 'href="budget-28.5/report.html"' in page
    assert page.count(">full<") == 1
    figures = json.loads(page.split('id="figures">')[1].split("</script>")[0])
    (front,) = figures.values()
    assert {trace["name"]: trace["x"] for trace in front["data"]} == {
        "full": [2.0], "uniform": [0.9, 1.1], "found": [0.9, 1.1],
    }  # fmt: skip
    assert front["layout"]["yaxis"]["title"]["text"] == "mIoU"


@pytest.mark.parametrize(
    "changes",
    [{"members": []}, {"members": "none"}, {"members": [{"folder": "<script>", "rows": [{"name": "found"}, 3]}]},
     {"metric_name": 3, "device": None}],
)  # fmt: skip
def test_a_damaged_family_is_a_page_all_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    page = report(make_family(tmp_path / "family", **changes)).read_text()
    assert "<h1>" in page
    assert '<script>"' not in page
    assert 'href="&lt;' not in page
