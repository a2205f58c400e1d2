"""``Device``: a file of ``devices/*.toml`` as a frozen value, and ``Fingerprint``: what the machine turned out to be.

A *home* is a folder that holds ``devices/`` and ``latency_tables/``. Homes are searched in this order:
``$HWSEARCH_HOME``, the current folder, the checkout that holds this package. A device's tables live in the home its
file came from, so a table in git stays beside the device that it describes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from hwsearch.device.ssh_settings import SshSettings
from hwsearch.errors import InputError, SchemaError

RUNTIMES = ("onnxruntime", "openvino", "simulated", "tensorrt")
TRANSPORTS = ("local", "ssh")
PRECISIONS = ("float32", "float16", "bfloat16", "int8")
#: These compute a network in the precision that it was exported in.
_AS_EXPORTED = ("onnxruntime", "simulated")
#: A runtime that is not hwsearch's own is a module of this name and the runtime's.
FOREIGN = "hwsearch_runtime_"

Option: TypeAlias = str | int | float

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: What a numeric option may be at most, either way.
_LARGEST = 1e300
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What decides a latency, as the device itself reports it. A table or predictor belongs to one fingerprint."""

    cpu: str
    isa: str
    runtime: str
    runtime_version: str
    threads: int
    precision: str
    system: str
    governor: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        """The inverse of :meth:`to_dict`.

        Raises:
            SchemaError: a field is missing, unknown or of another type; the message names it.
        """
        names = {f.name: int if f.name == "threads" else str for f in fields(cls)}
        if not isinstance(data, Mapping):
            raise SchemaError(f"fingerprint is {type(data).__name__}, not an object; profile the device again")
        wrong = sorted(set(names) ^ set(data))
        if wrong:
            raise SchemaError(
                f"fingerprint has missing or unknown fields {', '.join(map(str, wrong))}; profile the device again"
            )
        for name, kind in names.items():
            if not isinstance(data[name], kind) or isinstance(data[name], bool):
                raise SchemaError(
                    f"fingerprint.{name} is {data[name]!r}, not {kind.__name__}; profile the device again"
                )
        return cls(**data)

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """Fields that differ, each as ``"runtime_version: 1.31.1 against 1.30.0"`` (mine against the other's)."""
        return tuple(
            f"{f.name}: {getattr(self, f.name)} against {getattr(other, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        )


@dataclass(frozen=True, slots=True)
class Device:
    """One target: a runtime with its settings, reached over a transport.

    Attributes:
        name: the file's name without ``.toml``; also the name of the table's folder.
        runtime: one of ``RUNTIMES``, or ``x`` where a module ``hwsearch_runtime_x`` is installed.
        threads: threads that one inference may use.
        precision: what the weights and activations are; one of ``PRECISIONS``. On an ``int8`` device campaigns time
            8-bit networks, and candidates of a width search are priced as such; float networks stay files of float32,
            which a ``float16`` or ``bfloat16`` device rounds as it loads them.
        transport: how the agent is reached; one of ``TRANSPORTS``.
        options: settings of the runtime, by name; each runtime refuses names that it does not know.
        ssh: how a board is reached where ``transport`` is ``"ssh"``, else None.
        home: folder that holds ``latency_tables/``; not part of the device's identity.

    Example:
        >>> Device(name="toy", runtime="simulated").threads
        1
    """

    name: str
    runtime: str
    threads: int = 1
    precision: str = "float32"
    transport: str = "local"
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)
    ssh: SshSettings | None = None
    home: Path = field(default_factory=lambda: homes()[0], compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InputError(f"device name {self.name!r} is not usable; use letters, digits, '.', '_' and '-'")
        for label, value, known in (
            ("precision", self.precision, PRECISIONS),
            ("transport", self.transport, TRANSPORTS),
        ):
            if value not in known:
                raise InputError(f"device {self.name}: {label} {value!r} is not one of {', '.join(known)}")
        if self.runtime not in RUNTIMES and not _installed(self.runtime):
            raise InputError(
                f"device {self.name}: runtime {self.runtime!r} is not one of {', '.join(RUNTIMES)}, and no module "
                f"{FOREIGN}{self.runtime} is installed"
            )
        if self.runtime in _AS_EXPORTED and self.precision in ("float16", "bfloat16"):
            raise InputError(
                f"device {self.name}: {self.runtime} has no precision {self.precision!r}; use float32 or int8"
            )
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or not 1 <= self.threads <= 256:
            raise InputError(f"device {self.name}: threads is {self.threads!r}; use a whole number from 1 to 256")
        if (self.transport == "ssh") != (self.ssh is not None):
            raise InputError(
                f'device {self.name}: transport = "ssh" and the host to reach belong together: give both, or neither'
            )

    @property
    def table_folder(self) -> Path:
        """``latency_tables/<name>`` of the device's home: its tables, its predictor and ``device.json``."""
        return self.home / "latency_tables" / self.name

    @property
    def simulated(self) -> bool:
        """Whether no real machine is timed, so that no lock and no quiet is needed."""
        return self.runtime == "simulated"

    def option(self, name: str, default: float) -> float:
        """A numeric option, or ``default`` where the file does not give it.

        Raises:
            InputError: the value is not a finite number.
        """
        value = self.options.get(name, default)
        # compared, not converted: a whole number of a file may be too large for a float
        if isinstance(value, (bool, str)) or not -_LARGEST <= value <= _LARGEST:
            raise InputError(f"device {self.name}: options.{name} is {value!r:.40}; use a finite number")
        return float(value)

    def to_dict(self) -> dict[str, Any]:
        """The device as plain values, named as in its file (the home stays on the host)."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("home", "ssh")}
        return data | {"options": dict(self.options)} | (self.ssh.to_dict() if self.ssh else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Device:
        """The inverse of :meth:`to_dict`."""
        way = {f.name: data[f.name] for f in fields(SshSettings) if f.name in data}
        own = {name: value for name, value in data.items() if name not in way}
        return cls(**own, ssh=SshSettings(**({"host": ""} | way)) if way else None)

    def where_it_is(self) -> Device:
        """The device as the agent beside it sees it: it is local there."""
        return self if self.ssh is None else replace(self, transport="local", ssh=None)

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Device:
        """A device by the name of its file in a ``devices/`` folder, or by the path of a TOML file.

        Raises:
            InputError: no such device (the known ones are listed), an unreadable file, or a field with a wrong value
                (the message gives the field's path).

        Example:
            >>> Device.load("x86-ort-1t").runtime
            'onnxruntime'
        """
        text = os.fspath(name_or_path)
        if text.endswith(".toml") or os.sep in text:
            path = Path(text)
            if not path.is_file():
                raise InputError(f"device file {text} does not exist; `hwsearch device list` shows the known devices")
            return _read(path)
        for path in _device_files():
            if path.stem == text:
                return _read(path)
        known = (
            ", ".join(cls.names()) or f"none; no devices/*.toml in {' or '.join(map(str, homes()))}: set HWSEARCH_HOME"
        )
        raise InputError(f"unknown device {text!r}; known devices: {known}")

    def save(self) -> Path:
        """Write ``devices/<name>.toml`` into the device's home; an existing file is never overwritten.

        Raises:
            InputError: there is such a file, or the folder cannot be written.
        """
        path = self.home / "devices" / f"{self.name}.toml"
        values = {name: getattr(self, name) for name in ("runtime", "threads", "precision", "transport")}
        values |= self.ssh.to_dict() if self.ssh else {}
        lines = [f"{name} = {_toml(value)}" for name, value in values.items()]
        lines += ["", "[options]", *(f"{name} = {_toml(value)}" for name, value in self.options.items())]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write("\n".join(lines).rstrip() + "\n")
        except FileExistsError:
            raise InputError(f"{path} is there already: choose another name, or delete it") from None
        except (OSError, UnicodeEncodeError) as error:
            if isinstance(error, UnicodeEncodeError) or error.errno in _NO_ROOM:
                path.unlink(missing_ok=True)  # half of a file, which was made just now
            reason = "a text that is no UTF-8" if isinstance(error, UnicodeEncodeError) else error.strerror
            raise InputError(f"{path}: cannot be written ({reason}); choose a writable home") from None
        return path

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of all devices found, sorted."""
        return tuple(sorted({path.stem for path in _device_files()}))


def _toml(value: object) -> str:
    """A value as TOML has it: as JSON, but for characters that JSON writes in two halves, and DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _installed(runtime: object) -> bool:
    """Whether there is a module for a runtime that is not hwsearch's own."""
    if not isinstance(runtime, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", runtime):
        return False
    return find_spec(f"{FOREIGN}{runtime}") is not None


def homes() -> tuple[Path, ...]:
    """Folders that may hold ``devices/``, first one first; the first is also where new tables go by default."""
    found = [Path(__file__).resolve().parent.parent.parent]
    with contextlib.suppress(FileNotFoundError):  # somebody removed the current folder
        found.insert(0, Path.cwd())
    if os.environ.get("HWSEARCH_HOME"):
        found.insert(0, Path(os.environ["HWSEARCH_HOME"]).expanduser())
    return tuple(dict.fromkeys(path.resolve() for path in found))


def _device_files() -> list[Path]:
    """Every ``devices/*.toml`` of every home, first home first; a name seen twice is the first one's."""
    return [path for home in homes() for path in sorted((home / "devices").glob("*.toml"))]


def _read(path: Path) -> Device:
    """A checked device from a TOML file; every message starts with the file's path and the field's."""
    import tomllib  # here: a board may have an older Python

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the file and its permissions") from None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, brackets without an end
        raise InputError(f"{path}: is not valid TOML: {error}") from None
    try:
        checked = _validate(data)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    folder = path.resolve().parent
    home = folder.parent if folder.name == "devices" else folder
    try:
        return replace(Device.from_dict({"name": path.stem, **checked}), home=home)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _validate(data: dict[str, Any]) -> dict[str, Any]:
    """The file's fields through pydantic, imported here: a device-side agent has none of it."""
    from typing import Literal

    from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, ValidationError

    class DeviceFile(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        runtime: StrictStr
        threads: int = Field(default=1, ge=1, le=256)
        precision: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
        transport: Literal["local", "ssh"] = "local"
        host: str = ""
        port: int = Field(default=0, ge=1, le=65535)
        identity: str = ""
        ssh_options: list[str] = Field(default_factory=list)
        python: str = ""
        folder: str = ""
        patience_s: float = Field(default=0, ge=0, allow_inf_nan=False)
        options: dict[str, StrictInt | StrictFloat | StrictStr] = Field(default_factory=dict)

    try:
        return DeviceFile.model_validate(data).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # pydantic appends the tried member of a union to the path ("options.gmacs.int"); the file has no such field
        where = ".".join(str(part) for part in first["loc"] if part not in ("int", "float", "str")) or "the file"
        given = f" (found {first['input']!r:.60})" if first["type"] != "missing" else ""
        more = f"; {len(error.errors()) - 1} more fields are wrong" if where and len(error.errors()) > 3 else ""
        raise ValueError(f"{where}: {first['msg']}{given}{more}") from None
