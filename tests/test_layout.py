"""The architecture as tests: which way imports run, how large modules grow, what `import hwsearch` loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hwsearch"
# A package imports only from those to its left; config and pipeline sit beside the command line, errors below all.
ORDER = [
    "errors",
    "graph",
    "reparam",
    "models",
    "device",
    "latency",
    "train",
    "search",
    "deploy",
    "report",
    "config_types",
    "config_messages",
    "config_training",
    "config_masks",
    "config_cells",
    "config_filters",
    "config_weights",
    "config_devices",
    "config_branches",
    "config_data",
    "config_family",
    "config",
    "granularity",
    "config_options",
    "console",
    "model_argument",
    "estimation",
    "preparation",
    "campaigns",
    "campaign_worker",
    "deployment",
    "space_view",
    "cell_run",
    "comparison",
    "delivery",
    "kernel_times",
    "pipeline",
    "family",
    "cli_shared",
    "cli_device",
    "cli",
    "__main__",
]
EXEMPT = {"testing"}
MAX_LINES = 500
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    """First-level hwsearch packages that a module imports, at the top or inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("hwsearch.")}
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_leftwards_only(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in EXEMPT or room == "__init__":
        return
    allowed = set(ORDER[: ORDER.index(room) + 1])
    wrong = {r for r in imported_rooms(path) if r not in allowed and r != "__version__"}
    assert not wrong, f"{path.relative_to(PACKAGE)} ({room}) must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_import_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'xgboost', 'sklearn', 'numpy', 'rich', 'typer', 'plotly'}"
    code = f"import sys, hwsearch; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_device_side_needs_only_numpy_and_its_runtime() -> None:
    """The files that run on a board import nothing but the standard library, numpy, a runtime and each other."""
    heavy = "{'torch', 'onnx', 'rich', 'pydantic', 'xgboost'}"
    code = f"import sys, hwsearch.device.agent; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    import hwsearch

    for name in hwsearch.__all__:
        assert getattr(hwsearch, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hwsearch.nothing


def test_no_pickle_is_ever_read() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not names & {"pickle", "joblib", "dill", "shelve", "marshal"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                assert ast.unparse(node.func) != "torch.load", path
