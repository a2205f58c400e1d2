"""Tables, journals and predictors that are damaged, of another release, or made to harm."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

from hard_case import (
    DEEP,
    DIGITS,
    NET,
    NOT_UTF8,
    ON_SIMULATED,
    PREDICTOR,
    SHAPE,
    TABLE,
    Case,
    Spoil,
    both,
    cut,
    edited,
    field,
    folder_instead,
    gone,
    link,
    replaced,
    without,
    write,
)  # fmt: skip
from hard_onnx import noise

_MANIFEST, _NETWORKS, _KERNELS = TABLE / "manifest.json", TABLE / "networks.csv", TABLE / "kernels.csv"
_JOURNAL = TABLE / "journal.sqlite"
_FITTED = PREDICTOR / "manifest.json"


def _ubj(home: Path) -> Path:
    return min((home / PREDICTOR).glob("*.ubj"))


def cell(path: Path, line: int, column: str, value: str) -> Spoil:
    """One cell of a CSV file; the header is line 1."""

    def spoil(home: Path) -> None:
        rows = list(csv.reader(io.StringIO((home / path).read_text())))
        rows[line - 1][rows[0].index(column)] = value
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        (home / path).write_text(text.getvalue())

    return spoil


def signed(spoil: Spoil) -> Spoil:
    """A table that was spoilt, with checksums and counts that agree."""

    def whole(home: Path) -> None:
        spoil(home)
        manifest = json.loads((home / _MANIFEST).read_text())
        for name in manifest["files"]:
            data = (home / TABLE / name).read_bytes()
            manifest["files"][name] = {"rows": data.count(b"\n") - 1, "sha256": hashlib.sha256(data).hexdigest()}
        (home / _MANIFEST).write_text(json.dumps(manifest))

    return whole


def _lines(path: Path, change: Callable[[list[str]], list[str]]) -> Spoil:
    def spoil(home: Path) -> None:
        lines = (home / path).read_text().splitlines()
        (home / path).write_text("\n".join(change(lines)) + "\n")

    return spoil


def _tree(change: Callable[[bytes], bytes], *, sign: bool) -> Spoil:
    """The first file of trees, with a checksum that agrees or not."""

    def spoil(home: Path) -> None:
        path = _ubj(home)
        data = change(path.read_bytes())
        path.write_bytes(data)
        if sign:
            field(_FITTED, "model", "files", path.name, value=hashlib.sha256(data).hexdigest())(home)

    return spoil


def _sql(*statements: str) -> Spoil:
    def spoil(home: Path) -> None:
        base = sqlite3.connect(home / _JOURNAL, isolation_level=None)
        for statement in statements:
            base.execute(statement)
        base.close()

    return spoil


def _other_journal(script: str) -> Spoil:
    def spoil(home: Path) -> None:
        (home / _JOURNAL).unlink()
        base = sqlite3.connect(home / _JOURNAL)
        base.executescript(script)
        base.close()

    return spoil


def _holes(home: Path) -> None:
    """Every page but the first is rubbish."""
    data = (home / _JOURNAL).read_bytes()
    (home / _JOURNAL).write_bytes(data[:4096] + noise(len(data) - 4096, 7))


def _last_pages(home: Path) -> None:
    data = (home / _JOURNAL).read_bytes()
    (home / _JOURNAL).write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


#: What a manifest of a table or predictor may be, and what is said of any of them.
def _documents(path: Path) -> tuple[tuple[str, Spoil, str], ...]:
    return (
        ("empty", write(path, ""), "not JSON"), ("torn", cut(path, 0.5), "not JSON"),
        ("not UTF-8", write(path, NOT_UTF8), "cannot read"), ("brackets", write(path, DEEP), "as JSON"),
        ("digits", write(path, DIGITS), "as JSON"), ("a list", write(path, "[]"), "schema is 'list'"),
        ("a number", write(path, "3"), "schema is 'int'"), ("null", write(path, "null"), "schema is 'NoneType'"),
        ("a folder", folder_instead(path), "cannot read"), ("a link to itself", link(path, path.name), "cannot read"),
        ("another schema", field(path, "schema", value="x"), "schema is 'x', expected"),
        ("a schema that is a list", field(path, "schema", value=[]), r"schema is \[\], expected"),
        ("another version", field(path, "version", value=99), "version 99, this release reads"),
        ("no version", without(path, "version"), "version None, this release reads"),
        ("no fingerprint", without(path, "fingerprint"), "'fingerprint' is missing"),
        ("a fingerprint that is a text", field(path, "fingerprint", value="x"), "fingerprint is str"),
        ("a fingerprint cut", without(path, "fingerprint", "cpu"), "missing or unknown fields cpu"),
        ("a fingerprint of numbers", field(path, "fingerprint", "threads", value="1"), "fingerprint.threads is '1'"),
        ("a speed in words", field(path, "reference_ms", value="fast"), "missing or wrong"),
        ("a speed of hundreds of digits", field(path, "reference_ms", value=10**400), "missing or wrong"),
        ("a speed that is a list", field(path, "reference_ms", value=[1]), "missing or wrong"),
        ("a noise that is none", field(path, "noise_floor", value=float("nan")), "noise_floor is nan|not finite"),
    )  # fmt: skip


_TABLES: tuple[tuple[str, Spoil, str], ...] = (
    ("gone", gone(_MANIFEST), "holds no table"),
    ("a speed of 0", field(_MANIFEST, "reference_ms", value=0), "reference_ms is 0"),
    ("an endless speed", field(_MANIFEST, "reference_ms", value=float("inf")), "reference_ms is inf"),
    ("a noise below 0", field(_MANIFEST, "noise_floor", value=-1), "noise_floor is -1"),
    ("seeds that are a text", field(_MANIFEST, "seeds", value="none"), "missing or wrong"),
    ("seeds that are null", field(_MANIFEST, "seeds", value=[None]), "missing or wrong"),
    ("no files", without(_MANIFEST, "files"), "'files' is missing"),
    ("files that are a list", field(_MANIFEST, "files", value=[]), "missing or wrong"),
    ("a file less", without(_MANIFEST, "files", "kernels.csv"), "missing or wrong"),
    ("rows in words", field(_MANIFEST, "files", "kernels.csv", "rows", value="many"), "missing or wrong"),
    ("endless rows", field(_MANIFEST, "files", "kernels.csv", "rows", value=float("inf")), "missing or wrong"),
    ("fewer rows", field(_MANIFEST, "files", "networks.csv", "rows", value=1), "networks.csv.* of 1 rows"),
    ("another checksum", field(_MANIFEST, "files", "networks.csv", "sha256", value="0"), "SHA-256 differs"),
)  # fmt: skip
_CSV: tuple[tuple[str, Spoil, str], ...] = (
    ("networks gone", gone(_NETWORKS), "networks.csv: cannot be read"),
    ("kernels gone", gone(_KERNELS), "kernels.csv: cannot be read"),
    ("kernels a folder", folder_instead(_KERNELS), "kernels.csv: cannot be read"),
    ("kernels empty", write(_KERNELS, ""), "kernels.csv, line 1: the columns are not"),
    ("networks not UTF-8", write(_NETWORKS, b"\xff\xfe"), "networks.csv: cannot be read"),
    ("kernels of NUL", write(_KERNELS, b"\0" * 5000), "kernels.csv, line [01]: "),
    ("kernels cut", cut(_KERNELS, 0.7), r"kernels.csv, line \d+: "),
    ("networks cut", cut(_NETWORKS, 0.7), r"networks.csv, line \d+: "),
    ("a column gone", _lines(_KERNELS, lambda lines: [line.partition(",")[2] for line in lines]),
     "the columns are not"),
    ("a column more", _lines(_NETWORKS, lambda lines: [line + ",1" for line in lines]), "the columns are not"),
    ("a cell more", _lines(_NETWORKS, lambda lines: [*lines[:2], lines[2] + ",1", *lines[3:]]), "line 3: 10 cells"),
    ("a line twice", _lines(_NETWORKS, lambda lines: [*lines[:3], lines[2], *lines[3:]]), "line 4: .* is there twice"),
    ("a kernel twice", _lines(_KERNELS, lambda lines: [*lines[:3], lines[2], *lines[3:]]), "line 4: kernel 1"),
    ("a quote without an end", _lines(_NETWORKS, lambda lines: [*lines[:2], '"' + lines[2], *lines[3:]]), "line"),
    ("a line break inside", _lines(_KERNELS, lambda lines: [*lines[:2], lines[2] + "\r" + lines[3], *lines[4:]]),
     "line"),
    ("a cell of megabytes", cell(_NETWORKS, 3, "source", "x" * 200_000), "networks.csv, line"),
    ("an endless number", cell(_NETWORKS, 3, "measured_ms", "9" * 100_000), "line 3: measured_ms is '9999"),
    ("a count of words", cell(_KERNELS, 3, "in_channels", "many"), "line 3: in_channels is 'many'"),
    ("a count below 0", cell(_KERNELS, 3, "in_channels", "-4"), "line 3: in_channels is '-4'"),
    ("half a count", cell(_KERNELS, 3, "batch", "1.5"), "line 3: batch is '1.5'"),
    ("a superscript", cell(_KERNELS, 3, "batch", "²"), "line 3: batch is '²'"),
    ("a count of thousands of digits", cell(_KERNELS, 3, "batch", "9" * 6000), "line 3: batch is '999"),
    ("an unknown family", cell(_KERNELS, 3, "family", "magic"), "line 3: unknown kernel family 'magic'"),
    ("changed by hand", cell(_NETWORKS, 3, "measured_ms", "1.25"), "SHA-256 differs"),
    *(
        (f"{column} {value or 'left out'}", cell(path, 3, column, value),
         f"line 3: {column} is '{value}', not a positi")
        for path, column in ((_NETWORKS, "measured_ms"), (_KERNELS, "ms"))
        for value in ("nan", "0", "-0.5", "inf", "", "fast")
    ),
)  # fmt: skip
#: With checksums that agree, so that only what the lines say can tell.
_SIGNED: tuple[tuple[str, Spoil, str], ...] = (
    ("a time that no clock tells", cell(_NETWORKS, 3, "measured_ms", "1e-300"), "measured_ms = 1e-300"),
    ("a time of ages", cell(_KERNELS, 3, "ms", "1e300"), r"has 1e\+300 ms"),
    ("a kernel larger than any memory", both(*(cell(_KERNELS, 3, n, "9" * 12) for n in ("batch", "in_channels"))),
     "larger than an"),
    ("no kernels", _lines(_KERNELS, lambda lines: lines[:1]), "should have .* kernels"),
    ("no networks", _lines(_NETWORKS, lambda lines: lines[:1]), "kernels.csv has network"),
    ("a network without a name", cell(_NETWORKS, 3, "id", ""), "network ''"),
    ("a kernel of another network", cell(_KERNELS, 3, "network", "x"), "kernel 1 of network 'x'"),
)  # fmt: skip

_PREDICTORS: tuple[tuple[str, Spoil, str], ...] = (
    ("gone", gone(_FITTED), "holds no predictor"),
    ("unknown parameters", field(_FITTED, "parameters", "magic", value=1), "missing or wrong"),
    ("parameters that are a list", field(_FITTED, "parameters", value=[]), "missing or wrong"),
    ("settings in words", field(_FITTED, "settings", value="x"), "missing or wrong"),
    ("no calibration", without(_FITTED, "calibration"), "'calibration' is missing"),
    ("a calibration in words", field(_FITTED, "calibration", "a", value="x"), "missing or wrong"),
    ("a calibration that is none", field(_FITTED, "calibration", "a", value=float("nan")), "not finite"),
    ("an endless calibration", field(_FITTED, "calibration", "a", value=float("inf")), "not finite"),
    ("no errors", field(_FITTED, "log_errors", value=[]), "no out-of-fold errors"),
    ("errors in words", field(_FITTED, "log_errors", value=["x"]), "missing or wrong"),
    ("half a line", field(_FITTED, "p90", value=[1.0]), "missing or wrong"),
    ("profiled that is a number", field(_FITTED, "profiled", value=3), "missing or wrong"),
    ("profiled beyond all numbers", edited(_FITTED, lambda m: m["profiled"].update(x=[[10**30, 1, 1]])),
     "missing or wr"),
    ("other features", field(_FITTED, "model", "features", value=["x"]), "other features"),
    ("blocks of 0", field(_FITTED, "model", "vocabulary", "block", value=0), "blocks of 0"),
    ("no model", without(_FITTED, "model"), "'model' is missing"),
    ("a base without terms", field(_FITTED, "model", "base", "weights", value={}), "damaged"),
    ("a base that is a list", field(_FITTED, "model", "base", value=[]), "damaged"),
    ("ranges in words", edited(_FITTED, lambda m: m["model"].update(ranges={"conv": ["ab"]})), "a range for each"),
    ("a file outside", field(_FITTED, "model", "files", "../manifest.ubj", value="0"), "that no predictor has"),
    ("a file of the system", field(_FITTED, "model", "files", "/etc/passwd", value="0"), "that no predictor has"),
    ("files that are a list", field(_FITTED, "model", "files", value=["conv.ubj"]), "missing or wrong"),
    ("trees gone", lambda home: _ubj(home).unlink(), "cannot be read"),
    ("trees cut", _tree(lambda data: data[: len(data) // 2], sign=False), "SHA-256 differs"),
    ("a bit of the trees", _tree(lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:], sign=False), "SHA-256"),
    ("trees of text", _tree(lambda data: b"not a model", sign=True), "damaged"),
    ("no trees", _tree(lambda data: b"", sign=True), "damaged"),
    ("trees that are JSON", _tree(lambda data: b"{}", sign=True), "damaged"),
    ("of another processor", field(_FITTED, "fingerprint", "cpu", value="abacus"), "made for another device"),
    ("of another runtime version", field(_FITTED, "fingerprint", "runtime_version", value="0"), "revalidate --accept"),
    ("of another precision", field(_FITTED, "fingerprint", "precision", value="int8"), "precision 'float32' instead"),
)  # fmt: skip
_JOURNALS: tuple[tuple[str, Spoil, str], ...] = (
    ("text", write(_JOURNAL, "not a journal" * 100), "is no journal"),
    ("random bytes", lambda home: (home / _JOURNAL).write_bytes(noise(8192, 3)), "is no journal"),
    ("half of it", cut(_JOURNAL, 0.5), "is no journal|is damaged|cannot use"),
    ("only its first page", lambda home: (home / _JOURNAL).write_bytes((home / _JOURNAL).read_bytes()[:4096]),
     "journal"),
    ("pages of rubbish", _holes, "is no journal|is damaged"),
    ("pages of zeros", _last_pages, "is no journal|is damaged|cannot be read|no network"),
    ("a folder", folder_instead(_JOURNAL), "cannot write"),
    ("a link to itself", link(_JOURNAL, "journal.sqlite"), "cannot write"),
    ("of another program", _other_journal("CREATE TABLE networks (id TEXT, document TEXT)"), "another release"),
    ("of another version", _sql("UPDATE meta SET value = 'hwsearch.journal 99' WHERE name = 'schema'"),
     "another release"),
    ("of another device", _sql("UPDATE meta SET value = replace(value, 'simulated ', 'x') WHERE name = 'fingerprint'"),
     "made on another device"),
    ("without a readable fingerprint", _sql("UPDATE meta SET value = '{' WHERE name = 'fingerprint'"),
     "its fingerprint"),
    ("with a fingerprint of brackets", _sql(f"UPDATE meta SET value = '{DEEP}' WHERE name = 'fingerprint'"),
     "fingerpr"),
    ("with a fingerprint that is a list", _sql("UPDATE meta SET value = '[]' WHERE name = 'fingerprint'"),
     "its fingerp"),
    ("with a seed in words", _sql("UPDATE meta SET value = 'x' WHERE name = 'seed 0'"), "its seed 'x'"),
    ("with kernels that are none", _sql("UPDATE networks SET kernels = '{'"), "cannot be read"),
    ("with kernels of numbers", _sql("UPDATE networks SET kernels = '[3]'"), "cannot be read"),
    ("with kernels of another family", _sql("UPDATE networks SET kernels = replace(kernels, 'conv', 'magic')"),
     "cannot be read .*family"),
    ("with a network less", _sql("DELETE FROM networks WHERE id IN (SELECT id FROM networks LIMIT 1)"),
     "cannot be read"),
    ("with visits that are none", _sql("UPDATE visits SET document = '[]'"), "cannot be read"),
    ("with visits of brackets", _sql(f"UPDATE visits SET document = '{DEEP}'"), "cannot be read"),
    ("with times in words", _sql("UPDATE visits SET document = replace(document, '\"measured_ms\": ',"
                                 " '\"measured_ms\": \"x\", \"y\": ')"), "cannot be read"),
    ("with times that are none", _sql("UPDATE visits SET document = replace(document, '\"measured_ms\": ',"
                                      " '\"measured_ms\": NaN, \"raw_p50_ms\": ')"), "cannot be read"),
    ("with a speed in words", _sql("UPDATE visits SET reference_ms = 'x'"), "is damaged"),
    ("with a speed of 0", _sql("UPDATE visits SET reference_ms = 0"), "cannot be read"),
    ("with places in words", _sql("UPDATE visits SET place = CAST('x' AS BLOB) WHERE rowid = 1"), "is damaged"),
    ("with text that is no UTF-8", _sql("UPDATE networks SET source = CAST(X'FFFE' AS TEXT)"), "is damaged"),
)  # fmt: skip

#: The same campaign again: everything was visited, so only the journal is read.
_AGAIN = (*ON_SIMULATED, "--minutes", "0.0001")
#: SQLite may put its own files beside a journal, and fold them into it.
_OF_SQLITE = (r"latency_tables/simulated/journal\.sqlite(-wal|-shm)?",)

CASES: tuple[Case, ...] = (
    *(Case("fit", f"table {name}", ON_SIMULATED, says, spoil=spoil) for name, spoil, says in _documents(_MANIFEST)),
    *(Case("fit", f"table {name}", ON_SIMULATED, says, spoil=spoil) for name, spoil, says in (*_TABLES, *_CSV)),
    *(Case("fit", f"signed, {name}", ON_SIMULATED, says, spoil=signed(s)) for name, s, says in _SIGNED),
    *(
        Case(verb, f"table {name}", arguments, says, spoil=spoil)
        for verb, arguments in (("device revalidate", ("simulated",)), ("report", ("latency_tables/simulated",)))
        for name, spoil, says in (*_TABLES[1::4], *_CSV[1::5])
    ),
    *(
        Case("estimate", f"predictor {name}", ("net.onnx", *ON_SIMULATED), says, spoil=spoil)
        for name, spoil, says in (*_documents(_FITTED), *_PREDICTORS)
    ),
    *(
        Case(verb, f"predictor {name}", arguments, says, spoil=both(spoil, write("devices/second.toml",
            'runtime = "simulated"\n')))
        for verb, arguments in (
            ("space", (NET, *SHAPE, *ON_SIMULATED)), ("fit", ("--device", "second", "--from", "simulated")),
        )
        for name, spoil, says in _PREDICTORS[5::10]
    ),
    Case("estimate", "a predictor that is a file", ("net.onnx", *ON_SIMULATED), "has no predictor",
         spoil=lambda home: ((home / PREDICTOR).rename(home / "away"), (home / PREDICTOR).write_text("x"))),
    *(
        Case("profile", f"journal {name}", _AGAIN, says, spoil=spoil, writes=_OF_SQLITE)
        for name, spoil, says in _JOURNALS
    ),
    Case("device show", "a check beside a damaged table", ("simulated",), "device", code=0, result=True,
         spoil=write(_MANIFEST, DEEP)),
    Case("device list", "beside a damaged table", (), "simulated", code=0, result=True, spoil=write(_MANIFEST, DEEP)),
    Case("report", "a table beside a damaged card", ("latency_tables/simulated",), "report written", code=0,
        result=True,
         spoil=both(write(PREDICTOR / "card.json", DEEP), replaced(_FITTED, b"{", b"[")),
         writes=(r"latency_tables/simulated/report\.html",)),
)  # fmt: skip
