"""Weights carried from one width choice to another, up in some groups and down in others.

Two ways. ``preserve`` keeps the function where it can: a group that grows repeats its most important units and divides
what its readers weigh them with, so in evaluation mode the larger network computes what the smaller one did; a group
that shrinks keeps its most important units. ``svd`` is the published transfer of CONetV2: each convolution on its own
is cut through its singular value decomposition or lengthened by repeating its last channels, without any correction,
and everything else starts afresh.

Reference: Net2WiderNet (Chen, Goodfellow, Shlens, ICLR 2016) for ``preserve``; the published code of CONetV2 (arXiv
2110.06830), "weight transfer", for ``svd``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hwsearch.errors import InputError
from hwsearch.graph.surgery import axis_positions, kept_units, named_tensors, shrink
from hwsearch.search.winner import reset
from hwsearch.train.seeds import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from hwsearch.graph.widths import IntArray, WidthChoice, WidthSpace

TRANSFERS = ("preserve", "svd")


def carry_over(
    base: nn.Module,
    space: WidthSpace,
    old: nn.Module,
    before: WidthChoice,
    after: WidthChoice,
    *,
    how: str = "preserve",
    seed: int = 0,
    noise: float = 1e-3,
) -> nn.Module:
    """A network at ``after`` that starts from what ``old``, a network at ``before``, has learnt.

    Args:
        base: the model that the space was made from, at full width; it gives the structure and is not touched.
        old: made by ``shrink`` (of the first units) or by this function, and trained; it is not touched.
        how: see ``TRANSFERS``.
        seed: of the noise, and of what starts afresh.
        noise: standard deviation added to repeated units, relative to their weight's own: two equal units would get
            equal gradients for ever. Only for ``preserve``; 0 preserves the function to rounding.

    Returns:
        The network, in training mode, in plain memory layout.

    Raises:
        InputError: ``how`` is no transfer.

    A group that something mixes over (``WidthGroup.neutral`` is false: layer normalisation) keeps its function only
    approximately when it grows by less than a whole factor.
    """
    if how not in TRANSFERS:
        raise InputError(f"transfer is {how!r}; give one of {', '.join(TRANSFERS)}")
    small = shrink(base, space, after, check=False)
    source = {name: tensor.detach() for name, tensor in named_tensors(old).items()}
    if how == "svd":
        reset(small, seed)
        new = _by_svd(small, source)
    else:
        new = _preserving(space, source, named_tensors(base), before, after, seed, noise)
    import torch

    with torch.no_grad():
        for name, tensor in named_tensors(small).items():
            if name in new:
                tensor.copy_(new[name])
    return small.train()


def important_units(space: WidthSpace, tensors: dict[str, Tensor], choice: WidthChoice) -> list[NDArray[np.float64]]:
    """Importance (width,) of every kept unit of every group, for tensors at ``choice``.

    It is the sum, over all weights of two or more dimensions that the unit touches, of its share of their squared
    magnitude: the group form of magnitude pruning (DepGraph, Fang et al., CVPR 2023, section 3.3).
    """
    kept = kept_units(space, choice)
    places = axis_positions(space, kept, space.network.shapes)
    found = []
    for group, units in zip(space.groups, kept, strict=True):
        total = np.zeros(len(units))
        for slot in group.slots:
            tensor = tensors.get(slot.parameter)
            if tensor is None or tensor.dim() < 2:
                continue
            others = [axis for axis in range(tensor.dim()) if axis != slot.axis]
            squared = tensor.double().square().sum(dim=others).cpu().numpy()
            at = _places(places, slot.parameter, slot.axis, slot.positions[units])
            share = squared[at].sum(axis=1)
            total += share / max(float(share.mean()), 1e-30)
        found.append(total)
    return found


def _preserving(
    space: WidthSpace,
    source: dict[str, Tensor],
    full: dict[str, Tensor],
    before: WidthChoice,
    after: WidthChoice,
    seed: int,
    noise: float,
) -> dict[str, Tensor]:
    import torch

    importance = important_units(space, source, before)
    origins = [_origins(score, width) for score, width in zip(importance, after.widths, strict=True)]
    shapes = {name: tuple(tensor.shape) for name, tensor in full.items()}
    old_places = axis_positions(space, kept_units(space, before), shapes)
    new_places = axis_positions(space, kept_units(space, after), shapes)
    touched: dict[tuple[str, int], list[tuple[int, IntArray, bool]]] = {}
    for index, group in enumerate(space.groups):
        for slot in group.slots:
            touched.setdefault((slot.parameter, slot.axis), []).append((index, slot.positions, slot.reads))
    new = {name: tensor.clone() for name, tensor in source.items()}
    for (name, axis), parts in touched.items():
        if name not in new:
            continue
        size = shapes[name][axis]
        origin, share, repeated = np.arange(size), np.ones(size), np.zeros(size, dtype=bool)
        for index, positions, reads in parts:
            from_unit = origins[index]
            origin[positions[: len(from_unit)]] = positions[from_unit]
            counts = np.bincount(from_unit, minlength=len(importance[index]))
            if reads:
                share[positions[: len(from_unit)]] = 1.0 / counts[from_unit][:, None]
            repeated[positions[: len(from_unit)]] = _again(from_unit)[:, None]
        wanted = new_places.get((name, axis), np.arange(size))
        at = _places(old_places, name, axis, origin[wanted])
        gathered = new[name].index_select(axis, torch.from_numpy(at))
        if not gathered.is_floating_point():
            new[name] = gathered
            continue
        factor = share[wanted]
        if noise > 0 and gathered.dim() > 1:
            rng = generator(seed, "symmetry", axis, *name.encode())
            spread = noise * float(gathered.double().std(correction=0))
            shake = rng.normal(size=tuple(gathered.shape)) * spread
            shake *= _shaped(repeated[wanted].astype(np.float64), axis, gathered.dim())
            gathered = gathered + torch.from_numpy(shake).to(gathered.dtype)
        scale = torch.from_numpy(_shaped(factor, axis, gathered.dim())).to(gathered.dtype)
        new[name] = gathered * scale
    return new


def _origins(importance: NDArray[np.float64], width: int) -> NDArray[np.int64]:
    """For each of ``width`` new units the old one it comes from: the most important are kept in order, or repeated."""
    count = len(importance)
    order = np.argsort(-importance, kind="stable")
    if width <= count:
        return np.sort(order[:width]).astype(np.int64)
    more = np.resize(order, width - count)
    return np.concatenate([np.arange(count), more]).astype(np.int64)


def _again(origins: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which entries repeat an earlier one."""
    _, first = np.unique(origins, return_index=True)
    again = np.ones(len(origins), dtype=bool)
    again[first] = False
    return again


def _places(places: dict[tuple[str, int], IntArray], name: str, axis: int, wanted: IntArray) -> IntArray:
    """Where full positions lie on an axis that was cut down to ``places``."""
    kept = places.get((name, axis))
    return wanted if kept is None else np.searchsorted(kept, wanted)


def _shaped(values: NDArray[np.float64], axis: int, dimensions: int) -> NDArray[np.float64]:
    """A vector laid along one axis, for broadcasting."""
    shape = [1] * dimensions
    shape[axis] = -1
    return values.reshape(shape)


def _by_svd(small: nn.Module, source: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published transfer: weights of convolutions only."""
    import torch
    from torch import nn

    owners = dict(small.named_modules())
    new = {}
    for name, tensor in named_tensors(small).items():
        module = owners.get(name.rpartition(".")[0])
        if not isinstance(module, nn.modules.conv._ConvNd) or not name.endswith("weight") or name not in source:
            continue
        new[name] = torch.from_numpy(svd_transfer(_array(source[name]), tuple(tensor.shape))).to(tensor.dtype)
    return new


def svd_transfer(weight: NDArray[np.float64], shape: Sequence[int]) -> NDArray[np.float64]:
    """A convolution's weight (O, I, ...) at another number of outputs and inputs.

    What shrinks is cut to the best approximation, of the rank that is left, *of the whole* and then to its first rows
    and columns; what grows repeats its last rows, then its last input channels. The order, cut before repeat, matters
    only where one side shrinks and the other grows.

    Example:
        >>> svd_transfer(np.array([[1.0, 2.0], [3.0, 4.0]])[:, :, None, None], (3, 2, 1, 1))[:, :, 0, 0].tolist()
        [[1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]
    """
    outputs, inputs = shape[:2]
    kernel = tuple(weight.shape[2:])
    rows, channels = min(outputs, weight.shape[0]), min(inputs, weight.shape[1])
    columns = channels * int(np.prod(kernel, dtype=np.int64))
    matrix = weight.reshape(weight.shape[0], -1)
    if (rows, columns) != matrix.shape:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        rank = min(rows, columns, len(values))
        matrix = (left[:rows, :rank] * values[:rank]) @ right[:rank, :columns]
    cut = matrix.reshape(rows, channels, *kernel)
    cut = np.concatenate([cut, cut[_last(rows, outputs - rows)]], axis=0)
    return np.concatenate([cut, cut[:, _last(channels, inputs - channels)]], axis=1)


def _last(count: int, more: int) -> NDArray[np.int64]:
    """The last ``more`` of ``count`` positions, in order; all of them over again where there are too few."""
    return np.arange(count - more, count) % count if more <= count else np.resize(np.arange(count), more)


def _array(tensor: torch.Tensor) -> NDArray[np.float64]:
    # In plain layout whatever the tensor's own: equal values must give equal bits.
    return np.asarray(tensor.detach().double().contiguous().cpu().numpy())
