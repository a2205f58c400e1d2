"""Does a width space keep its promise? Every group is shrunk with random weights before anybody relies on it.

Extraction reads the exported graph, but the shrunk network runs its Python code: a size written there as a number
breaks it, or silently changes what it computes. Such groups are frozen, with the line of code as the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hwsearch.errors import HwsearchError, UnsupportedModelError
from hwsearch.graph.capture import first_line, try_forward
from hwsearch.graph.surgery import (
    blame,
    example_for,
    first_tensor,
    kill_units,
    named_tensors,
    randomise,
    shrink,
)
from hwsearch.graph.widths import WidthChoice, WidthSpace

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Largest relative difference that the check of a space accepts (float32, random weights).
_TOLERANCE = 1e-2


def freeze_failing(model: nn.Module, space: WidthSpace) -> WidthSpace:
    """Drop the groups whose shrinking breaks the network or changes its function, with the reason.

    A copy with random weights is shrunk to half everywhere and compared with the full copy whose dropped units are read
    with zero weights. Only when that fails are the groups halved, and halved again, until the failing ones are found:
    a network of ``n`` groups with ``k`` bad ones takes about ``2 k log2(n)`` trials.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        probe, example = _probe(model, space)
        neutral = [index for index, group in enumerate(space.groups) if group.neutral]
        others = [index for index, group in enumerate(space.groups) if not group.neutral]
        reasons = dict(space.frozen_reasons)
        # Values can be compared over the neutral groups alone; the others can only be run.
        kept = _passing(probe, space, [], neutral, example, reasons)
        kept = _passing(probe, space, kept, others, example, reasons)
        if len(kept) == len(space.groups):
            return space
        return replace(space, groups=tuple(space.groups[index] for index in sorted(kept)), frozen_reasons=reasons)


def _passing(
    probe: nn.Module,
    space: WidthSpace,
    kept: list[int],
    block: list[int],
    example: Tensor,
    reasons: dict[str, str],
) -> list[int]:
    """``kept`` plus those groups of ``block`` that can be shrunk beside them; ``reasons`` gets the others' failures."""
    if not block:
        return kept
    failure = _failure(probe, space, [*kept, *block], example)
    if failure is None:
        return [*kept, *block]
    if len(block) == 1:
        reasons.update({f"{slot.parameter} axis {slot.axis}": failure for slot in space.groups[block[0]].slots})
        return kept
    middle = len(block) // 2
    kept = _passing(probe, space, kept, block[:middle], example, reasons)
    return _passing(probe, space, kept, block[middle:], example, reasons)


def _probe(model: nn.Module, space: WidthSpace) -> tuple[nn.Module, Tensor]:
    """A copy with random weights and a random input; with the model's own weights where random ones overflow."""
    import torch

    try:
        probe = copy.deepcopy(model).eval()
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in named_tensors(probe).values()):
        probe = probe.float()  # half precision is too coarse to compare
    own = {name: tensor.detach().clone() for name, tensor in named_tensors(probe).items()}
    randomise(probe)
    example = example_for(probe, space, torch.randn)
    output = first_tensor(try_forward(probe, example))
    if not (torch.isfinite(output).all() and output.any()):
        for name, tensor in named_tensors(probe).items():
            tensor.copy_(own[name])
    return probe, example


def _failure(probe: nn.Module, space: WidthSpace, indices: list[int], example: Tensor) -> str | None:
    """Why the groups at ``indices`` cannot be shrunk together, or None."""
    rng = np.random.default_rng(0)
    widths, keep = [], {}
    for index, group in enumerate(space.groups):
        width = max(1, group.units // 2) if index in indices else group.units
        widths.append(width)
        keep[group.name] = np.sort(rng.permutation(group.units)[:width])
    # The probe's widths need not be allowed ones: what is tested is the group, not the quantum.
    free = replace(space, groups=tuple(replace(g, widths=tuple(range(1, g.units + 1))) for g in space.groups))
    try:
        small = shrink(probe, free, WidthChoice(tuple(widths)), keep)
    except HwsearchError as error:
        return f"a size is written in the model's Python code: {blame(error)}"
    if not all(space.groups[index].neutral for index in indices):
        return None  # shapes are all that can be promised: the function changes by design
    change = _change(probe, small, space, keep, example)
    if change <= _TOLERANCE:
        return None
    return f"dropping dead units changes the output by {change:.0%}: a size is written in the model's Python code"


def _change(
    probe: nn.Module, small: nn.Module, space: WidthSpace, keep: Mapping[str, np.ndarray], example: Tensor
) -> float:
    """Largest difference, relative to the output, between ``small`` and ``probe`` with the other units dead."""
    got = first_tensor(small(example))
    dropped = {group.name: np.setdiff1d(np.arange(group.units), keep[group.name]) for group in space.groups}
    wanted = first_tensor(kill_units(probe, space, dropped)(example))
    return float((wanted - got).abs().max()) / (float(wanted.abs().max()) or 1.0)
