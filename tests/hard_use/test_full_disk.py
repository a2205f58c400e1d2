"""A disk that fills up: one clear line, exit status 2, and what was there before stays as it was."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hard_case import NET, ON_SIMULATED, SHAPE, damage, snapshot
from running import told

#: Verb, arguments, what it may leave.
VERBS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("profile", (*ON_SIMULATED, "--minutes", "0.2"), (r"latency_tables/simulated/journal\.sqlite.*",)),
    ("profile", ("--device", "second", "--minutes", "0.2"), (r"latency_tables/second/.*",)),
    ("device check", ("second",), ()),
    ("device add", ("third", "--runtime", "simulated"), ()),
    ("fold", (NET, *SHAPE, "--output", "net.onnx"), ()),
    ("deploy", (NET, *SHAPE, *ON_SIMULATED, "--output", "bundle"), ()),
    ("deploy", (NET, *SHAPE, *ON_SIMULATED, "--output", "new"), ()),
    ("report", ("runs/done",), ()),
    ("report", ("latency_tables/simulated",), ()),
    ("report", ("bundle",), ()),
    ("run", ("good.toml",), (r"runs/first(/.*)?",)),
    ("search", ("good.toml",), (r"runs/first(/.*)?",)),
)


@pytest.fixture
def full(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The home on a small disk of its own, with no byte left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small disk can be mounted here")
    try:
        place = disk / "home"
        shutil.copytree(home, place, symlinks=True)
        (place / "devices/second.toml").write_text('runtime = "simulated"\n')
        monkeypatch.setenv("HWSEARCH_HOME", str(place))
        monkeypatch.chdir(place)
        with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        yield place
    finally:
        os.chdir(home)
        subprocess.run(["umount", "--lazy", str(disk)], check=False, capture_output=True)


@pytest.mark.parametrize(("verb", "arguments", "leaves"), VERBS, ids=lambda value: str(value)[:30])
def test_a_full_disk_costs_nothing(verb: str, arguments: tuple[str, ...], leaves: tuple[str, ...], full: Path) -> None:
    before = snapshot(full)
    answer = told(verb, arguments)
    assert not answer.crash, answer.crash
    assert answer.code == 2, (answer.code, answer.err[-500:], answer.out[-300:])
    assert len(answer.lines) == 1, answer.err[-1000:]
    assert any(words in answer.lines[0] for words in ("No space left", "disk is full", "free the disk")), answer.lines
    assert [name for name in damage(before, snapshot(full), leaves) if name != "filler"] == []


def test_a_journal_of_a_search_takes_no_half_line(tmp_path: Path) -> None:
    """The file system takes a part of a line: it is taken back, and the next run goes on behind the last whole one."""
    import resource
    import signal

    from hwsearch.errors import InputError
    from hwsearch.search.journal import Journal

    journal = Journal(tmp_path / "x.jsonl", {"schema": "s", "version": 1})
    journal.open()
    journal.append({"at": 1})
    size = journal.path.stat().st_size
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*x\.jsonl: File too large"):
            journal.append({"at": 2, "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert journal.path.stat().st_size == size
    journal.append({"at": 3})
    assert journal.open() == [{"at": 1}, {"at": 3}]
