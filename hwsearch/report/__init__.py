"""``report``: a run folder, a bundle or a device's table as one HTML file that opens anywhere, offline."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hwsearch.errors import InputError

__all__ = ["report"]


def report(
    source: str | os.PathLike[str] | Any,
    output: str | os.PathLike[str] | None = None,
    *,
    table: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the report of a run folder, a bundle (or the ``Bundle`` itself) or a latency table's folder.

    The page holds its data, its style and the plotting library, and may load nothing else. What is missing in the
    source is said in one line in its place. Equal sources give equal pages.

    Args:
        source: a folder.
        output: the HTML file; ``report.html`` in the source by default.
        table: the device's table folder, for the predictor's card; found by the device's name otherwise.
    Returns:
        The path written.
    Raises:
        InputError: the source is none of the three, or the output cannot be written.
        SchemaError: a bundle that is not what its manifest says, or a damaged table.

    Example:
        >>> report("runs/quickstart")                                   # doctest: +SKIP
        PosixPath('runs/quickstart/report.html')
    """
    from hwsearch import __version__

    folder = Path(getattr(source, "folder", source))
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give a run folder, a bundle, or a device's table folder")
    target = folder / "report.html" if output is None else Path(output)
    if os.path.isdir(target):
        raise InputError(f"{target} is a folder: give the name of an HTML file with output")
    page = _page(folder, None if table is None else Path(table))
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A text of a file from elsewhere may hold half a character, which no encoding has.
        temporary.write_text(page.render(__version__), encoding="utf-8", errors="replace")
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"cannot write {target} ({error.strerror}): choose a writable place with output") from error
    return target


def _page(folder: Path, table: Path | None) -> Any:
    schema = _schema(folder / "manifest.json")
    if schema == "hwsearch.bundle":
        from hwsearch.report.bundle_page import bundle_page

        return bundle_page(folder, table or _table_of(str(_manifest(folder / "manifest.json").get("device", ""))))
    if schema == "hwsearch.latency-table":
        from hwsearch.report.table_page import table_page

        return table_page(folder)
    if _schema(folder / "summary.json") == "hwsearch.family":
        from hwsearch.report.family_page import family_page

        return family_page(folder)
    if any((folder / name).exists() for name in ("result.json", "summary.json", "events.jsonl", "config.json")):
        from hwsearch.report.run_data import read_run
        from hwsearch.report.run_page import run_page

        run = read_run(folder)
        return run_page(run, table or _table_of(run.device))
    raise InputError(
        f"{folder} is no run folder (result.json, summary.json), no bundle and no latency table (manifest.json)"
    )


def _schema(path: Path) -> str:
    return str(_manifest(path).get("schema", ""))


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _table_of(device: str) -> Path | None:
    """The table folder of a device by its name, where a home has one."""
    from hwsearch.device.spec import homes

    if not device or "/" in device or device.startswith("."):
        return None
    folders = (home / "latency_tables" / device for home in homes())
    return next((folder for folder in folders if os.path.isdir(folder)), None)  # which takes any name


class _Package(ModuleType):
    """``hwsearch.report`` is this package and a public function at once: whichever a caller has, it can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
