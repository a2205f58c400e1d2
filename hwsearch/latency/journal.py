"""The campaign's diary: an SQLite file (WAL) in which every finished measurement is committed at once.

What is in it survives ``kill -9`` at any moment. One journal belongs to one device, fingerprint and reference speed; it
may hold several campaigns (other seeds, other models), and a network measured by one is not measured again by another.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from hwsearch.errors import InputError, SchemaError
from hwsearch.graph.kernel import Kernel
from hwsearch.latency.table import NetworkSample

SCHEMA = "hwsearch.journal"
VERSION = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS samples (id TEXT PRIMARY KEY, reference_ms REAL NOT NULL, document TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS places (
    campaign TEXT NOT NULL, place INTEGER NOT NULL, id TEXT NOT NULL, seconds REAL NOT NULL, error TEXT NOT NULL,
    PRIMARY KEY (campaign, place)
);
"""
_COLUMNS = tuple(f.name for f in fields(Kernel) if f.name != "source")


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
            self._base.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
        except (OSError, sqlite3.OperationalError) as error:
            if "locked" in str(error):
                raise InputError(f"{path} is in use: another process profiles this device; wait for it") from None
            raise InputError(f"cannot write {path}: {error}; choose a folder you may write to") from None
        except sqlite3.DatabaseError as error:
            raise SchemaError(f"{path} is no journal ({error}); move it away and profile again") from None
        schema = self.meta.setdefault("schema", f"{SCHEMA} {VERSION}")
        if schema != f"{SCHEMA} {VERSION}":
            raise SchemaError(f"{path} is a {schema!r}, this release reads {SCHEMA} {VERSION}; move it away")

    @property
    def meta(self) -> Meta:
        """Names and texts kept for good, such as the fingerprint."""
        return Meta(self._base)

    def places(self, campaign: str) -> dict[int, float]:
        """Places of a plan that are dealt with, and the device seconds each cost."""
        rows = self._base.execute("SELECT place, seconds FROM places WHERE campaign = ?", (campaign,))
        return {int(place): float(seconds) for place, seconds in rows}

    def failures(self, campaign: str) -> dict[str, str]:
        """Networks of a campaign that have no time, and why."""
        rows = self._base.execute(
            "SELECT id, error FROM places WHERE campaign = ? AND error != '' ORDER BY place", (campaign,)
        )
        return dict(rows.fetchall())

    def has(self, network: str) -> bool:
        """Whether a network was measured, by any campaign."""
        return self._base.execute("SELECT 1 FROM samples WHERE id = ?", (network,)).fetchone() is not None

    def record(self, campaign: str, place: int, sample: NetworkSample, reference_ms: float) -> None:
        """Commit one measurement, and the reference speed that its milliseconds refer to."""
        with self._transaction():
            row = (sample.id, reference_ms, _to_text(sample))
            self._base.execute("INSERT OR REPLACE INTO samples VALUES (?, ?, ?)", row)
            self._place(campaign, place, sample.id, sample.seconds, "")

    def skip(self, campaign: str, place: int, network: str, error: str = "") -> None:
        """Commit that a place needs no measurement (done before), or cannot have one (``error``)."""
        with self._transaction():
            self._place(campaign, place, network, 0.0, error)

    def forget(self, campaign: str, places: Sequence[int]) -> None:
        """Let failed places be tried again; measurements stay."""
        with self._transaction():
            for place in places:
                query = "DELETE FROM places WHERE campaign = ? AND place = ? AND error != ''"
                self._base.execute(query, (campaign, place))

    def samples(self) -> tuple[tuple[NetworkSample, float], ...]:
        """Every measurement with its reference speed, sorted by id.

        Raises:
            SchemaError: a row that this release cannot read.
        """
        rows = self._base.execute("SELECT id, reference_ms, document FROM samples ORDER BY id").fetchall()
        return tuple((_from_text(self.path, name, text), float(reference)) for name, reference, text in rows)

    def close(self) -> None:
        """Fold the write-ahead log into the file and let go of it."""
        self._base.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")

    def _place(self, campaign: str, place: int, network: str, seconds: float, error: str) -> None:
        row = (campaign, place, network, seconds, error)
        self._base.execute("INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?)", row)


class Meta:
    """Named texts of a journal."""

    def __init__(self, base: sqlite3.Connection) -> None:
        self._base = base

    def get(self, name: str) -> str | None:
        """The text, or None."""
        row = self._base.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def setdefault(self, name: str, value: str) -> str:
        """The text under the name, stored now when it is new."""
        self._base.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, value))
        return str(self.get(name))


def _to_text(sample: NetworkSample) -> str:
    document: dict[str, Any] = {f.name: getattr(sample, f.name) for f in fields(sample) if f.name != "kernels"}
    document["kernels"] = [[getattr(kernel, name) for name in _COLUMNS] for kernel in sample.kernels]
    return json.dumps(document)


def _from_text(path: Path, name: str, text: str) -> NetworkSample:
    try:
        document: Mapping[str, Any] = json.loads(text)
        kernels = []
        for cells in document["kernels"]:
            values = dict(zip(_COLUMNS, cells, strict=True))
            values["fused"] = tuple(values["fused"])
            kernels.append(Kernel(**values))
        rest = {key: value for key, value in document.items() if key != "kernels"}
        rest["node_ms"] = tuple(rest["node_ms"])
        return NetworkSample(kernels=tuple(kernels), **rest)
    except (KeyError, TypeError, ValueError) as error:
        raise SchemaError(
            f"{path}: network {name!r} cannot be read ({error}); move the file away, profile again"
        ) from None
