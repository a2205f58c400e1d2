"""The house style of figures, as plain dictionaries in plotly's format: no box, a thin grid, the legend above.

A figure is {data, layout, narrow, height, narrow_height}; ``narrow`` patches the layout on a small screen. Names from
files are escaped here (``label``), because plotly reads its labels as a kind of HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from hwsearch.report.style import FOUND, FULL, GRID, INK, MUTED, UNIFORM

Figure = dict[str, Any]
Trace = dict[str, Any]

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'
#: Colours of lines that have no meaning of their own.
LINES = (FOUND, UNIFORM, "#0f8f7b", "#7a55c7", "#cc4b74", "#7b8f2a", "#24407a", FULL)
#: For an axis of names from top to bottom.
NAMES_DOWN = {"autorange": "reversed", "showgrid": False}


def label(value: object, most: int = 40) -> str:
    """A name as plotly text: escaped; of a long one the end, which is what tells layers apart."""
    plain = str(value)
    return html.escape(plain if len(plain) <= most else f"…{plain[1 - most :]}", quote=False)


def colour_of(row: str) -> str:
    """The colour of a network of the comparison by its name, "" for any other."""
    known = {"found": FOUND, "winner": FOUND, "uniform": UNIFORM, "full": FULL}
    return next((colour for word, colour in known.items() if word in row.lower()), "")


def chart(
    data: list[Trace],
    x: Mapping[str, Any],
    y: Mapping[str, Any],
    height: int,
    *,
    narrow_height: int = 0,
    narrow: Mapping[str, Any] | None = None,
    **layout: Any,
) -> Figure:
    """No box, a thin grid, the legend above; ``x`` and ``y`` are axes with a plain ``title``."""
    base: dict[str, Any] = {
        "font": {"family": _FONT, "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 34, "b": 8},
        "hoverlabel": {
            "bgcolor": "#fff",
            "bordercolor": "#c9cfd9",
            "font": {"family": _FONT, "size": 13, "color": INK},
        },
        "legend": {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "traceorder": "normal"},
        "showlegend": True,
        "xaxis": axis(x),
        "yaxis": axis(y),
        **layout,
    }
    heights = {"height": height, "narrow_height": narrow_height or height}
    return {"data": data, "layout": base, "narrow": dict(narrow or {}), **heights}


def axis(given: Mapping[str, Any]) -> dict[str, Any]:
    """An axis with a plain ``title``; what is given goes over the style."""
    plain = {"gridcolor": GRID, "zeroline": False, "automargin": True, "tickfont": {"color": MUTED, "size": 12}}
    plain |= {"ticks": "outside", "ticklen": 5, "tickcolor": "rgba(0,0,0,0)"}  # room between labels and bars
    title = {"text": given.get("title", ""), "font": {"size": 13, "color": MUTED}, "standoff": 10}
    return {**plain, **given, "title": title}


def dots(name: str, x: list[float], y: list[float], colour: str, hover: str, **marker: Any) -> Trace:
    """Points; a hover text of plotly's template."""
    style = {"color": colour, "size": 7, "line": {"width": 0.5, "color": "#fff"}, **marker}
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": style, "hovertemplate": hover}


def line(name: str, x: list[float], y: list[float], colour: str, *, shape: str = "linear", hover: str = "") -> Trace:
    """A line; without a hover text it is not pointed at."""
    style = {"color": colour, "width": 2 if hover else 1.5, "shape": shape}
    tell = {"hovertemplate": hover} if hover else {"hoverinfo": "skip"}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style, **tell}


def bars(name: str, places: list[Any], lengths: list[Any], colour: Any, hover: str, **other: Any) -> Trace:
    """Horizontal bars."""
    tell = {"hovertemplate": hover} if hover else {"hoverinfo": "skip"}
    plain = {"type": "bar", "orientation": "h", "name": name, "y": places, "x": lengths, "marker": {"color": colour}}
    return {**plain, **tell, **other}


def mark(place: float, words: str, *, top: bool) -> dict[str, Any]:
    """A dashed line across the figure at ``x = place``, with words beside it."""
    dashes = {"color": INK, "width": 1.5, "dash": "dash"}
    shape = {"type": "line", "x0": place, "x1": place, "yref": "paper", "y0": 0, "y1": 1, "line": dashes}
    where = {"x": place, "y": 1 if top else 0, "yref": "paper", "yanchor": "bottom", "showarrow": False}
    where |= {"xanchor": "left" if top else "right", "xshift": -4}
    return {"shapes": [shape], "annotations": [{**where, "text": words, "font": {"size": 12, "color": INK}}]}


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis of milliseconds with whole labels: 0.1, 0.2, 0.5, 1 ..."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in decades for factor in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    span = [math.log10(low), math.log10(high)]
    return {"type": "log", "range": span, "tickvals": shown, "ticktext": [f"{tick:.6g}" for tick in shown]}
