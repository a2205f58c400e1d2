"""Folders for files that live as long as one process: in memory where there is room, removed also after a kill."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from hwsearch.device.runtime_onnxruntime import scratch

#: A folder younger than this may not have its lock yet.
_YOUNG_S = 60.0


def living_folder(name: str, root: str | None = None) -> tuple[Path, int]:
    """A new folder ``<name>-*`` and an open file that holds the lock in it which says that its process lives.

    It may lie in memory, so what a killed process left there is removed by the next one: nobody holds its lock.

    Args:
        name: start of the folder's name.
        root: where; by default a place in memory, else the system's temporary folder.
    """
    import fcntl

    place = Path(root or scratch() or tempfile.gettempdir())
    for old in place.glob(f"{name}-*"):
        with contextlib.suppress(OSError):
            if old.stat().st_uid != os.getuid() or time.time() - old.stat().st_mtime < _YOUNG_S:
                continue
            lock = os.open(old / "alive", os.O_RDONLY | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(lock)
    folder = Path(tempfile.mkdtemp(dir=place, prefix=f"{name}-"))
    alive = os.open(folder / "alive", os.O_RDONLY | os.O_CREAT)
    fcntl.flock(alive, fcntl.LOCK_EX)
    return folder, alive
