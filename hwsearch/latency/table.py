"""``LatencyTable``: what a campaign measured on one device, as sorted CSV files that git can diff.

Layout of a table folder::

    manifest.json   schema, version, device, fingerprint, reference speed, noise floor, SHA-256 and rows of each file
    networks.csv    one line a network: its milliseconds at the device's reference speed and the raw ones beside them
    kernels.csv     one line an executed node: its share of the network's milliseconds and what it computes

Nothing in it depends on when it was written, so equal measurements give equal bytes. Loading refuses a damaged table
and names the file and line.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hwsearch.device.spec import Fingerprint
from hwsearch.errors import InputError, SchemaError
from hwsearch.graph.kernel import FAMILIES, Kernel

SCHEMA = "hwsearch.latency-table"
VERSION = 1

#: No latency is shorter than a clock cycle, or longer than a week.
_SHORTEST_MS, _LONGEST_MS = 1e-9, 1e9
#: Digits of the largest count, and the most operations or bytes of a kernel: more cannot be, and would overflow.
_DIGITS, _LARGEST = 12, 1 << 50

_TEXT = ("family", "op", "dtype", "layout_in", "layout_out")
_KERNEL_COLUMNS = tuple(f.name for f in fields(Kernel) if f.name not in ("node", "source"))
_COUNTS = tuple(name for name in _KERNEL_COLUMNS if name not in (*_TEXT, "fused"))
_KERNEL_HEADER = ("network", "index", "ms", "node", *_KERNEL_COLUMNS)
_NETWORK_HEADER = (
    "id", "source", "measured_ms", "raw_p50_ms", "raw_p90_ms", "spread", "rounds", "seconds", "nodes",
)  # fmt: skip


@dataclass(frozen=True)
class NetworkSample:
    """One timed network.

    Attributes:
        id: stable identity, derived from the network's content.
        source: family it was drawn from, such as ``random:resnet`` or ``space:1f2e``; cross-validation leaves these
            out.
        kernels: the nodes that the runtime really executed, in order.
        node_ms: one value a kernel; they sum to ``measured_ms`` (shares of the un-profiled total).
        measured_ms: milliseconds at the device's reference speed.
        raw_p50_ms, raw_p90_ms: as the clock saw them.
        spread: relative half-width of the estimate's confidence interval.
        rounds: rounds that were kept.
        seconds: what the measurement cost, by the runtime's clock.
    """

    id: str
    source: str
    kernels: tuple[Kernel, ...]
    node_ms: tuple[float, ...]
    measured_ms: float
    raw_p50_ms: float
    raw_p90_ms: float
    spread: float
    rounds: int
    seconds: float = 0.0

    def problem(self) -> str | None:
        """What is wrong with this sample, or None."""
        if len(self.kernels) != len(self.node_ms) or not self.kernels:
            return f"network {self.id!r} has {len(self.kernels)} kernels and {len(self.node_ms)} kernel times"
        for name in ("measured_ms", "raw_p50_ms", "raw_p90_ms"):
            if not _is_latency(getattr(self, name)):
                return f"network {self.id!r} has {name} = {getattr(self, name)}; a latency is a positive number"
        if not (math.isfinite(self.spread) and self.spread >= 0):
            return f"network {self.id!r} has spread = {self.spread}; it is a number from 0 up"
        for index, ms in enumerate(self.node_ms):
            if not _is_latency(ms):
                return f"network {self.id!r}, kernel {index} has {ms} ms; a latency is a positive number"
        return None

    def scaled(self, factor: float) -> NetworkSample:
        """The same sample at another reference speed (milliseconds times ``factor``; the raw ones stay)."""
        return replace(self, measured_ms=self.measured_ms * factor, node_ms=tuple(ms * factor for ms in self.node_ms))


@dataclass(frozen=True)
class LatencyTable:
    """All networks measured on one device under one fingerprint.

    Attributes:
        device: the device's name.
        fingerprint: CPU, instruction set, runtime version, threads, precision ... that the numbers hold for.
        reference_ms: the canary's median at ``device check``: the speed that every ``measured_ms`` refers to.
        noise_floor: p95 of the relative test-retest error (0.05 = 5 %); accuracy below it is not a claim.
        networks: sorted by id.
        seeds: of the plans that the networks came from, sorted: with them the networks can be made again.

    Example:
        >>> table = LatencyTable.load("latency_tables/x86-ort-1t")      # doctest: +SKIP
        >>> len(table.networks), table.kernel_count                     # doctest: +SKIP
        (612, 18894)
    """

    device: str
    fingerprint: Fingerprint
    reference_ms: float
    noise_floor: float
    networks: tuple[NetworkSample, ...]
    seeds: tuple[int, ...] = ()

    @property
    def kernel_count(self) -> int:
        """Executed nodes over all networks."""
        return sum(len(n.kernels) for n in self.networks)

    @property
    def sources(self) -> tuple[str, ...]:
        """Families that the networks came from, sorted."""
        return tuple(sorted({n.source for n in self.networks}))

    def with_networks(self, networks: Iterable[NetworkSample]) -> LatencyTable:
        """The same device with other networks (sorted by id)."""
        return replace(self, networks=tuple(sorted(networks, key=lambda n: n.id)))

    def validate(self) -> None:
        """Refuse what no measurement can be.

        Raises:
            InputError: a latency that is NaN, zero or negative, a network twice, a reference speed that is none.
        """
        if not _is_latency(self.reference_ms):
            raise InputError(f"table of {self.device!r}: reference_ms is {self.reference_ms}; run `device check` again")
        if not (math.isfinite(self.noise_floor) and self.noise_floor >= 0):
            raise InputError(f"table of {self.device!r}: noise_floor is {self.noise_floor}; it is a number from 0 up")
        seen: set[str] = set()
        for network in self.networks:
            if problem := network.problem():
                raise InputError(f"table of {self.device!r}: {problem}; measure it again")
            if network.id in seen:
                raise InputError(f"table of {self.device!r}: network {network.id!r} is there twice; remove one")
            seen.add(network.id)

    def merge(self, other: LatencyTable) -> LatencyTable:
        """Both tables' networks at this table's reference speed; a network in both keeps its steadier measurement.

        Raises:
            InputError: the tables come from different devices or settings; the message names the difference.
        """
        differences = self.fingerprint.differences(other.fingerprint)
        if self.device != other.device or differences:
            what = "; ".join(differences) or f"{self.device!r} and {other.device!r}"
            raise InputError(f"tables of different devices cannot be merged: {what}; profile each on its own")
        chosen = {n.id: n for n in self.networks}
        for network in other.networks:
            moved = network.scaled(self.reference_ms / other.reference_ms)
            mine = chosen.get(network.id)
            if mine is None or moved.spread < mine.spread:
                chosen[network.id] = moved
        seeds = tuple(sorted({*self.seeds, *other.seeds}))
        merged = replace(self, noise_floor=max(self.noise_floor, other.noise_floor), seeds=seeds)
        return merged.with_networks(chosen.values())

    def save(self, folder: str | Path) -> None:
        """Write the table; the manifest goes last, so a table cut short is refused when it is loaded.

        Raises:
            InputError: the table breaks a promise (see ``validate``), or the folder cannot be written.
        """
        self.validate()
        ordered = self.with_networks(self.networks).networks
        files = {"networks.csv": _networks_csv(ordered), "kernels.csv": _kernels_csv(ordered)}
        manifest = {
            "schema": SCHEMA,
            "version": VERSION,
            "device": self.device,
            "fingerprint": self.fingerprint.to_dict(),
            "reference_ms": self.reference_ms,
            "noise_floor": self.noise_floor,
            "seeds": sorted(self.seeds),
            "files": {
                name: {"rows": text.count("\n") - 1, "sha256": hashlib.sha256(text.encode()).hexdigest()}
                for name, text in files.items()
            },
        }
        files["manifest.json"] = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                write_atomic(folder / name, text.encode())
        except OSError as error:
            raise InputError(f"cannot write the table to {folder}: {error}; choose a folder you may write to") from None

    @classmethod
    def load(cls, folder: str | Path) -> LatencyTable:
        """Read and check a table.

        Raises:
            InputError: there is no table.
            SchemaError: another schema or version, or a line that cannot be right; file and line are named.
        """
        folder = Path(folder)
        path = folder / "manifest.json"
        manifest = read_manifest(path, SCHEMA, VERSION, "table", "run `hwsearch profile` to make one")
        try:
            fingerprint = Fingerprint.from_dict(manifest["fingerprint"])
            files = {name: (int(entry["rows"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
            table = cls(
                device=str(manifest["device"]),
                fingerprint=fingerprint,
                reference_ms=float(manifest["reference_ms"]),
                noise_floor=float(manifest["noise_floor"]),
                networks=(),
                # Tables of before do not tell.
                seeds=tuple(sorted(int(seed) for seed in manifest.get("seeds", ()))),
            )
            networks_file, kernels_file = files["networks.csv"], files["kernels.csv"]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SchemaError(f"{path}: field {error} is missing or wrong; restore the file or profile again") from None
        kernels = _read_kernels(folder / "kernels.csv", *kernels_file)
        networks = _read_networks(folder / "networks.csv", *networks_file, kernels)
        table = replace(table, networks=networks)
        try:
            table.validate()
        except InputError as error:
            raise SchemaError(f"{folder}: {error}") from None
        return table


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file as a whole: a reader, or the next run after a kill, sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        # Half of a file is of no use to anybody, least of all on a full disk.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_manifest(path: Path, schema: str, version: int, what: str, remedy: str) -> dict:
    """A JSON manifest whose schema and version are the expected ones."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no {what} (manifest.json is not there); {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; {remedy}") from None
    except json.JSONDecodeError as error:
        raise SchemaError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}); restore the file, or {remedy}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without an end
        raise SchemaError(f"{path}: cannot be read as JSON ({error}); restore the file, or {remedy}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != schema:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise SchemaError(f"{path}: schema is {found!r}, expected {schema!r}; {remedy}")
    if manifest.get("version") != version:
        raise SchemaError(f"{path}: {what} version {manifest.get('version')!r}, this release reads {version}; {remedy}")
    return manifest


def _is_latency(value: float) -> bool:
    return _SHORTEST_MS <= value <= _LONGEST_MS


def _networks_csv(networks: Iterable[NetworkSample]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_NETWORK_HEADER)
    for n in networks:
        numbers = (n.measured_ms, n.raw_p50_ms, n.raw_p90_ms, n.spread)
        writer.writerow([n.id, n.source, *map(repr, numbers), n.rounds, repr(n.seconds), len(n.kernels)])
    return text.getvalue()


def _kernels_csv(networks: Iterable[NetworkSample]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_KERNEL_HEADER)
    for n in networks:
        for index, (kernel, ms) in enumerate(zip(n.kernels, n.node_ms, strict=True)):
            values = (getattr(kernel, name) for name in _KERNEL_COLUMNS)
            cells = ["+".join(v) if isinstance(v, tuple) else v for v in values]
            writer.writerow([n.id, index, repr(ms), kernel.node, *cells])
    return text.getvalue()


def _rows(path: Path, header: tuple[str, ...], rows: int, sha256: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a CSV file as (line number, cells by column); counted and hashed, so nothing can be cut off."""
    try:
        data = path.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: cannot be read ({error}); restore the file or profile again") from None
    reader = csv.reader(io.StringIO(text))
    if tuple(next(_cells(path, reader), ())) != header:
        raise SchemaError(f"{path}, line 1: the columns are not {','.join(header)}; restore the file or profile again")
    count = 0
    for cells in _cells(path, reader):
        if len(cells) != len(header):
            raise SchemaError(
                f"{path}, line {reader.line_num}: {len(cells)} cells instead of {len(header)}; the file is damaged or"
                " cut short: restore it or profile again"
            )
        count += 1
        yield reader.line_num, dict(zip(header, cells, strict=True))
    if count != rows:
        raise SchemaError(f"{path}, line {reader.line_num}: ends after {count} of {rows} rows; restore the file")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise SchemaError(f"{path}: changed since it was written (SHA-256 differs); restore it or profile again")


def _cells(path: Path, reader: Any) -> Iterator[list[str]]:
    """The lines of a CSV reader; what it cannot parse is named."""
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise SchemaError(f"{path}, line {reader.line_num}: {error}; restore the file or profile again") from None
        if cells is None:
            return
        yield cells


def _number(path: Path, line: int, row: dict[str, str], column: str, *, positive: bool = True) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        kind = "a positive number" if positive else "a number from 0 up"
        raise SchemaError(
            f"{path}, line {line}: {column} is {_shown(row[column])}, not {kind}; remove the network or profile again"
        )
    return value


def _count(path: Path, line: int, row: dict[str, str], column: str) -> int:
    value = row[column]
    if not value.isdecimal() or len(value) > _DIGITS:
        raise SchemaError(f"{path}, line {line}: {column} is {_shown(value)}, not a whole number; restore the file")
    return int(value)


def _shown(cell: str) -> str:
    """A cell as it may stand in a message of one line."""
    return repr(cell if len(cell) <= 40 else cell[:37] + "...")


def _read_kernels(path: Path, rows: int, sha256: str) -> dict[str, tuple[list[Kernel], list[float]]]:
    found: dict[str, tuple[list[Kernel], list[float]]] = {}
    interned: dict[tuple[str, ...], dict] = {}
    for line, row in _rows(path, _KERNEL_HEADER, rows, sha256):
        kernels, times = found.setdefault(row["network"], ([], []))
        if _count(path, line, row, "index") != len(kernels):
            raise SchemaError(
                f"{path}, line {line}: kernel {row['index']} of network {row['network']!r} where {len(kernels)} was"
                " due; a line is missing or there twice: restore the file"
            )
        shape = tuple(row[name] for name in _KERNEL_COLUMNS)
        values = interned.get(shape)
        if values is None:
            if row["family"] not in FAMILIES:
                family = _shown(row["family"])
                raise SchemaError(f"{path}, line {line}: unknown kernel family {family}; restore the file")
            values = {name: row[name] for name in _TEXT}
            values |= {name: _count(path, line, row, name) for name in _COUNTS}
            values["fused"] = tuple(row["fused"].split("+")) if row["fused"] else ()
            if max(Kernel(**values).macs, Kernel(**values).memory_bytes) > _LARGEST:
                raise SchemaError(f"{path}, line {line}: a kernel larger than any memory; restore the file")
            interned[shape] = values
        kernels.append(Kernel(**values, node=row["node"]))
        times.append(_number(path, line, row, "ms"))
    return found


def _read_networks(
    path: Path, rows: int, sha256: str, kernels: dict[str, tuple[list[Kernel], list[float]]]
) -> tuple[NetworkSample, ...]:
    networks: dict[str, NetworkSample] = {}
    for line, row in _rows(path, _NETWORK_HEADER, rows, sha256):
        name = row["id"]
        if name in networks:
            raise SchemaError(f"{path}, line {line}: network {name!r} is there twice; remove one")
        mine, times = kernels.get(name, ([], []))
        if len(mine) != _count(path, line, row, "nodes") or not mine:
            raise SchemaError(
                f"{path}, line {line}: network {name!r} should have {row['nodes']} kernels, kernels.csv has"
                f" {len(mine)}; restore both files or profile again"
            )
        networks[name] = NetworkSample(
            id=name,
            source=row["source"],
            kernels=tuple(mine),
            node_ms=tuple(times),
            measured_ms=_number(path, line, row, "measured_ms"),
            raw_p50_ms=_number(path, line, row, "raw_p50_ms"),
            raw_p90_ms=_number(path, line, row, "raw_p90_ms"),
            spread=_number(path, line, row, "spread", positive=False),
            rounds=_count(path, line, row, "rounds"),
            seconds=_number(path, line, row, "seconds", positive=False),
        )
    if orphans := sorted(set(kernels) - set(networks)):
        raise SchemaError(
            f"{path}: kernels.csv has network {orphans[0]!r}, which is not in this file; restore both files"
        )
    return tuple(networks[name] for name in sorted(networks))
