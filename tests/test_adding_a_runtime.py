"""``docs/adding_a_runtime.md`` as a new user walks through it: the example is a runtime, and keeps its promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_runtime_of_the_guide_passes_the_suite_as_the_guide_says(tmp_path: Path) -> None:
    module, check = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/adding_a_runtime.md").read_text(), re.M | re.S)
    (tmp_path / "hwsearch_runtime_reference.py").write_text(module, encoding="utf-8")
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices/mine.toml").write_text('runtime = "reference"\n', encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HWSEARCH_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.split("\n")[:-1]
    assert len(outcomes) == 13
    assert all(outcome.endswith(" ok") for outcome in outcomes), done.stdout
    shown = subprocess.run(
        [sys.executable, "-m", "hwsearch", "device", "show", "mine"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "reference" in shown.stdout


def test_a_runtime_that_is_not_installed_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices/mine.toml").write_text('runtime = "absent"\n', encoding="utf-8")
    environment = os.environ | {"HWSEARCH_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "hwsearch", "device", "show", "mine"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no module hwsearch_runtime_absent is installed" in done.stderr
