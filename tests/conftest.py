"""Shared fixtures. A test that measures no time holds the shared side of the timing lock."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers that lie beside this file are imported by name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files at the top go first: whole runs are the longest, and a long file begun last leaves a core idle."""
    items.sort(key=lambda item: len(item.path.parts))


@pytest.fixture(autouse=True)
def _honour_the_timing_lock(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked ``serial`` or ``real`` may time something and takes the exclusive side itself."""
    if request.node.get_closest_marker("serial") or request.node.get_closest_marker("real"):
        yield
        return
    from hwsearch.device.lock import background_lock

    with background_lock():
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hwsearch home with the repository's devices, for tests that write tables."""
    import shutil

    repository = Path(__file__).resolve().parent.parent
    shutil.copytree(repository / "devices", tmp_path / "devices")
    monkeypatch.setenv("HWSEARCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path
