"""What a report needs of a run folder, read defensively: whatever is missing or damaged is None or empty.

Files and fields that are looked at::

    result.json             method, seed, groups, widths, limits[], loss, metric, macs, parameters, candidates[]
    summary.json            rows[] (or a list): name, predicted_ms, low_ms, high_ms, measured_ms, raw_p50_ms, budget_ms,
                            macs, parameters, accuracy or metric, widths (list or {group: width}),
                            kernels[] {node, family, ms}; beside rows: model, device, ...
                            metric_name, groups (for widths that are a list), status (where there is no verdict.json);
                            with several devices rows[].devices[] and statuses {device: status}
    events.jsonl            anything with a step or epoch and a loss or metric; or history: [[step, loss], ...]
    state/*/checkpoint.safetensors      the training history, and held-out scores, in its header
    bundle/manifest.json, bundle/verdict.json
    kernels.json            the found network's kernels, predicted and measured
    explain.json            layers, stairs and reasons of an explanation
    space.json              the width groups with their costs, and what is frozen
    state/quality.jsonl     of CONetV2: quality of every layer after every epoch of its trials
    config.json             settings
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwsearch.deploy.verdict import STATUSES, Verdict
from hwsearch.errors import SchemaError
from hwsearch.report.values import items, mapping, number, positive, read_json, read_json_lines, word

_METRICS = ("metric", "accuracy", "valid_accuracy", "valid_metric", "top1")
_MAX_HEADER_BYTES = 16 << 20
_LOSSES = ("loss", "train_loss", "valid_loss")


@dataclass(frozen=True)
class KernelTime:
    """One executed node, its predicted milliseconds, and the measured ones where it was timed."""

    node: str
    family: str
    ms: float
    measured_ms: float | None = None


@dataclass(frozen=True)
class LayerBar:
    """One layer of an explanation: its milliseconds by kind (``parts``) and what it is bound by."""

    name: str
    share: float
    bound: str
    parts: dict[str, float]
    channels: str = ""
    down: str = ""
    saved_ms: float | None = None
    up: str = ""


@dataclass(frozen=True)
class StairLine:
    """The network's milliseconds over the widths of one group; ``down`` and ``up`` are 0 where there is none."""

    group: str
    width: float
    down: float
    up: float
    widths: tuple[float, ...]
    ms: tuple[float, ...]


@dataclass(frozen=True)
class GroupRow:
    """One width group: its parameter axes as text, and the network's costs at its smallest, middle and full width."""

    name: str
    units: float
    widths: tuple[float, ...]
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    costs: tuple[float | None, ...]


@dataclass(frozen=True)
class Row:
    """One network of the comparison. ``metric`` is a share of 1 when it is an accuracy."""

    name: str
    predicted_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    measured_ms: float | None = None
    raw_p50_ms: float | None = None
    budget_ms: float | None = None
    macs: float | None = None
    parameters: float | None = None
    metric: float | None = None
    widths: dict[str, float] = field(default_factory=dict)
    kernels: tuple[KernelTime, ...] = ()

    @property
    def best_ms(self) -> float | None:
        """Measured where it was measured, else predicted."""
        return self.measured_ms if self.measured_ms is not None else self.predicted_ms


@dataclass(frozen=True)
class CandidatePoint:
    """One scored choice of the search."""

    ms: float
    score: float


@dataclass(frozen=True)
class Curve:
    """A training curve: (step or epoch, value) in order of writing."""

    name: str
    quantity: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class RunData:
    """All of it."""

    folder: Path
    name: str
    method: str = ""
    device: str = ""
    model: str = ""
    metric_name: str = "accuracy"
    budget_ms: float | None = None
    rows: tuple[Row, ...] = ()
    candidates: tuple[CandidatePoint, ...] = ()
    curves: tuple[Curve, ...] = ()
    verdict: Verdict | None = None
    status: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    explanation: dict[str, Any] = field(default_factory=dict)
    kernel_times: dict[str, Any] = field(default_factory=dict)
    started: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)
    quality: tuple[dict[str, Any], ...] = ()
    seconds: tuple[tuple[str, float], ...] = ()
    problems: tuple[str, ...] = ()

    def row(self, name: str) -> Row | None:
        """The row of that name, whatever its case."""
        return next((row for row in self.rows if row.name.lower() == name), None)

    @property
    def found(self) -> Row | None:
        """The network that the search found."""
        return self.row("found") or (self.rows[-1] if self.rows else None)

    @property
    def answer(self) -> Row | None:
        """The network that was delivered: what was found, or uniform scaling where that is better."""
        return self.row(word(self.summary.get("delivered"), "found")) or self.found

    @property
    def why_answer(self) -> str:
        """Why that is not the found network."""
        return word(self.summary.get("why_delivered"), "another network than the found one is delivered")

    @property
    def full(self) -> Row | None:
        """The network at full width."""
        row = self.row("full") or self.row("full width")
        return row if row is not self.answer else None


def read_run(folder: Path) -> RunData:
    """Everything that can be read of a run folder."""
    problems: list[str] = []
    result = mapping(read_json(folder / "result.json", problems))
    summary = read_json(folder / "summary.json", problems)
    head = mapping(summary)
    settings = mapping(read_json(folder / "config.json", problems))
    settings = mapping(settings.get("settings")) or settings
    manifest = mapping(read_json(folder / "bundle" / "manifest.json", problems))
    events = read_json_lines(folder / "events.jsonl", problems)
    verdict = None
    if (folder / "bundle" / "verdict.json").exists():
        try:
            verdict = Verdict.load(folder / "bundle" / "verdict.json")
        except SchemaError as error:
            problems.append(str(error))
    limit = mapping(next(iter(items(result.get("limits"))), None))
    groups = [word(name, "?") for name in items(result.get("groups")) or items(head.get("groups"))]
    listed = items(summary) or items(head.get("rows")) or items(head.get("networks"))
    own = {**limit, "budget_ms": limit.get("max_ms"), "name": "found"}
    rows = tuple(_row(_completed(row, own), groups) for row in listed if isinstance(row, dict))
    if not rows and result:
        rows = (_row({**result, **own}, groups),)
    budget = positive(limit.get("max_ms")) or positive(manifest.get("budget_ms")) or positive(head.get("budget_ms"))
    device = word(head.get("device")) or word(manifest.get("device")) or _named(settings.get("device"), "name")
    status = verdict.status if verdict else word(head.get("status"))
    curves = tuple(_curves(events))
    known = {(curve.name, curve.quantity) for curve in curves}
    return RunData(
        folder=folder,
        name=folder.resolve().name,
        method=word(result.get("method")) or word(head.get("method")),
        device=device or word(limit.get("name")),
        model=word(head.get("model")) or _named(settings.get("model"), "factory"),
        metric_name=word(head.get("metric_name"), "accuracy"),
        budget_ms=budget or next((row.budget_ms for row in rows if row.budget_ms), None),
        rows=rows,
        candidates=tuple(candidates_at(result.get("candidates"))),
        curves=curves + tuple(c for c in _checkpoint_curves(folder / "state") if (c.name, c.quantity) not in known),
        verdict=verdict,
        status=status if status in STATUSES else "",
        manifest=manifest,
        settings=settings,
        result=result,
        summary=head,
        explanation=mapping(read_json(folder / "explain.json", problems)),
        kernel_times=mapping(read_json(folder / "kernels.json", problems)),
        started=next((event for event in reversed(events) if event.get("event") == "run_started"), {}),
        space=mapping(read_json(folder / "space.json", problems)),
        quality=tuple(read_json_lines(folder / "state" / "quality.jsonl", problems)),
        seconds=tuple(_seconds(events)),
        problems=tuple(problems),
    )


def _named(value: object, key: str) -> str:
    """A name that is given as itself or as a section with a field for it."""
    return word(value) or word(mapping(value).get(key))


def _completed(row: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The found network's row with the interval that only the search's result has."""
    if row.get("name") != "found" or "low_ms" in row:
        return row
    return {**row, "low_ms": own.get("low_ms"), "high_ms": own.get("high_ms")}


def _row(data: dict[str, Any], groups: list[str]) -> Row:
    given = data.get("widths")
    pairs = mapping(given).items() if isinstance(given, dict) else zip(groups, items(given), strict=False)
    widths = {str(name)[:200]: value for name, w in pairs if (value := positive(w)) is not None}
    numbers = {
        key: positive(data.get(key))
        for key in ("predicted_ms", "low_ms", "high_ms", "measured_ms", "raw_p50_ms", "budget_ms", "macs", "parameters")
    }
    metric = next((value for key in _METRICS if (value := number(data.get(key))) is not None), None)
    kernels = []
    for entry in items(data.get("kernels")):
        kernel = mapping(entry)
        time = number(kernel.get("ms"))
        if time is not None and time >= 0:
            kernels.append(KernelTime(word(kernel.get("node"), "?"), word(kernel.get("family"), "other"), time))
    return Row(word(data.get("name"), "?"), **numbers, metric=metric, widths=widths, kernels=tuple(kernels))


def candidates_at(listed: object, limit: int = 0) -> Iterable[CandidatePoint]:
    """The scored choices at their predicted milliseconds on one of the budget's limits."""
    for entry in items(listed):
        candidate = mapping(entry)
        times = candidate.get("ms")
        if isinstance(times, list):
            times = times[limit] if limit < len(times) else None
        ms = positive(times)
        score = number(candidate.get("loss"))
        if ms is not None and score is not None:
            yield CandidatePoint(ms, score)


def _curves(events: list[dict[str, Any]]) -> Iterable[Curve]:
    """Points grouped by phase and quantity, in order; a step that comes again after a resume replaces its first."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for event in events:
        kind = next(
            (word(event.get(key)) for key in ("phase", "stage", "network", "name", "event") if event.get(key)), ""
        )
        for place, value in _points(event.get("history")):
            found.setdefault((kind, "loss"), {})[place] = value
        place_ = next((number(event.get(key)) for key in ("step", "epoch", "generation") if key in event), None)
        if place_ is None:
            continue
        for quantity, keys in (("loss", _LOSSES), ("metric", _METRICS)):
            for key in keys:
                value_ = number(event.get(key))
                if value_ is not None:
                    label = kind if key in ("loss", "metric", "accuracy") else f"{kind} ({key.split('_')[0]})"
                    found.setdefault((label, quantity), {})[place_] = value_
    for (name, quantity), points in found.items():
        if len(points) > 1:
            yield Curve(name, quantity, tuple(sorted(points.items())))


def _checkpoint_curves(state: Path) -> Iterable[Curve]:
    """What each training keeps in the header of its checkpoint, its loss and its scores on held-out examples; weights
    are not read."""
    for path in sorted(state.glob("*/checkpoint.safetensors")) if state.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, RecursionError):
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size)) if size <= _MAX_HEADER_BYTES else {}
            stored = json.loads(str(mapping(mapping(header).get("__metadata__")).get("hwsearch")))
            notes = mapping(mapping(stored).get("notes"))
            looks = [entry for entry in items(notes.get("scores")) if isinstance(entry, list) and len(entry) == 3]
            held_out = [[place, metric] for place, _, metric in looks]
            for quantity, listed in (("loss", notes.get("history")), ("metric", held_out)):
                points = dict(_points(listed))
                if len(points) > 1:
                    yield Curve(path.parent.name, quantity, tuple(sorted(points.items())))


def _points(history: object) -> Iterable[tuple[float, float]]:
    for entry in items(history):
        if isinstance(entry, list) and len(entry) >= 2:
            place, value = number(entry[0]), number(entry[1])
            if place is not None and value is not None:
                yield place, value


def _seconds(events: list[dict[str, Any]]) -> Iterable[tuple[str, float]]:
    """(what, seconds) of every stage that says how long it took."""
    for event in events:
        took = positive(event.get("seconds")) or positive(event.get("took_s"))
        name = word(event.get("stage")) or word(event.get("phase")) or word(event.get("event"))
        if took is not None and name:
            yield name, took
    yield from _between(events).items()


#: The event that ends a stage of a run.
_ENDS = {
    "search_started": "preparation", "search_finished": "search", "compared": "comparison",
    "verified": "deployment and verification",
}  # fmt: skip


def _between(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the stages that a run went through, all processes that worked on it together."""
    found: dict[str, float] = {}
    before = 0.0
    for event in events:
        kind, now = word(event.get("event")), number(event.get("elapsed_s"))
        if now is None:
            continue
        if kind == "run_started":
            before = now
        elif kind in _ENDS:
            found[_ENDS[kind]] = found.get(_ENDS[kind], 0.0) + max(now - before, 0.0)
            before = now
    return found
