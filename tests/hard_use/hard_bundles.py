"""Bundles that are damaged, or made to harm: over ``verify`` and ``report``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hard_case import (
    DEEP,
    DIGITS,
    NOT_UTF8,
    ON_SIMULATED,
    Case,
    Spoil,
    both,
    cut,
    edited,
    field,
    folder_instead,
    gone,
    link,
    without,
    write,
)  # fmt: skip
from hard_onnx import model, node, outside

_B = Path("bundle")
_MANIFEST, _MODEL, _OUTPUT = _B / "manifest.json", _B / "model.onnx", _B / "output_0.npy"


def listed(name: str, content: bytes = b"x", **more: Any) -> Spoil:
    """One more file in the manifest, which is there if its name can be."""

    def change(manifest: Any) -> None:
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest} | more

    return edited(_MANIFEST, change)


def signed(path: Path, make: Callable[[bytes], bytes]) -> Spoil:
    """A file of the bundle with other content, with size and checksum that agree."""

    def spoil(home: Path) -> None:
        data = make((home / path).read_bytes())
        (home / path).write_bytes(data)
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        field(_MANIFEST, "files", path.name, value=entry)(home)

    return spoil


def _npy(array: np.ndarray, **how: Any) -> Callable[[bytes], bytes]:
    def make(_: bytes) -> bytes:
        import io

        file = io.BytesIO()
        np.save(file, array, **how)
        return file.getvalue()

    return make


def _golden(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """The first golden output after ``change``."""

    def make(data: bytes) -> bytes:
        import io

        return _npy(np.ascontiguousarray(change(np.load(io.BytesIO(data)))))(b"")

    return signed(_OUTPUT, make)


def _other_model(**how: Any) -> Spoil:
    return signed(_MODEL, lambda _: model(**how))


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("pwned", "w")


def _pipe(home: Path) -> None:
    (home / _MODEL).unlink()
    os.mkfifo(home / _MODEL)


def _code(home: Path) -> None:
    """Files that would run if anybody imported from the bundle."""
    for name in ("__init__.py", "agent.py", "hwsearch.py", "sitecustomize.py", "model.py", "numpy.py"):
        (home / _B / name).write_text("open('pwned', 'w')\n")


_REFUSED: tuple[tuple[str, Spoil, str], ...] = (
    ("empty", write(_MANIFEST, ""), "is not valid JSON"), ("torn", cut(_MANIFEST, 0.6), "is not valid JSON"),
    ("not UTF-8", write(_MANIFEST, NOT_UTF8), "is not valid JSON"), ("brackets", write(_MANIFEST, DEEP),
     "not valid JSON"),
    ("digits", write(_MANIFEST, DIGITS), "is not valid JSON"), ("a list", write(_MANIFEST, "[]"),
     "is not a JSON object"),
    ("a manifest of megabytes", write(_MANIFEST, " " * (1 << 21)), "at most 1048576 are expected"),
    ("a folder as manifest", folder_instead(_MANIFEST), "is not a regular file"),
    ("a link as manifest", link(_MANIFEST, "../good.toml"), "is a link"),
    ("another schema", field(_MANIFEST, "schema", value="x"), "is not a bundle's manifest"),
    ("another version", field(_MANIFEST, "version", value=9), "has version 9"),
    ("a version yes", field(_MANIFEST, "version", value=True), "has version True"),
    ("no files", without(_MANIFEST, "files"), "field 'files' is missing"),
    ("files that are a list", field(_MANIFEST, "files", value=[]), "files is .*not an object"),
    *(
        (f"the file name {name[:20]!r}", listed(name), "is refused; plain names only")
        for name in ("../secret", "/etc/passwd", "a/b", "..", ".hidden", "", "a\\b", "x" * 101, "a\0b", "a\nb", "ä",
                     "manifest.json")
    ),
    ("a file that is not there", listed("more.npy"), "more.npy cannot be read"),
    ("a size below 0", listed("x.npy", bytes=-1), "bytes is -1"), ("half a byte", listed("x.npy", bytes=1.5),
     "whole si"),
    ("an endless size", listed("x.npy", bytes=float("inf")), "not valid JSON|bytes"),
    ("a size of hundreds of digits", listed("x.npy", bytes=10**400), "bytes is"),
    ("a checksum that is none", listed("x.npy", sha256="x"), "no SHA-256"),
    ("model gone", gone(_MODEL), "model.onnx cannot be read"), ("model cut", cut(_MODEL, 0.9), "the manifest says"),
    ("model a folder", folder_instead(_MODEL), "model.onnx"), ("model a link", link(_MODEL, "/etc/passwd"),
     "is a link"),
    ("model a link to a device", link(_MODEL, "/dev/zero"), "is a link"), ("model a pipe", _pipe,
     "is not a regular file"),
    ("model with a changed bit", lambda home: (home / _MODEL).write_bytes(
        bytes([(data := (home / _MODEL).read_bytes())[0] ^ 1]) + data[1:]), "SHA-256"),
    ("model that is text", signed(_MODEL, lambda _: b"not a model"), "is not an ONNX model|holds no graph"),
    ("model that is empty", signed(_MODEL, lambda _: b""), "holds no graph"),
    ("model that is cut", signed(_MODEL, lambda data: data[: len(data) // 2]), "not an ONNX model|no graph"),
    ("weights elsewhere", _other_model(constants=[outside("../../../etc/passwd")]), "keeps weights in another file"),
    ("weights beside it", _other_model(constants=[outside("input_0.npy")]), "keeps weights in another file"),
    ("a model not listed", field(_MANIFEST, "model", value="other.onnx"), "which is not in its list"),
    ("a model outside", field(_MANIFEST, "model", value="../net.onnx"), "which is not in its list"),
    ("a canary not listed", field(_MANIFEST, "canary", value="x.onnx"), "which is not in its list"),
    ("no cases", field(_MANIFEST, "cases", value=[]), "cases is empty"),
    ("cases that are a text", field(_MANIFEST, "cases", value="all"), "cases is not a list"),
    ("cases by the thousand", field(_MANIFEST, "cases", value=[{}] * 1000), "at most 64"),
    ("a case that is a number", field(_MANIFEST, "cases", value=[3]), "is not a JSON object"),
    ("a case without output", field(_MANIFEST, "cases", value=[{"input": "input_0.npy"}]), "'output' is missing"),
    ("a case outside", field(_MANIFEST, "cases", 0, "input", value="/etc/passwd"), "not in its list"),
    ("swapped cases", field(_MANIFEST, "cases", 0, "input", value="output_0.npy"), "differ in shape or type"),
    ("a budget below 0", field(_MANIFEST, "budget_ms", value=-1), "budget_ms is -1"),
    ("a budget in words", field(_MANIFEST, "budget_ms", value="3"), "budget_ms is '3'"),
    ("an endless budget", field(_MANIFEST, "budget_ms", value=1e400), "not valid JSON"),
    ("a budget yes", field(_MANIFEST, "budget_ms", value=True), "budget_ms is True"),
    ("a budget of hundreds of digits", field(_MANIFEST, "budget_ms", value=10**400), "budget_ms is 1000"),
    ("a generous tolerance", field(_MANIFEST, "tolerance", "relative", value=5.0), "relative is 5.0"),
    ("a tolerance that is a number", field(_MANIFEST, "tolerance", value=3), "tolerance is 3"),
    ("a name that is a number", field(_MANIFEST, "name", value=3), "name is 3"),
    ("a name of thousands of letters", field(_MANIFEST, "name", value="x" * 5000), "name is 'xxx"),
    ("no name", without(_MANIFEST, "name"), "field 'name' is missing"),
    ("MACs in words", field(_MANIFEST, "macs", value="many"), "macs is 'many'"),
    ("a report that is not listed", field(_MANIFEST, "quantisation", value={"promised_sqnr_db": 3, "report": "x"}),
     "list"),
    ("a promise in words", field(_MANIFEST, "quantisation", value={"promised_sqnr_db": "x", "report": "x"}),
     "promised"),
    ("an array that is a pickle", signed(_OUTPUT, _npy(np.array([_Evil()], dtype=object), allow_pickle=True)),
     "plain .npy"),
    ("an array by columns", signed(_OUTPUT, _npy(np.asfortranarray(np.zeros((3, 4))))), "not a plain .npy"),
    ("an array of texts", signed(_OUTPUT, _npy(np.array(["a"]))), "not a plain .npy"),
    ("an array cut", signed(_OUTPUT, lambda data: data[:-1]), "by its header, but"),
    ("an array of a huge shape", signed(_OUTPUT, lambda data: data.replace(b"(1, 10)", b"(9, 99)")), "by its header"),
    ("an array that is empty", signed(_OUTPUT, lambda _: b""), "not a plain .npy"),
)  # fmt: skip
#: Whole bundles that a device is asked about: what it answers is told in one line.
_ASKED: tuple[tuple[str, Spoil, str], ...] = (
    ("a model of other inputs", _other_model(), "[Ii]nput|feed"),
    ("a model of unknown operators", _other_model(nodes=[node("Frobnicate", ["x"], ["y"])]), "Frobnicate|network"),
    ("another name of the output", field(_MANIFEST, "output_name", value="z"), "the manifest says 'z'"),
    ("another name of the input", field(_MANIFEST, "input_name", value="z"), "z|[Ii]nput"),
    ("an input of another shape", both(
        signed(_B / "input_0.npy", _npy(np.zeros((2, 1, 8, 8), np.float32))),
        edited(_MANIFEST, lambda m: m.update(cases=m["cases"][:1]))), "[Dd]imension|shape|dim"),
    ("an input of another type", both(
        signed(_B / "input_0.npy", _npy(np.zeros((1, 1, 8, 8), np.int64))),
        edited(_MANIFEST, lambda m: m.update(cases=m["cases"][:1]))), "type"),
)  # fmt: skip
#: Whole bundles whose answer is no.
_NO: tuple[tuple[str, Spoil, str], ...] = (
    ("a budget out of reach", field(_MANIFEST, "budget_ms", value=1e-6), "is above the budget"),
    ("other answers", _golden(lambda a: a + 1), "outputs differ from the golden ones"),
    ("answers that are no number", _golden(lambda a: a * np.nan), "outputs differ from the golden ones"),
    ("endless answers", _golden(lambda a: a + np.inf), "outputs differ from the golden ones"),
    ("weights that are no number", signed(_MODEL, lambda data: _with_nan(data)), "outputs differ"),
)  # fmt: skip


def _with_nan(data: bytes) -> bytes:
    import onnx
    from onnx import numpy_helper

    proto = onnx.load_from_string(data)
    tensor = proto.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32("nan"), tensor.name))
    return bytes(proto.SerializeToString())


_VERIFY = ("bundle", *ON_SIMULATED)
_PAGE = (r"bundle/report\.html",)

CASES: tuple[Case, ...] = (
    *(Case("verify", f"bundle: {name}", _VERIFY, says, spoil=spoil) for name, spoil, says in (*_REFUSED, *_ASKED)),
    *(Case("verify", f"bundle: {name}", _VERIFY, says, 1, spoil, result=True) for name, spoil, says in _NO),
    *(
        Case("verify", f"JSON of a bundle: {name}", (*_VERIFY, "--json"), says, 1, spoil, result=True)
        for name, spoil, says in _NO[1:]
    ),
    # whatever cannot be read as a bundle's manifest is no bundle for a report
    *(
        Case("report", f"bundle: {name}", ("bundle",), f"{says}|is no run folder", spoil=spoil)
        for name, spoil, says in _REFUSED[::3]
    ),
    Case("verify", "a bundle that brings code", _VERIFY, "pass", code=0, result=True, spoil=_code),
    Case("verify", "a name of brackets", _VERIFY, r"name: \[/\]\[bold\]x", code=0, result=True,
         spoil=field(_MANIFEST, "name", value="[/][bold]x")),
    Case("verify", "a name of a terminal's escapes", _VERIFY, r"name: \\x1b\[2Jx", code=0, result=True,
         spoil=field(_MANIFEST, "name", value="\x1b[2Jx")),
    Case("verify", "half a character as name", _VERIFY, r"name: \\ud800", code=0, result=True,
         spoil=field(_MANIFEST, "name", value="\ud800")),
    Case("report", "half a character as name", ("bundle",), "report written", code=0, result=True, writes=_PAGE,
         spoil=field(_MANIFEST, "name", value="\ud800<script>")),
    Case("report", "an unknown device", ("bundle",), "report written", code=0, result=True, writes=_PAGE,
         spoil=field(_MANIFEST, "device", value="x" * 290)),
    Case("report", "a device that is a path", ("bundle",), "report written", code=0, result=True, writes=_PAGE,
         spoil=field(_MANIFEST, "device", value="../../etc")),
    Case("report", "a verdict of brackets", ("bundle",), "report written", code=0, result=True, writes=_PAGE,
         spoil=write(_B / "verdict.json", DEEP)),
    Case("report", "a bundle that brings code", ("bundle",), "report written", code=0, result=True, writes=_PAGE,
         spoil=_code),
)  # fmt: skip
