"""The table that a run ends with: full width, uniform scaling at the same budget, and the found network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from hwsearch.errors import AnswerIsNo, NoisyDeviceError
from hwsearch.granularity import searches_cells
from hwsearch.preparation import Prepared, Target
from hwsearch.search.journal import write_atomic

if TYPE_CHECKING:
    from torch import nn

    from hwsearch.deploy.verdict import Verdict
    from hwsearch.graph.widths import WidthChoice
    from hwsearch.search.result import SearchResult
    from hwsearch.train.loop import TrainConfig

SCHEMA, VERSION = "hwsearch.summary", 1


@dataclass(frozen=True)
class KernelRow:
    """One kernel of a compared network and its predicted milliseconds."""

    node: str
    family: str
    ms: float


@dataclass(frozen=True)
class DeviceTime:
    """What a compared network takes on one device."""

    device: str
    predicted_ms: float
    low_ms: float
    high_ms: float
    measured_ms: float
    raw_p50_ms: float
    budget_ms: float


@dataclass(frozen=True)
class NetworkRow:
    """One line of the comparison: a network, what was predicted, what was measured, and how good it is.

    ``metric`` and ``loss`` are the task's, on the test set, which no search looks at; ``held_out`` is the metric on
    training images that were held out. Milliseconds and kernels are those of the run's first device; ``devices`` has
    every one.
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
    held_out: float
    low_ms: float
    high_ms: float
    kernels: tuple[KernelRow, ...]
    devices: tuple[DeviceTime, ...] = ()


@dataclass(frozen=True)
class Compared:
    """The comparison: its rows, and the trained networks and width choices behind them, by the rows' names."""

    rows: tuple[NetworkRow, ...]
    metric_name: str
    higher_is_better: bool
    networks: Mapping[str, nn.Module]
    choices: Mapping[str, WidthChoice]


def compare(ready: Prepared, result: SearchResult, tuning: TrainConfig | None = None) -> Compared:
    """Full width, uniform scaling at the same budget and the found network: trained alike, tested, measured.

    With ``tuning`` the run's network is trained already: it stands for the full one, and what is scaled of it (the
    units with the largest weights) is fine-tuned so.
    """
    from hwsearch.graph.onnx_build import export_onnx
    from hwsearch.reparam.fold import fold
    from hwsearch.search.baselines import uniform
    from hwsearch.search.winner import train_choice
    from hwsearch.train.loop import evaluate

    config, console = ready.config, ready.console
    task, test = config.data.load(config.run.seed)
    training = config.mgas().winner if searches_cells(config, ready.module) else config.train.config(config.run)
    console.step("Comparing with the full network and with uniform scaling at the same budget")
    budget = ready.budget
    if config.search.floor is not None and result.measured_ms is not None:
        # Where the fewest milliseconds were asked for, uniform scaling gets as many as were found.
        first, *others = budget.limits
        budget = replace(budget, limits=[replace(first, max_ms=result.measured_ms), *others])
    choices = {"full": ready.space.full()}
    try:
        with console.bar("uniform scaling") as bar:
            scaled = uniform(ready.space, budget, journal=ready.run.state / "uniform.jsonl", progress=bar)
        choices["uniform"] = scaled.candidate.choice
    except NoisyDeviceError:
        raise
    except AnswerIsNo as error:  # what was found stands all the same
        console.say(f"  uniform scaling is left out, for none keeps the budget: {error}")
    choices["found"] = result.choice
    networks: dict[str, nn.Module] = {}
    if tuning is not None:
        networks["full"] = ready.module
    for name in [name for name in choices if name != "found" and name not in networks]:
        with console.bar(f"training {name}") as bar:
            networks[name], _ = train_choice(
                ready.module, ready.space, choices[name], task, tuning or training, scratch=tuning is None,
                folder=ready.run.state / name, progress=bar,
            )  # fmt: skip
    assert result.model is not None
    networks["found"] = result.model
    files = {
        name: export_onnx(fold(network, ready.example, require=False), ready.example)
        for name, network in networks.items()
    }
    times = [_times(target, files, choices) for target in ready.targets]
    rows = []
    for name, network in networks.items():
        tested = evaluate(network, task, test, training)
        devices = tuple(device[name] for device in times)
        own, latency = devices[0], ready.first.latency
        estimated = latency.estimate(choices[name])
        rows.append(
            NetworkRow(
                name,
                choices[name].widths,
                own.predicted_ms,
                own.measured_ms,
                own.raw_p50_ms,
                own.budget_ms,
                ready.space.macs(choices[name]),
                ready.space.parameters(choices[name]),
                tested.metric,
                tested.loss,
                evaluate(network, task, task.valid, training).metric,
                own.low_ms,
                own.high_ms,
                tuple(
                    KernelRow(kernel.node, kernel.family, ms)
                    for kernel, ms in zip(latency.kernels(choices[name]), estimated.kernel_ms, strict=True)
                ),
                devices,
            )
        )
        ready.run.event("compared", network=name, metric=tested.metric, measured_ms=own.measured_ms)
    return Compared(tuple(rows), task.metric_name, task.higher_is_better, networks, choices)


def _times(target: Target, files: dict[str, bytes], choices: dict[str, WidthChoice]) -> dict[str, DeviceTime]:
    """What every network takes on a device, by its name."""
    from hwsearch.latency.measure import measure_many
    from hwsearch.latency.quantising import quantise_network

    eight = target.device.precision == "int8"
    networks = [(name, quantise_network(file) if eight else file) for name, file in files.items()]
    # Interleaved with each other: a comparison must not depend on the minute in which each one was timed.
    timings = measure_many(networks, target.session, reference_ms=target.reference_ms, allow_unfolded=True)
    found = {}
    for (name, _), measured in zip(networks, timings, strict=True):
        estimated = target.latency.estimate(choices[name])
        found[name] = DeviceTime(
            target.device.name,
            estimated.ms,
            estimated.low_ms,
            estimated.high_ms,
            measured.measured_ms,
            measured.raw_p50_ms,
            target.limit.max_ms,
        )
    return found


def with_verdict(row: NetworkRow, verdict: Verdict, at: int) -> NetworkRow:
    """A row with what the verification on device number ``at`` measured: one number, not two that differ by noise."""
    if verdict.measured_ms is None or verdict.raw_p50_ms is None:
        return row
    devices = list(row.devices)
    devices[at] = replace(devices[at], measured_ms=verdict.measured_ms, raw_p50_ms=verdict.raw_p50_ms)
    first = devices[0]
    return replace(row, devices=tuple(devices), measured_ms=first.measured_ms, raw_p50_ms=first.raw_p50_ms)


def write_summary(
    ready: Prepared, compared: Compared, verdicts: tuple[Verdict, ...], *, delivered: str, why: str
) -> None:
    """``summary.json`` of the run folder: what the report shows; ``why`` the row ``delivered`` is not the found one."""
    statuses = {target.device.name: verdict.status for target, verdict in zip(ready.targets, verdicts, strict=True)}
    summary = {
        "schema": SCHEMA,
        "version": VERSION,
        "device": ready.first.device.name,
        "groups": [group.name for group in ready.space.groups],
        "metric_name": compared.metric_name,
        "rows": [asdict(row) for row in compared.rows],
        "delivered": delivered,
        "why_delivered": why,
        "status": verdicts[0].status,
        "statuses": statuses,
    }
    write_atomic(ready.run.path / "summary.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")


def comparison_table(rows: tuple[NetworkRow, ...], metric_name: str) -> tuple[list[str], list[list[str]]]:
    """The comparison as text: columns and rows; with several devices a line for each network and device."""
    several = any(len(row.devices) > 1 for row in rows)
    times = ["predicted ms", "measured ms", "budget ms", "of budget"]
    columns = ["network", *(["device"] if several else []), *times, "MMACs", "parameters", metric_name]
    lines = [
        [
            row.name,
            *([time.device] if several else []),
            f"{time.predicted_ms:.4f}",
            f"{time.measured_ms:.4f}",
            f"{time.budget_ms:.4f}",
            f"{100 * time.measured_ms / time.budget_ms:.1f} %",
            f"{row.macs / 1e6:.2f}",
            f"{row.parameters:,}",
            f"{row.metric:.4f}",
        ]
        for row in rows
        for time in row.devices
    ]
    return columns, lines
