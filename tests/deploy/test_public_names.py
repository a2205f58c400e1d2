"""``hwsearch.deploy`` and ``hwsearch.report`` are packages and public functions: both work in any order of imports."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "first", ["hs.verify", "import hwsearch.deploy.verify", "import hwsearch.report", "hs.report", "hs.deploy", "pass"]
)
def test_the_functions_stay_callable(first: str) -> None:
    code = (
        f"import hwsearch as hs\n{first}\n"
        "for call in (hs.deploy, hs.report):\n"
        "    try: call(1, 2, 3, 4, 5, 6)\n"
        "    except TypeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "deploy() takes 4 positional" in done.stdout
    assert "report() takes from 1 to 2 positional" in done.stdout
