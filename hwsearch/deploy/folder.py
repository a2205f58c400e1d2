"""Write a folder of files in one step, so that a kill leaves the old one or the new one, never half of either."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hwsearch.errors import InputError


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files, then put them in place of ``folder`` at once: a kill leaves the old folder or the new one.

    Raises: InputError when it cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    old = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror}): choose a writable folder") from error
    try:
        for name, content in files.items():
            with (new / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        new.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent)) / "it"
            folder.rename(old)
        new.rename(folder)
    except OSError as error:
        if old is not None and old.exists() and not folder.exists():
            old.rename(folder)
        raise InputError(f"cannot write {folder} ({error.strerror}): free space or choose another folder") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)
