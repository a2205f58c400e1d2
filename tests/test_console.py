"""What a person sees of long work."""

from __future__ import annotations

import pytest

from hwsearch.console import Console


def test_no_share_is_above_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().bar("timing") as report:
        report(11.0, 10.0, "the last one took longer")
    assert capsys.readouterr().err == "  timing: 100 %  the last one took longer\n"
