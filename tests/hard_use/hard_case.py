"""``Case``: one malformed input, the verb that gets it, and what the verb has to say to it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What is done to a home before the verb is called; paths are relative to it, which is the working directory too.
Spoil = Callable[[Path], object]

ON_SIMULATED = ("--device", "simulated")
NET = "hard_nets:small"
SHAPE = ("--input", "1x1x8x8")
TABLE = Path("latency_tables/simulated")
PREDICTOR = TABLE / "predictor"


@dataclass(frozen=True)
class Case:
    """One call of the command line that cannot work.

    Args:
        verb: as it is typed, ``device show`` for instance.
        name: unique among the cases of its verb.
        arguments: behind the verb.
        says: a regular expression that the one line must match; of a verdict (exit 1) its printed result.
        code: exit status: 1 the answer is no, 2 bad input.
        spoil: what is done to the home first.
        writes: files that the verb may make or change all the same, as regular expressions of their paths.
        result: whether the answer is printed as a result rather than as an error.
    """

    verb: str
    name: str
    arguments: tuple[str, ...]
    says: str
    code: int = 2
    spoil: Spoil | None = None
    writes: tuple[str, ...] = ()
    result: bool = False

    @property
    def id(self) -> str:
        """For pytest."""
        return f"{self.verb}: {self.name}"


def snapshot(home: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, links as what they point to, by relative path."""
    found = {}
    for path in sorted(home.rglob("*")):
        name = str(path.relative_to(home))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def damage(before: dict[str, str], after: dict[str, str], allowed: tuple[str, ...]) -> list[str]:
    """Files that a call made, changed or removed without leave."""
    changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    return [name for name in changed if not any(re.fullmatch(pattern, name) for pattern in allowed)]


# --- ways to spoil a file ---


def write(path: str | Path, content: str | bytes) -> Spoil:
    """A file with this content, its folders made."""

    def spoil(home: Path) -> None:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def cut(path: str | Path, keep: float) -> Spoil:
    """Only the first part of a file, a share of it."""

    def spoil(home: Path) -> None:
        data = (home / path).read_bytes()
        (home / path).write_bytes(data[: int(keep * len(data))])

    return spoil


def replaced(path: str | Path, old: bytes, new: bytes) -> Spoil:
    """The first place of some bytes in a file, which must be there."""

    def spoil(home: Path) -> None:
        data = (home / path).read_bytes()
        assert old in data, f"{path} does not hold {old!r}"
        (home / path).write_bytes(data.replace(old, new, 1))

    return spoil


def edited(path: str | Path, change: Callable[[Any], object]) -> Spoil:
    """A JSON file after ``change`` had its way with its content; NaN and infinities are written as Python does."""

    def spoil(home: Path) -> None:
        content = json.loads((home / path).read_text())
        new = change(content)
        (home / path).write_text(json.dumps(content if new is None else new))

    return spoil


def field(path: str | Path, *keys: str | int, value: Any) -> Spoil:
    """One field of a JSON file, given by its keys, set to a value."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edited(path, change)


def without(path: str | Path, *keys: str | int) -> Spoil:
    """A JSON file without one field."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edited(path, change)


def gone(path: str | Path) -> Spoil:
    """No such file."""
    return lambda home: (home / path).unlink()


def folder_instead(path: str | Path) -> Spoil:
    """A folder of the same name."""

    def spoil(home: Path) -> None:
        (home / path).unlink(missing_ok=True)
        (home / path).mkdir(parents=True)

    return spoil


def link(path: str | Path, target: str) -> Spoil:
    """A symbolic link in its place."""

    def spoil(home: Path) -> None:
        (home / path).unlink(missing_ok=True)
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).symlink_to(target)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""

    def spoil(home: Path) -> None:
        for one in spoils:
            one(home)

    return spoil


#: JSON that breaks readers: brackets without an end, a number of thousands of digits, half a character, not UTF-8.
DEEP = "[" * 100_000
DIGITS = '{"version": ' + "9" * 6000 + "}"
NOT_UTF8 = b'{"schema": "\xff\xfe"}'
