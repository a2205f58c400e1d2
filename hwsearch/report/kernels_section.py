"""The found network kernel by kernel: what was predicted of each, and what the device's profiler saw.

``kernels.json`` of a run folder has both; a run without it shows the prediction of ``summary.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hwsearch.report import figures_run
from hwsearch.report.page import Page, details, ms, panel, percent, plural, table, text
from hwsearch.report.run_data import KernelTime, RunData
from hwsearch.report.values import items, mapping, positive, word
from hwsearch.search.journal import write_atomic

FILE, SCHEMA, VERSION = "kernels.json", "hwsearch.kernel_times", 1
_MOST = 5000


def write_kernel_times(folder: Path, device: str, measured_ms: float, kernels: Sequence[KernelTime]) -> Path:
    """Write ``kernels.json``: predicted and measured milliseconds of every kernel, in order of execution.

    Args:
        measured_ms: of the whole network, which the kernels' measured milliseconds sum to.

    Raises:
        InputError: the folder cannot be written.
    """
    document = {
        "schema": SCHEMA, "version": VERSION, "device": device, "measured_ms": measured_ms,
        "kernels": [asdict(kernel) for kernel in kernels],
    }  # fmt: skip
    write_atomic(folder / FILE, json.dumps(document, indent=1, sort_keys=True) + "\n")
    return folder / FILE


def kernels_section(page: Page, run: RunData) -> str:
    """Bars of what was predicted with marks of what was measured; below, the same as a table, the slowest first."""
    timed = _timed(run.kernel_times)
    found = timed or (run.answer.kernels if run.answer else ())
    if not found:
        return ""
    note = f"{plural(len(found), 'kernel')} of the found network, as the runtime executes them."
    if timed:
        note += (
            " Measured: the network's time, divided as the runtime's own profiler saw it; what the profiler itself "
            "adds to every kernel makes short ones look longer."
        )
    figure = page.figure(figures_run.kernel_pairs(found), "Predicted and measured ms of each kernel")
    return panel("Kernel by kernel", note, figure, details("As a table", _table(found, bool(timed))))


def _table(kernels: Sequence[KernelTime], timed: bool) -> str:
    rows = []
    for kernel in sorted(kernels, key=lambda k: -max(k.ms, k.measured_ms or 0.0)):
        cells = [text(kernel.node), text(kernel.family), ms(kernel.ms)]
        if timed:
            off = kernel.ms / kernel.measured_ms - 1 if kernel.measured_ms else None
            cells += [ms(kernel.measured_ms), percent(off)]
        rows.append(cells)
    head = ["kernel", "family", "predicted ms", *(["measured ms", "predicted against it"] if timed else [])]
    return table(head, rows, stack=True)


def _timed(document: dict[str, Any]) -> tuple[KernelTime, ...]:
    """The kernels of a file of this release; nothing where it is another, or where a number is missing."""
    if (document.get("schema"), document.get("version")) != (SCHEMA, VERSION):
        return ()
    found = []
    for entry in items(document.get("kernels"))[:_MOST]:
        kernel = mapping(entry)
        predicted, measured = positive(kernel.get("ms")), positive(kernel.get("measured_ms"))
        if predicted is None and measured is None:
            continue
        found.append(
            KernelTime(word(kernel.get("node"), "?"), word(kernel.get("family"), "other"), predicted or 0.0, measured)
        )
    return tuple(found)
