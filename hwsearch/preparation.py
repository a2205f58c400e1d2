"""From a config to everything a search needs: a checked device, a table, a predictor, a width space and a budget.

Every step keeps what it finished beside the device's table or in the run folder, so that the same command after a kill
goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hwsearch import __version__
from hwsearch.config import RunConfig
from hwsearch.console import Console
from hwsearch.errors import HwsearchError, InputError, NoisyDeviceError
from hwsearch.granularity import check_granularity, searches_cells
from hwsearch.search.journal import write_atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hwsearch.device.session import DeviceSession
    from hwsearch.device.spec import Device, Fingerprint
    from hwsearch.graph.control import GroupRule
    from hwsearch.graph.onnx_build import OnnxTemplate
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.latency.card import ErrorCard
    from hwsearch.latency.measure import Measurement
    from hwsearch.latency.network import NetworkLatency
    from hwsearch.latency.predictor import LatencyPredictor
    from hwsearch.latency.sample import NetworkTemplate
    from hwsearch.latency.table import LatencyTable
    from hwsearch.search.budget import Budget, Limit
    from hwsearch.search.run_folder import RunFolder

#: Folder of the fitted predictor and its card, beside the table.
PREDICTOR = "predictor"
#: In it: what it was fitted to, written last.
FITTED_TO = "fitted_to.json"
#: The width space of a run with its milliseconds, in the run folder.
SPACE = "space.json"
#: How often a device is checked before it is called too noisy.
CHECKS = 3


@dataclass(frozen=True)
class Target:
    """One device of a run: how it is asked, what a network takes there, and how many milliseconds it may."""

    device: Device
    session: DeviceSession
    reference_ms: float
    template: NetworkTemplate
    latency: NetworkLatency
    limit: Limit
    full_ms: float

    def measure(self, onnx: bytes) -> Measurement:
        """A network's milliseconds on the device, by the one code path for measuring."""
        from hwsearch.latency.measure import measure

        # it has been folded as deploying folds it: what is left is what runs
        return measure(onnx, self.session, reference_ms=self.reference_ms, allow_unfolded=True)

    @property
    def measured(self) -> Limit:
        """The limit that asks the device for milliseconds too."""
        return replace(self.limit, measure=lambda choice: self.measure(self.template.slice(choice)).measured_ms)


@dataclass(frozen=True)
class Prepared:
    """Everything that a search needs, made from a config; lives as long as the run's device sessions.

    ``targets`` are the devices, that of ``[device]`` first, in the order of the budget's limits.
    """

    config: RunConfig
    run: RunFolder
    console: Console
    module: nn.Module
    example: Tensor
    space: WidthSpace
    targets: tuple[Target, ...]

    @property
    def budget(self) -> Budget:
        """What the network must keep on every device."""
        from hwsearch.search.budget import Budget

        return Budget([target.measured for target in self.targets])

    @property
    def first(self) -> Target:
        """The device of ``[device]``, which the tables and pages of a run are about."""
        return self.targets[0]


@contextmanager
def prepare(config: RunConfig, console: Console) -> Iterator[Prepared]:
    """Open the run folder and the devices, and make sure of tables, predictors, space and a budget that can be kept.

    Raises:
        InfeasibleBudgetError: the space cannot keep the budget; nothing was trained.
        NoisyDeviceError: the device check found the machine too busy to be measured.
    """
    from hwsearch.device.spec import Device
    from hwsearch.graph.onnx_build import OnnxTemplate
    from hwsearch.graph.space_table import SpaceTable
    from hwsearch.reparam.fold import fold
    from hwsearch.search.run_folder import open_run

    names = (config.device.name, *(further.name for further in config.devices))
    devices = [Device.load(name) for name in names]
    for device in devices:
        _check_precision(config, device)
    config.deploy.int8()  # wrong settings are told now, not after the training
    if "int8" in (config.deploy.precision, *(device.precision for device in devices)):
        _check_images(config)
    module, example = _model(config)
    check_granularity(config, module)
    notes, data = _rehearsed(config, module)
    with open_run(config.run_folder, config.identity()) as run_folder, contextlib.ExitStack() as sessions:
        run_folder.event("run_started", resumed=run_folder.resumed, data=data, **_versions())
        for note in notes:
            console.say(note)
        console.step("Extracting the width space")
        space, module = width_space(config, module, example)
        if config.search.method == "cafenet":
            from hwsearch.search.supernet import SuperNet

            SuperNet(module, space)  # a layer that it cannot run is told now, not after minutes of profiling
        plain = OnnxTemplate(space, fold(module, example, require=False), example)
        console.say(f"  {len(space.groups)} width groups, 10^{space.log10_size:.1f} networks")
        targets = tuple(_target(config, device, plain, run_folder, sessions, console) for device in devices)
        shown = SpaceTable.of(space, targets[0].latency.evaluate)
        write_atomic(run_folder.path / SPACE, json.dumps(shown.to_dict(), indent=1, sort_keys=True) + "\n")
        console.say(shown.text(slots=False))
        ready = Prepared(config, run_folder, console, module, example, space, targets)
        if not searches_cells(config, module):  # which leaves operations out as well, and checks for itself
            ready.budget.check_reachable(space)
        yield ready


def width_space(
    config: RunConfig, module: nn.Module, example: Tensor, more: Sequence[GroupRule] = ()
) -> tuple[WidthSpace, nn.Module]:
    """The widths that a config searches, and the network at full width: a maximum makes it narrower.

    Masks learn on a network with its branches but are those of its folded form, in which identities tie no layers.

    Raises:
        InputError: rules that fit no group, or a maximum where branches are masked.
    """
    from hwsearch.graph.control import bounded
    from hwsearch.graph.foldable import folding_blocks
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.reparam.fold import fold

    rules = [*(group.rule() for group in config.groups), *more]
    masked = config.search.method == "pas" and bool(folding_blocks(module))
    if masked and any(rule.maximum is not None for rule in rules):
        raise InputError(
            "a maximum makes a network of branches narrower only where identities allow it: give the model widths of "
            "its own in kwargs instead"
        )
    source = fold(module, example) if masked else module
    space = WidthSpace.from_model(source, example, quantum=config.search.quantum, minimum=config.search.minimum)
    if rules:
        space = bounded(space, example, rules)
    return space, module if masked else space.model or module


def _target(
    config: RunConfig,
    device: Device,
    plain: OnnxTemplate,
    run_folder: RunFolder,
    sessions: contextlib.ExitStack,
    console: Console,
) -> Target:
    """A device that is checked, profiled and predicted, with its budget in milliseconds."""
    from hwsearch.device.session import open_session
    from hwsearch.latency.lowering import Lowering
    from hwsearch.latency.network import NetworkLatency
    from hwsearch.latency.quantising import template_for
    from hwsearch.search.budget import Limit

    session = sessions.enter_context(open_session(device, message=console.say))
    console.step(f"Checking {device.name}")
    reference_ms = ensure_checked(device, session, console)
    template = template_for(plain, device.precision)
    console.step(f"Profiling {device.name}")
    table = profile_device(
        device, session, console, minutes=config.profile.minutes, templates=(plain,), seed=config.run.seed
    )
    predictor, card = _fitted(device, table, session, console)
    console.say(card)
    # a super-network of cells is asked about a few times only
    each = plain.space.model is not None and searches_cells(config, plain.space.model)
    latency = NetworkLatency(plain.space, predictor, Lowering(template, session), lower_each=each)
    console.step(f"Learning how {device.name} lowers the widths")
    with console.bar("lowering") as bar:
        latency.prepare(bar)
    settings = next((further for further in config.devices if further.name == device.name), None)
    # The first device's file is named as if it were the only one: most runs have one.
    name = "full_measured_ms" if settings is None else f"full_measured_ms-{Path(device.name).stem}"
    full_ms = _once(run_folder, name, lambda: _full_ms(session, template, plain.space, reference_ms, console))
    asked = settings or config.search
    # What a run finds is measured, and the measurement decides: the prediction itself is compared.
    limit = Limit(latency, asked.max_ms(full_ms), asked.quantile or 0.5, device.name)
    console.say(f"  full network {full_ms:.4g} ms measured; budget {limit.max_ms:.4g} ms on {device.name}")
    return Target(device, session, reference_ms, template, latency, limit, full_ms)


def _check_precision(config: RunConfig, device: Device) -> None:
    """A search in 8-bit milliseconds ends in a network in 8 bits."""
    if device.precision == "int8" and config.deploy.precision == "float32":
        raise InputError(
            f"device {device.name!r} is an int8 one, so the search is in 8-bit milliseconds, but deploy.precision is "
            "float32: leave it out, or use a float32 device"
        )


def _check_images(config: RunConfig) -> None:
    """Images that calibrate 8 bits go through the exported network, whose input has one shape."""
    import numpy as np

    found = tuple(config.data.load(config.run.seed)[0].valid.take(np.arange(1))[0].shape[1:])
    if found != config.model.input_shape[1:]:
        raise InputError(
            f"model.input is {config.model.input}, but the data's images are {'x'.join(map(str, found))}: 8 bits are "
            "calibrated on them, so give the model's input their shape"
        )


def ensure_checked(device: Device, session: DeviceSession, console: Console) -> float:
    """The device's reference speed; the device is checked first where that was not done on this machine.

    Raises:
        NoisyDeviceError: too noisy to measure.
    """
    from hwsearch.latency.profile import current_check

    for attempt in range(CHECKS):
        # A neighbour that comes and goes must not end a run of a quarter of an hour before it began.
        check = current_check(device, session, lambda text: console.say(f"  {text}"))
        if check.ok:
            break
        console.say(f"  too noisy ({'; '.join(check.messages)})" + (": once more" if attempt + 1 < CHECKS else ""))
    else:
        raise NoisyDeviceError(
            f"{device.name} is too noisy to be measured ({'; '.join(check.messages)}): stop other work, then run "
            f"hwsearch device check {device.name} again"
        )
    return check.reference_ms


def profile_device(
    device: Device,
    session: DeviceSession,
    console: Console,
    *,
    minutes: float | None = None,
    templates: tuple[OnnxTemplate, ...] = (),
    seed: int = 0,
    resume: bool = True,
    target: float | None = None,
) -> LatencyTable:
    """Profile a device, or go on profiling it, with progress shown; ``minutes`` None is the campaign's default."""
    from hwsearch.latency.profile import profile

    limit = {} if minutes is None else {"minutes": minutes}
    with console.bar("profile") as bar:
        table = profile(
            device,
            templates=templates,
            seed=seed,
            resume=resume,
            session=session,
            target=target,
            progress=lambda done, spent, budget, words: bar(spent, budget, f"{done} networks, {words}"),
            **limit,  # type: ignore[arg-type]
        )
    console.say(f"  {len(table.networks)} networks, {table.kernel_count} kernel instances in the table")
    return table


def _fitted(
    device: Device, table: LatencyTable, session: DeviceSession, console: Console
) -> tuple[LatencyPredictor, str]:
    """A table's predictor and its card (Markdown): what lies beside the table, where it was fitted to this one."""
    from hwsearch.latency.predictor import LatencyPredictor

    folder = device.table_folder / PREDICTOR
    with contextlib.suppress(HwsearchError, OSError, ValueError):  # whatever is wrong with it: fit again
        if json.loads((folder / FITTED_TO).read_text(encoding="utf-8")) == _fitted_to(device):
            predictor = LatencyPredictor.load(folder, session.fingerprint)
            if predictor.get_params() == LatencyPredictor().get_params():
                return predictor, (folder / "card.md").read_text(encoding="utf-8")
    predictor, card = fit_table(device, table, console)
    return predictor, card.to_markdown()


def _fitted_to(device: Device) -> dict[str, str]:
    """What a predictor hangs on: the table, whose manifest names its files' hashes, and this release's algorithm."""
    table = (device.table_folder / "manifest.json").read_bytes()
    return {"table_sha256": hashlib.sha256(table).hexdigest(), "release": __version__}


def predictor_of(device: Device, fingerprint: Fingerprint) -> LatencyPredictor:
    """A device's predictor as it lies on the disk.

    Raises:
        InputError: there is none; the message says how one is made.
        SchemaError: it was made for another runtime, ISA or precision.
    """
    from hwsearch.latency.predictor import LatencyPredictor

    folder = device.table_folder / PREDICTOR
    if not folder.is_dir():
        raise InputError(
            f"{device.name} has no predictor: run hwsearch profile --device {device.name}, then "
            f"hwsearch fit --device {device.name}"
        )
    return LatencyPredictor.load(folder, fingerprint)


def fit_table(device: Device, table: LatencyTable, console: Console) -> tuple[LatencyPredictor, ErrorCard]:
    """Fit the predictor to a table, judge it by cross-validation, and keep both beside the table."""
    from hwsearch.latency.card import ErrorCard
    from hwsearch.latency.predictor import LatencyPredictor

    console.step("Fitting the latency predictor")
    with console.bar("fit") as bar:
        predictor = LatencyPredictor().fit(table, progress=bar)
    with console.bar("error card") as bar:
        card = ErrorCard.of(predictor, table, progress=bar)
    folder = device.table_folder / PREDICTOR
    (folder / FITTED_TO).unlink(missing_ok=True)
    predictor.save(folder)
    write_atomic(folder / "card.json", json.dumps(card.to_dict(), indent=1, sort_keys=True) + "\n")
    write_atomic(folder / "card.md", card.to_markdown() + "\n")
    write_atomic(folder / FITTED_TO, json.dumps(_fitted_to(device)) + "\n")
    return predictor, card


def transfer_to(
    device: Device,
    sources: Sequence[Device],
    console: Console,
    *,
    networks: int,
    templates: tuple[OnnxTemplate, ...] = (),
) -> dict[str, object]:
    """A new device's table and predictor from a few networks timed on it and other devices' predictors.

    Raises:
        InputError: the device has a table already, or a source has no predictor.
    """
    from hwsearch.latency.predictor import LatencyPredictor
    from hwsearch.latency.transfer import transfer_device

    if (device.table_folder / "manifest.json").exists():
        raise InputError(
            f"{device.name} has been profiled already: fit it without --from, or move {device.table_folder} away first"
        )
    known = [LatencyPredictor.load(source.table_folder / PREDICTOR) for source in sources]
    console.step(f"Timing {networks} networks on {device.name}")
    with console.bar("transfer") as bar:
        predictor, table = transfer_device(device, known, networks=networks, templates=templates, progress=bar)
    table.save(device.table_folder)
    predictor.save(device.table_folder / PREDICTOR)
    held_out = predictor.cross_validation_
    return {
        "device": device.name,
        "sources": [source.name for source in sources],
        "networks": len(table.networks),
        "mape": float(abs(held_out.predicted_ms / held_out.measured_ms - 1).mean()),
        "predictor": str(device.table_folder / PREDICTOR),
    }


def _model(config: RunConfig) -> tuple[nn.Module, Tensor]:
    """The full network with weights drawn by the run's seed, and an example input."""
    import torch

    from hwsearch.model_argument import load_model_argument
    from hwsearch.train.seeds import torch_seed

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.run.seed, "model"))
        argument = load_model_argument(config.model.factory, config.model.input_shape, config.model.kwargs)
    module = argument.need_module()
    if config.model.weights is not None:
        from hwsearch.train.weights import load_weights

        load_weights(module, config.model.weights)
    return module, argument.example_input


def _rehearsed(config: RunConfig, module: nn.Module) -> tuple[tuple[str, ...], str]:
    """What is to be told of model and data, and which data they are; they are tried before the device is asked."""
    from hwsearch.train.rehearsal import rehearse

    task, test = config.data.load(config.run.seed)
    notes = rehearse(module, task, test, config.training(), config.model.input_shape)
    return notes, task.train.identity


def _versions() -> dict[str, str]:
    """What the weights of a run hang on beside its settings."""
    import torch

    return {"hwsearch": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def _full_ms(
    session: DeviceSession, template: NetworkTemplate, space: WidthSpace, reference_ms: float, console: Console
) -> float:
    from hwsearch.latency.measure import measure

    console.step("Measuring the full network")
    onnx = template.slice(space.full())
    return measure(onnx, session, reference_ms=reference_ms, allow_unfolded=True).measured_ms


def _once(run: RunFolder, name: str, make: Callable[[], float]) -> float:
    """A number that must not change when the run goes on: the budget hangs on it."""
    path = run.state / f"{name}.json"
    if path.exists():
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            value = None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise InputError(f"{path} is damaged: use another run name, or delete the folder")
        return float(value)
    value = make()
    write_atomic(path, json.dumps(value) + "\n")
    return value
