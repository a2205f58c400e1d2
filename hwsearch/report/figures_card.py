"""Figures of a predictor's card: how its errors are spread over kernel families, and whether its intervals hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hwsearch.report.chart import NAMES_DOWN, Figure, chart, dots, label, log_axis
from hwsearch.report.style import FAIL, FAMILY_COLOURS, FOUND, INK

_MOST = 2000


def residuals(quantiles: Mapping[str, Sequence[float]]) -> Figure:
    """Of each kernel family the 5, 25, 50, 75 and 95 % quantiles of predicted over measured, less 1, as a box."""
    names = sorted(quantiles, key=lambda name: quantiles[name][0] - quantiles[name][4])
    colours = [FAMILY_COLOURS.get(name, FAMILY_COLOURS["other"]) for name in names]
    data = []
    for name, colour in zip(names, colours, strict=True):
        least, low, middle, high, most = (value * 100 for value in quantiles[name])
        words = f"{label(name, 24)}: half from {low:.1f} to {high:.1f} %, nine in ten from {least:.1f} to "
        data.append(
            {
                "type": "box", "orientation": "h", "y": [label(name, 24)], "q1": [low], "median": [middle],
                "q3": [high], "lowerfence": [least], "upperfence": [most], "line": {"color": colour, "width": 1.5},
                "fillcolor": f"{colour}33", "width": 0.5, "hoverinfo": "skip", "showlegend": False, "name": "",
            }
        )  # fmt: skip
        hover = f"{words}{most:.1f} %<extra></extra>"
        data.append({**dots("", [middle], [0.0], colour, hover, size=5), "y": [label(name, 24)], "showlegend": False})
    x = {"title": "predicted against measured, %", "zeroline": True, "zerolinecolor": INK}
    return chart(data, x, NAMES_DOWN, max(90 + 32 * len(names), 200), boxmode="overlay")


def intervals(points: Sequence[tuple[float, float, float, float]]) -> Figure:
    """Held-out networks as (measured, predicted, low, high ms): each measurement in its interval of the prediction."""
    shown = sorted(points, key=lambda point: point[1])[:: max(1, -(-len(points) // _MOST))]
    x: list[float | None] = []
    y: list[float | None] = []
    for _, predicted, low, high in shown:
        x += [predicted, predicted, None]
        y += [(low / predicted - 1) * 100, (high / predicted - 1) * 100, None]
    bars = {
        "type": "scatter", "mode": "lines", "name": "90 % interval", "x": x, "y": y, "hoverinfo": "skip",
        "line": {"color": "#c3cbd8", "width": 2},
    }  # fmt: skip
    data = [bars]
    for name, colour, inside in (("measured, inside", FOUND, True), ("measured, outside", FAIL, False)):
        own = [(m, p) for m, p, low, high in shown if (low <= m <= high) == inside]
        hover = "predicted %{x:.3g} ms, measured %{y:+.1f} % from it<extra></extra>"
        if own:
            data.append(dots(name, [p for _, p in own], [(m / p - 1) * 100 for m, p in own], colour, hover, size=5))
    low_ms, high_ms = shown[0][1] * 0.9, shown[-1][1] * 1.1
    axis = {"title": "measured against predicted, %", "zeroline": True, "zerolinecolor": INK}
    return chart(data, {"title": "predicted ms", **log_axis(low_ms, high_ms)}, axis, 430, narrow_height=380)
