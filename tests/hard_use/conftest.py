"""A home that works, made once; every case gets a copy of it to spoil."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hard_case import NET, ON_SIMULATED, SHAPE, snapshot
from running import call, shared_agents

CONFIG = f"""
[run]
name = "first"
[device]
name = "simulated"
[profile]
minutes = 0.02
[model]
factory = "{NET}"
input = "1x1x8x8"
[data]
kind = "synthetic"
[search]
budget = "60%"
quantum = 4
"""


@pytest.fixture(scope="session")
def _agents() -> Iterator[None]:
    import torch

    torch.set_num_threads(1)
    with shared_agents():
        yield


@pytest.fixture(scope="session")
def good_home(tmp_path_factory: pytest.TempPathFactory, _agents: None) -> Path:
    """devices/, a table with its predictor, net.onnx, model/, bundle/, runs/done/ and good.toml."""
    import hard_homes

    home = tmp_path_factory.mktemp("good")
    repository = Path(__file__).resolve().parents[2]
    (home / "devices").mkdir()
    shutil.copy(repository / "devices" / "simulated.toml", home / "devices")
    (home / "good.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_HOME", str(home))
        patch.chdir(home)
        hard_homes.table(home)
        answer = call("deploy", NET, *ON_SIMULATED, *SHAPE, "--output", "bundle", "--budget-ms", "5")
        assert answer.code == 0, answer.err + answer.crash
        shutil.copy(home / "bundle" / "model.onnx", home / "net.onnx")
        hard_homes.model_folder(home / "model")
        hard_homes.finished_run(home / "runs" / "done")
    return home


def _folders(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_dir() and not path.is_symlink())


@pytest.fixture(scope="session")
def _copy(good_home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A copy of the good home, and what is in it."""
    place = tmp_path_factory.mktemp("copy") / "home"
    shutil.copytree(good_home, place, symlinks=True)
    return place, snapshot(place)


@pytest.fixture
def home(good_home: Path, _copy: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home to spoil, which is the working directory too; made anew where the test left traces."""
    place, good = _copy
    monkeypatch.setenv("HWSEARCH_HOME", str(place))
    monkeypatch.chdir(place)
    yield place
    if snapshot(place) != good or _folders(place) != _folders(good_home):
        for path in place.iterdir():  # the folder itself stays: agents work in it
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(good_home, place, symlinks=True, dirs_exist_ok=True)
