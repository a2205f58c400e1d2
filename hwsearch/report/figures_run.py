"""Figures of a run's networks: what they are worth at their milliseconds, and their kernels as timed."""

from __future__ import annotations

from collections.abc import Sequence

from hwsearch.report.chart import Figure, chart, colour_of, dots, label, mark
from hwsearch.report.page import ms as as_ms
from hwsearch.report.run_data import KernelTime, Row
from hwsearch.report.style import FAMILY_COLOURS, INK, MUTED


def trained(rows: Sequence[Row], budget_ms: float | None, metric: str) -> Figure | None:
    """The networks that were trained to the end: milliseconds (measured where they were) against the task's metric."""
    known = [(row, row.best_ms, row.metric) for row in rows]
    shown = [(row, time, worth) for row, time, worth in known if time is not None and worth is not None]
    if not shown:
        return None
    share = metric == "accuracy"
    data = []
    for row, time, worth in shown:
        value = f"{worth * 100:.2f} %" if share else f"{worth:.4g}"
        kind = "measured" if row.measured_ms is not None else "predicted"
        hover = f"{label(row.name)}: {as_ms(time)} ms {kind}, {label(metric)} {value}<extra></extra>"
        trace = dots(label(row.name, 24), [time], [worth], colour_of(row.name) or MUTED, hover, size=13)
        # beside the line of the budget, not on it, and found and uniform not on each other
        kept = budget_ms is not None and time <= 1.05 * budget_ms
        side = ("top left" if "uniform" in row.name.lower() else "bottom left") if kept else "bottom center"
        words = {"mode": "markers+text", "text": [label(row.name, 24)], "textposition": side}
        data.append({**trace, **words, "textfont": {"color": INK, "size": 12}, "cliponaxis": False})
    times, values = [time for _, time, _ in shown], [worth for _, _, worth in shown]
    most = max(*times, budget_ms or 0.0)
    room = max((max(values) - min(values)) * 0.35, abs(max(values)) * 0.01, 1e-6)
    line = {} if budget_ms is None else mark(budget_ms, f"budget {as_ms(budget_ms)} ms", top=True)
    low, high = min(values) - room, max(values) + room
    y = {"title": label(metric), "range": [low, high], "nticks": 6}
    if share and high > 1:  # room for the names, but no tick above all of them right
        step = next((step for step in (0.005, 0.01, 0.02, 0.05, 0.1) if (1 - low) / step <= 5), 0.25)
        y |= {"tickvals": [round(1 - step * at, 3) for at in range(5, -1, -1) if 1 - step * at >= low]}
    y |= {"tickformat": ".0%" if high - low > 0.1 else ".1%"} if share else {}
    return chart(data, {"title": "ms", "range": [0, most * 1.15]}, y, 420, narrow_height=340, showlegend=False, **line)


def kernel_pairs(kernels: Sequence[KernelTime]) -> Figure:
    """Every kernel in order of execution: predicted as a bar of its family's colour, measured as a mark."""
    totals: dict[str, float] = {}
    for kernel in kernels:
        totals[kernel.family] = totals.get(kernel.family, 0.0) + kernel.ms
    data = []
    for family in sorted(totals, key=lambda name: -totals[name]):
        own = [(at, kernel) for at, kernel in enumerate(kernels, 1) if kernel.family == family]
        data.append(
            {
                "type": "bar",
                "name": label(family, 24),
                "x": [at for at, _ in own],
                "y": [kernel.ms for _, kernel in own],
                "marker": {"color": FAMILY_COLOURS.get(family, FAMILY_COLOURS["other"])},
                "customdata": [label(kernel.node, 80) for _, kernel in own],
                "hovertemplate": "%{x}. %{customdata}: %{y:.3g} ms predicted<extra>%{fullData.name}</extra>",
            }
        )
    timed = [(at, kernel.measured_ms) for at, kernel in enumerate(kernels, 1) if kernel.measured_ms is not None]
    if timed:
        hover = "%{x}. %{y:.3g} ms measured<extra></extra>"
        trace = dots("measured", [float(at) for at, _ in timed], [time for _, time in timed], INK, hover, size=6)
        data.append({**trace, "marker": {"color": INK, "size": 5, "symbol": "diamond"}})
    x = {"title": "kernel, in order of execution", "showgrid": False}
    words = "ms: bars predicted, marks measured" if timed else "predicted ms"
    return chart(data, x, {"title": words}, 360, bargap=0.25, barmode="stack")
