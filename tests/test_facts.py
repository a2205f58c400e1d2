"""Plain facts of a verb, as lines: what there is of them."""

from __future__ import annotations

import pytest

from hwsearch.cli_shared import show_facts
from hwsearch.console import Console


def test_what_there_is_none_of_has_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_facts(Console(), "Verdict: pass", {"sqnr_db": None, "ms": 1.0, "numerics": {"worst": None, "images": [1, 2]}})
    assert capsys.readouterr().out.splitlines() == ["Verdict: pass", "  ms: 1", "  numerics:", "    images: [1, 2]"]
