"""Read files that may be damaged, from elsewhere or from a later version: a value is what it should be, or None."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_MAX_BYTES = 64 << 20
_LARGEST = 1e300


def number(value: object) -> float | None:
    """A finite number, else None (``true`` is no number)."""
    # compared, not converted: a whole number of a file may be too large for a float
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
        return None
    return float(value)


def positive(value: object) -> float | None:
    """A finite number above 0, else None."""
    found = number(value)
    return found if found is not None and found > 0 else None


def word(value: object, default: str = "") -> str:
    """A text of at most 200 characters, else the default."""
    return value[:200] if isinstance(value, str) and value else default


def mapping(value: object) -> dict[str, Any]:
    """A JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """A JSON list, else an empty one."""
    return value if isinstance(value, list) else []


def read_text(path: Path, problems: list[str]) -> str | None:
    """A file's text; None when it is not there. What else is wrong goes to ``problems``, one line each."""
    try:
        if not path.exists():
            return None
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            problems.append(f"{path.name} is no file of at most {_MAX_BYTES >> 20} MB: left out")
            return None
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror}): left out")
        return None


def read_json(path: Path, problems: list[str]) -> Any:
    """A JSON file's content; None when it is not there or damaged (see ``read_text``)."""
    content = read_text(path, problems)
    if content is None:
        return None
    try:
        return _parse(content)
    except (ValueError, RecursionError):
        problems.append(f"{path.name} is not valid JSON: left out")
        return None


def read_json_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a torn last line is what a kill leaves and is no problem."""
    content = read_text(path, problems) or ""
    found, bad = [], 0
    lines = content.splitlines()
    for place, line in enumerate(lines):
        try:
            record = _parse(line)
        except (ValueError, RecursionError):
            bad += bool(line.strip()) and place < len(lines) - 1
            continue
        if isinstance(record, dict):
            found.append(record)
    if bad:
        problems.append(f"{path.name}: {bad} damaged line{'' if bad == 1 else 's'} left out")
    return found


def _parse(content: str) -> Any:
    """JSON in which NaN and numbers beyond a float's range are null."""

    def finite(digits: str) -> float | None:
        value = float(digits)
        return value if math.isfinite(value) else None

    return json.loads(content, parse_constant=lambda _: None, parse_float=finite)
