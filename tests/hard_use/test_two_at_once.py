"""Two processes that want the same folder: one works, the other is told so, and nothing is mixed up."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hard_case import ON_SIMULATED, TABLE, snapshot
from running import told

#: Holds what it is told to hold until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
if sys.argv[1] == "run":
    from hwsearch.search.run_folder import open_run
    held = open_run(sys.argv[2], {})
else:
    from hwsearch.latency.journal import Journal
    held = Journal(Path(sys.argv[2]))
with held:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("kind", "place", "verb", "arguments", "says"),
    [
        ("run", Path("runs/first"), "run", ("good.toml",), "another process (pid "),
        ("run", Path("runs/first"), "search", ("good.toml",), "another process (pid "),
        (
            "profile",
            TABLE / "journal.sqlite",
            "profile",
            (*ON_SIMULATED, "--minutes", "1"),
            "is in use: another process",
        ),
    ],
)
def test_the_second_one_is_told(
    kind: str, place: Path, verb: str, arguments: tuple[str, ...], says: str, home: Path
) -> None:
    (home / place).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLDER, kind, str(home / place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = snapshot(home)
        answer = told(verb, arguments)
        after = snapshot(home)
        holder.communicate()
    assert (answer.code, answer.crash) == (2, ""), answer
    assert len(answer.lines) == 1
    assert says in answer.lines[0]
    assert before == after


def test_two_writers_of_one_file_leave_one_of_the_two(tmp_path: Path) -> None:
    """Threads of one process would share its number; processes do not."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom hwsearch.search.journal import write_atomic\n"
        "for _ in range(100): write_atomic(Path(sys.argv[1]), sys.argv[2] * 5000)\n"
    )
    path = tmp_path / "file"
    workers = [subprocess.Popen([sys.executable, "-c", script, str(path), letter]) for letter in "ab"]
    stop, torn = threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            text = path.read_text() if path.exists() else "a" * 5000
            if text not in ("a" * 5000, "b" * 5000):
                torn.append(text[:20])

    watcher = threading.Thread(target=watch)
    watcher.start()
    codes = [worker.wait(60) for worker in workers]
    stop.set()
    watcher.join()
    assert codes == [0, 0]
    assert torn == []
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
