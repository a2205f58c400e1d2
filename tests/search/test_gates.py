"""Gates: the surrogate's values, what commits and regrows, and what is protected."""

from __future__ import annotations

import pytest
import torch

from hwsearch.errors import InputError
from hwsearch.search.gates import DiscreteGate, commit_jointly, joint_mask, step


def test_the_surrogate_is_long_tailed() -> None:
    x = torch.tensor([0.0, 0.2, 0.4, 0.41, 1.0, 1.01, -0.2, -1.0, -1.01], requires_grad=True)
    y = step(x)
    assert y.tolist() == [0, 1, 1, 1, 1, 1, 0, 0, 0]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([2, 1.2, 0.4, 0.4, 0.4, 0, 1.2, 0.4, 0], abs=1e-6)


def test_score_and_threshold_are_pulled_against_each_other() -> None:
    gate = DiscreteGate(2)
    (gate.mask() * torch.tensor([3.0, -1.0])).sum().backward()
    slope = 0.4  # at s - t = 0.5
    assert gate.threshold.grad is not None
    assert gate.score.grad is not None
    assert gate.threshold.grad.tolist() == pytest.approx([-3 * slope, slope])
    assert gate.score.grad.tolist() == pytest.approx([3 * slope * 0.25, -slope * 0.25])


def test_masks_come_and_go_until_they_are_committed_and_then_only_fall() -> None:
    torch.manual_seed(0)
    gate, off = DiscreteGate(12), torch.zeros(12, dtype=torch.bool)
    revived = False
    for number in range(200):
        with torch.no_grad():
            gate.score.add_(0.6 * torch.randn(12))
            gate.threshold.add_(0.02)
        before = gate.mask().bool()
        gate.observe()
        if number % 5 == 4:
            gate.commit()
            assert not bool((gate.alive & off).any()), "what was committed as off is on again"
            off = ~gate.alive
        revived |= bool((gate.mask().bool() & ~before).any())
        assert not bool((gate.mask().bool() & off).any())
        assert gate.alive.any()
        assert gate.mask().any()
    assert int(off.sum()) > 6


def test_a_commit_believes_the_average_and_not_the_moment() -> None:
    gate = DiscreteGate(2)
    with torch.no_grad():
        gate.score[0] = -9.0
        gate.threshold.fill_(0.1)
    gate.observe()
    assert gate.mask().tolist() == [0, 1]
    assert gate.commit() == 0
    for _ in range(40):
        gate.observe()
    assert gate.commit() == 1
    assert gate.alive.tolist() == [False, True]


def test_exactly_what_is_regrown_comes_back_with_its_score() -> None:
    gate = DiscreteGate(5, shared=True)
    with torch.no_grad():
        gate.score.copy_(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]))
        gate.threshold.fill_(0.6)
    assert gate.commit(now=True) == 3
    gate.regrow([1])
    assert gate.alive.tolist() == [False, True, False, True, True]
    assert gate.score[1] == -1.0
    gate.reset_threshold()
    assert gate.mask().tolist() == [0, 1, 0, 1, 1]
    with pytest.raises(InputError, match="some of them are alive"):
        gate.regrow([3])


@pytest.mark.parametrize("least", [1, 3])
def test_the_last_units_survive_any_threshold(least: int) -> None:
    gate = DiscreteGate(4, least=least)
    with torch.no_grad():
        gate.score.copy_(torch.tensor([0.1, 0.3, 0.2, 0.0]))
        gate.threshold.fill_(50.0)
    assert int(gate.mask().sum()) == least
    assert gate.mask()[1] == 1
    for _ in range(100):
        gate.observe()
    gate.commit()
    assert int(gate.alive.sum()) == least
    with pytest.raises(InputError, match="would be left"):
        gate.close(torch.nonzero(gate.alive).flatten().tolist())


def test_tied_gates_fall_together_and_part_when_the_tie_is_gone() -> None:
    one, two = DiscreteGate(3, shared=True), DiscreteGate(3, shared=True)
    with torch.no_grad():
        one.score.copy_(torch.tensor([3.0, -3.0, 1.0]))
        two.score.copy_(torch.tensor([3.0, -3.0, -2.0]))
        two.threshold.fill_(0.6)
    mask, scores = joint_mask([one, two])
    assert mask.tolist() == [1, 0, 1]
    assert scores[2].item() == pytest.approx((torch.sigmoid(torch.tensor([1.0, -2.0]))).mean().item())
    assert commit_jointly([one, two], now=True) == 1
    assert one.alive.tolist() == two.alive.tolist() == [True, False, True]
    assert two.mask().tolist() == [1, 0, 0]


def test_a_gate_cannot_keep_more_than_it_has() -> None:
    with pytest.raises(InputError, match="give 1 to 2"):
        DiscreteGate(2, least=3)
