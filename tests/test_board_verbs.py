"""Every verb that needs a device, with the device on a board over SSH."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "device"))

from loopback import Board, made

SHAPE = ("--input", "1x1x16x16")
VGG = "hwsearch.models.vgg:vgg_small"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    found = made(tmp_path_factory.mktemp("board"))
    yield found
    found.stop()


@pytest.fixture
def added(board: Board, home: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """A simulated device on the board, added by the command line."""
    settings = board.settings()
    options = [word for option in settings.ssh_options for word in ("--ssh-option", option)]
    return answer(
        capsys, "device", "add", "there", "--runtime", "simulated", "--host", settings.host, "--port", str(board.port),
        "--identity", str(settings.identity), "--python", settings.python, "--folder", settings.folder, *options,
    )  # fmt: skip


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The one JSON object of a verb."""
    from hwsearch.cli import app

    capsys.readouterr()
    app([*words, "--json"], standalone_mode=False)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.long
def test_the_verbs_of_a_device(added: dict[str, Any], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert added["host"] == "127.0.0.1"
    assert added["fingerprint"]["runtime"] == "simulated"
    assert (home / "devices" / "there.toml").read_text().startswith('runtime = "simulated"\n')
    assert answer(capsys, "device", "show", "there")["transport"] == "ssh"
    assert "there" in [item["name"] for item in answer(capsys, "device", "list")["items"]]
    checks = [answer(capsys, "device", "check", name, "--seconds", "1") for name in ("there", "simulated")]
    assert checks[0]["verdict"] == "ok"
    assert checks[0]["fingerprint"] == checks[1]["fingerprint"]
    table = answer(capsys, "profile", "--device", "there", "--minutes", "0.03")
    assert table["networks"] > 3
    answer(capsys, "fold", VGG, *SHAPE, "--output", str(home / "vgg.onnx"))
    there, here = (
        answer(capsys, "measure", str(home / "vgg.onnx"), "--device", name) for name in ("there", "simulated")
    )
    assert there | {"device": ""} == here | {"device": ""}, "the same device, reached by another way"
    deployed = answer(
        capsys, "deploy", VGG, "--device", "there", "--output", str(home / "bundle"), "--budget-ms", "50", *SHAPE,
        "--measure",
    )  # fmt: skip
    verdict = answer(capsys, "verify", str(home / "bundle"), "--device", "there")
    assert verdict["status"] == "pass"
    assert verdict["measured_ms"] == deployed["measured_ms"]


@pytest.mark.long
def test_a_whole_run(added: dict[str, Any], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parents[1] / "examples" / "simulated.toml").read_text()
    for more, less in (
        ("minutes = 0.5", "minutes = 0.15"), ("limit = 1200", "limit = 300"), ("candidates = 40", "candidates = 8"),
        ("population = 10", "population = 4"), ("steps = 30", "steps = 4"), ("steps = 40", "steps = 4"),
    ):  # fmt: skip
        assert more in text
        text = text.replace(more, less)
    results = {}
    for name in ("there", "simulated"):
        (home / f"{name}.toml").write_text(text.replace('name = "simulated"', f'name = "{name}"'))
        outcome = answer(capsys, "run", str(home / f"{name}.toml"))
        assert outcome["verdict"]["status"] == "pass"
        results[name] = [
            {key: row[key] for key in ("name", "measured_ms", "predicted_ms", "metric")} for row in outcome["rows"]
        ]
    assert results["there"] == results["simulated"], "a run does not depend on where its device stands"
