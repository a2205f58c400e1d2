"""``Bundle``: a network that carries the proof of itself, in a folder of plain data.

    bundle/
      manifest.json                  schema, version, device, budget, predicted and measured ms, SHA-256 of every file
      model.onnx                     the folded network, weights inside
      input_0.npy, output_0.npy ...  golden inputs, and what the network must answer to them
      float_0.npy ...                of an 8-bit network: what the float network answers
      canary.onnx                    what the device's speed is told by, for a board that cannot write it
      quantisation.json              of an 8-bit network: its layers, what 8 bits cost in each (see quantised_report.py)

Reading needs the standard library and numpy alone, and trusts nothing: only files that the manifest lists are opened,
by plain names (no folders, no links), and only if size and SHA-256 agree; arrays are parsed without pickle, and a model
that points to other files is refused. Nothing in a bundle is ever executed as code. Other files in the folder (a
verdict, a report) are left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hwsearch.deploy.arrays import parse_npy
from hwsearch.deploy.wire import refuse_external_data
from hwsearch.errors import InputError, SchemaError

SCHEMA, VERSION = "hwsearch.bundle", 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_FILE_BYTES = 1 << 31
MAX_CASES = 64


@dataclass(frozen=True, slots=True)
class Golden:
    """One golden case: an input and the output that the unfolded PyTorch network gave for it (static shapes).

    Of an 8-bit network ``output`` is its own answer, and ``reference`` that of the float network.
    """

    input: np.ndarray
    output: np.ndarray
    reference: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that has been read and whose every byte agrees with its manifest.

    ``relative_tolerance`` and ``absolute_tolerance`` say how far a runtime's output may be from the golden one:
    ``max|got - golden| <= absolute + relative * max|golden|``. ``noise_floor`` and ``reference_ms`` are those of the
    device when the bundle was made. Milliseconds and the budget are None where they were not given.
    ``promised_sqnr_db`` is what an 8-bit network must leave of the float one's output on the golden cases; ``report``
    the content of its ``quantisation.json``.
    """

    folder: Path
    name: str
    device: str
    model: bytes = field(repr=False)
    cases: tuple[Golden, ...] = field(repr=False)
    input_name: str = "input"
    output_name: str = "output"
    budget_ms: float | None = None
    predicted_ms: float | None = None
    measured_ms: float | None = None
    noise_floor: float | None = None
    reference_ms: float | None = None
    relative_tolerance: float = 1e-4
    absolute_tolerance: float = 1e-5
    macs: int | None = None
    parameters: int | None = None
    fingerprint: dict[str, Any] | None = None
    sha256: dict[str, str] = field(default_factory=dict, repr=False)
    precision: str = "float32"
    promised_sqnr_db: float | None = None
    report: dict[str, Any] | None = field(default=None, repr=False)
    canary: bytes | None = field(default=None, repr=False)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the network's input, batch first."""
        return tuple(self.cases[0].input.shape)


def read_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Read a bundle and check every byte of it.

    Raises:
        InputError: there is no such folder, or no manifest in it.
        SchemaError: anything in it is not what the manifest says; the message names the file.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give the folder that `hwsearch deploy` wrote")
    if not os.path.lexists(path / MANIFEST):
        raise InputError(f"{path} holds no {MANIFEST}: give the folder that `hwsearch deploy` wrote")
    manifest = _Fields(_parse(_read(path, MANIFEST, _MAX_MANIFEST_BYTES)), MANIFEST)
    schema, version = manifest.raw("schema"), manifest.raw("version")
    if schema != SCHEMA:
        raise SchemaError(f"{path / MANIFEST} is not a bundle's manifest (schema {schema!r})")
    if version != VERSION or isinstance(version, bool):
        raise SchemaError(f"{path / MANIFEST} has version {version!r}, this hwsearch reads {VERSION}: deploy again")
    listed = _listed(manifest.mapping("files"))
    contents = {name: _checked(path, name, size, digest) for name, (size, digest) in listed.items()}

    def content(name: str, where: str) -> bytes:
        if name not in contents:
            raise SchemaError(f"{MANIFEST}: {where} names {name!r}, which is not in its list of files")
        return contents[name]

    model_name = manifest.text("model")
    model = content(model_name, "model")
    refuse_external_data(model, model_name)
    cases = []
    for number, case in enumerate(manifest.sequence("cases", MAX_CASES)):
        names = _Fields(case, f"{MANIFEST}: cases[{number}]")
        keys = ("input", "output", "reference") if "reference" in names.data else ("input", "output")
        pair = ((names.text(key), f"cases[{number}].{key}") for key in keys)
        cases.append(Golden(*(parse_npy(content(name, where), name) for name, where in pair)))
        if cases[-1].reference is not None and cases[-1].reference.shape != cases[-1].output.shape:
            raise SchemaError(f"{MANIFEST}: cases[{number}]: reference and output differ in shape")
    if not cases:
        raise SchemaError(f"{MANIFEST}: cases is empty; a bundle carries at least one golden case")
    if len({(c.input.shape, c.output.shape, c.input.dtype, c.output.dtype) for c in cases}) > 1:
        raise SchemaError(f"{MANIFEST}: the golden cases differ in shape or type")
    tolerance = _Fields(manifest.mapping("tolerance"), f"{MANIFEST}: tolerance")
    fingerprint = manifest.raw("fingerprint")
    canary = None
    if "canary" in manifest.data:  # bundles of earlier releases have none
        canary = content(manifest.text("canary"), "canary")
        refuse_external_data(canary, manifest.text("canary"))
    promised, report = None, None
    if "quantisation" in manifest.data:
        told = _Fields(manifest.mapping("quantisation"), f"{MANIFEST}: quantisation")
        promised = told.number("promised_sqnr_db", low=-200.0, high=200.0)
        name = told.text("report")
        report = _parse(content(name, "quantisation.report"), name)
        if not isinstance(report, dict):
            raise SchemaError(f"{name} is not a JSON object: the bundle is damaged")
    return Bundle(
        folder=path,
        name=manifest.text("name"),
        device=manifest.text("device"),
        model=model,
        cases=tuple(cases),
        input_name=manifest.text("input_name"),
        output_name=manifest.text("output_name"),
        relative_tolerance=tolerance.number("relative", low=0.0, high=0.1),
        absolute_tolerance=tolerance.number("absolute", low=0.0, high=1.0),
        fingerprint=fingerprint if isinstance(fingerprint, dict) else None,
        macs=manifest.count("macs"),
        parameters=manifest.count("parameters"),
        sha256={name: digest for name, (_, digest) in listed.items()},
        precision=manifest.text("precision"),
        promised_sqnr_db=promised,
        report=report,
        canary=canary,
        **{key: manifest.optional_ms(key) for key in _MILLISECONDS},
    )


def is_bundle(folder: Path) -> bool:
    """Whether a folder's manifest says that it is a bundle, of whatever version (nothing else is checked)."""
    try:
        manifest = _parse(_read(folder, MANIFEST, _MAX_MANIFEST_BYTES))
    except SchemaError:
        return False
    return isinstance(manifest, dict) and manifest.get("schema") == SCHEMA


def listed_names(folder: Path) -> frozenset[str]:
    """The files that belong to a bundle of whatever version: its manifest and what that lists; none of another folder.

    Raises:
        SchemaError: the manifest cannot be read.
    """
    manifest = _parse(_read(folder, MANIFEST, _MAX_MANIFEST_BYTES))
    files = manifest.get("files") if isinstance(manifest, dict) else None
    return frozenset((MANIFEST, *files)) if isinstance(files, dict) else frozenset()


_MILLISECONDS = ("budget_ms", "predicted_ms", "measured_ms", "noise_floor", "reference_ms")


@dataclass(frozen=True)
class _Fields:
    """Typed access to a JSON object; every refusal names the field."""

    data: Any
    where: str

    def __post_init__(self) -> None:
        if not isinstance(self.data, dict):
            raise SchemaError(f"{self.where} is not a JSON object")

    def raw(self, key: str) -> Any:
        if key not in self.data:
            raise SchemaError(f"{self.where}: field {key!r} is missing; the bundle is damaged or of another version")
        return self.data[key]

    def text(self, key: str) -> str:
        value = self.raw(key)
        if not isinstance(value, str) or not value or len(value) > 300:
            raise SchemaError(f"{self.where}: {key} is {_short(value)}, not a text")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise SchemaError(f"{self.where}: {key} is {_short(value)}, not a number from {low:g} to {high:g}")
        return float(value)

    def optional_ms(self, key: str) -> float | None:
        return None if self.raw(key) is None else self.number(key, low=0.0, high=1e9)

    def count(self, key: str) -> int | None:
        return None if self.data.get(key) is None else int(self.number(key, low=0, high=1e18))

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.raw(key)
        if not isinstance(value, dict):
            raise SchemaError(f"{self.where}: {key} is {_short(value)}, not an object")
        return value

    def sequence(self, key: str, most: int) -> list[Any]:
        value = self.raw(key)
        if not isinstance(value, list) or len(value) > most:
            raise SchemaError(f"{self.where}: {key} is not a list of at most {most}")
        return value


def _listed(files: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The manifest's list of files: name -> (bytes, SHA-256), all names plain."""
    listed = {}
    for name, entry in files.items():
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise SchemaError(f"{MANIFEST}: file name {_short(name)} is refused; plain names only, no folders, no '..'")
        fields = _Fields(entry, f"{MANIFEST}: files[{name!r}]")
        size, digest = fields.number("bytes", low=0, high=_MAX_FILE_BYTES), fields.text("sha256")
        if size != int(size) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise SchemaError(f"{MANIFEST}: files[{name!r}] has no whole size or no SHA-256")
        listed[name] = (int(size), digest)
    return listed


def _parse(content: bytes, name: str = MANIFEST) -> Any:
    def refuse(value: str) -> Any:
        raise ValueError(f"{value} is not a number of JSON")

    try:
        return json.loads(content.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{name} is not valid JSON ({_short(str(error))}): the bundle is damaged") from error


def _checked(folder: Path, name: str, size: int, digest: str) -> bytes:
    content = _read(folder, name, size)
    if len(content) != size:
        raise SchemaError(f"{name} has {len(content)} bytes, the manifest says {size}: the bundle is damaged")
    if hashlib.sha256(content).hexdigest() != digest:
        raise SchemaError(f"{name} does not have the SHA-256 of the manifest: the bundle is damaged or was changed")
    return content


def _read(folder: Path, name: str, most: int) -> bytes:
    """The bytes of a regular file that is no link; one byte more than ``most`` at the most."""
    try:
        # O_NONBLOCK: opening a named pipe must not wait for its writer before it can be refused.
        descriptor = os.open(folder / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        what = "is a link, which is refused" if os.path.islink(folder / name) else f"cannot be read ({error.strerror})"
        raise SchemaError(f"{name} {what}: the bundle is incomplete or was changed") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > most:
        os.close(descriptor)
        if stat.S_ISREG(status.st_mode):
            raise SchemaError(f"{name} has {status.st_size} bytes, at most {most} are expected: refused")
        raise SchemaError(f"{name} is not a regular file: refused")
    with os.fdopen(descriptor, "rb") as file:
        return file.read(most + 1)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
