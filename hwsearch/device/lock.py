"""The machine-wide timing lock: nothing else may run while something is timed.

A timing takes the lock exclusively, background work (training, a test suite) takes it shared around each chunk of work
and so pauses while somebody measures. Two ``flock`` files, because ``flock`` is not fair: a stream of background chunks
would keep a timing waiting for ever. A timing first closes the *gate*, which new background chunks must pass.

The locks are the kernel's: a killed process releases them. Entering again in the same thread is free, so ``measure``
inside a benchmark that already holds the lock does not wait for itself; neither does a command that such a process
started and waits for (Linux). A thread that holds the background lock and starts a timing gives it up for that long.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hwsearch.errors import InputError

#: Where the two lock files lie; the same for every user and environment of a machine, hence not ``$TMPDIR``.
FOLDER = Path("/tmp") if os.name == "posix" and os.path.isdir("/tmp") else Path(tempfile.gettempdir())
_GATE, _LOCK = "hwsearch-timing.gate", "hwsearch-timing.lock"

_SHARED, _EXCLUSIVE = "shared", "exclusive"

#: Waits that follow each other within so many seconds are one episode, which is told once: a campaign takes the lock
#: for each of its jobs, and beside background work it would say the same at every one.
_EPISODE_S = 120.0
_told_until: dict[str, float] = {}


class _Held(threading.local):
    """What this thread holds: the modes it entered, outermost first, and the open files."""

    def __init__(self) -> None:
        self.modes: list[str] = []
        self.files: list[int] = []


_held = _Held()


@contextmanager
def timing_lock(message: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds the machine for a timing; waits for background chunks and other timings to end.

    Args:
        message: told in one line when somebody else holds the machine and this call has to wait; once for all waits
            of this process that follow each other within two minutes.
    """
    with _hold(_EXCLUSIVE, message):
        yield


@contextmanager
def background_lock(message: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds the machine for a chunk of background work (seconds, not minutes: a timing waits for its end)."""
    with _hold(_SHARED, message):
        yield


@contextmanager
def _hold(mode: str, message: Callable[[str], None] | None) -> Iterator[None]:
    before = _held.modes[-1] if _held.modes else None
    sufficient = before in (_EXCLUSIVE, mode)
    if not sufficient:
        _release()  # from shared to exclusive through nothing: two upgraders would wait for each other for ever
        _acquire(mode, message)
    _held.modes.append(mode if not sufficient else str(before))
    try:
        yield
    finally:
        _held.modes.pop()
        if not sufficient:
            _release()
            if before is not None:
                _acquire(before, message)


def _acquire(mode: str, message: Callable[[str], None] | None) -> None:
    key, waited = f"{mode} {FOLDER}", False

    def tell(text: str) -> None:
        nonlocal waited
        waited = True
        if message is not None and time.monotonic() > _told_until.get(key, -math.inf):
            _told_until[key] = math.inf  # once, though there are two files to wait for
            message(text)

    try:
        if mode == _EXCLUSIVE:
            _held.files.append(_locked(_GATE, mode, tell))
            _held.files.append(_locked(_LOCK, mode, tell))
        else:
            gate = _locked(_GATE, mode, tell)
            try:
                _held.files.append(_locked(_LOCK, mode, tell))
            finally:
                os.close(gate)
    except _AncestorHolds:
        _release()
    except BaseException:
        _release()
        raise
    finally:
        if waited and message is not None:
            _told_until[key] = time.monotonic() + _EPISODE_S


class _AncestorHolds(Exception):
    """A process that started this one (and waits for it) already holds the machine in a sufficient mode."""


def _release() -> None:
    import fcntl

    while _held.files:
        file = _held.files.pop()
        fcntl.flock(file, fcntl.LOCK_UN)  # explicit: a forked child may still hold a copy of the descriptor
        os.close(file)


def _forget() -> None:
    """In a forked child: the lock is the parent's, and unlocking the shared descriptor would take it away."""
    for file in _held.files:
        os.close(file)
    _held.files.clear()
    _held.modes.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _locked(name: str, mode: str, message: Callable[[str], None]) -> int:
    """An open descriptor of the named file with the lock taken on it."""
    try:
        import fcntl
    except ImportError:
        raise InputError(
            "timing needs flock, which this system lacks; run hwsearch on Linux, macOS or in WSL"
        ) from None
    file = _opened(FOLDER / name)
    try:
        operation = fcntl.LOCK_EX if mode == _EXCLUSIVE else fcntl.LOCK_SH
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if _ancestor_holds(mode):
                raise _AncestorHolds from None
            who = "a timing" if mode == _SHARED else "another timing or background work"
            message(f"waiting for {who} on this machine to end (lock {FOLDER / name})")
            fcntl.flock(file, operation)
    except BaseException:
        os.close(file)
        raise
    return file


def _ancestor_holds(mode: str) -> bool:
    """Whether a parent, grandparent ... holds the lock (not merely the gate) in this mode or a stronger one."""
    sufficient = ("WRITE",) if mode == _EXCLUSIVE else ("WRITE", "READ")
    try:
        inode = os.stat(FOLDER / _LOCK).st_ino
        holders = set()
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            words = line.split()  # "12: FLOCK  ADVISORY  READ 4711 fd:01:393219 0 EOF"; a waiter's second word is "->"
            if len(words) > 5 and words[1] == "FLOCK" and words[3] in sufficient and words[5].endswith(f":{inode}"):
                holders.add(int(words[4]))
        process = os.getppid()
        while process > 1:
            if process in holders:
                return True
            stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
            process = int(stat.rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return False  # no /proc: simply wait
    return False


def _opened(path: Path) -> int:
    """The lock file, made if need be. It is never written: readable by everyone is enough for ``flock``.

    No ``O_CREAT`` on an existing file: in a sticky folder Linux refuses that for a file of another user.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(10):
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise InputError(f"the timing lock {path} cannot be opened ({error.strerror}); remove that file") from None
        try:
            created = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(
                f"the timing lock {path} cannot be made ({error.strerror}); make that folder writable"
            ) from None
        os.fchmod(created, 0o644)  # whatever the umask: other users must be able to wait for us
        return created
    raise InputError(f"the timing lock {path} is removed as fast as it is made; stop what cleans that folder")
