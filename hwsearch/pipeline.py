"""The main path as one resumable job: device, table, predictor, space, budget, search, comparison, bundle, report.

``run`` is what `hwsearch run` calls; ``prepare`` is its first half, which `hwsearch search` shares. Every stage keeps
what it finished in the run folder or beside the device's table, so the same command after a kill goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.config import RunConfig
from hwsearch.console import Console
from hwsearch.errors import InputError, NoisyDeviceError
from hwsearch.search.journal import write_atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hwsearch.deploy.verdict import Verdict
    from hwsearch.device.session import DeviceSession
    from hwsearch.device.spec import Device
    from hwsearch.graph.onnx_build import OnnxTemplate
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.latency.card import ErrorCard
    from hwsearch.latency.measure import Measurement
    from hwsearch.latency.network import NetworkLatency
    from hwsearch.latency.predictor import LatencyPredictor
    from hwsearch.latency.table import LatencyTable
    from hwsearch.model_argument import ModelArgument
    from hwsearch.search.budget import Budget
    from hwsearch.search.result import SearchResult
    from hwsearch.search.run_folder import RunFolder

SUMMARY_SCHEMA, SUMMARY_VERSION = "hwsearch.summary", 1
#: Folder of the fitted predictor and its card, beside the table.
PREDICTOR = "predictor"


@dataclass(frozen=True)
class KernelRow:
    """One kernel of a compared network and its predicted milliseconds."""

    node: str
    family: str
    ms: float


@dataclass(frozen=True)
class NetworkRow:
    """One line of the comparison: a network, what was predicted, what was measured, and how good it is.

    ``metric`` and ``loss`` are the task's, on the test set, which no search looks at.
    """

    name: str
    widths: tuple[int, ...]
    predicted_ms: float
    measured_ms: float
    raw_p50_ms: float
    budget_ms: float
    macs: int
    parameters: int
    metric: float
    loss: float
    low_ms: float
    high_ms: float
    kernels: tuple[KernelRow, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run ends with."""

    folder: Path
    rows: tuple[NetworkRow, ...]
    metric_name: str
    verdict: Verdict
    report: Path


@dataclass(frozen=True)
class Prepared:
    """Everything that a search needs, made from a config; lives as long as the run's device session."""

    config: RunConfig
    run: RunFolder
    console: Console
    device: Device
    session: DeviceSession
    reference_ms: float
    module: nn.Module
    example: Tensor
    space: WidthSpace
    template: OnnxTemplate
    latency: NetworkLatency
    budget: Budget

    def measure(self, onnx: bytes) -> Measurement:
        """A network's milliseconds on the device, by the one code path for measuring."""
        from hwsearch.latency.measure import measure

        return measure(onnx, self.session, reference_ms=self.reference_ms)


def run(config: RunConfig, console: Console) -> Outcome:
    """The whole path. Raises what its stages raise; a missed budget is in the verdict, not an error."""
    from hwsearch.deploy.bundle import deploy
    from hwsearch.deploy.verify import verify
    from hwsearch.reparam.fold import fold
    from hwsearch.report import report

    with prepare(config, console) as ready:
        result = search(ready)
        rows, metric_name = _compare(ready, result)
        console.step("Deploying and verifying the found network")
        assert result.model is not None
        folded = fold(result.model, ready.example)
        deploy(
            folded,
            ready.example,
            ready.device,
            config.bundle_folder,
            budget_ms=ready.budget.limits[0].max_ms,
            predicted_ms=result.predicted_ms * result.limits[0].correction,
            measured_ms=result.measured_ms,
            name=config.run.name,
        )
        verdict = verify(config.bundle_folder, ready.device, session=ready.session)
        verdict.save(config.bundle_folder / "verdict.json")
        rows = tuple(_with_verdict(row, verdict) if row.name == "found" else row for row in rows)
        _write_summary(ready, rows, metric_name, verdict)
        ready.run.event("verified", status=verdict.status, measured_ms=verdict.measured_ms)
        page = report(ready.run.path, ready.run.path / "report.html")
    return Outcome(config.run_folder, rows, metric_name, verdict, Path(page))


@contextmanager
def prepare(config: RunConfig, console: Console) -> Iterator[Prepared]:
    """Open the run folder and the device, and make sure of table, predictor, space and a budget that can be kept.

    Raises:
        InfeasibleBudgetError: the space cannot keep the budget; nothing was trained.
        NoisyDeviceError: the device check found the machine too busy to be measured.
    """
    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device
    from hwsearch.graph.onnx_build import OnnxTemplate
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.latency.lowering import Lowering
    from hwsearch.latency.network import NetworkLatency
    from hwsearch.reparam.fold import fold
    from hwsearch.search.budget import Budget, Limit
    from hwsearch.search.run_folder import open_run

    device = Device.load(config.device.name)
    module, example = _model(config)
    with (
        open_run(config.run_folder, config.identity()) as run_folder,
        open_session(device, message=console.say) as session,
    ):
        run_folder.event("run_started", resumed=run_folder.resumed)
        console.step(f"Checking {device.name}")
        reference_ms = ensure_checked(device, session, console)
        console.step("Extracting the width space")
        space = WidthSpace.from_model(module, example, quantum=config.search.quantum, minimum=config.search.minimum)
        template = OnnxTemplate(space, fold(module, example, require=False), example)
        console.say(f"  {len(space.groups)} width groups, 10^{space.log10_size:.1f} networks")
        for operation in space.unknown_operations:
            console.say(f"  frozen around an unknown operation: {operation}")
        console.step(f"Profiling {device.name}")
        table = profile_device(
            device,
            session,
            console,
            minutes=config.profile.minutes,
            templates=(template,),
            seed=config.run.seed,
        )
        predictor, card = fit_table(device, table, console)
        console.say(card.to_markdown())
        latency = NetworkLatency(space, predictor, Lowering(template, session))
        full_ms = _once(
            run_folder, "full_measured_ms", lambda: _full_ms(session, template, space, reference_ms, console)
        )
        limit = Limit(latency, config.search.max_ms(full_ms), config.search.quantile, device.name)
        ready = Prepared(
            config, run_folder, console, device, session, reference_ms, module, example, space, template, latency,
            Budget([limit]),
        )  # fmt: skip
        console.say(f"  full network {full_ms:.4g} ms measured; budget {limit.max_ms:.4g} ms on {device.name}")
        ready.budget.check_reachable(space)
        measured = Limit(
            latency, limit.max_ms, limit.quantile, limit.name,
            measure=lambda choice: ready.measure(template.slice(choice)).measured_ms,
        )  # fmt: skip
        yield replace(ready, budget=Budget([measured]))


def search(ready: Prepared) -> SearchResult:
    """The search itself; its result and the found network are in the run folder when it returns."""
    from hwsearch.graph.model_folder import save_model
    from hwsearch.search.cafenet import CafeNet

    config = ready.config
    ready.console.step(f"Searching with {config.search.method} under {ready.budget.limits[0].max_ms:.4g} ms")
    task, _ = config.data.load(config.run.seed)
    searcher = CafeNet(
        ready.space, ready.budget, config.cafenet(), model=ready.module, seed=config.run.seed, folder=ready.run
    )
    with _stages(ready.console) as progress:
        result = searcher.search(task, None, progress=progress)
    assert result.model is not None
    save_model(
        ready.run.model,
        result.model,
        factory=config.model.factory,
        input_shape=config.model.input_shape,
        factory_kwargs=config.model.kwargs,
        widths=dict(zip(result.groups, result.choice.widths, strict=True)),
    )
    return result


def ensure_checked(device: Device, session: DeviceSession, console: Console) -> float:
    """The device's reference speed; the device is checked first where that was not done on this machine.

    Raises:
        NoisyDeviceError: too noisy to measure.
    """
    from hwsearch.latency.profile import current_check

    check = current_check(device, session, lambda text: console.say(f"  {text}"))
    if not check.ok:
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
            progress=lambda done, spent, budget, words: bar(spent, budget, f"{done} networks, {words}"),
            **limit,  # type: ignore[arg-type]
        )
    console.say(f"  {len(table.networks)} networks, {table.kernel_count} kernel instances in the table")
    return table


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
    predictor.save(folder)
    write_atomic(folder / "card.json", json.dumps(card.to_dict(), indent=1, sort_keys=True) + "\n")
    write_atomic(folder / "card.md", card.to_markdown() + "\n")
    return predictor, card


def _model(config: RunConfig) -> tuple[nn.Module, Tensor]:
    """The full network with weights drawn by the run's seed, and an example input."""
    import torch

    from hwsearch.model_argument import load_model_argument
    from hwsearch.train.seeds import torch_seed

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.run.seed, "model"))
        argument = load_model_argument(config.model.factory, config.model.input_shape, config.model.kwargs)
    return argument.need_module(), argument.example_input


def _full_ms(
    session: DeviceSession, template: OnnxTemplate, space: WidthSpace, reference_ms: float, console: Console
) -> float:
    from hwsearch.latency.measure import measure

    console.step("Measuring the full network")
    return measure(template.slice(space.full()), session, reference_ms=reference_ms).measured_ms


def _compare(ready: Prepared, result: SearchResult) -> tuple[tuple[NetworkRow, ...], str]:
    """Full width, uniform scaling at the same budget and the found network: trained alike, tested, measured."""
    from hwsearch.graph.onnx_build import export_onnx
    from hwsearch.reparam.fold import fold
    from hwsearch.search.baselines import uniform
    from hwsearch.search.winner import train_choice
    from hwsearch.train.loop import evaluate

    config, console = ready.config, ready.console
    task, test = config.data.load(config.run.seed)
    training = config.train.config(config.run)
    console.step("Comparing with the full network and with uniform scaling at the same budget")
    with console.bar("uniform scaling") as bar:
        scaled = uniform(ready.space, ready.budget, journal=ready.run.state / "uniform.jsonl", progress=bar)
    choices = {"full": ready.space.full(), "uniform": scaled.candidate.choice, "found": result.choice}
    networks: dict[str, nn.Module] = {}
    for name in ("full", "uniform"):
        with console.bar(f"training {name}") as bar:
            networks[name], _ = train_choice(
                ready.module, ready.space, choices[name], task, training, folder=ready.run.state / name, progress=bar
            )
    assert result.model is not None
    networks["found"] = result.model
    rows = []
    for name, network in networks.items():
        tested = evaluate(network, task, test, training)
        estimated = ready.latency.estimate(choices[name])
        measured = ready.measure(export_onnx(fold(network, ready.example, require=False), ready.example))
        rows.append(
            NetworkRow(
                name,
                choices[name].widths,
                estimated.ms,
                measured.measured_ms,
                measured.raw_p50_ms,
                ready.budget.limits[0].max_ms,
                ready.space.macs(choices[name]),
                ready.space.parameters(choices[name]),
                tested.metric,
                tested.loss,
                estimated.low_ms,
                estimated.high_ms,
                tuple(
                    KernelRow(kernel.node, kernel.family, ms)
                    for kernel, ms in zip(ready.latency.kernels(choices[name]), estimated.kernel_ms, strict=True)
                ),
            )
        )
        ready.run.event("compared", network=name, metric=tested.metric, measured_ms=measured.measured_ms)
    return tuple(rows), task.metric_name


def _with_verdict(row: NetworkRow, verdict: Verdict) -> NetworkRow:
    """The found network's row says what the verification measured: one number, not two that differ by noise."""
    measured_ms, raw_p50_ms = verdict.measured_ms or row.measured_ms, verdict.raw_p50_ms or row.raw_p50_ms
    return replace(row, measured_ms=measured_ms, raw_p50_ms=raw_p50_ms)


def _write_summary(ready: Prepared, rows: tuple[NetworkRow, ...], metric_name: str, verdict: Verdict) -> None:
    summary = {
        "schema": SUMMARY_SCHEMA,
        "version": SUMMARY_VERSION,
        "device": ready.device.name,
        "groups": [group.name for group in ready.space.groups],
        "metric_name": metric_name,
        "rows": [asdict(row) for row in rows],
        "status": verdict.status,
    }
    write_atomic(ready.run.path / "summary.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")


def _once(run: RunFolder, name: str, make: Callable[[], float]) -> float:
    """A number that must not change when the run goes on: the budget hangs on it."""
    path = run.state / f"{name}.json"
    if path.exists():
        try:
            return float(str(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged: use another run name, or delete the folder") from error
    value = make()
    write_atomic(path, json.dumps(value) + "\n")
    return value


@contextmanager
def _stages(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Progress of a search, whose callback names its stage before a colon: a bar for each stage in turn."""
    open_bar: list[Any] = ["", None, None]

    def close() -> None:
        if open_bar[1] is not None:
            open_bar[1].__exit__(None, None, None)

    def report(done: int, total: int, text: str) -> None:
        title, _, words = text.partition(": ")
        if title != open_bar[0]:
            close()
            bar = console.bar(title)
            open_bar[:] = [title, bar, bar.__enter__()]
        open_bar[2](done, total, words)

    try:
        yield report
    finally:
        close()


def templates_of(models: list[str], shape: str | None) -> tuple[OnnxTemplate, ...]:
    """Width templates of models that the user named, so that a campaign covers their widths too."""
    from hwsearch.graph.onnx_build import OnnxTemplate
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.model_argument import load_model_argument, parse_shape
    from hwsearch.reparam.fold import fold

    templates = []
    for name in models:
        argument = load_model_argument(name, parse_shape(shape) if shape else None)
        module, example = argument.need_module(), argument.example_input
        space = WidthSpace.from_model(module, example)
        templates.append(OnnxTemplate(space, fold(module, example, require=False), example))
    return tuple(templates)


def fold_model(argument: ModelArgument, output: Path | None, *, prove_it: bool) -> dict[str, Any]:
    """Fold a model's batch normalisation, prove it where asked for, write it as ONNX where asked for; what was done.

    Raises:
        InputError: there is nothing to fold, or the output cannot be written.
        CheckFailedError: the folded network does not compute what the model does.
    """
    from hwsearch.graph.onnx_build import export_onnx
    from hwsearch.reparam.check import prove
    from hwsearch.reparam.fold import fold

    module, example = argument.need_module(), argument.example_input
    folded = fold(module, example)
    facts: dict[str, Any] = {"model": argument.spec}
    if prove_it:
        facts["proof"] = asdict(prove(module, folded, argument.input_shape))
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_bytes(export_onnx(folded, example))
        except OSError as error:
            raise InputError(f"cannot write {output}: {error.strerror}; choose a writable path") from error
        facts["onnx"] = str(output)
    return facts


def comparison_table(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """The run's table as text: columns and rows."""
    columns = [
        "network",
        "predicted ms",
        "measured ms",
        "budget ms",
        "of budget",
        "MMACs",
        "parameters",
        outcome.metric_name,
    ]
    rows = [
        [
            row.name,
            f"{row.predicted_ms:.4f}",
            f"{row.measured_ms:.4f}",
            f"{row.budget_ms:.4f}",
            f"{100 * row.measured_ms / row.budget_ms:.1f} %",
            f"{row.macs / 1e6:.2f}",
            f"{row.parameters:,}",
            f"{row.metric:.4f}",
        ]
        for row in outcome.rows
    ]
    return columns, rows
