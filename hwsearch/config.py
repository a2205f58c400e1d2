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
    budget = "50%"                       # of the full network's measured ms; or budget_ms = 3.0; or budgets = [...]
    [[devices]]                          # further devices whose budgets the one network keeps as well
    name = "x86-ort-2t"
    budget = "60%"
    [[groups]]
    pattern = "stem.*"                   # layers by name or pattern
    freeze = true                        # or quantum, minimum, maximum
    [supernet]
    epochs = 2
    [train]
    epochs = 4
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hwsearch.config_branches import ONE_RUN, BranchSettings
from hwsearch.config_cells import CellSettings
from hwsearch.config_data import DataSettings
from hwsearch.config_devices import FurtherDevice, allowed_ms, check_budget, check_devices
from hwsearch.config_family import Budgets, check_budgets, ms_of
from hwsearch.config_filters import FilterSettings
from hwsearch.config_masks import MaskSettings
from hwsearch.config_messages import explain
from hwsearch.config_training import NetworkTraining, TrainSettings, given
from hwsearch.config_types import (
    Below1,
    Count,
    Factory,
    Ms,
    Name,
    Percent,
    Positive,
    Quantile,
    Shape,
    Share,
    Switch,
    Text,
    Threads,
    Whole,
    Width,
)
from hwsearch.config_weights import WeightSettings
from hwsearch.errors import InputError

if TYPE_CHECKING:
    from hwsearch.deploy.quantise import Int8Settings
    from hwsearch.graph.control import GroupRule
    from hwsearch.search.cafenet import CafeNetConfig
    from hwsearch.search.conetv2_config import ConetConfig
    from hwsearch.search.mgas_config import MgasConfig
    from hwsearch.search.mgas_widths_config import FilterConfig
    from hwsearch.search.pas_config import PasConfig
    from hwsearch.search.repnas_search import RepNASSearchConfig
    from hwsearch.train.loop import TrainConfig

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
class GroupSettings:
    """``[[groups]]``: what is decided about the width groups that ``pattern`` names, see ``GroupRule``.

    ``pattern`` is a layer or a glob of layers (``stages.2.*``); rules apply in the file's order, the last one wins.
    """

    __pydantic_config__ = _STRICT
    pattern: Text
    freeze: Switch = False
    quantum: Count | None = None
    minimum: Width | None = None
    maximum: Width | None = None

    def __post_init__(self) -> None:
        if not self.freeze and self.quantum is None and self.minimum is None and self.maximum is None:
            raise InputError(
                f"the rule for {self.pattern!r} says nothing: give freeze = true, quantum, minimum or maximum"
            )
        for name in ("minimum", "maximum"):
            value = getattr(self, name)
            if isinstance(value, float) and value > 1:
                raise InputError(
                    f"the {name} for {self.pattern!r} is {value!r}: give whole units, or a share up to 1.0"
                )

    def rule(self) -> GroupRule:
        """The same for ``hwsearch.graph.control``."""
        from hwsearch.graph.control import GroupRule

        return GroupRule(self.pattern, self.freeze, self.quantum, self.minimum, self.maximum)


#: Settings of CafeNet itself, of its evolution and scoring, of CONetV2, and of either method.
_CAFENET = (
    "offset", "bin_units", "patterns", "full_steps", "distillation", "sharing", "complementary", "bins", "smallest_bin",
    "largest_bin", "refinements", "finalists", "finalist_share", "floor",
)  # fmt: skip
_CAFENET_ONLY = (
    *_CAFENET, "population", "generations", "candidates", "calibration_images", "score_images", "score_patterns",
)  # fmt: skip
_CONETV2_ONLY = ("accept", "trials", "momentum", "guard", "transfer", "adas", "stairs")
_BOTH = ("measured", "rounds", "start")


@dataclass(frozen=True)
class SearchSettings:
    """``[search]``: the budget, the width space and how it is searched. See ``CafeNetConfig`` for most of them.

    Exactly one of ``budget`` (a share of the full network's measured time) and ``budget_ms`` is given. ``quantum`` is
    the step of widths in channels, ``minimum`` the narrowest width (channels, or a share of the full width).
    ``candidates`` caps the choices that are scored. With ``floor`` the objective is the other one: the fewest
    milliseconds, at most the budget, of a network that keeps this metric on held-out examples.

    With ``method = "conetv2"`` see ``ConetConfig``, with ``"repnas"`` ``[branches]``: its widths are searched as
    CafeNet's are, or without a budget stay as they are. A setting that only another method has is refused.
    ``budgets``, with ``"pas"``, asks for a network for each of them, from one trained parent.
    """

    __pydantic_config__ = _STRICT
    method: Literal["cafenet", "conetv2", "repnas", "pas", "mgas"] = "cafenet"
    budget: Percent | None = None
    budget_ms: Ms | None = None
    budgets: Budgets | None = None
    quantile: Quantile | None = None
    quantum: Count = 1
    minimum: Width | None = None
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
    start: Literal["scratch", "model", "supernet", "all", "trial", "masked"] | None = None
    accept: Literal["metropolis", "conetv2", "greedy"] | None = None
    trials: Count | None = None
    momentum: Below1 | None = None
    guard: Switch | None = None
    transfer: Literal["preserve", "svd"] | None = None
    adas: Switch | None = None
    stairs: Switch | None = None

    def __post_init__(self) -> None:
        foreign: tuple[str, ...] = _CAFENET_ONLY if self.method in ("conetv2", "pas", "mgas") else ()
        foreign += ("start",) if self.method == "mgas" else ()
        foreign += () if self.method == "conetv2" else _CONETV2_ONLY
        for name in foreign:
            if getattr(self, name) is not None:
                raise InputError(f"search.{name} is no setting of the method {self.method}: leave it out")
        if self.budgets is not None:
            check_budgets(self.budgets, self.method, alone=self.budget is None and self.budget_ms is None)
        elif self.method != "repnas" or self.has_budget:
            check_budget("search", self.budget, self.budget_ms)
        if isinstance(self.minimum, float) and self.minimum > 1:
            raise InputError(f"search.minimum is {self.minimum!r}: give whole channels, or a share up to 1.0")

    @property
    def has_budget(self) -> bool:
        """Whether widths must be found that keep a budget."""
        return self.budget is not None or self.budget_ms is not None or self.budgets is not None

    def max_ms(self, full_ms: float) -> float:
        """The budget in milliseconds, the smallest of several, of a full network that was measured at ``full_ms``."""
        if self.budgets is not None:
            return min(ms_of(budget, full_ms) for budget in self.budgets)
        return allowed_ms(self.budget, self.budget_ms, full_ms)


@dataclass(frozen=True)
class DeploySettings:
    """``[deploy]``: where the bundle goes (by default ``bundle`` in the run folder), which network (``better``: of what
    was found and uniform scaling in the budget the one with the better score on held-out images; ``found``), in which
    precision (by default the device's). For 8 bits see ``Int8Settings``: layers in float32, what may be lost, images.
    """

    __pydantic_config__ = _STRICT
    output: Text | None = None
    deliver: Literal["better", "found"] = "better"
    precision: Literal["float32", "int8"] | None = None
    keep_fp32: Annotated[
        Whole | Literal["auto"] | tuple[Text, ...],
        Field(description='a number of layers, "auto", or a list of their names'),
    ] | None = None  # fmt: skip
    tolerance: Share | None = None
    images: Count | None = None
    methods: tuple[Text, ...] | None = None

    def __post_init__(self) -> None:
        if self.precision == "float32" and (eight := given(self, "keep_fp32", "tolerance", "images", "methods")):
            raise InputError(f"deploy.{next(iter(eight))} is for 8 bits: leave it out, or set deploy.precision to int8")

    def int8(self) -> Int8Settings:
        """How the network is brought to 8 bits.

        Raises:
            InputError: an unknown calibration method.
        """
        from hwsearch.deploy.quantise import Int8Settings

        return Int8Settings(**given(self, "keep_fp32", "tolerance", "images", "methods"))


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
    groups: tuple[GroupSettings, ...] = ()
    devices: tuple[FurtherDevice, ...] = ()
    run: RunSettings = field(default_factory=RunSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    data: DataSettings = field(default_factory=DataSettings)
    supernet: TrainSettings = field(default_factory=TrainSettings)
    trial: TrainSettings = field(default_factory=TrainSettings)
    train: NetworkTraining = field(default_factory=NetworkTraining)
    branches: BranchSettings = field(default_factory=BranchSettings)
    masks: MaskSettings = field(default_factory=MaskSettings)
    cells: CellSettings = field(default_factory=CellSettings)
    filters: FilterSettings = field(default_factory=FilterSettings)
    weights: WeightSettings = field(default_factory=WeightSettings)
    deploy: DeploySettings = field(default_factory=DeploySettings)

    def __post_init__(self) -> None:
        check_devices(self.device.name, self.devices, has_budget=self.search.has_budget)
        if self.search.budgets is not None and self.devices:
            raise InputError("search.budgets are of one device: leave [[devices]] out, or give one budget")
        if self.search.method != "repnas" and self.branches != BranchSettings():
            raise InputError(f'[branches] is for method = "repnas", not {self.search.method}: leave it out')
        if self.search.method == "repnas" and self.train.callback is not None and not self.branches.restarts:
            raise InputError(f"train.callback: {ONE_RUN}: leave the callback out, or set branches.restart = true")
        if self.search.method != "pas" and self.masks != MaskSettings():
            raise InputError(f'[masks] is for method = "pas", not {self.search.method}: leave it out')
        if self.search.method != "mgas" and self.cells != CellSettings():
            raise InputError(f'[cells] is for method = "mgas", not {self.search.method}: leave it out')
        if self.search.method != "mgas" and self.filters != FilterSettings():
            raise InputError(f'[filters] is for method = "mgas", not {self.search.method}: leave it out')
        if self.search.method != "mgas" and self.weights.asked:
            raise InputError(f'[weights] is for method = "mgas", not {self.search.method}: leave it out')

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
        except (ValueError, RecursionError) as error:
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
            raise InputError(f"{source}: {explain(cls, error)}") from error
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every section and field."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What decides the result: all but where files go and how often checkpoints are written."""
        plain = self.to_dict()
        del plain["run"]["folder"], plain["deploy"]
        # a family goes on where it was with more budgets: each has a run folder of its own
        plain["search"]["budgets"] = self.search.budgets is not None
        for section in ("supernet", "trial", "train", "masks", "cells", "filters", "weights"):
            del plain[section]["checkpoint_s"]
        return plain

    @property
    def run_folder(self) -> Path:
        """``<folder>/<name>``."""
        return Path(self.run.folder) / self.run.name

    @property
    def bundle_folder(self) -> Path:
        """Where the bundle goes."""
        return Path(self.deploy.output) if self.deploy.output else self.run_folder / "bundle"

    def bundle_of(self, device: str) -> Path:
        """Where the bundle for one of the devices goes: beside the first device's."""
        first = self.bundle_folder
        return first if device == self.device.name else first.with_name(f"{first.name}-{Path(device).stem}")

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
        evolution = given(search, "population", "generations", evaluations="candidates")
        scoring = given(search, "calibration_images", images="score_images", patterns="score_patterns")
        return CafeNetConfig(
            training=self.supernet.config(self.run, "supernet"),
            winner=self.training(),
            evolution=EvolutionSettings(**evolution),
            scoring=ScoringConfig(**scoring),
            **given(search, *_CAFENET, *_BOTH),
        )

    def conetv2(self) -> ConetConfig:
        """The search that ``[search]``, ``[trial]`` and ``[train]`` stand for.

        Raises:
            InputError: values that do not go together.
        """
        from hwsearch.search.conetv2_config import ConetConfig

        make = ConetConfig.published if self.search.accept in ("conetv2", "greedy") else ConetConfig
        training = self.trial.config(self.run, "trial", like=make().training)
        return make(training=training, winner=self.training(), **given(self.search, *_CONETV2_ONLY, *_BOTH))

    def pas(self) -> PasConfig:
        """The search by masks that ``[masks]`` and ``[train]`` stand for.

        Raises:
            InputError: values that do not go together.
        """
        winner = self.train.config(self.run, "train", like=self.masks.base().winner)
        shared = given(self.search, *_BOTH)
        return self.masks.config(self.training(), winner, shared, trained=self.model.weights is not None)

    def mgas(self) -> MgasConfig:
        """The search of cells that ``[cells]`` and ``[train]`` stand for.

        Raises:
            InputError: values that do not go together.
        """
        winner = self.train.config(self.run, "train", like=self.cells.base().winner)
        shared = {**given(self.search, "measured", "rounds"), "weights": self.weights.config(winner)}
        return self.cells.config(winner, shared)

    def mgas_widths(self) -> FilterConfig:
        """The search of filters that ``[filters]`` and ``[train]`` stand for.

        Raises:
            InputError: values that do not go together.
        """
        winner = self.training()
        shared = {**given(self.search, "measured", "rounds"), "weights": self.weights.config(winner)}
        return self.filters.config(winner, shared)

    def repnas(self) -> RepNASSearchConfig:
        """The search of branches that ``[branches]`` and ``[train]`` stand for.

        Raises:
            InputError: values that do not go together.
        """
        return self.branches.config(self.training(), self.search.start)
