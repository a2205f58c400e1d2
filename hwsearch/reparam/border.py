"""A block against its fold, border and interior apart.

A fold that pads zeros where the block has something else is exact inside and wrong on a ring of pixels: an error over
the whole map, or behind a global mean, hides it. So each block is judged on the input it gets in its network, and the
ring of outputs that see the padding has an error of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hwsearch.reparam.foreign import record_calls
from hwsearch.reparam.odbb import ODBB

#: Largest error of a block relative to its largest output: float64 rounding, or that of float32 kernels of others.
_OWN, _OTHERS = 1e-12, 1e-5


@dataclass(frozen=True, slots=True)
class BlockCase:
    """One block in float64 under random statistics.

    ``kind``: "odbb", or the method that folds it. ``branches``: those that run (of an ODBB). ``folded``: what it
    became. Errors are relative to the largest output; ``interior_error`` is 0 where the map is all border.
    """

    name: str
    kind: str
    branches: tuple[str, ...]
    folded: str
    seed: int
    border_error: float
    interior_error: float
    tolerance: float
    ok: bool


def block_cases(
    network: nn.Module, folded: nn.Module, blocks: Sequence[tuple[str, str]], example_input: Tensor, seed: int
) -> list[BlockCase]:
    """Every block of ``blocks`` (name, kind) in a network of random statistics, against what stands there in its fold.

    Args:
        network, folded: in eval mode; both are copied to float64.
        example_input: of the network, float64.
    """
    exact, other = copy.deepcopy(network).double(), copy.deepcopy(folded).double()
    calls = record_calls(exact, tuple(name for name, _ in blocks), example_input)
    cases = []
    for name, kind in blocks:
        if name not in calls:
            continue
        block, result = exact.get_submodule(name), other.get_submodule(name)
        with torch.no_grad():
            expected, got = (module(*copy.deepcopy(calls[name].args), **calls[name].kwargs)
                             for module in (block, result))  # fmt: skip
        border, interior = split_error(expected, got, ring_of(block))
        tolerance = _OWN if kind == "odbb" and _dtype(network) == torch.float64 else _OTHERS
        running = tuple(n for n, runs in zip(block.names, block.mask, strict=True) if runs) if isinstance(
            block, ODBB) else ()  # fmt: skip
        ok = max(border, interior) <= tolerance
        cases.append(BlockCase(name, kind, running, _told(result), seed, border, interior, tolerance, ok))
    return cases


def split_error(expected: object, got: object, ring: int) -> tuple[float, float]:
    """(border, interior) error of maps (N, C, H, W), relative to the largest expected value; inf for other shapes."""
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor) or expected.shape != got.shape:
        return float("inf"), float("inf")
    error = (expected - got).abs() / expected.abs().max().clamp_min(1e-30)
    if not torch.isfinite(error).all():
        return float("inf"), float("inf")
    if error.dim() != 4:
        return float(error.max()), 0.0
    inside = torch.zeros_like(error, dtype=torch.bool)
    inside[:, :, ring : error.shape[2] - ring, ring : error.shape[3] - ring] = True
    return _largest(error[~inside]), _largest(error[inside])


def ring_of(block: nn.Module) -> int:
    """How many rows of outputs next to the edge may see the padding."""
    if not isinstance(block, ODBB):
        return 3
    sides = zip(block.host.padding, block.host.stride, strict=True)
    return max(-(-max(pads) // stride) for pads, stride in sides)


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _told(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        return f"conv {module.kernel_size[0]}x{module.kernel_size[1]}"
    return type(module).__name__
