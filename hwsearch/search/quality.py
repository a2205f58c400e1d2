"""How well trained layers are, read off their weights alone: CONet's metrics, per layer side and for a network.

Every weight is unfolded along the axis of its outputs and of its inputs, the noise is taken out, and what is left gives
the share of channels that carry something (``rank``), how evenly (``gain``), how well conditioned the map is, and the
quality that CONetV2 steers by::

    QC = atan2(rank, 1 - 1 / condition)

As published QC jumps: a side with a single learnt direction has condition 1 and scores pi/2, above any other. The
guarded form says ``rank`` there instead. No data is needed, and a layer that has learnt nothing yet scores 0.

Reference: CONetV2 (Hosseini et al., arXiv 2110.06830) and its published code; unfoldings and knowledge gain are those
of CONet and AdaS. A weight with more outputs than inputs times kernel is turned before it is factorised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hwsearch.errors import InputError, SchemaError
from hwsearch.search.lowrank import low_rank

if TYPE_CHECKING:
    from torch import nn

    from hwsearch.graph.widths import WidthSpace

#: Below this share of learnt directions (or at a single one) the condition says nothing, and QC is the share itself.
GUARD_RANK = 0.02
#: What the published code puts in the place of a denominator of 0.
_NO_DENOMINATOR = 1e-4
_SIDES = ("outputs", "inputs")

#: A side of a layer: (parameter name, "outputs" or "inputs").
Side = tuple[str, str]


@dataclass(frozen=True)
class SideQuality:
    """One weight, unfolded along its outputs or its inputs.

    Attributes:
        parameter: name of the weight.
        side: ``outputs`` or ``inputs``.
        channels: N, size of that axis.
        directions: R, learnt directions, see ``low_rank``.
        rank: R / N.
        gain: knowledge gain, sum of the kept singular values over the largest, over N.
        condition: largest over smallest kept singular value; 0 where nothing was learnt.
        stable_rank: sum of squares of the kept singular values over the largest squared, over N.
    """

    parameter: str
    side: str
    channels: int
    directions: int
    rank: float
    gain: float
    condition: float
    stable_rank: float

    @property
    def published_quality(self) -> float:
        """QC as the published code computes it, 0 to pi/2."""
        denominator = 1.0 if self.condition == 0 else 1 - 1 / self.condition
        return math.atan2(self.rank, _NO_DENOMINATOR if denominator == 0 else denominator)

    @property
    def quality(self) -> float:
        """QC, guarded: at most one direction, or a share below ``GUARD_RANK``, counts as that share."""
        if self.directions <= 1 or self.rank < GUARD_RANK:
            return self.rank
        return self.published_quality


@dataclass(frozen=True)
class NetworkQuality:
    """All measured sides of a network at one moment of its training."""

    sides: tuple[SideQuality, ...]

    @property
    def mean(self) -> float:
        """Mean guarded QC: over the sides of a layer, then over layers."""
        return self.mean_of("quality")

    def mean_of(self, name: str) -> float:
        """Mean of any attribute of ``SideQuality``: over the sides of a layer, then over layers."""
        layers: dict[str, list[float]] = {}
        for side in self.sides:
            layers.setdefault(side.parameter, []).append(float(getattr(side, name)))
        return float(np.mean([np.mean(values) for values in layers.values()]))

    def by_side(self, name: str = "quality") -> dict[Side, float]:
        """An attribute of every side."""
        return {(side.parameter, side.side): float(getattr(side, name)) for side in self.sides}

    def to_list(self) -> list[dict[str, Any]]:
        """Plain JSON values, one entry a side, with both forms of QC."""
        return [
            {**asdict(side), "quality": side.quality, "published_quality": side.published_quality}
            for side in self.sides
        ]

    @classmethod
    def from_list(cls, entries: Sequence[Mapping[str, Any]]) -> NetworkQuality:
        """The same from plain values.

        Raises:
            SchemaError: an entry lacks a field, or has one of another type.
        """
        names = SideQuality.__dataclass_fields__
        try:
            return cls(tuple(SideQuality(**{name: entry[name] for name in names}) for entry in entries))
        except (KeyError, TypeError) as error:
            raise SchemaError(f"a record of layer quality is damaged ({error!r}): delete the file") from error


def network_quality(model: nn.Module, *, linear: bool = False) -> NetworkQuality:
    """Measure every convolution of a model.

    A depth-wise convolution has no input side: each of its channels reads one.

    Args:
        model: trained, at any width; it is only read.
        linear: linear layers too (the paper leaves them out).

    Raises:
        InputError: there is no such layer, or a weight is not finite.

    Example:
        >>> quality = network_quality(torch.nn.Conv2d(8, 16, 3))            # nothing learnt yet
        >>> [(side.side, side.channels) for side in quality.sides], quality.mean
        ([('outputs', 16), ('inputs', 8)], 0.0)
    """
    from torch import nn

    found = []
    for path, module in model.named_modules():
        wanted = isinstance(module, nn.modules.conv._ConvNd) or (linear and isinstance(module, nn.Linear))
        if not wanted:
            continue
        name = f"{path}.weight" if path else "weight"
        weight = np.asarray(module.weight.detach().to("cpu", dtype=_double()).contiguous().numpy())
        turned = isinstance(module, nn.modules.conv._ConvTransposeNd)
        found += [
            _measured(name, side, unfold(weight, axis))
            for side, axis in zip(_SIDES, (1, 0) if turned else (0, 1), strict=True)
            if weight.shape[axis] > 1 or side == "outputs"
        ]
    if not found:
        raise InputError(f"{type(model).__name__} has no convolution whose quality could be measured")
    return NetworkQuality(tuple(found))


def unfold(weight: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """A weight (O, I, ...) as the matrix (size of ``axis``, everything else)."""
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def sides_of_groups(space: WidthSpace) -> tuple[tuple[Side, ...], ...]:
    """The sides that each group of a space decides: what produces its channels, and what reads them."""
    shapes = space.network.shapes
    weights = {layer.weight for layer in space.network.layers if layer.weight and len(shapes[layer.weight]) > 1}
    return tuple(
        tuple(
            dict.fromkeys(
                (slot.parameter, "inputs" if slot.reads else "outputs")
                for slot in group.slots
                if slot.parameter in weights
            )
        )
        for group in space.groups
    )


def _measured(name: str, side: str, matrix: NDArray[np.float64]) -> SideQuality:
    signal, channels = low_rank(matrix), len(matrix)
    return SideQuality(
        name,
        side,
        channels,
        signal.rank,
        signal.rank / channels,
        signal.gain / channels,
        signal.condition,
        signal.stable_rank / channels,
    )


def _double() -> Any:
    import torch

    return torch.float64
