"""One search under the budgets of two devices that differ: one network that keeps both, and what says so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hwsearch.cli import app
from hwsearch.config import RunConfig
from hwsearch.config_options import search_config
from hwsearch.errors import InputError
from hwsearch.report import report

CONFIG = """
[run]
name = "two"
[device]
name = "simulated"
[[devices]]
name = "narrow"
budget = "45%"
[profile]
minutes = 0.08
[model]
factory = "hwsearch.models.vgg:vgg_small"
input = "1x1x16x16"
kwargs = { width = 0.5 }
[data]
kind = "synthetic"
limit = 300
valid = 100
[search]
budget = "60%"
quantum = 2
minimum = 0.25
candidates = 12
population = 6
score_images = 64
calibration_images = 64
[supernet]
steps = 8
[train]
steps = 6
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a second pretended device, bound by its memory where the first is bound by arithmetic; one run."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(Path(__file__).resolve().parent.parent / "devices", folder / "devices")
    other = (folder / "devices/simulated.toml").read_text()
    for before, after in (
        ("gmacs = 20.0", "gmacs = 60.0"),
        ("gbytes = 10.0", "gbytes = 2.0"),
        ("block = 8", "block = 4"),
    ):
        assert before in other
        other = other.replace(before, after)
    (folder / "devices/narrow.toml").write_text(other)
    (folder / "two.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_HOME", str(folder))
        patch.chdir(folder)
        done = CliRunner().invoke(app, ["run", "two.toml", "--json"])
    assert done.exit_code == 0, done.output
    (folder / "output.json").write_text(done.stdout)
    return folder


@pytest.mark.long
def test_the_one_network_keeps_both_budgets(home: Path) -> None:
    outcome = json.loads((home / "output.json").read_text())
    assert {name: verdict["status"] for name, verdict in outcome["verdicts"].items()} == {
        "simulated": "pass",
        "narrow": "pass",
    }
    found = next(row for row in outcome["rows"] if row["name"] == "found")
    full = next(row for row in outcome["rows"] if row["name"] == "full")
    assert [time["device"] for time in found["devices"]] == ["simulated", "narrow"]
    assert all(time["measured_ms"] <= time["budget_ms"] for time in found["devices"])
    assert found["measured_ms"] == found["devices"][0]["measured_ms"]
    shares = [
        time["budget_ms"] / whole["measured_ms"] for time, whole in zip(found["devices"], full["devices"], strict=True)
    ]
    assert shares == [pytest.approx(0.6, rel=0.03), pytest.approx(0.45, rel=0.03)]
    # the devices really differ: the ratio of their times is not that of the full network
    assert full["devices"][0]["measured_ms"] != pytest.approx(full["devices"][1]["measured_ms"], rel=0.05)
    # one of the two budgets binds
    assert max(time["measured_ms"] / time["budget_ms"] for time in found["devices"]) > 0.93


@pytest.mark.long
def test_each_device_gets_its_bundle(home: Path) -> None:
    for folder, device in (("bundle", "simulated"), ("bundle-narrow", "narrow")):
        manifest = json.loads((home / "runs/two" / folder / "manifest.json").read_text())
        assert manifest["device"] == device
        assert (home / "runs/two" / folder / "verdict.json").exists()
    budgets = {
        json.loads((home / "runs/two" / folder / "manifest.json").read_text())["budget_ms"]
        for folder in ("bundle", "bundle-narrow")
    }
    assert len(budgets) == 2


@pytest.mark.long
def test_the_report_shows_every_device(home: Path) -> None:
    page = Path(report(home / "runs/two", home / "again.html")).read_text(encoding="utf-8")
    assert re.search(r"<h2[^>]*>Devices</h2>", page)
    assert "<h3>narrow</h3>" in page
    result = json.loads((home / "runs/two/result.json").read_text())
    assert [limit["name"] for limit in result["limits"]] == ["simulated", "narrow"]
    assert all(len(candidate["ms"]) == 2 for candidate in result["candidates"])


def test_budgets_of_the_command_line_become_devices() -> None:
    config = search_config(
        method="cafenet",
        model="hwsearch.models.vgg:vgg_small",
        shape="1x1x28x28",
        data="synthetic",
        budgets=["a:3", "b:5.5"],
        folder=None,
    )
    assert config.device.name == "a"
    assert config.search.max_ms(9.0) == 3.0
    assert [(further.name, further.max_ms(9.0)) for further in config.devices] == [("b", 5.5)]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"devices": [{"name": "a", "budget": "40%"}]}, "'a' is named 2 times"),
        ({"devices": [{"name": "b"}]}, "'b' of [[devices]] needs either budget"),
        ({"devices": [{"name": "b", "budget": "0%"}]}, "above 0%"),
        ({"devices": [{"name": "b", "budget_ms": -1.0}]}, "budget_ms"),
        (
            {"devices": [{"name": "b", "budget": "40%"}], "search": {"method": "repnas"}},
            "search has none for 'a'",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(changed: dict[str, object], said: str) -> None:
    plain = {
        "device": {"name": "a"},
        "model": {"factory": "hwsearch.models.vgg:vgg_small", "input": "1x1x28x28"},
        "search": {"budget": "50%"},
    }
    with pytest.raises(InputError, match=re.escape(said)):
        RunConfig.from_dict({**plain, **changed})
