"""``DiscreteGate``: units that learn whether they are kept, by a score against a threshold that is learnt as well.

Score s = sigmoid of a parameter, mask m = 1[s > t]. The step has a long-tailed surrogate gradient, so score and
threshold are moved by what the unit does to the loss. Masks of a forward pass come and go; now and then they are
committed, from a moving average of s - t, and a unit that was committed as off stays off until it is regrown.

Reference: MGAS (arXiv 2310.15074) and its published code, whose step is that of DST (Liu et al., ICLR 2020). Not
followed: there a dead unit's score is pushed to -10^4, which loses it (here: a boolean mask), and a commit believes the
last minibatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hwsearch.errors import InputError

#: Of the moving averages of s - t and of the scores' gradients.
MOMENTUM = 0.9


class _Step(torch.autograd.Function):
    """1[x > 0], with a gradient that is 2 - 4|x| up to 0.4, 0.4 up to 1, and 0 beyond."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(n,) to (n,) of zeros and ones."""
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The surrogate times what comes in."""
        (x,) = ctx.saved_tensors
        size = x.abs()
        slope = torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1.0, 0.4, 0.0))
        return grads[0] * slope.to(grads[0].dtype)


def step(x: Tensor) -> Tensor:
    """1 where x > 0, else 0, with the long-tailed surrogate gradient.

    Example:
        >>> x = torch.tensor([-0.2, 0.0, 0.7], requires_grad=True)
        >>> y = step(x); y.sum().backward(); y.tolist(), [round(g, 3) for g in x.grad.tolist()]
        ([0.0, 0.0, 1.0], [1.2, 2.0, 0.4])

    Reference: DST (ICLR 2020), the long-tailed estimator.
    """
    return _Step.apply(x)  # type: ignore[no-any-return,no-untyped-call]


class DiscreteGate(nn.Module):
    """A gate for some units.

    Args:
        units: how many.
        least: units that are on at least: those of the largest s - t among the living.
        shared: one threshold for all units (filters) instead of one each (operations).

    Parameters ``score`` (units,) and ``threshold`` (units,) or (1,) begin at 0: s is 0.5, and everything is on.
    Buffers: ``alive`` (units,), ``average`` (units,) of s - t, ``pull`` (units,) of the score's gradient.

    Example:
        >>> gate = DiscreteGate(3)
        >>> with torch.no_grad():
        ...     _ = gate.threshold.copy_(torch.tensor([0.0, 0.9, 0.9]))
        >>> gate.mask().tolist(), gate.commit(now=True), gate.alive.tolist()
        ([1.0, 0.0, 0.0], 2, [True, False, False])
    """

    alive: Tensor
    average: Tensor
    pull: Tensor

    def __init__(self, units: int, *, least: int = 1, shared: bool = False) -> None:
        super().__init__()
        if not 1 <= least <= units:
            raise InputError(f"a gate of {units} units cannot keep {least} of them: give 1 to {units}")
        self.least = least
        self.score = nn.Parameter(torch.zeros(units))
        self.threshold = nn.Parameter(torch.zeros(1 if shared else units))
        self.register_buffer("alive", torch.ones(units, dtype=torch.bool))
        self.register_buffer("average", torch.full((units,), 0.5))
        self.register_buffer("pull", torch.zeros(units))

    def __len__(self) -> int:
        return len(self.score)

    def scores(self) -> Tensor:
        """s (units,) in (0, 1)."""
        return torch.sigmoid(self.score)

    def mask(self) -> Tensor:
        """The mask (units,) of this moment, with the surrogate's gradient; off where a unit was committed as off."""
        return joint_mask([self])[0]

    @torch.no_grad()
    def observe(self, gradients: bool = True) -> None:
        """Move the averages by the present scores, thresholds and (after a backward pass) gradients."""
        observe_jointly([self])
        if gradients and self.score.grad is not None:
            self.pull.mul_(MOMENTUM).add_(self.score.grad)

    def commit(self, *, now: bool = False) -> int:
        """Switch off for good the living units whose average is not above 0; how many those are.

        Args:
            now: believe the present moment instead of the average.
        """
        return commit_jointly([self], now=now)

    @torch.no_grad()
    def close(self, units: Sequence[int]) -> None:
        """Commit these units as off.

        Raises:
            InputError: fewer than ``least`` would be left.
        """
        left = self.alive.clone()
        left[list(units)] = False
        if int(left.sum()) < self.least:
            raise InputError(f"a gate must keep {self.least} units, and {int(left.sum())} would be left")
        self.alive.copy_(left)

    @torch.no_grad()
    def regrow(self, units: Sequence[int]) -> None:
        """Switch committed units on again, just above their thresholds' reset value; their scores stay.

        Raises:
            InputError: one of them is not off.
        """
        if bool(self.alive[list(units)].any()):
            raise InputError(f"units {list(units)} cannot be regrown: some of them are alive")
        self.alive[list(units)] = True
        self.average[list(units)] = self.scores()[list(units)]
        self.pull[list(units)] = 0.0

    @torch.no_grad()
    def reset_threshold(self) -> None:
        """Thresholds back to 0, as at the beginning of every stage: all living units are on again."""
        self.threshold.zero_()
        self.average.copy_(self.scores())


def joint_mask(gates: Sequence[DiscreteGate]) -> tuple[Tensor, Tensor]:
    """(mask, scores), both (units,), of gates whose units are tied: they are on together, by the mean of s - t.

    Tied gates learn alike and so stay equal until the tie is gone. Their ``alive`` must be equal.
    """
    scores = torch.stack([gate.scores() for gate in gates]).mean(0)
    margin = scores - torch.stack([gate.threshold.expand(len(gate)) for gate in gates]).mean(0)
    living = gates[0].alive
    mask = step(margin) * living
    least = max(gate.least for gate in gates)
    if int(mask.detach().sum()) < least:
        kept = _largest(margin.detach(), living, least)
        mask = mask + (kept & (mask.detach() == 0)).to(mask.dtype)
    return mask, scores


@torch.no_grad()
def observe_jointly(gates: Sequence[DiscreteGate]) -> None:
    """Move the averages of tied gates by their mean s - t."""
    margin = torch.stack([gate.scores() - gate.threshold for gate in gates]).mean(0)
    for gate in gates:
        gate.average.mul_(MOMENTUM).add_(margin, alpha=1 - MOMENTUM)


@torch.no_grad()
def commit_jointly(gates: Sequence[DiscreteGate], *, now: bool = False) -> int:
    """``DiscreteGate.commit`` of tied gates."""
    margin = torch.stack([gate.scores() - gate.threshold if now else gate.average for gate in gates]).mean(0)
    living = gates[0].alive.clone()
    kept = living & (margin > 0)
    least = max(gate.least for gate in gates)
    if int(kept.sum()) < least:
        kept = _largest(margin, living, least)
    for gate in gates:
        gate.alive.copy_(kept)
    return int(living.sum() - kept.sum())


def _largest(margin: Tensor, living: Tensor, least: int) -> Tensor:
    """The ``least`` living units (units,) of the largest margins; equal ones in order."""
    order = torch.sort(margin.masked_fill(~living, -torch.inf), descending=True, stable=True).indices[:least]
    kept = torch.zeros_like(living)
    kept[order] = True
    return kept & living
