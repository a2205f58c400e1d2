"""Why the network takes its time, as a section: bars of the layers, stair curves of those that matter, the sentences.

Read from a run folder's ``explain.json``. A bundle has none, so its ``model.onnx`` is explained here and now where the
device and its predictor are at hand; that times nothing.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.errors import HwsearchError
from hwsearch.report import figures
from hwsearch.report.page import Page, absent, details, halves, ms, panel, percent, table, text
from hwsearch.report.run_data import LayerBar, RunData, StairLine
from hwsearch.report.style import BOUND_COLOURS
from hwsearch.report.values import items, mapping, number, positive, word
from hwsearch.search.journal import write_atomic

if TYPE_CHECKING:
    from hwsearch.latency.explain import Explanation

FILE, SCHEMA, VERSION = "explain.json", "hwsearch.explanation", 1

_TITLE = "Why it is not faster"
_CURVES = 4
_MOST_LAYERS = 400


def explain_section(page: Page, explanation: dict[str, Any] | str) -> str:
    """The section of an explanation's plain values, or of the line that says why there is none."""
    found = {} if isinstance(explanation, str) else explanation
    layers = [bar for entry in items(found.get("layers"))[:_MOST_LAYERS] if (bar := _bar(mapping(entry))) is not None]
    if not layers:
        return panel(_TITLE, "", absent(explanation if isinstance(explanation, str) else "It lists no layers."))
    reasons = "".join(f"<li>{text(reason)}</li>" for reason in items(found.get("reasons"))[:8] if word(reason))
    listed = f'<ul class="reasons">{reasons}</ul>' if reasons else ""
    note = (
        "Predicted milliseconds of each layer with every kernel that serves it, divided by what the predictor's "
        "analytic part prices: arithmetic, memory traffic, and what is paid once a kernel."
    )
    bars = page.figure(figures.layers(layers), "Predicted ms of each layer, by compute, memory and overhead")
    whole = details("As a table", _table(layers))
    return panel(_TITLE, note, listed, bars, *_stairs(page, found), whole)


def of_run(run: RunData) -> dict[str, Any] | str:
    """What the pipeline wrote into a run's ``explain.json``; a line where that is missing or of another release."""
    if run.explanation.get("schema") == SCHEMA and run.explanation.get("version") == VERSION:
        return run.explanation
    command = f"hwsearch estimate {run.folder} --device {run.device or 'NAME'} --explain"
    return f"This run has no {FILE} that this release reads; {command} tells."


def write_explanation(folder: Path, explanation: Explanation) -> Path:
    """Write ``explain.json`` of a run folder.

    Raises:
        InputError: the folder cannot be written.
    """
    document = {"schema": SCHEMA, "version": VERSION, **explanation.to_dict()}
    write_atomic(folder / FILE, json.dumps(document, indent=1, sort_keys=True) + "\n")
    return folder / FILE


def explain_bundle(model: bytes, device_name: str, table_folder: Path | None) -> dict[str, Any] | str:
    """Explain an ONNX network on a device by its name; a line where device or predictor are not at hand."""
    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device
    from hwsearch.latency.explain import explain, named_kernels
    from hwsearch.latency.predictor import LatencyPredictor, OutOfRangeWarning

    if table_folder is None or not (table_folder / "predictor" / "manifest.json").is_file():
        return f"No predictor of {device_name or 'its device'} is at hand, so its time cannot be taken apart here."
    try:
        device = Device.load(device_name)
        with open_session(device) as session:
            predictor = LatencyPredictor.load(table_folder / "predictor", session.fingerprint)
            kernels = named_kernels(model, session.lower([model])[0], session)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OutOfRangeWarning)
            note = "no stair edges: an ONNX file has no width space"
            return explain(model, kernels, predictor, note=note).to_dict()
    except HwsearchError as error:
        return f"Its time cannot be taken apart here: {error}"


def _bar(entry: dict[str, Any]) -> LayerBar | None:
    parts = {kind: max(number(entry.get(f"{kind}_ms")) or 0.0, 0.0) for kind in BOUND_COLOURS}
    name, share = word(entry.get("name")), number(entry.get("share"))
    if not name or share is None or not sum(parts.values()):
        return None
    channels, runs_as = positive(entry.get("channels")), positive(entry.get("runs_as"))
    shown = "" if channels is None else f"{channels:g}"
    if channels is not None and runs_as is not None and runs_as > channels:
        shown += f" as {runs_as:g}"
    down, up = positive(entry.get("down")), positive(entry.get("up"))
    bound = word(entry.get("bound"))
    return LayerBar(
        name, share, bound if bound in BOUND_COLOURS else "?", parts, shown,
        "" if down is None else f"{down:g}", number(entry.get("saved_ms")), "" if up is None else f"{up:g}",
    )  # fmt: skip


def _table(layers: list[LayerBar]) -> str:
    head = ["layer", "ms", "share", "bound", "channels", "down to", "saves ms", "free up to"]
    rows = []
    for bar in layers:
        saved = ms(bar.saved_ms) if bar.down else ""
        cells = [text(bar.name), ms(sum(bar.parts.values())), percent(bar.share), text(bar.bound)]
        rows.append([*cells, text(bar.channels), text(bar.down), saved, text(bar.up)])
    return table(head, rows, stack=True)


def _stairs(page: Page, found: dict[str, Any]) -> list[str]:
    """Curves of the groups whose width moves the time most, two beside each other."""
    lines = [line for entry in items(found.get("stairs")) if (line := _line(mapping(entry))) is not None]
    if not lines:
        return [absent(note[:1].upper() + note[1:] + ".")] if (note := word(found.get("note"))) else []
    chosen = sorted(lines, key=lambda line: min(line.ms) - max(line.ms))[:_CURVES]
    drawn = [page.figure(figures.stair(line), f"Predicted ms over the units of {line.group}") for line in chosen]
    lead = "The whole network's predicted milliseconds over the width of one group, the others as they are: where it "
    lead += "stands, the next edge down, and the widest width that costs no more."
    return [f'<p class="note">{text(lead)}</p>', *(halves(*drawn[at : at + 2]) for at in range(0, len(drawn), 2))]


def _line(entry: dict[str, Any]) -> StairLine | None:
    widths = [positive(value) for value in items(entry.get("widths"))]
    times = [positive(value) for value in items(entry.get("ms"))]
    group, width = word(entry.get("group")), positive(entry.get("width"))
    if not group or width is None or len(widths) != len(times) or len(widths) < 2:
        return None
    pairs = [(w, t) for w, t in zip(widths, times, strict=True) if w is not None and t is not None]
    if len(pairs) != len(widths):
        return None
    down, up = positive(entry.get("down")) or 0.0, positive(entry.get("up")) or 0.0
    return StairLine(group, width, down, up, tuple(w for w, _ in pairs), tuple(t for _, t in pairs))
