"""Which of hwsearch's own files a board needs: the agent, its runtime, and what those import of hwsearch; nothing else.

Found by reading the imports, so a new runtime has nothing to register. Heavy packages are imported inside the functions
that need them, and a board without them only lacks those functions.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import hwsearch
from hwsearch.device.spec import FOREIGN
from hwsearch.errors import InputError, InternalError

_ROOT = Path(hwsearch.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Payload:
    """Files of hwsearch for a board.

    Attributes:
        files: text by path, such as ``hwsearch/device/agent.py``.
        name: of the folder that they belong into; equal files, equal name.
    """

    files: dict[str, bytes]
    name: str


@cache
def payload(runtime: str) -> Payload:
    """The files that the agent needs for one runtime.

    Example:
        >>> "hwsearch/device/stopwatch.py" in payload("onnxruntime").files
        True
        >>> any(name.startswith("hwsearch/search/") for name in payload("onnxruntime").files)
        False
    """
    waiting = ["hwsearch.device.agent", f"hwsearch.device.runtime_{runtime}"]
    files = _foreign(runtime) if _file_of(waiting[1]) is None else {}
    waiting += [module for text in files.values() for module in _imported(text)]
    while waiting:
        module = waiting.pop()
        path = _file_of(module)
        name = None if path is None else path.relative_to(_ROOT).as_posix()
        if path is None or name in files:
            continue
        files[str(name)] = path.read_bytes()
        # a module is imported through its packages
        waiting += [module.rpartition(".")[0], *_imported(files[str(name)])]
    if "hwsearch/device/agent.py" not in files:
        raise InternalError(f"{_ROOT} does not hold hwsearch's own files")
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return Payload(files, f"agent-{digest.hexdigest()[:16]}")


def _foreign(runtime: str) -> dict[str, bytes]:
    """The files of a runtime that is somebody else's module or package."""
    found = find_spec(f"{FOREIGN}{runtime}")
    if found is None or found.origin is None:
        raise InputError(f"there is no runtime {runtime!r}: neither hwsearch's own nor a module {FOREIGN}{runtime}")
    path = Path(found.origin)
    if path.name != "__init__.py":
        return {path.name: path.read_bytes()}
    return {f.relative_to(path.parent.parent).as_posix(): f.read_bytes() for f in sorted(path.parent.rglob("*.py"))}


def _file_of(module: str) -> Path | None:
    base = _ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if module and path.is_file()), None)


def _imported(source: bytes) -> Iterator[str]:
    """Modules of hwsearch that a module imports when it runs; names that are none are dropped by the caller."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if node in skipped or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            skipped.update(ast.iter_child_nodes(node))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("hwsearch"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hwsearch"):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
