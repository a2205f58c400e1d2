"""The stress run of a campaign: small in the suite, whole in the long tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("stress_campaign")


def test_a_campaign_killed_once_ends_in_the_same_table(tool: ModuleType, tmp_path: Path) -> None:
    found = tool.stress(0.02, 1, 3, tmp_path)
    assert found.same
    assert found.kills == 1
    assert found.kernels > 100


@pytest.mark.long
def test_ten_thousand_kernels_with_kills_at_random_moments(tool: ModuleType, tmp_path: Path) -> None:
    found = tool.stress(4.0, 10, 0, tmp_path)
    assert found.same
    assert found.kernels >= 10_000
    assert found.kills_at_work >= 3
