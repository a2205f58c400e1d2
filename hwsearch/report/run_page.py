"""The report of a run: what was asked, what was found, whether it holds, and why."""

from __future__ import annotations

from pathlib import Path

from hwsearch.deploy.verdict import Verdict
from hwsearch.report import figures
from hwsearch.report.card_section import card_section
from hwsearch.report.cells_section import cells_section
from hwsearch.report.devices_section import devices_section
from hwsearch.report.explain_section import explain_section, of_run
from hwsearch.report.front_section import front_section
from hwsearch.report.kernels_section import kernels_section
from hwsearch.report.page import (
    Page,
    absent,
    card,
    count,
    definitions,
    details,
    halves,
    ms,
    panel,
    percent,
    table,
    text,
)
from hwsearch.report.provenance_section import provenance_section
from hwsearch.report.quality_section import quality_section
from hwsearch.report.run_data import Row, RunData
from hwsearch.report.space_section import space_section
from hwsearch.report.way_section import way_section

#: Kinds of kernels, as ``hwsearch.graph.kernel`` calls them.
KINDS = {
    "conv": "a dense convolution",
    "conv_first": "a convolution of an input with few channels, as an image",
    "pointwise": "a 1x1 convolution",
    "depthwise": "a convolution of each channel on its own",
    "grouped": "a convolution of groups of channels",
    "conv_transpose": "a transposed convolution",
    "gemm": "a fully connected layer, or another product of matrices",
    "attention": "scores, softmax and mixing of attention in one",
    "recurrent": "a recurrent layer",
    "pool": "pooling over a window",
    "global_pool": "pooling over the whole image",
    "reduce": "any other sum, mean or maximum along axes",
    "norm": "a normalisation over each example, and softmax",
    "elementwise": "sums, products and activations that no other kernel took along",
    "resize": "interpolation",
    "reorder": "a change of the memory layout, which the runtime puts between kernels",
    "concat": "joins channels",
    "move": "moves bytes: transpose, slice, split, pad",
    "free": "a view, which costs next to nothing",
    "other": "anything else",
}
_STATES = {"pass": "Pass", "conditional": "Conditional", "fail": "Fail"}


def run_page(run: RunData, table_folder: Path | None) -> Page:
    """The page of a run; ``table_folder`` is where the device's predictor card is looked for."""
    page = Page(f"{run.name} · hwsearch", [run.name, run.model, run.device, run.method])
    page.add(hero(run))
    page.add(cards(run))
    page.add(comparison(run))
    page.add(devices_section(page, run))
    page.add(front_section(page, run))
    page.add(f'<div class="split">{widths(page, run)}{families(page, run)}</div>')
    page.add(cells_section(page, run.result))
    page.add(way_section(page, run.result))
    page.add(space_section(page, run.space))
    page.add(kernels_section(page, run))
    page.add(explain_section(page, of_run(run)))
    page.add(card_section(page, table_folder))
    page.add(training(page, run))
    page.add(quality_section(page, run.quality))
    page.add(provenance_section(run))
    return page


def judged(run: RunData) -> tuple[str, str]:
    """(state, word): the verdict where the bundle was verified, else "" and what is known."""
    return run.status, _STATES.get(run.status, "Not verified")


def measured(run: RunData) -> float | None:
    """The milliseconds that count: those of the verification, else those of the comparison."""
    if run.verdict is not None and run.verdict.measured_ms is not None:
        return run.verdict.measured_ms
    return run.answer.measured_ms if run.answer else None


def hero(run: RunData) -> str:
    """One sentence that says it all, and the reasons when the answer is no."""
    state, word = judged(run)
    time, budget, found, full = measured(run), run.budget_ms, run.answer, run.full
    if time is not None and budget is not None:
        place = "inside" if time <= budget else "above"
        title = f"{ms(time)} ms measured, {place} the {ms(budget)} ms budget"
    elif found is not None and found.predicted_ms is not None and budget is not None:
        title = f"{ms(found.predicted_ms)} ms predicted for a {ms(budget)} ms budget; not measured yet"
    else:
        title = f"{run.name}: this run has no result yet"
    words = []
    if run.answer is not run.found:
        words.append(f"{run.why_answer[:1].upper()}{run.why_answer[1:]}.")
    if time is not None and budget is not None:
        words.append(f"{percent(time / budget)} of the budget is used.")
    if found and full and full.best_ms and (own := time or found.best_ms):
        words.append(f"{full.best_ms / own:.1f} times as fast as the full network.")
    if found and full and found.metric is not None and full.metric is not None:
        words.append(_metric_change(run.metric_name, found.metric, full.metric))
    lead = f'<p class="lead">{text(" ".join(words))}</p>' if words else ""
    reasons = [f'<li class="bad">{text(r)}</li>' for r in (run.verdict.reasons if run.verdict else ())]
    reasons += [f"<li>{text(r)}</li>" for r in (run.verdict.notes if run.verdict else ())]
    listed = f'<ul class="reasons">{"".join(reasons)}</ul>' if reasons else ""
    return (
        f'<section class="hero"><span class="pill {text(state)}">{text(word)}</span>'
        f"<h1>{text(title)}</h1>{lead}{listed}</section>"
    )


def _metric_change(name: str, found: float, full: float) -> str:
    if name == "accuracy":
        points = (found - full) * 100
        if abs(points) < 0.005:
            return f"The same accuracy ({percent(found, 2)})."
        return f"{abs(points):.2f} points {'more' if points >= 0 else 'less'} accuracy ({percent(found, 2)})."
    return f"{name} {found:.4g} against {full:.4g}."


def cards(run: RunData) -> str:
    """Budget, predicted, measured, verdict."""
    found, verdict, budget, time = run.answer, run.verdict, run.budget_ms, measured(run)
    state, word = judged(run)
    predicted = found.predicted_ms if found else None
    if predicted is None and verdict is not None:
        predicted = verdict.predicted_ms
    raw = verdict.raw_p50_ms if verdict else (found.raw_p50_ms if found else None)
    about = f"raw median {ms(raw)} ms" if raw is not None else ("not timed" if time is None else "")
    where = f"on {run.device}" if run.device else "device not recorded"
    pieces = [
        card("Budget", ms(budget), "ms" if budget else "", where),
        card("Predicted", ms(predicted), "ms" if predicted else "", _prediction_line(found, predicted, time), "accent"),
        card("Measured", ms(time), "ms" if time else "", about, state or "accent"),
        card("Verdict", word, "", _verdict_line(verdict, state), state),
    ]
    return f'<section class="cards">{"".join(pieces)}</section>'


def _prediction_line(found: Row | None, predicted: float | None, time: float | None) -> str:
    words = []
    if predicted and time:
        words.append(f"{(predicted / time - 1) * 100:+.1f} % from measured")
    if found and found.low_ms is not None and found.high_ms is not None:
        words.append(f"interval {ms(found.low_ms)} to {ms(found.high_ms)} ms")
    return "; ".join(words)


def _verdict_line(verdict: Verdict | None, state: str) -> str:
    if verdict is None:
        return "by the run's summary" if state else "run hwsearch verify on the bundle"
    words = "agree" if verdict.numerics.ok else "differ"
    return f"outputs {words}: relative error {verdict.numerics.max_relative_error:.1e}"


def comparison(run: RunData) -> str:
    """Full, uniform and found beside each other: bars of milliseconds, then all numbers."""
    if not run.rows:
        return panel("Comparison", "", absent("summary.json is not there: the run has not reached its comparison."))
    head = ["network", "predicted ms", "measured ms", "budget ms", "MACs", "parameters", run.metric_name]
    rows = []
    for row in run.rows:
        budget = row.budget_ms if row.budget_ms is not None else (run.budget_ms if row is run.answer else None)
        judged_row = row is not run.full  # nobody asks the full network to keep the budget
        over = judged_row and row.measured_ms is not None and budget is not None and row.measured_ms > budget
        time = f'<span class="over">{ms(row.measured_ms)}</span>' if over else ms(row.measured_ms)
        if row.raw_p50_ms is not None:
            time += f'<span class="minor">raw {ms(row.raw_p50_ms)}</span>'
        predicted = ms(row.predicted_ms)
        if row.low_ms is not None and row.high_ms is not None:
            predicted += f'<span class="minor">{ms(row.low_ms)} to {ms(row.high_ms)}</span>'
        rows.append(
            [
                text(row.name),
                predicted,
                time,
                ms(budget if judged_row else None),
                count(row.macs),
                count(row.parameters),
                _metric(run, row),
            ]
        )
    note = "Bars: measured milliseconds (pale: predicted, not measured). Dark mark: the prediction with its interval."
    stressed = run.answer.name if run.answer else ""
    return panel("Comparison", note, race(run), table(head, rows, stack=True, mark=stressed))


def _metric(run: RunData, row: Row) -> str:
    if row.metric is None:
        return "–"
    return percent(row.metric, 2) if run.metric_name == "accuracy" and 0 <= row.metric <= 1 else f"{row.metric:.4g}"


def race(run: RunData) -> str:
    """Bars of milliseconds with the budget as a line across; plain HTML, so it is there without any script."""
    timed = [row for row in run.rows if row.best_ms is not None]
    values = [v for row in timed for v in (row.measured_ms, row.predicted_ms, row.high_ms) if v is not None]
    values += [run.budget_ms] if run.budget_ms else []
    if not timed or not values:
        return ""
    whole = max(values) * 1.02

    def share(value: float) -> str:
        return f"{max(0.0, min(1.0, value / whole)) * 100:.2f}%"

    lines = []
    for row in timed:
        kind = "uniform" if row.name.lower().startswith("uniform") else ""
        kind = "found" if row is run.answer else kind
        time = row.best_ms or 0.0
        guess = " guess" if row.measured_ms is None else ""
        bar = f'<span class="bar {kind}{guess}" style="width:{share(time)}"></span>'
        if row.low_ms is not None and row.high_ms is not None and row.high_ms >= row.low_ms:
            width = f"{max(0.0, (row.high_ms - row.low_ms) / whole) * 100:.2f}%"
            bar += f'<span class="whisker" style="left:{share(row.low_ms)};width:{width}"></span>'
        if row.predicted_ms is not None:
            bar += f'<span class="tick" style="left:{share(row.predicted_ms)}"></span>'
        lines.append(
            f'<div class="row {kind}"><span class="name" title="{text(row.name)}">{text(row.name)}</span>'
            f'<span class="track">{bar}</span><span class="ms">{ms(time)} ms</span></div>'
        )
    overlay = ""
    if run.budget_ms is not None:
        place = share(run.budget_ms)
        overlay = (
            f'<div class="overlay"><span class="budget-label" style="left:{place}">budget {ms(run.budget_ms)} ms</span>'
            f'<span class="budget" style="left:{place}"></span></div>'
        )
    return f'<div class="race">{"".join(lines)}{overlay}</div>'


def widths(page: Page, run: RunData) -> str:
    """Units per width group."""
    found, full = run.answer, run.full
    if found is None or not found.widths:
        return panel("Widths", "", absent("No widths are recorded for the found network."))
    note = "Units kept in each group of coupled layers"
    note += ", in front of the full network's." if full and full.widths else "; the full network's are not recorded."
    whole = full.widths if full else {}
    rows = [[text(n), f"{w:g}", f"{whole[n]:g}" if n in whole else "–"] for n, w in found.widths.items()]
    figure = page.figure(figures.widths(found, full), "Units kept per width group, against the full network")
    return panel("Widths", note, figure, details("As a table", table(["group", found.name, "full"], rows)))


def families(page: Page, run: RunData) -> str:
    """Predicted milliseconds by kernel family."""
    title = "Where the time goes"
    rows = [row for row in run.rows if row.kernels]
    if not rows:
        return panel(title, "", absent("summary.json lists no kernels: the prediction was not broken down."))
    shown = [row for row in (run.full, run.answer) if row in rows] or rows[:3]
    note = "Predicted milliseconds by kind of kernel, from the runtime's own optimised graph."
    kinds = {kernel.family for row in shown for kernel in row.kernels}
    words = definitions((kind, KINDS[kind]) for kind in KINDS if kind in kinds)
    figure = page.figure(figures.families(shown), "Predicted ms by kernel family")
    return panel(title, note, figure, details("What the kinds are", words))


def training(page: Page, run: RunData) -> str:
    """Curves of whatever was trained."""
    metric = "accuracy" if run.metric_name == "accuracy" else run.metric_name
    drawn = [
        page.figure(figures.curves(run.curves, "loss", "loss"), "Training loss"),
        page.figure(figures.curves(run.curves, "metric", metric), f"Held-out {metric} along training"),
    ]
    if not any(drawn):
        return panel("Training", "", absent("No training curve is recorded."))
    note = "Mean training loss along each training's own steps. winner: the found network; supernet: shared weights, "
    note += "which candidates were scored with."
    if drawn[1]:
        note += f" The {metric} is of some held-out examples, looked at now and then; nothing was chosen by it."
    return panel("Training", note, halves(*drawn))
