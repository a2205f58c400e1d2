"""The drawing of a genotype: what is kept is seen, and whatever a file holds is text."""

from __future__ import annotations

from hwsearch.models.cells import Blueprint, Genotype
from hwsearch.report.cells_section import cells_section
from hwsearch.report.page import Page


def result(genotype: dict[str, object]) -> dict[str, object]:
    way = [{"step": step, "ms": 3.0 / step, "target_ms": 1.0} for step in (1.0, 2.0, 3.0)]
    return {"extra": {"genotype": genotype, "trajectory": way}}


def test_every_cell_is_drawn_with_what_is_kept() -> None:
    genotype = Genotype.full(Blueprint(cells=2, nodes=2, reductions=(1,), operations=("skip", "sep3")))
    shown = cells_section(Page("run", []), result(genotype.without(0, 2, "skip").to_dict()))
    assert shown.count("<svg role") == 2
    assert "19 of 20 operations kept" in shown
    assert "Cell 1 (halves the side)" in shown
    assert shown.count("skip + sep3") == 9
    assert "node 1" in shown


def test_nothing_is_shown_of_another_methods_result_or_of_nonsense() -> None:
    page = Page("run", [])
    assert cells_section(page, {"extra": {"trajectory": []}}) == ""
    assert cells_section(page, {"extra": {"genotype": {"kept": [[["skip"]]], "nodes": 10**9}}}) == ""
    assert cells_section(page, {"extra": {"genotype": {"kept": 3, "nodes": 2}}}) == ""
    bad = cells_section(page, result({"kept": [[["<script>"], [4]]], "nodes": 1, "operations": [], "reductions": "x"}))
    assert "<script>" not in bad
    assert "&lt;script&gt;" in bad
