"""The report of a latency table: what was measured on a device, how steadily, and how well it is predicted."""

from __future__ import annotations

import statistics
from pathlib import Path

from hwsearch.device.check import DeviceCheck
from hwsearch.errors import HwsearchError
from hwsearch.latency.table import LatencyTable
from hwsearch.report import figures
from hwsearch.report.card_section import card_section
from hwsearch.report.page import Page, absent, card, definitions, ms, panel, percent, plural, table, text
from hwsearch.report.run_data import KernelTime, Row


def table_page(folder: Path) -> Page:
    """The page of a device's table folder.

    Raises: InputError, SchemaError: the table cannot be read; the message names file and line.
    """
    measured = LatencyTable.load(folder)
    check: DeviceCheck | str
    try:
        check = DeviceCheck.load(folder)
    except HwsearchError as error:
        check = str(error)
    page = Page(
        f"{measured.device} · hwsearch", [measured.device, measured.fingerprint.cpu, measured.fingerprint.runtime]
    )
    page.add(_hero(measured, check))
    page.add(_cards(measured))
    page.add(card_section(page, folder))
    page.add(_networks(page, measured))
    page.add(_families(page, measured))
    page.add(_provenance(folder, measured, check))
    return page


def _hero(measured: LatencyTable, check: DeviceCheck | str) -> str:
    state, word = "", "Not checked"
    messages: tuple[str, ...] = ()
    if isinstance(check, DeviceCheck):
        state, word = ("pass", "Steady") if check.ok else ("conditional", "Noisy")
        messages = check.messages
    listed = "".join(f"<li>{text(message)}</li>" for message in messages)
    notes = f'<ul class="reasons">{listed}</ul>' if listed else ""
    title = f"{measured.device}: {plural(len(measured.networks), 'network')} measured"
    kinds = "1 family" if len(measured.sources) == 1 else f"{len(measured.sources)} families"
    lead = f"{plural(measured.kernel_count, 'executed kernel')}, from {kinds} of networks."
    return (
        f'<section class="hero"><span class="pill {state}">{word}</span><h1>{text(title)}</h1>'
        f'<p class="lead">{text(lead)}</p>{notes}</section>'
    )


def _cards(measured: LatencyTable) -> str:
    spreads = [network.spread for network in measured.networks]
    times = [network.measured_ms for network in measured.networks]
    span = f"{ms(min(times))} to {ms(max(times))} ms" if times else "none"
    pieces = [
        card("Networks", f"{len(times):,}", "", span, "accent"),
        card("Kernels", f"{measured.kernel_count:,}", "", "executed nodes with their times"),
        card("Noise floor", percent(measured.noise_floor), "", "test-retest error, 95th percentile"),
        card(
            "Spread",
            percent(statistics.median(spreads) if spreads else None),
            "",
            "median half-width of one measurement",
        ),
    ]
    return f'<section class="cards">{"".join(pieces)}</section>'


def _networks(page: Page, measured: LatencyTable) -> str:
    title = "Operations do not tell milliseconds"
    points = [(float(sum(k.macs for k in n.kernels)), n.measured_ms, n.source) for n in measured.networks]
    points = [point for point in points if point[0] > 0]
    if not points:
        return panel(title, "", absent("The table holds no network."))
    note = "Each point is one measured network. At equal MACs the time differs by what the device makes of the shapes."
    return panel(title, note, page.figure(figures.macs_against_ms(points), "Measured ms against MACs of every network"))


def _families(page: Page, measured: LatencyTable) -> str:
    title = "What was measured"
    kernels = [
        KernelTime(kernel.node, kernel.family, time)
        for network in measured.networks
        for kernel, time in zip(network.kernels, network.node_ms, strict=True)
    ]
    if not kernels:
        return panel(title, "", absent("The table holds no kernel."))
    numbers: dict[str, list[float]] = {}
    for kernel in kernels:
        numbers.setdefault(kernel.family, []).append(kernel.ms)
    rows = [
        [text(f), f"{len(v):,}", ms(sum(v)), ms(statistics.median(v))]
        for f, v in sorted(numbers.items(), key=lambda item: -sum(item[1]))
    ]
    figure = page.figure(
        figures.families([Row("all networks", kernels=tuple(kernels))], "measured ms, summed"), "Measured ms by family"
    )
    return panel(title, "", figure, table(["family", "kernels", "sum ms", "median ms"], rows))


def _provenance(folder: Path, measured: LatencyTable, check: DeviceCheck | str) -> str:
    pairs: list[tuple[str, object]] = [("table folder", folder), ("device", measured.device)]
    pairs += [(k.replace("_", " "), v) for k, v in measured.fingerprint.to_dict().items()]
    pairs += [("reference speed", f"{ms(measured.reference_ms)} ms"), ("families", ", ".join(measured.sources))]
    content = definitions(pairs)
    if isinstance(check, str):
        content += absent(f"No device check: {check}")
    return panel("Provenance", "", content)
