"""``RunConfig``: the TOML file of ``hwsearch run`` and ``hwsearch search``, checked before anything starts.

A file names what it changes; a setting that is left out (``None`` here) takes the default of the part that uses it, so
no default is written down twice. pydantic checks the file at this border; behind it are frozen dataclasses only.

    [run]
    name = "first"                       # the run folder is runs/first
    [device]
    name = "x86-ort-1t"
    [model]
    factory = "hwsearch.models.resnet:resnet_small"
    input = "1x1x28x28"
    [search]
    budget = "50%"                       # of the full network's measured ms; or budget_ms = 3.0
    [supernet]
    epochs = 2
    [train]
    epochs = 4
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hwsearch.errors import InputError
from hwsearch.search.journal import short

if TYPE_CHECKING:
    from hwsearch.search.cafenet import CafeNetConfig
    from hwsearch.train.data import Examples
    from hwsearch.train.loop import TrainConfig
    from hwsearch.train.task import Task

# The description of a type is what an error message tells the user to give.
Count = Annotated[int, Field(strict=True, ge=1, description="a whole number of 1 or more")]
Whole = Annotated[int, Field(strict=True, ge=0, description="a whole number of 0 or more")]
Threads = Annotated[int, Field(strict=True, ge=1, le=256, description="a whole number from 1 to 256")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number above 0")]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number of 0 or more")]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")]
Below1 = Annotated[
    float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False, description="a number from 0 up to, not including, 1")
]
Switch = Annotated[bool, Field(strict=True, description="true or false")]
Text = Annotated[str, Field(strict=True, min_length=1, description="text in quotes")]
Name = Annotated[
    str,
    Field(
        strict=True,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="up to 64 letters, digits, '.', '_' and '-', the first a letter or digit",
    ),
]
Factory = Annotated[
    str,
    Field(
        strict=True,
        pattern=r"^(timm:[\w.]+|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*)$",
        description='package.module:factory or timm:name, such as "hwsearch.models.vgg:vgg_small"',
    ),
]
Shape = Annotated[
    str,
    Field(
        strict=True, pattern=r"^[1-9]\d{0,6}(x[1-9]\d{0,6})+$", description='sizes joined by x, such as "1x3x224x224"'
    ),
]
Percent = Annotated[
    str,
    Field(
        strict=True,
        pattern=r"^\d{1,3}(\.\d+)?\s*%$",
        description='a share of the full network\'s measured ms, such as "50%", or set budget_ms',
    ),
]
Ms = Annotated[
    float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number of milliseconds above 0, such as 3.0")
]
Quantile = Annotated[float, Field(strict=True, ge=0.5, lt=1, description="a number from 0.5 up to, not including, 1")]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class RunSettings:
    """``[run]``: what the run is called and what it is drawn from. ``threads`` are torch's; they change bits."""

    __pydantic_config__ = _STRICT
    name: Name = "run"
    seed: Whole = 0
    threads: Threads = 1
    folder: Text = "runs"


@dataclass(frozen=True)
class DeviceSettings:
    """``[device]``: a file of ``devices/``."""

    __pydantic_config__ = _STRICT
    name: Text


@dataclass(frozen=True)
class ProfileSettings:
    """``[profile]``: how long the device is profiled where it has no table yet."""

    __pydantic_config__ = _STRICT
    minutes: Positive | None = None


@dataclass(frozen=True)
class ModelSettings:
    """``[model]``: the network at full width, the shape of one inference, the factory's arguments, and trained weights
    of the user's own (safetensors): where the super-network begins, and the winner with ``search.start = "model"``."""

    __pydantic_config__ = _STRICT
    factory: Factory
    input: Shape
    kwargs: dict[str, Any] = field(default_factory=dict)
    weights: Text | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``input`` as numbers, batch first."""
        return tuple(int(size) for size in self.input.split("x"))


@dataclass(frozen=True)
class DataSettings:
    """``[data]``: what is learnt. ``valid`` training examples are held out for choosing; ``limit`` counts both."""

    __pydantic_config__ = _STRICT
    kind: Literal["fashion-mnist", "synthetic"] = "fashion-mnist"
    folder: Text | None = None
    limit: Count | None = None
    valid: Count | None = None
    label_smoothing: Below1 | None = None
    shift: Whole | None = None
    flip: Switch | None = None
    size: Count | None = None

    def load(self, seed: int) -> tuple[Task, Examples]:
        """The task, and the test set that no search may look at.

        Raises:
            InputError: files are missing, or more examples are held out than there are.
        """
        from hwsearch.train.task import load_task

        given = _given(self, "valid", "label_smoothing", "shift", "flip", "size")
        return load_task(self.folder or self.kind, limit_to=self.limit, seed=seed, **given)


@dataclass(frozen=True)
class SearchSettings:
    """``[search]``: the budget, the width space and how it is searched. See ``CafeNetConfig`` for most of them.

    Exactly one of ``budget`` (a share of the full network's measured time) and ``budget_ms`` is given. ``quantum`` is
    the step of widths in channels, ``minimum`` the narrowest width (channels, or a share of the full width).
    ``candidates`` caps the choices that are scored. With ``floor`` the objective is the other one: the fewest
    milliseconds, at most the budget, of a network that keeps this metric on held-out examples.
    """

    __pydantic_config__ = _STRICT
    method: Literal["cafenet"] = "cafenet"
    budget: Percent | None = None
    budget_ms: Ms | None = None
    quantile: Quantile | None = None
    quantum: Count = 1
    minimum: Annotated[Count | Positive | None, Field(description="channels, or a share such as 0.25")] = None
    offset: Whole | None = None
    bin_units: Count | None = None
    patterns: Count | None = None
    full_steps: Switch | None = None
    distillation: Share | None = None
    sharing: Literal["local", "bilateral"] | None = None
    complementary: Switch | None = None
    bins: Literal["ms", "macs", "none"] | None = None
    smallest_bin: Count | None = None
    largest_bin: Count | None = None
    refinements: Whole | None = None
    finalists: Whole | None = None
    finalist_share: Share | None = None
    population: Annotated[int, Field(strict=True, ge=2, description="a whole number of 2 or more")] | None = None
    generations: Count | None = None
    candidates: Count | None = None
    calibration_images: Count | None = None
    score_images: Count | None = None
    score_patterns: Count | None = None
    measured: Count | None = None
    rounds: Count | None = None
    floor: Annotated[float, Field(strict=True, allow_inf_nan=False, description="a number, such as 0.9")] | None = None
    start: Literal["scratch", "model", "supernet", "all"] | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.budget_ms is None):
            raise InputError(
                'search needs either budget, such as "50%", or budget_ms, such as 3.0: give one of the two'
            )
        if self.budget is not None and not 0 < self.share <= 100:
            raise InputError(f"search.budget is {self.budget!r}: give a share above 0% and up to 100%")
        if isinstance(self.minimum, float) and self.minimum > 1:
            raise InputError(f"search.minimum is {self.minimum!r}: give whole channels, or a share up to 1.0")

    @property
    def share(self) -> float:
        """``budget`` in per cent; 100 where milliseconds are given."""
        return float(self.budget.rstrip("% \t")) if self.budget else 100.0

    def max_ms(self, full_ms: float) -> float:
        """The budget in milliseconds, of a full network that was measured at ``full_ms``."""
        return self.budget_ms if self.budget_ms is not None else full_ms * self.share / 100


@dataclass(frozen=True)
class TrainSettings:
    """``[supernet]`` and ``[train]``: see ``TrainConfig``. ``steps`` and ``epochs`` exclude each other."""

    __pydantic_config__ = _STRICT
    epochs: Positive | None = None
    steps: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    final_rate: NotNegative | None = None
    warmup: Below1 | None = None
    momentum: Below1 | None = None
    nesterov: Switch | None = None
    weight_decay: NotNegative | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    channels_last: Switch | None = None
    checkpoint_s: NotNegative | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise InputError("a training has both epochs and steps: give one of the two")

    def config(self, run: RunSettings, section: str = "train") -> TrainConfig:
        """The training that these settings stand for; ``section`` is their name, for messages.

        Raises:
            InputError: values that do not go together.
        """
        from hwsearch.train.loop import TrainConfig

        try:
            return TrainConfig(seed=run.seed, threads=run.threads, **_given(self))
        except InputError as error:
            raise InputError(f"[{section}]: {error}") from error


@dataclass(frozen=True)
class DeploySettings:
    """``[deploy]``: where the bundle goes; by default ``bundle`` in the run folder."""

    __pydantic_config__ = _STRICT
    output: Text | None = None


@dataclass(frozen=True)
class RunConfig:
    """A whole run, section by section.

    Example:
        >>> config = RunConfig.from_dict({
        ...     "device": {"name": "simulated"},
        ...     "model": {"factory": "hwsearch.models.vgg:vgg_small", "input": "1x1x28x28"},
        ...     "search": {"budget": "50%"},
        ... })
        >>> config.search.max_ms(full_ms=4.0), config.model.input_shape
        (2.0, (1, 1, 28, 28))
    """

    __pydantic_config__ = _STRICT
    device: DeviceSettings
    model: ModelSettings
    search: SearchSettings
    run: RunSettings = field(default_factory=RunSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    data: DataSettings = field(default_factory=DataSettings)
    supernet: TrainSettings = field(default_factory=TrainSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    deploy: DeploySettings = field(default_factory=DeploySettings)

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a TOML file.

        Raises:
            InputError: one line: the file cannot be read, is not TOML, or a field is wrong (its path, its value and
                what is allowed; an unknown one with the nearest known name).
        """
        file = Path(path)
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the config {file}: {error.strerror}; check the path") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{file} is not valid TOML: {str(error).splitlines()[0]}") from error
        return cls.from_dict(data, source=str(file))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "config") -> RunConfig:
        """Check plain values; ``source`` begins the message of an error.

        Raises:
            InputError: see ``load``.
        """
        try:
            return TypeAdapter(cls).validate_python(dict(data))
        except ValidationError as error:
            raise InputError(f"{source}: {_explain(cls, error)}") from error
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every section and field."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What decides the result: all but where files go and how often checkpoints are written."""
        plain = self.to_dict()
        del plain["run"]["folder"], plain["deploy"], plain["supernet"]["checkpoint_s"], plain["train"]["checkpoint_s"]
        return plain

    @property
    def run_folder(self) -> Path:
        """``<folder>/<name>``."""
        return Path(self.run.folder) / self.run.name

    @property
    def bundle_folder(self) -> Path:
        """Where the bundle goes."""
        return Path(self.deploy.output) if self.deploy.output else self.run_folder / "bundle"

    def training(self) -> TrainConfig:
        """How networks are trained on their own: the full one, the baselines' and the winner.

        Raises:
            InputError: values that do not go together.
        """
        return self.train.config(self.run, "train")

    def cafenet(self) -> CafeNetConfig:
        """The search that ``[search]``, ``[supernet]`` and ``[train]`` stand for.

        Raises:
            InputError: values that do not go together.
        """
        from hwsearch.search.cafenet import CafeNetConfig
        from hwsearch.search.evolution import EvolutionSettings
        from hwsearch.search.scoring import ScoringConfig

        search = self.search
        evolution = _given(search, "population", "generations", evaluations="candidates")
        scoring = _given(search, "calibration_images", images="score_images", patterns="score_patterns")
        names = (
            "offset",
            "bin_units",
            "patterns",
            "full_steps",
            "distillation",
            "sharing",
            "complementary",
            "bins",
            "smallest_bin",
            "largest_bin",
            "refinements",
            "finalists",
            "finalist_share",
            "measured",
            "rounds",
            "floor",
            "start",
        )
        return CafeNetConfig(
            training=self.supernet.config(self.run, "supernet"),
            winner=self.training(),
            evolution=EvolutionSettings(**evolution),
            scoring=ScoringConfig(**scoring),
            **_given(search, *names),
        )


def _given(settings: Any, *names: str, **renamed: str) -> dict[str, Any]:
    """The fields that were given (all of them by default); ``renamed`` maps new names to fields."""
    if not names and not renamed:
        names = tuple(f.name for f in dataclasses.fields(settings))
    pairs = {**{name: name for name in names}, **renamed}
    return {new: value for new, old in pairs.items() if (value := getattr(settings, old)) is not None}


def _explain(root: type, error: ValidationError) -> str:
    """One line for everything that is wrong: the first field in full, the paths of the others."""
    found: dict[str, dict[str, Any]] = {}
    for item in error.errors(include_url=False):
        path, _ = _field(root, item["loc"])
        found.setdefault(_printable(".".join(path)), dict(item))
    # An unknown key is often the reason why another one is missing: it goes first.
    order = sorted(found, key=lambda path: found[path]["type"] != "unexpected_keyword_argument")
    first = order[0]
    more = f" (also wrong: {', '.join(order[1:])})" if len(order) > 1 else ""
    return _sentence(root, first, found[first]) + more


def _printable(text: str) -> str:
    """A key as it stands in the file, on one line whatever it is made of."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _sentence(root: type, path: str, item: dict[str, Any]) -> str:
    """What is wrong with one field and what to do."""
    parts, annotation = _field(root, item["loc"])
    if item["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(_section(root, parts[:-1]))]
        close = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.6)
        where = f"[{parts[0]}]" if len(parts) > 1 else "a config"
        hint = f"did you mean {close[0]}?" if close else f"{where} has {', '.join(known)}"
        return f"{path} is no setting: {hint}"
    if item["type"] == "missing":
        if dataclasses.is_dataclass(annotation):
            return f"the section [{path}] is missing: add it"
        return f"{path} is missing: give {_allowed(annotation) or 'a value'}"
    if item["type"] in ("dataclass_type", "dict_type"):
        return f"{path} is {short(item['input'])}: give a section [{path}]"
    allowed = _allowed(annotation) or str(item["msg"]).removeprefix("Input should be ")
    return f"{path} is {short(repr(item['input']))}: give {allowed}"


def _field(root: type, location: tuple[Any, ...]) -> tuple[list[str], Any]:
    """The path of a field as the file spells it, and its annotation; pydantic's own additions are left out."""
    path: list[str] = []
    annotation: Any = root
    for part in location:
        if not dataclasses.is_dataclass(annotation):
            # Inside a union pydantic appends the member it tried; inside free-form values the file's own keys go on.
            if annotation is not None and get_origin(annotation) is dict:
                path.append(str(part))
            continue
        path.append(str(part))
        annotation = get_type_hints(annotation, include_extras=True).get(str(part))
    return path, annotation


def _section(root: type, path: list[str]) -> Any:
    """The dataclass of a section."""
    return _field(root, tuple(path))[1]


def _allowed(annotation: Any) -> str:
    """What a field may be, in words."""
    for argument in getattr(annotation, "__metadata__", ()):
        if getattr(argument, "description", None):
            return str(argument.description)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return next(filter(None, (_allowed(member) for member in get_args(annotation))), "")
    return ""


def search_config(
    *, method: str, model: str | None, shape: str | None, data: str, budget: str | None, folder: Path | None
) -> RunConfig:
    """The config of a search that is described by options instead of a file.

    Args:
        budget: ``DEVICE:MS``.
        folder: the run folder; by default ``runs/<method>-<device>``.

    Raises:
        InputError: an option is missing or wrong; the message names it.

    Example:
        >>> search_config(method="cafenet", model="hwsearch.models.vgg:vgg_small", shape="1x1x28x28",
        ...               data="synthetic", budget="simulated:0.2", folder=None).run_folder.as_posix()
        'runs/cafenet-simulated'
    """
    for name, value in (("--model", model), ("--input", shape), ("--budget", budget)):
        if value is None:
            raise InputError(f"search needs {name}, or a config file: see hwsearch search --help")
    device, _, ms = (budget or "").rpartition(":")
    try:
        max_ms = float(ms)
    except ValueError:
        max_ms = math.nan
    if not device or not math.isfinite(max_ms) or max_ms <= 0:
        raise InputError(f"--budget is {budget!r}: give DEVICE:MS with milliseconds above 0, such as x86-ort-1t:3.0")
    known = data in ("fashion-mnist", "synthetic")
    path = folder if folder is not None else Path("runs") / f"{method}-{Path(device).stem}"
    return RunConfig.from_dict(
        {
            "run": {"name": path.name, "folder": str(path.parent)},
            "device": {"name": device},
            "model": {"factory": model, "input": shape},
            "data": {"kind": data} if known else {"folder": data},
            "search": {"method": method, "budget_ms": max_ms},
        },
        source="search options",
    )
