"""The timing lock between threads and processes. Every test uses lock files of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hwsearch.device import lock
from hwsearch.device.lock import background_lock, timing_lock
from hwsearch.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent.parent

CHILD = """
import sys, pathlib, time
from hwsearch.device import lock
lock.FOLDER = pathlib.Path(sys.argv[1])
with getattr(lock, sys.argv[2])(lambda text: print("waiting", flush=True)):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
print("free", flush=True)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lock, "FOLDER", tmp_path)
    monkeypatch.setattr(lock, "_held", lock._Held())
    return tmp_path


def start(folder: Path, kind: str, seconds: float = 60.0) -> subprocess.Popen[str]:
    """A process that takes a lock; its lines tell when."""
    command = [sys.executable, "-c", CHILD, str(folder), kind, str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_entering_again_is_free_and_leaving_frees(folder: Path) -> None:
    with timing_lock(), timing_lock(), background_lock():
        pass
    assert not lock._held.modes
    assert not lock._held.files
    with background_lock(), background_lock():
        pass


def test_background_work_runs_beside_background_work(folder: Path) -> None:
    with background_lock():
        other = start(folder, "background_lock", 0)
        assert says(other) == "held"
        other.wait()


def test_a_timing_excludes_a_timing_of_another_thread(folder: Path) -> None:
    order: list[str] = []
    entered = threading.Event()

    def other() -> None:
        with timing_lock(lambda text: entered.set()):
            order.append("other")

    with timing_lock():
        thread = in_thread(other)
        assert entered.wait(20)  # it was told to wait
        order.append("first")
    thread.join(20)
    assert order == ["first", "other"]


def test_a_killed_process_frees_the_lock(folder: Path) -> None:
    holder = start(folder, "timing_lock")
    assert says(holder) == "held"
    messages: list[str] = []
    done = threading.Event()

    def wait() -> None:
        with timing_lock(messages.append):
            done.set()

    thread = in_thread(wait)
    while not messages:
        time.sleep(0.01)
    assert not done.is_set()
    holder.kill()
    holder.wait()
    thread.join(20)
    assert done.is_set()
    assert len(messages) == 1
    assert "waiting" in messages[0]


def test_a_waiting_timing_is_not_starved_by_new_background_work(folder: Path) -> None:
    first = start(folder, "background_lock")
    assert says(first) == "held"
    timing = start(folder, "timing_lock", 0)
    assert says(timing) == "waiting"
    second = start(folder, "background_lock", 0)
    assert says(second) == "waiting"  # though only background work holds the lock
    first.kill()
    assert says(timing) == "held"
    assert says(timing) == "free"
    assert says(second) == "held"
    for process in (first, timing, second):
        process.wait()


def test_a_timing_inside_background_work_gives_it_up_for_that_long(folder: Path) -> None:
    with background_lock():
        with timing_lock():
            assert lock._held.modes == ["shared", "exclusive"]
            other = start(folder, "background_lock", 0)
            # an ancestor's timing covers the child, so it may go on at once: see the test below
            assert says(other) == "held"
            other.wait()
        assert lock._held.modes == ["shared"]
        assert len(lock._held.files) == 1


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the kernel does not tell who holds a lock")
def test_a_command_started_under_the_lock_does_not_wait_for_it(folder: Path) -> None:
    with timing_lock():
        for kind in ("timing_lock", "background_lock"):
            child = start(folder, kind, 0)
            assert says(child) == "held"
            child.wait()
    with background_lock():
        timing = start(folder, "timing_lock", 0)
        assert says(timing) == "waiting"  # shared is not enough for a timing
        child = start(folder, "background_lock", 0)
        assert says(child) == "held"  # and the waiting timing does not stop the holder's own child
        child.wait()
    timing.wait()


def test_an_error_inside_frees_the_lock(folder: Path) -> None:
    with pytest.raises(KeyError), timing_lock():
        raise KeyError
    assert not lock._held.files


def test_a_forked_child_does_not_free_the_parents_lock(folder: Path) -> None:
    with timing_lock():
        child = os.fork()
        if child == 0:
            os._exit(0 if not lock._held.files and not lock._held.modes else 1)
        assert os.waitpid(child, 0)[1] == 0
        messages: list[str] = []
        thread = in_thread(lambda: timing_lock(messages.append).__enter__())
        while not messages:
            time.sleep(0.01)
    thread.join(20)


def test_the_files_are_usable_by_everyone_and_no_link_is_followed(folder: Path) -> None:
    with timing_lock():
        pass
    assert (folder / "hwsearch-timing.lock").stat().st_mode & 0o777 == 0o644
    (folder / "hwsearch-timing.gate").unlink()
    (folder / "hwsearch-timing.gate").symlink_to(folder / "elsewhere")
    with pytest.raises(InputError, match="cannot be opened"), timing_lock():
        pass


def test_an_unwritable_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lock, "FOLDER", tmp_path / "absent")
    with pytest.raises(InputError, match="cannot be made"), timing_lock():
        pass


def test_waits_that_follow_each_other_are_told_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []

    def wait_for(seconds: float) -> None:
        holder = start(folder, "background_lock", seconds)
        assert says(holder) == "held"
        with timing_lock(messages.append):
            pass
        holder.wait()

    wait_for(0.2)
    assert len(messages) == 1
    wait_for(0.2)
    assert len(messages) == 1, "the same episode"
    monkeypatch.setattr(lock, "_told_until", {key: 0.0 for key in lock._told_until})  # two minutes later
    wait_for(0.2)
    assert len(messages) == 2
