"""Rules and forms are found again from examples of them."""

from __future__ import annotations

import numpy as np
import pytest

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.lowering_template import ABSENT, Extent, Split, decide, slot_kernels
from hwsearch.latency.lowering_template import Slot as TemplateSlot
from hwsearch.latency.rules import Atoms, fit_rule, fit_variants


def examples(count: int, *, quantities: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 65, (count, quantities))


@pytest.mark.parametrize(
    ("truth", "share"),
    [
        (lambda c: (c[:, 1] % 4 == 0) & (c[:, 2] % 8 == 0), 0.99),
        (lambda c: ((c[:, 0] % 4 == 0) | (c[:, 0] < 8)) & (c[:, 3] >= 16), 0.99),
        (lambda c: (c[:, 0] % 4 == 0) & (c[:, 1] % 2 == 0) | (c[:, 2] < 24), 0.97),
    ],
)
def test_a_rule_is_found_again(truth: object, share: float) -> None:
    seen, fresh = examples(500), examples(2000, seed=1)
    labels = truth(seen).astype(np.int64) - 1  # type: ignore[operator]
    rule = fit_rule(labels, Atoms.of(seen, [1] * 4), frozenset())
    assert (decide(rule, seen, len(seen)) == labels).all()
    assert (decide(rule, fresh, len(fresh)) == truth(fresh) - 1).mean() >= share  # type: ignore[operator]


def test_one_label_needs_no_question() -> None:
    seen = examples(20)
    assert fit_rule(np.full(20, 3), Atoms.of(seen, [1] * 4), frozenset()) == 3


def test_a_bound_between_two_widths_is_the_roundest() -> None:
    seen = np.array([[4], [12], [20], [28]])
    rule = fit_rule(np.array([0, 0, 1, 1]), Atoms.of(seen, [1]), frozenset())
    assert rule == Split(0, 0, 16, 0, 1)


def test_own_and_usual_questions_are_preferred() -> None:
    seen = np.array([[3, 3], [8, 8], [5, 5], [16, 16]])
    labels, atoms = np.array([0, 1, 0, 1]), Atoms.of(seen, [1, 1])
    assert fit_rule(labels, atoms, frozenset({1})).quantity == 1  # type: ignore[union-attr]
    assert fit_rule(labels, atoms, frozenset({0})).quantity == 0  # type: ignore[union-attr]
    usual = fit_rule(labels, atoms, frozenset(), {(0, 8): 5})
    assert isinstance(usual, Split)
    assert (usual.block, usual.small) == (0, 8)


def test_forms_are_channel_counts_rounded_up() -> None:
    counts = examples(300)
    column: list[Kernel | None] = []
    for a, b, c, _ in counts.tolist():
        if c < 10:
            column.append(None)
        elif a % 4 == 0:
            column.append(Kernel("conv", "Conv", layout_out="nchwc", in_channels=-(-a // 16) * 16, out_channels=b))
        else:
            column.append(Kernel("conv", "Conv", in_channels=a, out_channels=b + 0, in_height=7))
    variants, labels, own = fit_variants(column, counts)
    assert own == frozenset({0, 1})
    blocked = next(v for v in variants if v.kernel.layout_out == "nchwc")
    assert set(blocked.extents) == {Extent("in_channels", 0, 16), Extent("out_channels", 1)}
    rule = fit_rule(labels, Atoms.of(counts, [1] * 4), own)
    slot = TemplateSlot(("a",), "Conv", 0, variants, rule)
    assert slot_kernels(slot, counts, len(counts)) == column
    assert (labels == ABSENT).sum() == (counts[:, 2] < 10).sum()


def test_a_value_that_no_count_gives_stays_a_constant() -> None:
    counts = examples(50)
    column: list[Kernel | None] = [
        Kernel("pool", "P", in_channels=a, in_width=1000 + 7 * (b % 2)) for a, b, *_ in counts.tolist()
    ]
    variants, labels, _ = fit_variants(column, counts)
    assert sorted(v.kernel.in_width for v in variants) == [1000, 1007]
    widths = [variants[label].kernel.in_width for label in labels]
    assert widths == [kernel.in_width for kernel in column if kernel is not None]
