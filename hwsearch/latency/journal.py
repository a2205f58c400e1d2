"""The campaign's diary: an SQLite file (WAL) in which every finished measurement is committed at once.

What is in it survives ``kill -9`` at any moment. One journal belongs to one device and fingerprint; it may hold several
campaigns (other seeds, other models), and their networks all go into the device's table.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from hwsearch.errors import InputError, SchemaError
from hwsearch.graph.kernel import FAMILIES, Kernel
from hwsearch.latency.visits import Network, Visit

SCHEMA = "hwsearch.journal"
VERSION = 2

_TABLES = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS networks (id TEXT PRIMARY KEY, source TEXT NOT NULL, kernels TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS chosen (
    campaign TEXT NOT NULL, place INTEGER NOT NULL, candidate INTEGER NOT NULL, PRIMARY KEY (campaign, place)
);
CREATE TABLE IF NOT EXISTS visits (
    campaign TEXT NOT NULL, place INTEGER NOT NULL, visit INTEGER NOT NULL, id TEXT NOT NULL, seconds REAL NOT NULL,
    reference_ms REAL NOT NULL, document TEXT NOT NULL, error TEXT NOT NULL, PRIMARY KEY (campaign, place, visit)
);
COMMIT;
"""
_COLUMNS = tuple(f.name for f in fields(Kernel) if f.name != "source")
_TEXTS = ("family", "op", "dtype", "layout_in", "layout_out", "node")
_LARGEST = 10**12
#: The columns of each table as this release makes them.
_LAYOUT = {
    "meta": ("name", "value"),
    "networks": ("id", "source", "kernels"),
    "chosen": ("campaign", "place", "candidate"),
    "visits": ("campaign", "place", "visit", "id", "seconds", "reference_ms", "document", "error"),
}

#: Place of a network in a plan, and number of the visit to it.
Slot = tuple[int, int]


class Journal:
    """An open journal; only one process may have it open.

    Args:
        path: the SQLite file; made, with its folder, when it is not there.

    Raises:
        InputError: the folder is read-only, or another process profiles this device.
        SchemaError: the file is no journal, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Exclusive: a second campaign on the same device would disturb the first one's times anyway.
            self._base = sqlite3.connect(path, timeout=1.0, isolation_level=None)
            self._base.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._base.execute("PRAGMA journal_mode=WAL")
            self._refuse_other_layout()
            self._base.executescript(_TABLES)
            self.meta.setdefault("schema", f"{SCHEMA} {VERSION}")
        except (OSError, sqlite3.OperationalError) as error:
            self._let_go()
            if "locked" in str(error):
                raise InputError(f"{path} is in use: another process profiles this device; wait for it") from None
            raise InputError(f"cannot write {path}: {error}; choose a folder you may write to") from None
        except sqlite3.DatabaseError as error:
            self._let_go()
            raise SchemaError(f"{path} is no journal ({error}); move it away and profile again") from None
        except SchemaError:
            self._let_go()
            raise

    @property
    def meta(self) -> Meta:
        """Names and texts kept for good, such as the fingerprint."""
        return Meta(self._rows)

    def done(self, campaign: str) -> dict[Slot, float]:
        """Visits of a plan that are dealt with, and the device seconds that each cost."""
        query = "SELECT place, visit, seconds FROM visits WHERE campaign = ?"
        rows = self._rows(query, (campaign,), int, int, float)
        return {(place, visit): seconds for place, visit, seconds in rows}

    def failed(self, campaign: str) -> set[int]:
        """Places whose network the runtime rejects or crashes on."""
        query = "SELECT DISTINCT place FROM visits WHERE campaign = ? AND error != ''"
        return {place for (place,) in self._rows(query, (campaign,), int)}

    def chosen(self, campaign: str) -> dict[int, int]:
        """Candidate that was chosen for each place of a plan at which there was a choice."""
        query = "SELECT place, candidate FROM chosen WHERE campaign = ?"
        return dict(self._rows(query, (campaign,), int, int))

    def choose(self, campaign: str, candidates: Mapping[int, int]) -> None:
        """Commit choices, all or none: a campaign that goes on must make the same."""
        with self._transaction():
            rows = [(campaign, place, candidate) for place, candidate in candidates.items()]
            self._base.executemany("INSERT OR REPLACE INTO chosen VALUES (?, ?, ?)", rows)

    def record(self, campaign: str, slot: Slot, network: Network, visit: Visit, reference_ms: float) -> None:
        """Commit one measurement, with the reference speed that its milliseconds refer to."""
        kernels = json.dumps([[getattr(kernel, name) for name in _COLUMNS] for kernel in network.kernels])
        document = json.dumps({f.name: getattr(visit, f.name) for f in fields(visit)})
        with self._transaction():
            row = (network.id, network.source, kernels)
            self._base.execute("INSERT OR REPLACE INTO networks VALUES (?, ?, ?)", row)
            self._put(campaign, slot, network.id, visit.seconds, reference_ms, document, "")

    def skip(self, campaign: str, slot: Slot, network: str, error: str) -> None:
        """Commit that a visit cannot be made."""
        with self._transaction():
            self._put(campaign, slot, network, 0.0, 0.0, "", error)

    def forget(self, campaign: str, slots: Sequence[Slot]) -> None:
        """Let visits that failed be tried again; measurements stay."""
        with self._transaction():
            for place, visit in slots:
                query = "DELETE FROM visits WHERE campaign = ? AND place = ? AND visit = ? AND document = ''"
                self._base.execute(query, (campaign, place, visit))

    def measurements(self) -> tuple[dict[str, Network], list[tuple[Visit, float]]]:
        """All networks by id, and all visits with their reference speeds.

        Raises:
            SchemaError: a row that this release cannot read.
        """
        rows = self._rows("SELECT id, source, kernels FROM networks ORDER BY id", (), str, str, str)
        networks = {name: self._network(name, source, text) for name, source, text in rows}
        query = "SELECT id, reference_ms, document FROM visits WHERE document != '' ORDER BY campaign, place, visit"
        visits = []
        for name, reference_ms, text in self._rows(query, (), str, float, str):
            try:
                values = json.loads(text)
                visit = Visit(**(values | {"shares": tuple(map(float, values["shares"]))}))
                _check_numbers(visit, reference_ms)
                if len(visit.shares) != len(networks[visit.network].kernels):
                    raise ValueError("its nodes are not those of its network")
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
                raise self._unreadable(name, error) from None
            visits.append((visit, reference_ms))
        return networks, visits

    def close(self) -> None:
        """Fold the write-ahead log into the file and let go of it."""
        self._let_go()

    def _let_go(self) -> None:
        # A disk that is full, or a file that is damaged, has been told of already.
        with contextlib.suppress(AttributeError, sqlite3.Error):
            self._base.close()

    def _rows(self, query: str, values: tuple[Any, ...] = (), *kinds: Callable[[Any], Any]) -> list[tuple[Any, ...]]:
        """The rows of a query, each cell as what it should be.

        Raises:
            SchemaError: a page of the file is damaged, or a cell holds something else.
            InputError: the disk is full, or the file cannot be read.
        """
        try:
            rows = self._base.execute(query, values).fetchall()
            if not kinds:
                return rows
            return [tuple(kind(cell) for kind, cell in zip(kinds, row, strict=True)) for row in rows]
        except sqlite3.OperationalError as error:
            if "UTF-8" in str(error):
                raise SchemaError(f"{self.path} is damaged ({error}); move it away and profile again") from None
            raise InputError(f"cannot use {self.path}: {error}; free the disk or mend the file, then go on") from None
        except (sqlite3.Error, TypeError, ValueError, OverflowError) as error:
            raise SchemaError(f"{self.path} is damaged ({error}); move it away and profile again") from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_other_layout(self) -> None:
        """Refuse the journal of another release before anything is added to it.

        Raises:
            SchemaError: its schema, or the columns of a table, are not this release's.
        """
        found = {}
        for table in _LAYOUT:
            rows = self._base.execute(f"PRAGMA table_info({table})").fetchall()
            found[table] = tuple(str(row[1]) for row in rows)
        if not any(found.values()):
            return
        if found["meta"] == _LAYOUT["meta"]:
            schema = self.meta.get("schema")
            if schema is not None and schema != f"{SCHEMA} {VERSION}":
                raise SchemaError(
                    f"{self.path} was written by another release of hwsearch ({schema!r}, this one writes "
                    f"{f'{SCHEMA} {VERSION}'!r}); move it away and profile again"
                )
        # Between releases the columns have changed without the version: look at both.
        different = [table for table, columns in _LAYOUT.items() if found[table] not in ((), columns)]
        if different:
            raise SchemaError(
                f"{self.path} was written by another release of hwsearch (the columns of its table {different[0]!r} "
                f"are {', '.join(found[different[0]])}); move it away and profile again"
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")
        except sqlite3.Error as error:
            raise InputError(f"cannot write {self.path}: {error}; free the disk or mend the file, then go on") from None

    def _put(
        self, campaign: str, slot: Slot, network: str, seconds: float, reference_ms: float, document: str, error: str
    ) -> None:
        row = (campaign, *slot, network, seconds, reference_ms, document, error)
        self._base.execute("INSERT OR REPLACE INTO visits VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def _network(self, name: str, source: str, text: str) -> Network:
        try:
            kernels = []
            for cells in json.loads(text):
                values: dict[str, Any] = dict(zip(_COLUMNS, cells, strict=True))
                values["fused"] = tuple(values["fused"])
                if wrong := [n for n in _COLUMNS if not _right(n, values[n])]:
                    raise ValueError(f"{wrong[0]} is {str(values[wrong[0]])[:40]!r}")
                kernels.append(Kernel(**values))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise self._unreadable(name, error) from None
        return Network(name, source, tuple(kernels))

    def _unreadable(self, network: str, error: Exception) -> SchemaError:
        return SchemaError(f"{self.path}: network {network!r} cannot be read ({error}); move the file away")


class Meta:
    """Named texts of a journal."""

    def __init__(self, rows: Callable[..., list[tuple[Any, ...]]]) -> None:
        self._rows = rows

    def get(self, name: str) -> str | None:
        """The text, or None."""
        rows = self._rows("SELECT value FROM meta WHERE name = ?", (name,), str)
        return str(rows[0][0]) if rows else None

    def all(self, prefix: str) -> list[str]:
        """The texts of all names that begin so."""
        query = "SELECT value FROM meta WHERE substr(name, 1, ?) = ? ORDER BY name"
        return [value for (value,) in self._rows(query, (len(prefix), prefix), str)]

    def setdefault(self, name: str, value: str) -> str:
        """The text under the name, stored now when it is new."""
        self._rows("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, value))
        return str(self.get(name))


def _check_numbers(visit: Visit, reference_ms: float) -> None:
    """Raises ValueError or TypeError where a time is none."""
    times = (reference_ms, visit.measured_ms, visit.raw_p50_ms, visit.raw_p90_ms)
    rest = (visit.spread, visit.seconds, visit.rounds, *visit.shares)
    if not all(0 < time < math.inf for time in times) or not all(0 <= number < math.inf for number in rest):
        raise ValueError("a time that is no positive number")
    if not isinstance(visit.step, str) or not isinstance(visit.rounds, int):
        raise TypeError("its step or its rounds are of another type")


def _right(column: str, value: object) -> bool:
    """Whether a kernel's cell is what its column holds: texts, or a size that a tensor can have."""
    if column == "fused":
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if column in _TEXTS:
        return isinstance(value, str) and (column != "family" or value in FAMILIES)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST
