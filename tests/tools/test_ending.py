"""How the tools end."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from hwsearch.errors import InputError


def test_a_no_is_one_line_and_a_status(
    load_tool: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> int:
        raise InputError("there is no seed -1: give 0 or more")

    monkeypatch.setattr("sys.argv", ["tools/bench_x.py"])
    tool = load_tool("ending")
    with pytest.raises(SystemExit) as ended:
        tool.leave(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "bench_x: error: there is no seed -1: give 0 or more\n"
    with pytest.raises(SystemExit) as ended:
        tool.leave(lambda: 7)
    assert ended.value.code == 7
