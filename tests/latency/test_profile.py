"""Campaigns on the simulated device: limits, resuming after a real SIGKILL, what must not be mixed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hwsearch.device.check import check_device
from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.errors import InputError, NoisyDeviceError, SchemaError
from hwsearch.latency.journal import SCHEMA, VERSION, Journal
from hwsearch.latency.profile import JOURNAL, current_check, profile
from hwsearch.latency.table import LatencyTable

FILES = ("manifest.json", "networks.csv", "kernels.csv")

#: Profiles in a process of its own and kills it, as ``kill -9`` does, once so many networks are reported.
CHILD = """
import os, signal, sys
from pathlib import Path
from hwsearch.device.spec import Device
from hwsearch.latency.profile import profile
home, networks, die_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def progress(done, spent, budget, message):
    if die_at and done >= die_at:
        os.kill(os.getpid(), signal.SIGKILL)
device = Device(name="simulated", runtime="simulated", home=home)
profile(device, minutes=60, networks=networks, progress=progress, visits=2)
"""


def device(home: Path, **options: Any) -> Device:
    return Device(name="simulated", runtime="simulated", home=home, options=options)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def measured(path: Path) -> set[tuple[str, str]]:
    """What a journal holds: (network, step) of each visit."""
    with Journal(path) as journal:
        return {(visit.network, visit.step) for visit, _ in journal.measurements()[1]}


def child(home: Path, networks: int, die_at: int) -> int:
    command = [sys.executable, "-c", CHILD, str(home), str(networks), str(die_at)]
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": root}, timeout=300, check=False).returncode


@pytest.mark.slow
def test_a_killed_campaign_ends_with_the_bytes_of_an_unbroken_one(tmp_path: Path) -> None:
    unbroken = profile(device(tmp_path / "unbroken"), minutes=60, networks=21, visits=2)
    home, kept = tmp_path / "killed", set[tuple[str, str]]()
    journal = device(home).table_folder / JOURNAL
    for die_at in (3, 18, 21):
        assert child(home, 21, die_at) == -signal.SIGKILL
        now = measured(journal)
        assert kept < now, "a finished measurement was lost"
        assert len(now) >= die_at
        kept = now
        assert not (device(home).table_folder / "networks.csv").exists()
    assert child(home, 21, 0) == 0
    assert kept < measured(journal) == measured(device(tmp_path / "unbroken").table_folder / JOURNAL)
    assert contents(device(home).table_folder) == contents(device(tmp_path / "unbroken").table_folder)
    assert LatencyTable.load(device(home).table_folder) == unbroken


def test_the_time_limit_counts_device_seconds_and_more_minutes_add_networks(tmp_path: Path) -> None:
    seen: list[tuple[int, float, float, str]] = []
    first = profile(device(tmp_path), minutes=0.02, progress=lambda *facts: seen.append(facts))
    spent = sum(n.seconds for n in first.networks)
    assert 1.2 <= spent < 1.2 + 16 * 1.0
    assert seen[-1][:3] == (len(first.networks), pytest.approx(spent, rel=1e-4), pytest.approx(1.2))
    assert all(a[0] <= b[0] for a, b in pairwise(seen))

    again = profile(device(tmp_path), minutes=0.02)
    assert again == first, "the time was spent already"

    longer = profile(device(tmp_path), minutes=2 * spent / 60)
    assert {n.id for n in first.networks} < {n.id for n in longer.networks}

    whole = profile(device(tmp_path / "unbroken"), minutes=2 * spent / 60)
    assert whole == longer

    other = profile(device(tmp_path), minutes=0.02, seed=1)
    assert len(other.networks) > len(longer.networks), "another seed adds to the same table"


def test_starting_anew_keeps_the_old_journal(tmp_path: Path) -> None:
    profile(device(tmp_path), minutes=60, networks=3)
    table = profile(device(tmp_path), minutes=60, networks=2, resume=False)
    assert len(table.networks) == 2
    with Journal(device(tmp_path).table_folder / f"{JOURNAL}.old") as old:
        assert len(old.measurements()[0]) == 3


def test_a_network_that_fails_costs_itself_only(tmp_path: Path) -> None:
    whole = profile(device(tmp_path / "all"), minutes=60, networks=6)
    bad = whole.networks[0].id
    messages: list[str] = []
    other = device(tmp_path / "one", crash_on=bad)
    table = profile(other, minutes=60, networks=6, progress=lambda *facts: messages.append(facts[3]))
    assert {n.id for n in table.networks} == {n.id for n in whole.networks} - {bad}
    assert any(m.startswith("skipped") and bad in m for m in messages)
    assert profile(other, minutes=60, networks=6) == table, "it is not tried again and again"


def test_a_busy_machine_is_refused_and_tried_again(tmp_path: Path) -> None:
    table = profile(device(tmp_path), minutes=60, networks=2)
    # Slower than it was when it was checked; the options are part of the fingerprint, so the old one is put back.
    slow = device(tmp_path, slowdown=1.6)
    with open_session(slow) as session:
        session._fingerprint = table.fingerprint
        with pytest.raises(NoisyDeviceError, match="no quiet moment"):
            profile(slow, minutes=60, networks=6, session=session)
    assert len(profile(device(tmp_path), minutes=60, networks=6).networks) == 6


def test_another_machine_does_not_go_on_with_a_journal(tmp_path: Path) -> None:
    profile(device(tmp_path), minutes=60, networks=2)
    with pytest.raises(InputError, match="resume=False") as caught:
        profile(device(tmp_path, gmacs=40.0), minutes=60, networks=4)
    assert "simulated" in str(caught.value)


def test_a_new_reference_speed_moves_every_number_by_its_ratio(tmp_path: Path) -> None:
    from hwsearch.device.check import DeviceCheck

    target = device(tmp_path)
    before = profile(target, minutes=60, networks=2)
    check = DeviceCheck.load(target.table_folder)
    replace(check, reference_ms=check.reference_ms * 2).save(target.table_folder)
    after = profile(target, minutes=60, networks=2)
    assert after.reference_ms == 2 * before.reference_ms
    for old, new in zip(before.networks, after.networks, strict=True):
        assert new.measured_ms == pytest.approx(2 * old.measured_ms, rel=1e-5)
        assert new.raw_p50_ms == old.raw_p50_ms
        assert sum(new.node_ms) == pytest.approx(new.measured_ms, rel=1e-3)


def test_two_campaigns_at_once_are_refused(tmp_path: Path) -> None:
    target = device(tmp_path)
    with Journal(target.table_folder / JOURNAL), pytest.raises(InputError, match="another process"):
        Journal(target.table_folder / JOURNAL)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), "5", True])
def test_senseless_minutes(minutes: Any) -> None:
    with pytest.raises(InputError, match="minutes"):
        profile("simulated", minutes=minutes)


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
@pytest.mark.parametrize("name", ["networks", "visits"])
def test_senseless_numbers(name: str, number: Any) -> None:
    with pytest.raises(InputError, match=name):
        profile("simulated", **{name: number})


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "latency_tables").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        profile(device(tmp_path), minutes=60, networks=1)


def test_a_journal_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    path.write_bytes(b"not a database, certainly" * 100)
    with pytest.raises(SchemaError, match="no journal"):
        Journal(path)
    path.unlink()
    with Journal(path) as journal:
        journal._base.execute("UPDATE meta SET value = 'hwsearch.journal 99' WHERE name = 'schema'")
    with pytest.raises(SchemaError, match="99"):
        Journal(path)
    path.unlink()
    with Journal(path):
        pass
    base = sqlite3.connect(path)
    base.execute("INSERT INTO networks VALUES ('x', 'random:vgg', '[[1, 2]]')")
    base.commit()
    base.close()
    with Journal(path) as journal, pytest.raises(SchemaError, match="'x'"):
        journal.measurements()


OLD_LAYOUTS = {
    "a table with other columns": "CREATE TABLE networks (id TEXT PRIMARY KEY, source TEXT, document TEXT)",
    "another version": """
        CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
        INSERT INTO meta VALUES ('schema', 'hwsearch.journal 0')
    """,
    "the same version, other columns": f"""
        CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
        INSERT INTO meta VALUES ('schema', '{SCHEMA} {VERSION}');
        CREATE TABLE visits (campaign TEXT, place INTEGER, id TEXT, seconds REAL, document TEXT)
    """,
    "another meta": "CREATE TABLE meta (key TEXT, value TEXT)",
}


@pytest.mark.parametrize("layout", OLD_LAYOUTS)
def test_a_journal_of_an_older_layout_is_refused_in_one_line_and_left_alone(tmp_path: Path, layout: str) -> None:
    path = tmp_path / JOURNAL
    base = sqlite3.connect(path)
    base.executescript(OLD_LAYOUTS[layout])
    tables = base.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
    base.close()
    for _ in range(2):  # refusing lets go of the file
        with pytest.raises(SchemaError, match="written by another release of hwsearch") as caught:
            Journal(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    base = sqlite3.connect(path)
    assert base.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall() == tables
    base.close()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with Journal(tmp_path / JOURNAL) as journal:
        journal._base.execute("PRAGMA max_page_count = 1")
        with pytest.raises(InputError, match=r"cannot write .*full"):
            journal.skip("campaign", (0, 0), "network", "x" * 100_000)
        journal._base.execute("PRAGMA max_page_count = 1000000")
        journal.skip("campaign", (0, 0), "network", "x")
        assert journal.failed("campaign") == {0}


def test_a_device_that_was_noisy_once_is_checked_again(tmp_path: Path) -> None:
    said: list[str] = []
    with open_session(device(tmp_path)) as session:
        noisy = replace(check_device(device(tmp_path), session=session), verdict="noisy")
        noisy.save(device(tmp_path).table_folder)
        assert current_check(device(tmp_path), session, said.append).ok
        assert "noisy when it was checked" in said[0]
        said.clear()
        assert current_check(device(tmp_path), session, said.append).ok
    assert not said
