"""The report of a bundle: what it promises, what it holds, and whether it was verified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hwsearch.deploy.quantised_report import markdown
from hwsearch.deploy.reader import Bundle, read_bundle
from hwsearch.deploy.verdict import Verdict
from hwsearch.errors import SchemaError
from hwsearch.report.explain_section import explain_bundle, explain_section
from hwsearch.report.page import Page, absent, definitions, panel, percent, table, text
from hwsearch.report.run_data import Row, RunData
from hwsearch.report.run_page import cards, hero


def bundle_page(folder: Path, table_folder: Path | None = None) -> Page:
    """The page of a bundle; it is read as strictly as ``verify`` reads it. ``table_folder`` is where its device's
    predictor is looked for.

    Raises: InputError, SchemaError: something in the bundle is not what its manifest says.
    """
    bundle = read_bundle(folder)
    verdict, problem = None, "The bundle has not been verified: run hwsearch verify on it."
    if (folder / "verdict.json").exists():
        try:
            verdict = Verdict.load(folder / "verdict.json")
        except SchemaError as error:
            problem = str(error)
    row = Row(
        bundle.name, bundle.predicted_ms, measured_ms=bundle.measured_ms, budget_ms=bundle.budget_ms,
        macs=bundle.macs, parameters=bundle.parameters,
    )  # fmt: skip
    run = RunData(folder, bundle.name, device=bundle.device, budget_ms=bundle.budget_ms, rows=(row,))
    if verdict is not None:
        run = replace(run, verdict=verdict, status=verdict.status)
    page = Page(f"{bundle.name} · hwsearch", [f"bundle {bundle.name}", bundle.device])
    page.add(hero(run))
    page.add(cards(run))
    page.add(_check(verdict, problem))
    if bundle.report is not None:
        page.add(_eight_bits(bundle))
    page.add(explain_section(page, explain_bundle(bundle.model, bundle.device, table_folder)))
    shape = " × ".join(map(str, bundle.input_shape))
    pairs: list[tuple[str, object]] = [("folder", folder), ("device", bundle.device), ("input", shape)]
    pairs += [("output", " × ".join(map(str, bundle.cases[0].output.shape))), ("golden cases", len(bundle.cases))]
    pairs += [("MACs", f"{bundle.macs:,}")] if bundle.macs is not None else []
    pairs += [("parameters", f"{bundle.parameters:,}")] if bundle.parameters is not None else []
    pairs += [("noise floor", percent(bundle.noise_floor))] if bundle.noise_floor is not None else []
    pairs += [(str(k).replace("_", " "), v) for k, v in (bundle.fingerprint or {}).items()]
    page.add(panel("Contents", "", definitions(pairs)))
    rows = [[text(name), f"<code>{text(digest)}</code>"] for name, digest in sorted(bundle.sha256.items())]
    page.add(panel("Files", "Every file was read and has the SHA-256 below.", table(["file", "SHA-256"], rows)))
    return page


def _check(verdict: Verdict | None, problem: str) -> str:
    title = "Does it compute the same?"
    if verdict is None:
        return panel(title, "", absent(problem))
    numbers = verdict.numerics
    pairs: list[tuple[str, object]] = [
        ("golden cases", numbers.cases),
        ("largest error", f"{numbers.max_abs_error:.3g}, {numbers.allowed:.3g} is allowed"),
        *_left(verdict),
        ("relative to the largest output", f"{numbers.max_relative_error:.2e}"),
        ("timing rounds", verdict.rounds if verdict.rounds is not None else "–"),
        ("spread", percent(verdict.spread)),
    ]
    against = "those of the unfolded network in PyTorch" if verdict.sqnr_db is None else "the 8-bit network's own"
    return panel(title, f"The runtime's outputs against {against}.", definitions(pairs))


def _left(verdict: Verdict) -> list[tuple[str, object]]:
    if verdict.sqnr_db is None or verdict.promised_sqnr_db is None:
        return []
    told = f"{verdict.sqnr_db:.1f} dB, {verdict.promised_sqnr_db:.1f} dB are promised"
    return [("left of the float network's outputs", told)]


def _eight_bits(bundle: Bundle) -> str:
    """What 8 bits cost, layer by layer, the worst first; a report that is not one is said to be none."""
    title = "What do 8 bits cost?"
    try:
        told = markdown(bundle.report or {})
    except (KeyError, TypeError, ValueError, AttributeError):
        return panel(title, "", absent("quantisation.json is not a report of this release."))
    lines, _, rest = told.partition("\n\n")
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in rest.splitlines()]
    body = table(head, [[text(cell) for cell in row] for row in rows])
    note = "Decibels, six are one bit; the last column is the network's output with that layer alone in 8 bits."
    return panel(title, f"{' '.join(lines.splitlines())} {note}", body)
