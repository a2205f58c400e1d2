"""``RunFolder``: where a run keeps what it was asked, how far it came and what it found.

    runs/<name>/
      config.json     what was asked; the same command continues, a different one is refused
      events.jsonl    what happened and when (wall-clock times live here and nowhere else)
      state/          checkpoints and journals
      result.json     what was found; the same bytes whenever the run is
      model/          the found network
      lock            held while a process works here

Everything but the events is written in one step, and one process at a time works in a folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hwsearch.errors import InputError, SchemaError
from hwsearch.search.journal import first_difference, short, write_atomic

SCHEMA, VERSION = "hwsearch.run", 1


@dataclass(frozen=True)
class RunFolder:
    """An open run folder; made by ``open_run``."""

    path: Path
    resumed: bool = False
    _started: float = field(default_factory=time.monotonic, compare=False, repr=False)

    @property
    def state(self) -> Path:
        """Folder of checkpoints and journals."""
        return self.path / "state"

    @property
    def model(self) -> Path:
        """Folder of the found network."""
        return self.path / "model"

    @property
    def result_path(self) -> Path:
        """``result.json``."""
        return self.path / "result.json"

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to ``events.jsonl``: the time, seconds since this process opened the run, and plain values.

        Raises:
            InputError: the folder cannot be written.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"event": kind, "time": now, "elapsed_s": round(time.monotonic() - self._started, 3), **values}
        path = self.path / "events.jsonl"
        try:
            # A kill may have torn the last line; the next record must not be glued to it.
            torn = path.exists() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
            with path.open("ab") as file:
                file.write((b"\n" if torn else b"") + json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; choose a writable folder") from error

    def events(self) -> list[dict[str, Any]]:
        """All events so far, torn lines left out."""
        path = self.path / "events.jsonl"
        found = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return [event for event in found if isinstance(event, dict)]

    def bind(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Write ``name`` (a JSON file of settings) once; later calls must agree with it. True if it was there.

        Raises:
            InputError: the stored settings differ (the first differing field is named), or cannot be written.
            SchemaError: the stored file is damaged.
        """
        path = self.path / name
        wanted = json.loads(json.dumps(settings))
        if not path.exists():
            text = json.dumps({"schema": SCHEMA, "version": VERSION, "settings": wanted}, indent=1, sort_keys=True)
            write_atomic(path, text + "\n")
            return False
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; use another run name") from error
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"{path} is damaged (not JSON): use another run name, or delete the folder") from error
        if not isinstance(stored, dict) or (stored.get("schema"), stored.get("version")) != (SCHEMA, VERSION):
            raise SchemaError(
                f"{path} is not of {SCHEMA} version {VERSION}: use another run name, or delete the folder"
            )
        settings_of = stored.get("settings")
        if not isinstance(settings_of, dict):
            raise SchemaError(f"{path} is damaged (no settings): use another run name, or delete the folder")
        differs = first_difference(settings_of, wanted)
        if differs:
            where, was, now = differs
            raise InputError(
                f"the run folder {self.path} was made with {where} = {short(was)}, this command says {short(now)}: "
                "use another run name, or delete the folder to start again"
            )
        return True


@contextlib.contextmanager
def open_run(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> Iterator[RunFolder]:
    """Open a run folder for work, new or to be continued, and keep every other process out of it.

    Args:
        path: the folder; made if it is not there.
        settings: all that decides the result, as plain JSON values.

    Raises:
        InputError: another process works in the folder, it was made with other settings, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with open_run(tempfile.mkdtemp(), {"seed": 0}) as run:
        ...     run.event("started")
        ...     run.resumed
        False
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # no link: what is written into the lock must not end up in a file elsewhere
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        raise InputError(f"cannot write the run folder {folder}: {error.strerror}; choose a writable folder") from error
    try:
        _take(lock, folder)
        run = RunFolder(folder)
        run = RunFolder(folder, resumed=run.bind("config.json", settings))
        try:
            run.state.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {run.state}: {error.strerror}; choose a writable folder") from error
        yield run
    finally:
        os.close(lock)  # gives the lock back; the kernel does the same after a kill


def _take(lock: int, folder: Path) -> None:
    """Take the folder's lock or say who has it."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        raise InputError(
            f"another process (pid {owner}) is working in the run folder {folder}: wait for it, or use another run name"
        ) from error
    try:
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise InputError(f"cannot write {folder / 'lock'}: {error.strerror}; make room, then go on") from error


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
