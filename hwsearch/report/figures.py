"""Figures as plain dictionaries in plotly's format: pure functions of what was read. See ``chart`` for the style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hwsearch.report.chart import LINES as _LINES
from hwsearch.report.chart import NAMES_DOWN as _NAMES_DOWN
from hwsearch.report.chart import Figure, Trace, colour_of, label
from hwsearch.report.chart import bars as _bars
from hwsearch.report.chart import chart as _figure
from hwsearch.report.chart import dots as _points
from hwsearch.report.chart import line as _line
from hwsearch.report.chart import log_axis as _log_axis
from hwsearch.report.chart import mark as _mark
from hwsearch.report.page import ms as as_ms
from hwsearch.report.run_data import CandidatePoint, Curve, GroupRow, KernelTime, LayerBar, Row, StairLine
from hwsearch.report.style import BOUND_COLOURS, FAMILY_COLOURS, FOUND, GRID, INK, MUTED, UNIFORM

_OTHERS = _LINES[2:7]
_MOST_POINTS = 4000
_MOST_SOURCES = 6  # with names of their own in a legend


# --- a run ---


def candidates(
    points: Sequence[CandidatePoint], found: Row | None, budget_ms: float | None, score: float | None
) -> Figure:
    """Every scored choice: predicted milliseconds against the search's own score, with the best score at each time."""
    shown = points[:: max(1, math.ceil(len(points) / _MOST_POINTS))]
    limit = budget_ms if budget_ms is not None else math.inf
    within, above = [p for p in shown if p.ms <= limit], [p for p in shown if p.ms > limit]
    hover = "%{x:.4g} ms, score %{y:.4g}<extra></extra>"
    data = [
        _points(name, [p.ms for p in group], [p.score for p in group], colour, hover)
        for name, colour, group in (("within the budget", "#86b4e6", within), ("above the budget", "#cdd3dc", above))
        if group
    ]
    front: list[CandidatePoint] = []
    for point in sorted(points, key=lambda p: (p.ms, p.score)):
        if not front or point.score < front[-1].score:
            front.append(point)
    data.append(_line("best at each time", [p.ms for p in front], [p.score for p in front], INK, shape="hv"))
    if found is not None and found.predicted_ms is not None and score is not None:
        star = {"size": 15, "symbol": "star", "line": {"width": 1.5, "color": "#fff"}}
        data.append(_points("found", [found.predicted_ms], [score], FOUND, "found: " + hover, **star))
    mark = {} if budget_ms is None else _mark(budget_ms, f"budget {as_ms(budget_ms)} ms", top=False)
    y = {"title": "search score (lower is better)"}
    return _figure(data, {"title": "predicted ms"}, y, 420, narrow_height=360, **mark)


def family(points: Sequence[tuple[str, float, float, str]], metric: str) -> Figure:
    """Networks of a family, as (full, uniform or found; measured ms; metric; member): a line through each kind."""
    data = []
    for name in dict.fromkeys(point[0] for point in points):
        mine = sorted((ms, value, member) for kind, ms, value, member in points if kind == name)
        x, y = [ms for ms, _, _ in mine], [value for _, value, _ in mine]
        colour = colour_of(name) or MUTED
        trace = _points(label(name), x, y, colour, "%{x:.4g} ms, %{y:.4g} %{text}<extra></extra>", size=11)
        data.append({**trace, "mode": "lines+markers", "text": [label(member) for _, _, member in mine]})
    x_axis = {"title": "measured ms", "rangemode": "tozero"}
    return _figure(data, x_axis, {"title": label(metric)}, 420, narrow_height=360)


def widths(found: Row, full: Row | None) -> Figure:
    """Units left in each width group, in front of the full network's."""
    names = list(found.widths)
    whole = full.widths if full else {}
    places = list(range(len(names)))
    words = [f"{found.widths[n]:g} / {whole[n]:g}" if n in whole else f"{found.widths[n]:g}" for n in names]
    data = [_bars("full", places, [whole.get(n) for n in names], "#dde2ea", "", width=0.72)] if whole else []
    tell = {"customdata": [[label(n, 120), w] for n, w in zip(names, words, strict=True)]}
    hover = "%{customdata[0]}: %{customdata[1]}<extra></extra>"
    thick = 0.4 if whole else 0.72
    data.append(_bars(found.name, places, [found.widths[n] for n in names], FOUND, hover, width=thick, **tell))
    style = {"xanchor": "left", "xshift": 6, "showarrow": False, "font": {"size": 12, "color": MUTED}}
    notes = [
        {"x": max(found.widths[n], whole.get(n, 0)), "y": at, "text": words[at], **style} for at, n in enumerate(names)
    ]
    most = max((*found.widths.values(), *whole.values()), default=1.0)
    x = {"title": "units", "range": [0, most * 1.22]}
    y = {"tickvals": places, "ticktext": [label(n, 28) for n in names], **_NAMES_DOWN}
    narrow = {"yaxis": {"ticktext": [label(n, 16) for n in names]}, "xaxis": {"range": [0, most * 1.5]}}
    height = max(70 + 26 * len(names), 160)
    return _figure(data, x, y, height, narrow=narrow, barmode="overlay", annotations=notes)


def families(rows: Sequence[Row], title: str = "predicted ms") -> Figure:
    """Milliseconds by kernel family, one bar for each network that has kernels."""
    totals = [_by_family(row.kernels) for row in rows]
    names = sorted({name for total in totals for name in total}, key=lambda n: -max(t.get(n, 0.0) for t in totals))
    data = []
    for at, (row, total) in enumerate(zip(rows, totals, strict=True)):
        colour: Any = colour_of(row.name) or _OTHERS[at % len(_OTHERS)]
        if len(rows) == 1:  # nothing to tell apart but the families themselves
            colour = [FAMILY_COLOURS.get(n, FAMILY_COLOURS["other"]) for n in names]
        places, lengths = [label(n, 24) for n in names], [total.get(n, 0.0) for n in names]
        data.append(_bars(label(row.name, 24), places, lengths, colour, "%{y}: %{x:.3g} ms<extra></extra>"))
    height = max(80 + (16 * len(rows) + 14) * len(names), 180)
    legend = len(rows) > 1
    return _figure(data, {"title": title}, _NAMES_DOWN, height, barmode="group", bargap=0.35, showlegend=legend)


def _by_family(kernels: Sequence[KernelTime]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for kernel in kernels:
        totals[kernel.family] = totals.get(kernel.family, 0.0) + kernel.ms
    return totals


def layers(found: Sequence[LayerBar]) -> Figure:
    """Milliseconds of each layer in order of execution, divided by what they are spent on."""
    places = list(range(len(found)))
    tell = {"customdata": [[label(bar.name, 120), f"{bar.share * 100:.1f} %", bar.bound] for bar in found]}
    data = []
    for kind, colour in BOUND_COLOURS.items():
        hover = f"%{{customdata[0]}}: {kind} %{{x:.3g}} ms<br>%{{customdata[1]}} of the time in all, bound by "
        hover += "%{customdata[2]}<extra></extra>"
        data.append(_bars(kind, places, [bar.parts.get(kind, 0.0) for bar in found], colour, hover, **tell))
    most = max((sum(bar.parts.values()) for bar in found), default=1.0)
    style = {"xanchor": "left", "xshift": 6, "showarrow": False, "font": {"size": 12, "color": MUTED}}
    notes = [
        {"x": sum(bar.parts.values()), "y": at, "text": f"{bar.share * 100:.0f} %", **style}
        for at, bar in enumerate(found)
    ]
    x = {"title": "predicted ms", "range": [0, most * 1.12]}
    y = {"tickvals": places, "ticktext": [label(bar.name, 28) for bar in found], **_NAMES_DOWN}
    narrow = {"yaxis": {"ticktext": [label(bar.name, 14) for bar in found]}, "xaxis": {"range": [0, most * 1.25]}}
    height = max(80 + 24 * len(found), 180)
    return _figure(data, x, y, height, narrow=narrow, barmode="stack", bargap=0.3, annotations=notes)


def stair(curve: StairLine) -> Figure:
    """The network's milliseconds over the widths of one group, with where it stands and the edges beside it."""
    hover = "%{x} units: %{y:.4g} ms<extra></extra>"
    data = [_line("", list(curve.widths), list(curve.ms), FOUND, hover=hover)]
    at = dict(zip(curve.widths, curve.ms, strict=True))
    for name, width, colour, symbol in (
        ("down to", curve.down, UNIFORM, "diamond"),
        ("now", curve.width, INK, "circle"),
        ("free up to", curve.up, "#0f8f7b", "triangle-right"),
    ):
        if width in at:
            words = f"{name} {width:g}: %{{y:.4g}} ms<extra></extra>"
            data.append(_points(f"{name} {width:g}", [width], [at[width]], colour, words, size=11, symbol=symbol))
    data[0]["showlegend"] = False
    x = {"title": f"units of {label(curve.group, 32)}"}
    return _figure(data, x, {"title": "predicted ms", "rangemode": "tozero"}, 280, narrow_height=270)


def curves(found: Sequence[Curve], quantity: str, title: str) -> Figure | None:
    """One line a phase; None without any."""
    own = [curve for curve in found if curve.quantity == quantity]
    data = []
    for at, curve in enumerate(own):
        colour = colour_of(curve.name) or _OTHERS[at % len(_OTHERS)]
        x, y = [place for place, _ in curve.points], [value for _, value in curve.points]
        hover = "%{x:.6g}: %{y:.4g}<extra>%{fullData.name}</extra>"
        data.append(_line(label(curve.name, 32), x, y, colour, hover=hover))
    axis = {"title": title, "tickformat": ".0%"} if title == "accuracy" else {"title": title}
    return _figure(data, {"title": "step"}, axis, 320, narrow_height=300) if data else None


# --- a device ---


def predicted_against_measured(points: Sequence[tuple[float, float, str]]) -> Figure:
    """Predictions of networks left out of the fit: (measured ms, predicted ms, source), with a band of ±10 %."""
    low = min(min(m, p) for m, p, _ in points) * 0.9
    high = max(max(m, p) for m, p, _ in points) * 1.1
    band = _line("±10 %", [low, high, high, low], [low * 1.1, high * 1.1, high * 0.9, low * 0.9], FOUND)
    data = [{**band, "fill": "toself", "fillcolor": "rgba(11,98,196,.12)", "line": {"width": 0}}]
    hover = "measured %{x:.3g} ms, predicted %{y:.3g} ms<extra>%{text}</extra>"
    data += _by_source(points, hover)
    data.append({**_line("equal", [low, high], [low, high], INK), "showlegend": False})
    log = _log_axis(low, high)
    return _figure(data, {"title": "measured ms", **log}, {"title": "predicted ms", **log}, 430, narrow_height=420)


def error_distribution(errors: Sequence[float]) -> Figure:
    """Histogram of signed relative errors (predicted / measured - 1) of networks left out of the fit."""
    width = 0.02
    reach = min(max(abs(e) for e in errors), 0.5)
    edge = math.ceil(reach / width + 0.5) + 0.5  # a bar is centred on zero
    inside = [max(-reach, min(reach, e)) * 100 for e in errors]
    bins = {"start": -edge * width * 100, "end": edge * width * 100, "size": width * 100}
    bars = {"type": "histogram", "x": inside, "xbins": bins, "marker": {"color": FOUND}, "showlegend": False}
    hover = {"hovertemplate": "%{x:.0f} %: %{y} networks<extra></extra>"}
    x = {"title": "predicted against measured, %", "zeroline": True, "zerolinecolor": INK}
    return _figure([{**bars, **hover}], x, {"title": "networks"}, 300, bargap=0.06)


def error_by_family(errors: Mapping[str, float], noise_floor: float | None) -> Figure:
    """Mean absolute percentage error of each kernel family (shares of 1), with the device's noise floor."""
    names = sorted(errors, key=lambda name: -errors[name])
    colours = [FAMILY_COLOURS.get(name, FAMILY_COLOURS["other"]) for name in names]
    places, lengths = [label(n, 24) for n in names], [errors[n] * 100 for n in names]
    bars = _bars("", places, lengths, colours, "%{y}: %{x:.1f} %<extra></extra>", showlegend=False)
    mark = {} if noise_floor is None else _mark(noise_floor * 100, f"noise floor {noise_floor * 100:.1f} %", top=True)
    x = {"title": "mean absolute error, %", "rangemode": "tozero"}
    return _figure([bars], x, _NAMES_DOWN, max(90 + 30 * len(names), 300), narrow_height=300, bargap=0.4, **mark)


def macs_against_ms(points: Sequence[tuple[float, float, str]]) -> Figure:
    """Every measured network of a table: (MACs, measured ms, family it was drawn from)."""
    data = _by_source(points, "%{x:.3s} MACs, %{y:.3g} ms<extra>%{text}</extra>")
    x = {"title": "MACs", "type": "log", "dtick": "D2", "tickformat": "~s"}
    y = {"title": "measured ms", **_log_axis(min(t for _, t, _ in points) * 0.9, max(t for _, t, _ in points) * 1.1)}
    return _figure(data, x, y, 430, narrow_height=420)


def _by_source(points: Sequence[tuple[float, float, str]], hover: str) -> list[Trace]:
    """(x, y, source) as one trace a source, or a kind of source where they are many."""
    many = len({source for _, _, source in points}) > _MOST_SOURCES
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for point in sorted(points, key=lambda p: p[2]):
        kind, _, name = point[2].partition(":")
        words = {"random": "random networks", "space": "widths of a model"}.get(kind, kind)
        groups.setdefault(words if many or not name else f"{words}, {name}", []).append(point)
    traces = []
    for at, (name, own) in enumerate(groups.items()):
        x, y = [a for a, _, _ in own], [b for _, b, _ in own]
        trace = _points(label(name, 28), x, y, _LINES[at % len(_LINES)], hover, size=6, opacity=0.75)
        traces.append({**trace, "text": [label(source, 28) for _, _, source in own]})
    return traces


def groups(rows: Sequence[GroupRow]) -> Figure:
    """Groups across, layers down: a filled mark where a layer writes a group's channels, hollow where it reads."""
    layers: dict[str, None] = {}
    for group in rows:
        layers |= dict.fromkeys(_layers(group.writes))
    for group in rows:
        layers |= dict.fromkeys(_layers(group.reads))  # those that only read come last: the classifier
    place = {layer: at for at, layer in enumerate(layers)}
    data: list[Trace] = []
    for at, group in enumerate(rows):
        touched = [place[layer] for layer in (*_layers(group.writes), *_layers(group.reads))]
        line = {"color": GRID, "width": 3}
        data.append(_marks([at, at], [min(touched), max(touched)], mode="lines", line=line) if touched else {})
    for name, symbol, of in (("reads", "circle-open", "reads"), ("writes", "circle", "writes")):
        marks = [(at, layer) for at, group in enumerate(rows) for layer in _layers(getattr(group, of))]
        hover = [f"{label(layer)} {name} {label(rows[at].name)}" for at, layer in marks]
        data.append(
            _marks(
                [at for at, _ in marks],
                [place[layer] for _, layer in marks],
                name=name,
                text=hover,
                showlegend=True,
                mode="markers",
                marker={"symbol": symbol, "size": 9, "color": FOUND, "line": {"width": 1.5}},
                hovertemplate="%{text}<extra></extra>",
            )
        )
    ticks = {"tickmode": "array", "tickvals": list(place.values()), "ticktext": [label(layer, 24) for layer in layers]}
    columns = {"tickmode": "array", "tickvals": list(range(len(rows))), "ticktext": [label(g.name, 18) for g in rows]}
    height = 110 + 18 * len(layers)
    return _figure(
        [trace for trace in data if trace], {**columns, "tickangle": -60, "showgrid": False},
        {**ticks, **_NAMES_DOWN}, height, narrow={"xaxis": {"showticklabels": False}},
    )  # fmt: skip


def _layers(slots: Sequence[str]) -> tuple[str, ...]:
    """Layers of parameter axes such as ``conv1.weight[0]``, each once."""
    return tuple(dict.fromkeys(slot.partition("[")[0].rpartition(".")[0] or slot.partition("[")[0] for slot in slots))


def _marks(x: Sequence[float], y: Sequence[float], **given: Any) -> Trace:
    return {"type": "scatter", "x": list(x), "y": list(y), "hoverinfo": "skip", "showlegend": False, **given}


def quality(
    layers: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], title: str
) -> Figure:
    """Layers down, epochs of all trials across, the darker the larger."""
    trace = {
        "type": "heatmap",
        "z": [list(row) for row in values],
        "x": [label(column) for column in columns],
        "y": [label(layer, 24) for layer in layers],
        "colorscale": [[0, "#f2f4f8"], [1, FOUND]],
        "colorbar": {"thickness": 10, "outlinewidth": 0},
        "hovertemplate": "%{y}, %{x}: %{z:.3g}<extra></extra>",
    }
    height = 130 + 18 * len(layers)
    return _figure(
        [trace], {"title": title, "showgrid": False, "type": "category"}, dict(_NAMES_DOWN), height, showlegend=False
    )
