"""``grow``: a wider copy of a network that computes the same function, on the same groups that ``shrink`` cuts.

A new unit is a copy of an old one: everything that produces it is repeated, and what reads it is divided by the number
of copies, so the sum over the copies is what it was. A copy lies right behind its original on every axis, which keeps
concatenations, flattened maps and grouped channels in the order that the network's code expects.

Reference: Chen, Goodfellow, Shlens, "Net2Net", ICLR 2016, section 2.2 (Net2WiderNet), carried over to tied channels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.capture import evaluation_mode, first_line, try_forward
from hwsearch.graph.surgery import (
    blame,
    example_for,
    first_tensor,
    followers,
    named_tensors,
    put_tensors,
)
from hwsearch.graph.widths import IntArray, WidthSpace

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def grow(
    model: nn.Module,
    space: WidthSpace,
    widths: Mapping[str, int],
    *,
    source: Mapping[str, Sequence[int]] | None = None,
    noise: float = 0.0,
    seed: int = 0,
    check: bool = True,
) -> nn.Module:
    """A wider copy of ``model`` with the same function; ``model`` itself is not touched.

    Where an operation mixes over a group's channels (``neutral`` is false: layer normalisation, mean over channels),
    only whole multiples of its units keep the function.

    Args:
        model: the model that ``space`` was made from, or its folded form.
        space: its width space; the space of the result is made anew with ``WidthSpace.from_model``.
        widths: new number of units per group name, at least the group's own; other groups stay as they are.
        source: per group name, which unit each new unit copies; without it the units are copied in turn.
        noise: standard deviation of noise on the copies, as a share of each tensor's own: equal copies would get equal
            gradients for ever. Anything above 0 changes the function.
        seed: seed of the noise.
        check: run both networks once and compare.

    Raises:
        InputError: an unknown group, a smaller width, or a source that does not fit.
        UnsupportedModelError: the model's Python code fixes a size, or its function cannot be kept.

    Example:
        >>> wide = grow(model, space, {group.name: 2 * group.units for group in space.groups})
    """
    import torch

    copies = _copies(space, widths, source or {})
    try:
        wide = copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error
    generator = torch.Generator().manual_seed(seed)
    tensors = named_tensors(wide)
    new: dict[str, Tensor] = {}
    for (name, axis), spread in _spreads(space, copies, tensors).items():
        data = new.get(name, tensors[name].detach())
        new[name] = spread.apply(data, axis, noise, generator)
    put_tensors(wide, new)
    if check:
        exact = noise == 0.0 and all(
            group.neutral or len(set(times.tolist())) == 1 for group, times in zip(space.groups, copies, strict=True)
        )
        _compare(model, wide, space, exact)
    return wide


def _copies(space: WidthSpace, widths: Mapping[str, int], source: Mapping[str, Sequence[int]]) -> list[IntArray]:
    """How often every unit of every group will be there."""
    unknown = sorted((widths.keys() | source.keys()) - {group.name for group in space.groups})
    if unknown:
        raise InputError(f"no group named {unknown[0]!r}; the groups are {', '.join(g.name for g in space.groups)}")
    found = []
    for group in space.groups:
        width = widths.get(group.name, group.units)
        if isinstance(width, bool) or not isinstance(width, int | np.integer) or width < group.units:
            raise InputError(f"group {group.name} has {group.units} units and cannot grow to {width!r}; use shrink")
        extra = int(width) - group.units
        chosen = np.asarray(source.get(group.name, np.arange(extra) % group.units), dtype=np.int64).ravel()
        if len(chosen) != extra or ((chosen < 0) | (chosen >= group.units)).any():
            raise InputError(
                f"source for group {group.name} must hold {extra} units of 0 to {group.units - 1}, got {len(chosen)}"
            )
        found.append(1 + np.bincount(chosen, minlength=group.units).astype(np.int64))
    return found


class _Spread:
    """How one parameter axis is laid out anew: which old position each new one copies, and what reading divides by."""

    def __init__(self, size: int) -> None:
        self.times = np.ones(size, dtype=np.int64)
        self.divide = np.ones(size, dtype=np.int64)
        self.run = np.ones(size, dtype=np.int64)  # length of the run of positions that starts here and is copied whole

    def repeat(self, positions: IntArray, times: IntArray, reads: bool) -> None:
        """Units at ``positions`` (units, elements) will be there ``times`` (units,)."""
        for unit in np.flatnonzero(times > 1):
            places = np.sort(positions[unit])
            # Positions of one unit side by side are its inside (the pixels of a flattened channel): kept together.
            for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
                self.run[run[0]] = len(run)
            self.times[places] = times[unit]
            if reads:
                self.divide[places] = times[unit]

    def layout(self) -> tuple[IntArray, IntArray]:
        """Old position of every new one, and which new ones are copies (1) rather than originals (0)."""
        pieces, copied = [], []
        place = 0
        while place < len(self.times):
            end = place + int(self.run[place])
            times = int(self.times[place])
            pieces.append(np.tile(np.arange(place, end), times))
            copied.append(np.repeat((np.arange(times) > 0).astype(np.int64), end - place))
            place = end
        return np.concatenate(pieces), np.concatenate(copied)

    def apply(self, data: Tensor, axis: int, noise: float, generator: torch.Generator) -> Tensor:
        """The tensor with its axis laid out anew, divided where it reads, with noise on written copies."""
        import torch

        old, copied = self.layout()
        shape = [1] * data.dim()
        shape[axis] = -1
        wide = data.index_select(axis, torch.from_numpy(old).to(data.device))
        if (self.divide > 1).any():
            wide = wide / torch.from_numpy(self.divide[old]).to(data.device, data.dtype).view(shape)
        elif noise > 0.0 and data.dim() > 1 and data.is_floating_point():
            drawn = torch.randn(wide.shape, generator=generator).to(data.device, data.dtype)
            wide = wide + noise * data.std() * drawn * torch.from_numpy(copied).to(data.device, data.dtype).view(shape)
        return wide


def _spreads(
    space: WidthSpace, copies: list[IntArray], tensors: Mapping[str, Tensor]
) -> dict[tuple[str, int], _Spread]:
    """The new layout of every parameter axis that grows."""
    found: dict[tuple[str, int], _Spread] = {}
    for group, times in zip(space.groups, copies, strict=True):
        for slot in group.slots if (times > 1).any() else ():
            if slot.parameter in tensors:
                size = int(tensors[slot.parameter].shape[slot.axis])
                spread = found.setdefault((slot.parameter, slot.axis), _Spread(size))
                spread.repeat(slot.positions, times, slot.reads)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, owner in followers(space, shapes).items():
        if owner in found:
            found[name, 0] = found[owner]
    return found


def _compare(model: nn.Module, wide: nn.Module, space: WidthSpace, exact: bool) -> None:
    import torch

    advice = "a size is written in its Python code, read it from the tensor's shape instead"
    generator = torch.Generator().manual_seed(0)
    example = example_for(model, space, lambda shape: torch.randn(shape, generator=generator))
    with evaluation_mode(model), evaluation_mode(wide):
        wanted = first_tensor(try_forward(model, example))
        try:
            got = first_tensor(try_forward(wide, example))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{type(model).__name__} cannot grow: {blame(error)}; {advice}") from error
    if got.shape != wanted.shape:
        raise UnsupportedModelError(
            f"{type(model).__name__} grown returns shape {tuple(got.shape)} instead of {tuple(wanted.shape)}; {advice}"
        )
    tolerance = 10 * torch.finfo(wanted.dtype).eps ** 0.5 if wanted.is_floating_point() else 0.0
    change = float((got - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)
    if exact and not change <= tolerance:
        raise UnsupportedModelError(f"growing {type(model).__name__} changes its output by {change:.1%}; {advice}")
