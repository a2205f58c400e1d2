"""The board's end of every file transfer: one request, on a Python of its own, then gone. Standard library only.

Its text is sent ahead of the request and run by ``python3 -c``, so it needs nothing on the board but Python and cannot
be of another version than the host. Files come and go over the same ssh channel: each lands whole under its SHA-256 or
not at all, and a full disk is told by the system's own words (``scp`` knows only "Failure", and small boards have no
sftp server).

A request is one JSON object a line on standard input; answers are JSON lines on standard output after ``MARK``, which
separates them from what a login script prints. Raw bytes follow the lines where sizes were told:

    hello  {folder, stop}                    -> {python, numpy, folder, free}
    put    {folder, files: [[sha, size]],    -> {missing: [number]}, then the host sends their bytes one by one
            tree: {name, files} or null,     -> {done, paths, tree}, or {again} when old files had to make room first
            keep_bytes}
    get    {paths}                           -> {sizes: [bytes or null]}, then the bytes of those that are there
    any    anything that fails               -> {error, errno, path, free}
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from typing import Any, BinaryIO, Callable  # noqa: UP035 - boards may have an older Python

Answer = Callable[..., None]

MARK = "hwsearch-courier-1"
CHUNK = 1 << 20
#: Files that were used so recently may be another host's: only a full disk removes them.
RECENT_S = 3600.0


def hello(request: dict[str, Any], source: BinaryIO, answer: Answer) -> None:
    """Says what is here, after ending the agent of a link that broke: it may still hold the machine."""
    from importlib.util import find_spec

    _stop(request.get("stop"))
    folder = os.path.abspath(os.path.expanduser(request["folder"]))
    os.makedirs(folder, exist_ok=True)
    answer(
        python=list(sys.version_info[:3]), numpy=find_spec("numpy") is not None, folder=folder, free=_free(folder),
        program=sys.executable,
    )  # fmt: skip


def put(request: dict[str, Any], source: BinaryIO, answer: Answer) -> None:
    """Takes the files that are not here yet; builds the tree of the agent from them."""
    folder = os.path.abspath(os.path.expanduser(request["folder"]))
    store = os.path.join(folder, "store")
    os.makedirs(store, exist_ok=True)
    wanted = {sha: size for sha, size in request["files"]}
    missing = [number for number, (sha, size) in enumerate(request["files"]) if not _whole(store, sha, size)]
    answer(missing=missing)
    for number in missing:
        sha, size = request["files"][number]
        try:
            _write(source, store, sha, size)
        except OSError as error:
            # What could be read of the file is lost, so the host has to begin again; but first make room.
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and _evict(store, wanted, 0, 60.0):
                answer(again=True)
                return
            raise
    _evict(store, wanted, request["keep_bytes"], RECENT_S)
    tree = request.get("tree")
    if tree is not None:
        _build(os.path.join(folder, tree["name"]), store, tree["files"])
    answer(
        done=True, paths=[os.path.join(store, sha) for sha, _ in request["files"]],
        tree=None if tree is None else os.path.join(folder, tree["name"]),
    )  # fmt: skip


def get(request: dict[str, Any], source: BinaryIO, answer: Answer) -> None:
    """Sends files that are here; the size of one that is not is null."""
    sizes: list[int | None] = []
    for path in request["paths"]:
        try:
            sizes.append(os.path.getsize(path))
        except OSError:
            sizes.append(None)
    answer(sizes=sizes)
    for path, size in zip(request["paths"], sizes):  # noqa: B905 - boards may have an older Python
        if size is not None:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer, CHUNK)
    sys.stdout.buffer.flush()


def _whole(store: str, sha: str, size: int) -> bool:
    """Whether a file is here as it should be; read, because after a power cut its size alone says nothing."""
    path = os.path.join(store, sha)
    try:
        if os.path.getsize(path) != size:
            return False
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(CHUNK), b""):
                digest.update(block)
        os.utime(path)
    except OSError:
        return False
    return digest.hexdigest() == sha


def _write(source: BinaryIO, store: str, sha: str, size: int) -> None:
    """One file from the stream, in place under its name at once or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=".part-", dir=store)
    digest, left = hashlib.sha256(), size
    try:
        with os.fdopen(handle, "wb") as file:
            while left:
                block = source.read(min(CHUNK, left))
                if not block:
                    raise EOFError("the host ended in the middle of a file")
                file.write(block)
                digest.update(block)
                left -= len(block)
        if digest.hexdigest() != sha:
            raise ValueError("a file arrived damaged")
        os.replace(temporary, os.path.join(store, sha))
    except BaseException:
        os.unlink(temporary)
        raise


def _evict(store: str, wanted: dict[str, int], keep_bytes: int, recent_s: float) -> int:
    """Removes files, those first that were not used for longest, until ``keep_bytes`` are left; how many went."""
    found, gone = [], 0
    for name in os.listdir(store):
        path = os.path.join(store, name)
        try:
            state = os.stat(path)
        except OSError:
            continue
        found.append((state.st_mtime, state.st_size, name, path))
    total = sum(size for _, size, _, _ in found)
    for used, size, name, path in sorted(found):
        if total <= keep_bytes or time.time() - used < recent_s:
            break
        if name not in wanted:
            try:
                os.unlink(path)
            except OSError:
                continue
            total, gone = total - size, gone + 1
    return gone


def _build(tree: str, store: str, files: dict[str, str]) -> None:
    """The agent's modules as a folder; what is there and right stays as it is."""
    for name, sha in files.items():
        path = os.path.join(tree, name)
        with open(os.path.join(store, sha), "rb") as file:
            text = file.read()
        try:
            with open(path, "rb") as file:
                if file.read() == text:
                    continue
        except OSError:
            pass
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".part-", dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def _stop(who: tuple[int, str] | None) -> None:
    """Ends the process ``[number, token]`` if its command line still has the token."""
    if not who:
        return
    try:
        with open(f"/proc/{who[0]}/cmdline", "rb") as file:
            ours = who[1].encode() in file.read().split(b"\0")
        if ours:
            os.kill(who[0], signal.SIGKILL)
    except OSError:
        pass


def _free(folder: str) -> int | None:
    """Bytes that can be written there, or None."""
    try:
        state = os.statvfs(folder)
    except OSError:
        return None
    return state.f_bavail * state.f_frsize


def main() -> None:
    """Serves the one request on standard input."""
    source = sys.stdin.buffer

    def answer(**fields: Any) -> None:
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()

    sys.stdout.write("\n" + MARK + "\n")
    request = json.loads(source.readline().decode("utf-8"))
    try:
        {"hello": hello, "put": put, "get": get}[request["op"]](request, source, answer)
    except OSError as error:
        folder = os.path.expanduser(request.get("folder", "~"))
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder) or "/"
        where = error.filename or folder
        answer(error=error.strerror or str(error), errno=error.errno, path=str(where), free=_free(folder))
    except (EOFError, ValueError) as error:
        answer(error=str(error), errno=0, path="", free=None)


if __name__ == "__main__":
    main()
