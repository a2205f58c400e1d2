#!/usr/bin/env python
"""A long campaign on the simulated device that is killed (SIGKILL) again and again, beside one that is left alone.

    python tools/stress_campaign.py --minutes 4 --kills 20 --seed 0

Both are `hwsearch profile` in processes of their own. After every kill the journal must be whole for SQLite, and hold
all that it held before; in the end both tables must be the same, byte for byte. Prints what was done, and exits 1 where
one of these does not hold, or where the table has fewer kernels than asked for.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("manifest.json", "networks.csv", "kernels.csv")
TABLE = Path("latency_tables/simulated")


@dataclass(frozen=True)
class Stress:
    """What was done: kills by what they met, and whether both tables are the same."""

    kernels: int
    networks: int
    kills: int
    kills_at_work: int
    visits_at_kill: tuple[int, ...]
    alone_s: float
    killed_s: float
    same: bool

    def text(self) -> str:
        """In a few lines."""
        return (
            f"{self.kernels} kernels of {self.networks} networks; {self.kills} kills, {self.kills_at_work} of them "
            f"while visits were made (the journal held {', '.join(map(str, self.visits_at_kill))} then)\n"
            f"left alone {self.alone_s:.0f} s, with kills and restarts {self.killed_s:.0f} s\n"
            f"tables: {'the same, byte for byte' if self.same else 'DIFFERENT'}"
        )


def home(folder: Path) -> Path:
    """A new home with the simulated device."""
    (folder / "devices").mkdir(parents=True)
    shutil.copy(ROOT / "devices" / "simulated.toml", folder / "devices")
    return folder


def campaign(place: Path, minutes: float, seed: int) -> subprocess.Popen[bytes]:
    """`hwsearch profile` in a process group of its own."""
    command = [sys.executable, "-m", "hwsearch", "profile", "--device", "simulated", "--minutes", f"{minutes}"]
    environment = os.environ | {"HWSEARCH_HOME": str(place), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--seed", str(seed)],
        env=environment, cwd=place, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def visits(place: Path) -> int:
    """Finished visits in a journal that nobody has open; checked page by page.

    Raises:
        RuntimeError: SQLite finds it damaged.
    """
    path = place / TABLE / "journal.sqlite"
    if not path.exists():
        return 0
    base = sqlite3.connect(path)
    try:
        (verdict,) = base.execute("PRAGMA integrity_check").fetchone()
        if verdict != "ok":
            raise RuntimeError(f"the journal is damaged after a kill: {verdict}")
        if not base.execute("SELECT name FROM sqlite_master WHERE name = 'visits'").fetchone():
            return 0
        return int(base.execute("SELECT count(*) FROM visits").fetchone()[0])
    finally:
        base.close()


def written(place: Path) -> int:
    """When the journal was last written to, in nanoseconds; 0 before it is there."""
    wal = place / TABLE / "journal.sqlite-wal"
    return wal.stat().st_mtime_ns if wal.exists() else 0


def stress(minutes: float, kills: int, seed: int, folder: Path) -> Stress:
    """Run both campaigns.

    Raises:
        RuntimeError: a campaign fails, or a journal is damaged or lost a visit.
    """
    start = time.monotonic()
    alone = home(folder / "alone")
    whole = campaign(alone, minutes, seed)
    _, words = whole.communicate()
    if whole.returncode:
        raise RuntimeError(words.decode().strip().splitlines()[-1])
    alone_s = time.monotonic() - start
    rng = random.Random(seed)
    killed = home(folder / "killed")
    start, done, held, ends = time.monotonic(), 0, 0, list[int]()
    while True:
        before = written(killed)
        process = campaign(killed, minutes, seed)
        while done < kills and process.poll() is None and written(killed) == before:
            time.sleep(0.02)  # until it has something to lose
        try:
            # on the average half of an equal share of the work, so that all kills find it at work
            _, words = process.communicate(timeout=rng.uniform(0.0, alone_s / kills) if done < kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            done += 1
            now = visits(killed)
            if now < held:
                raise RuntimeError(f"the journal held {held} visits before a kill, {now} after") from None
            held = now
            ends.append(now)
            continue
        if process.returncode:
            raise RuntimeError(words.decode().strip().splitlines()[-1])
        break
    tables = [[(place / TABLE / name).read_bytes() for name in FILES] for place in (alone, killed)]
    counts = {name: tables[0][FILES.index(name)].count(b"\n") - 1 for name in FILES[1:]}
    moved = sum(later > sooner for sooner, later in zip([0, *ends], ends, strict=False))
    return Stress(
        counts["kernels.csv"], counts["networks.csv"], done, moved, tuple(ends), alone_s,
        time.monotonic() - start, tables[0] == tables[1],
    )  # fmt: skip


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="simulated device time of the campaign")
    parser.add_argument("--kernels", type=int, default=10_000, help="fewer in the table are a failure")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hwsearch-stress-") as folder:
        found = stress(options.minutes, options.kills, options.seed, Path(folder))
    print(found.text())
    return 0 if found.same and found.kernels >= options.kernels else 1


if __name__ == "__main__":
    sys.exit(main())
