"""``Journal``: an append-only file of JSON lines that survives a kill at any moment.

Every record is written in one call and forced to the disk before the work goes on, so a finished evaluation is never
lost. A kill can tear at most the last line; it is cut off when the file is next opened. Files hold data, never code.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwsearch.errors import InputError, SchemaError


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two nested settings differ: (dotted path, old value, new value), or None."""
    for key in sorted({*old, *new}):
        path, was, now = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            inner = first_difference(was, now, f"{path}.")
            if inner:
                return inner
        elif was != now:
            return path, was, now
    return None


@dataclass(frozen=True)
class Journal:
    """JSON lines under a header that says what they belong to.

    Args:
        path: the file.
        header: what the records belong to (seed, space, settings). Plain JSON values only.
    """

    path: Path
    header: Mapping[str, Any]

    def open(self) -> list[dict[str, Any]]:
        """Create the file, or read the finished records of an earlier run and cut off a torn last line.

        Raises:
            InputError: the file belongs to something else (the first differing field is named) or cannot be written.
            SchemaError: a line before the last is damaged, or another release wrote the file.
        """
        wanted = json.loads(json.dumps(self.header))
        try:
            raw = self.path.read_bytes() if self.path.exists() else b""
            whole = raw[: raw.rfind(b"\n") + 1]
            if not whole:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.unlink(missing_ok=True)
                self.append(wanted)
                sync_folder(self.path.parent)
                return []
            if len(whole) < len(raw):
                os.truncate(self.path, len(whole))
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; choose a writable folder") from error
        lines = whole.decode("utf-8", "replace").splitlines()
        records = [self._parse(line, number) for number, line in enumerate(lines, 1)]
        for name in ("schema", "version"):
            if records[0].get(name) != wanted.get(name):
                raise SchemaError(
                    f"{self.path} was written by another release of hwsearch ({name} {short(records[0].get(name))}, "
                    f"this one writes {short(wanted.get(name))}): delete it to start again, or use another run name"
                )
        differs = first_difference(records[0], wanted)
        if differs:
            name, was, now = differs
            raise InputError(
                f"{self.path} belongs to another search: its {name} is {short(was)}, this one's is {short(now)}; "
                "continue with the former, or use another run name"
            )
        return records[1:]

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and force it to the disk.

        Raises:
            InputError: the disk is full, or the file cannot be written; the journal stands as before.
        """
        line = (json.dumps(record, sort_keys=True, allow_nan=False) + "\n").encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                _append(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; make room or make it writable, then go on"
            ) from error

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise SchemaError(f"{self.path} line {number} is damaged (not a JSON object): delete it to start again")
        return record


def _append(descriptor: int, line: bytes) -> None:
    """Write a whole line or nothing: a disk that fills up takes a part of it, which the next line must not follow.

    Raises:
        OSError: there is no room.
    """
    before = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        if written < len(line):
            written += os.write(descriptor, line[written:])  # which says why
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, before)
        raise


def short(value: object, most: int = 60) -> str:
    """A value as it may stand in a message of one line."""
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= most else text[: most - 3] + "..."


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, so that a new or renamed file survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` in one step: a reader, or a run after a kill, sees the old file or the new one.

    Raises:
        InputError: the folder cannot be written.
    """
    # two processes that write one file must not write into each other's half of it
    partial = path.parent / f"{path.name}.{os.getpid()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
