"""``tools/gpu_check`` where there is no GPU: it says so, and installs nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "gpu_check"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([TOOL], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "gpu_check: error: no NVIDIA GPU is at hand (nvidia-smi finds none)\n"


def test_an_unknown_argument_is_named() -> None:
    done = subprocess.run([TOOL, "--fast"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown argument '--fast'; known: --conformance, --rtx" in done.stderr
