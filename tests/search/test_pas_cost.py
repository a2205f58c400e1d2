"""The surrogate: a lower envelope that never falls with width and has the derivative it says; the budget's term."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.errors import InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.graph.widths import WidthSpace
from hwsearch.latency.lowering_template import (
    Check,
    Extent,
    LoweringTemplate,
    Quantity,
    Slot,
    Split,
    Variant,
    network_key,
)
from hwsearch.latency.width_table import WidthTable
from hwsearch.search.budget import Budget, Limit, MegaMacs
from hwsearch.search.pas_cost import BudgetTerm, CurveSurrogate, PolynomialSurrogate, TableSurrogate, surrogate_of


class Predictor:
    """Prices a kernel by its channels padded to blocks of 4, and one by its width just above a block, slower."""

    overhead_ms = 0.3

    class model_:
        @staticmethod
        def doubt(kernel: Kernel) -> None:
            return None

    class profiled_:
        @staticmethod
        def novelty(kernels: list[Kernel]) -> np.ndarray:
            return np.zeros(len(kernels))

    def predict(self, kernels: list[Kernel]) -> np.ndarray:
        inner, outer = (np.array([getattr(k, name) for k in kernels]) for name in ("in_channels", "out_channels"))
        slow = np.where(outer % 4 == 1, 1.8, 1.0)
        return np.asarray(0.01 * np.ceil(inner / 4) * np.ceil(outer / 4) * slow)

    @staticmethod
    def context_ms(network_mb: np.ndarray) -> np.ndarray:
        return np.asarray(20.0 * network_mb)

    @staticmethod
    def stretched(ms: np.ndarray) -> np.ndarray:
        return np.asarray(ms * (1 + 0.05 * ms))


@pytest.fixture(scope="module")
def table(toy: Any) -> WidthTable:
    """Two layers in a row, one behind a sum of two groups, and a reorder where the third is not aligned."""
    space = toy.space([range(1, 17), range(2, 13), range(1, 10)])

    def conv(inner: int, outer: int) -> Variant:
        kernel = Kernel("conv", "Conv", batch=1, kernel_height=3, kernel_width=3, in_height=4, in_width=4,
                        out_height=4, out_width=4)  # fmt: skip
        return Variant(kernel, (Extent("in_channels", inner), Extent("out_channels", outer)))

    reorder = Variant(Kernel("reorder", "Reorder"), (Extent("in_channels", 2), Extent("out_channels", 2)))
    slots = (
        Slot(("a",), "Conv", 0, (conv(0, 1),), 0),
        Slot(("b",), "Conv", 0, (conv(1, 2),), 0),
        Slot(("c",), "Conv", 0, (conv(3, 0),), 0),
        Slot(("d",), "Reorder", 0, (reorder,), Split(2, 4, 0, -1, 0)),
    )
    quantities = (*(Quantity(0, ((i, 1),)) for i in range(3)), Quantity(0, ((0, 1), (2, 1))))
    groups = tuple((g.name, g.widths) for g in space.groups)
    template = LoweringTemplate(
        "simulated",
        None,
        network_key(space),
        groups,
        quantities,
        slots,
        Check(0, 0, 0.0, 0),  # type: ignore[arg-type]
    )
    return WidthTable(space, template, Predictor())  # type: ignore[arg-type]


def grid(table: WidthTable) -> np.ndarray:
    return np.asarray(list(product(*(group.widths for group in table.space.groups))), dtype=np.int64)


def test_the_table_surrogate_is_a_lower_envelope_that_never_falls(table: WidthTable) -> None:
    rows = grid(table)
    surrogate = TableSurrogate(table, tolerance=0.0)
    times = dict(zip(map(tuple, rows.tolist()), table.evaluate(rows).tolist(), strict=True))
    values = {key: surrogate(np.array(key, dtype=float))[0] for key in times}
    assert all(values[key] <= times[key] * (1 + 1e-9) for key in times)
    for group in range(3):
        step = np.eye(3, dtype=int)[group]
        pairs = [(key, tuple((np.array(key) + step).tolist())) for key in times]
        assert all(values[narrow] <= values[wide] * (1 + 1e-12) for narrow, wide in pairs if wide in values)
    # and it is tight: at stair edges, where nothing wider is as fast, it is the table itself
    edges = [key for key in times if all(width % 4 == 0 for width in key)]
    assert len(edges) >= 20
    gaps = [1 - values[key] / times[key] for key in edges]
    assert max(gaps) < 0.02
    staircase = [key for key in times if key[1] % 4 == 1 and key[1] < 12]
    assert all(values[key] < 0.95 * times[key] for key in staircase), "a wider layer that is faster is what counts"


@pytest.mark.parametrize("tolerance", [0.0, 0.02])
def test_the_table_surrogate_has_the_derivative_it_says(table: WidthTable, tolerance: float) -> None:
    surrogate = TableSurrogate(table, 1.3, tolerance=tolerance)
    rng, step = np.random.default_rng(0), 1e-5
    some = 0.0
    for _ in range(60):
        widths = np.array([rng.uniform(g.widths[0], g.units) for g in table.space.groups])
        _, slopes = surrogate(widths)
        for group, shift in enumerate(step * np.eye(3)):
            by_hand = (surrogate(widths + shift)[0] - surrogate(widths - shift)[0]) / (2 * step)
            assert slopes[group] == pytest.approx(by_hand, rel=1e-3, abs=1e-7)
            some = max(some, by_hand)
    assert some > 0.01


def test_at_an_edge_the_derivative_is_of_the_side_that_is_asked_for(toy: Any) -> None:
    space = toy.space([range(1, 13)])
    surrogate = CurveSurrogate(space, lambda rows: np.ceil(rows[:, 0] / 4) ** 2)
    (narrower,), (wider,) = (surrogate(np.array([8.0]), growing=growing)[1] for growing in (False, True))
    assert (narrower, wider) == (pytest.approx(3 / 4), pytest.approx(5 / 4))
    assert surrogate(np.array([12.0]), growing=True)[1] == [0.0]
    assert surrogate(np.array([4.0]))[1] == [0.0], "no group is pushed below its narrowest stair"


def test_the_curve_surrogate_is_a_lower_bound_of_any_latency(toy: Any) -> None:
    space = toy.space([range(2, 33), range(2, 33), range(2, 33)])
    latency = toy.Staircase(bump=1.5)
    surrogate = CurveSurrogate(space, latency.evaluate, tolerance=0.0)
    rng, step = np.random.default_rng(1), 1e-5
    rows = rng.integers(2, 33, (200, 3))
    times = latency.evaluate(rows)
    values = np.array([surrogate(row.astype(float))[0] for row in rows])
    assert (values <= times * (1 + 1e-9)).all()
    assert (times / values).min() < 1.001
    for row in rng.uniform(3, 31.9, (40, 3)):
        _, slopes = surrogate(row)
        assert (slopes >= 0).all()
        for group, shift in enumerate(step * np.eye(3)):
            by_hand = (surrogate(row + shift)[0] - surrogate(row - shift)[0]) / (2 * step)
            assert slopes[group] == pytest.approx(by_hand, rel=1e-3, abs=1e-9)


def test_a_latency_is_asked_once_for_the_same_surroundings(toy: Any) -> None:
    latency = toy.Staircase()
    surrogate = CurveSurrogate(toy.space([range(2, 33, 2)] * 3), latency.evaluate)
    surrogate(np.array([9.0, 12.0, 7.0]))
    asked = latency.predictions
    surrogate(np.array([9.5, 11.2, 8.0]))
    assert latency.predictions == asked == 48


def chain() -> tuple[nn.Module, WidthSpace]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    ).eval()  # fmt: skip
    return model, WidthSpace.from_model(model, torch.zeros(1, 3, 8, 8))


def test_the_macs_loss_has_the_papers_gradient() -> None:
    """Section 4.3: 2 alpha (M - T) (kappa_l n_{l-1} + kappa_{l+1} n_{l+1}), here of the relative error."""
    _, space = chain()
    n, kappa = (5, 4, 3), (9 * 64, 9 * 16, 16)
    macs = kappa[0] * 3 * n[0] + kappa[1] * n[0] * n[1] + kappa[2] * n[1] * n[2] + n[2] * 2
    target, alpha = 0.7 * macs, 0.3
    term = BudgetTerm(space, [PolynomialSurrogate(space.macs_array)], [target], [None], pressure=alpha)
    widths = torch.tensor([float(width) for width in n], requires_grad=True)
    loss = term(widths)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(alpha * (macs / target - 1) ** 2, rel=1e-5)
    outer = 2 * alpha * (macs / target - 1) / target
    assert widths.grad is not None
    assert widths.grad.tolist() == pytest.approx([
        outer * (kappa[0] * 3 + kappa[1] * n[1]),
        outer * (kappa[1] * n[0] + kappa[2] * n[2]),
        outer * (kappa[2] * n[1] + 2),
    ], rel=1e-4)  # fmt: skip


def test_parameters_and_macs_of_any_network_are_differentiated_exactly() -> None:
    _, space = chain()
    surrogate = PolynomialSurrogate(space.parameters_array)
    count, slopes = surrogate(np.array([5.0, 4.0, 3.0]))
    assert count == space.parameters_array(np.array([[5, 4, 3]]))[0]
    assert slopes.tolist() == [9 * 3 + 1 + 9 * 4, 9 * 5 + 1 + 3, 4 + 1 + 2]


def test_a_limit_picks_its_surrogate(toy: Any) -> None:
    _, space = chain()
    assert isinstance(surrogate_of(space, Limit(MegaMacs(space), 1.0)), PolynomialSurrogate)
    assert isinstance(surrogate_of(space, Limit(toy.Staircase(), 1.0)), CurveSurrogate)
    # An upper quantile is what the limit compares: it must be what the surrogate follows.
    limit = Limit(toy.Staircase(), 1.0, quantile=0.95)
    row = np.asarray([space.full().widths])
    assert surrogate_of(space, limit)(row[0].astype(float))[0] == pytest.approx(limit.evaluate(row)[0])


def test_the_penalty_is_differentiable_and_pushes_towards_the_budget_from_both_sides(toy: Any) -> None:
    """A resource penalty through which no gradient comes is a known bug of differentiable searches."""
    space = toy.space([range(2, 33)] * 3)
    term = BudgetTerm.of(space, toy.budget(space, 0.4))
    for row, sign in (([30.0, 28.0, 31.0], 1), ([12.0, 10.0, 11.0], -1)):
        widths = torch.tensor(row, requires_grad=True)
        term(widths).backward()
        assert widths.grad is not None
        assert (sign * widths.grad > 0).all()
        errors, slopes = term.errors(np.array(row), growing=sign < 0)
        assert widths.grad.tolist() == pytest.approx((2 * errors[0] * slopes[0]).tolist(), rel=1e-5)


def test_the_surrogate_is_scaled_to_the_prediction_at_the_next_allowed_widths(toy: Any) -> None:
    space = toy.space([(8, 16, 24, 32)] * 3)
    latency = toy.Staircase(bump=2.0)
    budget = toy.budget(space, 0.5, latency)
    errors, _ = BudgetTerm.of(space, budget).errors(np.array([16.0, 8.0, 24.0]))
    assert errors[0] == pytest.approx(latency.evaluate(np.array([[16, 8, 24]]))[0] / budget.limits[0].max_ms - 1)


def test_the_weights_follow_the_budget(toy: Any) -> None:
    space = toy.space([range(2, 33)] * 2)
    term = BudgetTerm.of(space, toy.budget(space, 0.4), pressure=2.0, rate=0.1)
    wide, narrow = np.array([32.0, 32.0]), np.array([4.0, 4.0])
    for _ in range(5):
        term.update(wide)
    assert float(term.pressure[0]) == pytest.approx(2.0 * np.exp(0.5 * min(1 / 0.4 - 1, 1.0)))
    high = float(term.pressure[0])
    term.update(narrow)
    assert float(term.pressure[0]) < high
    still = BudgetTerm.of(space, toy.budget(space, 0.4), pressure=2.0)
    still.update(wide)
    assert float(still.pressure[0]) == 2.0
    assert "pressure" in term.state_dict()


def test_a_limit_that_is_kept_does_not_pull_against_one_that_is_missed(toy: Any) -> None:
    space = toy.space([range(2, 33)] * 2)
    tight, loose = (toy.budget(space, share).limits[0] for share in (0.3, 0.9))
    at = torch.tensor([20.0, 20.0], requires_grad=True)
    both, alone = (BudgetTerm.of(space, Budget(limits))(at) for limits in ([tight, loose], [tight]))
    assert float(both.detach()) == pytest.approx(float(alone.detach()))
    missed = BudgetTerm.of(space, Budget([tight, replace(tight, name="other")]))(at)
    assert float(missed.detach()) == pytest.approx(2 * float(alone.detach()))


def test_the_strongest_push_is_bounded_at_the_first_weights(toy: Any) -> None:
    space = toy.space([range(2, 33)] * 3)
    budget = toy.budget(space, 0.2)
    free, held = (BudgetTerm.of(space, budget, pressure=5.0, most=most) for most in (None, 1e-3))
    grads = []
    for term in (free, held):
        widths = torch.full((3,), 32.0, requires_grad=True)
        term(widths).backward()
        assert widths.grad is not None
        grads.append(widths.grad)
    assert float(grads[0].max()) > 1e-2
    assert float(grads[1].max()) == pytest.approx(1e-3, rel=1e-4)
    assert torch.allclose(grads[1] / grads[1].max(), grads[0] / grads[0].max())


def test_a_term_without_a_target_is_refused(toy: Any) -> None:
    space = toy.space()
    with pytest.raises(InputError, match="target above 0"):
        BudgetTerm(space, [PolynomialSurrogate(lambda rows: rows.sum(1))], [0.0], [None])
