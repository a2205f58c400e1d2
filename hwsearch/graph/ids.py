"""Element ids: every index of every parameter axis is one id; ids that must live and die together are joined.

Design: rules only *record* facts (join these, freeze these, these lie on a rectangle); ``Ids.solve`` turns the facts
into classes at the end, so the order in which facts arrive cannot matter. Joining is one call of SciPy's connected
components, near-linear in the number of ids plus facts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Value:
    """What is known about one tensor: its shape, and which ids lie along its axes.

    Each factor is an id array that broadcasts to ``shape``: its axis has the tensor's size where ids run along it,
    and size 1 where they do not. One plain channel axis is a factor of shape ``(1, C, 1, 1)``; an axis split into
    heads is a factor with two long axes. No axis belongs to two factors. Axes without a factor are fixed (batch,
    space, constants).
    """

    shape: tuple[int, ...]
    factors: tuple[IntArray, ...] = ()

    def __post_init__(self) -> None:
        kept = tuple(f for f in self.factors if any(size > 1 for size in f.shape))
        object.__setattr__(self, "factors", kept)

    def on(self, axis: int) -> IntArray | None:
        """The factor that runs along ``axis``, or None."""
        axis %= max(len(self.shape), 1)
        return next((f for f in self.factors if f.shape[axis] > 1), None)


def tracked_axes(factor: IntArray) -> tuple[int, ...]:
    """The axes along which the ids of a factor run."""
    return tuple(axis for axis, size in enumerate(factor.shape) if size > 1)


def along(ids: IntArray, axis: int, rank: int) -> IntArray:
    """A flat id array laid along ``axis`` of a tensor of ``rank`` axes."""
    shape = [1] * rank
    shape[axis] = len(ids)
    return ids.reshape(shape)


@dataclass
class Ids:
    """The growing set of ids and of the facts about them."""

    count: int = 0
    _joins: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _frozen: list[tuple[IntArray, str]] = field(default_factory=list)
    _rectangles: list[IntArray] = field(default_factory=list)
    _mixed: list[tuple[IntArray, str]] = field(default_factory=list)

    def new(self, size: int) -> IntArray:
        """``size`` fresh ids, joined to nothing."""
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return ids

    def join(self, left: IntArray, right: IntArray) -> None:
        """The ids of two arrays stand for the same units, element by element after broadcasting."""
        if left is right:
            return
        a, b = np.broadcast_arrays(left, right)
        self._joins.append((a.ravel().astype(np.int64), b.ravel().astype(np.int64)))

    def freeze(self, ids: IntArray, reason: str) -> None:
        """These ids can never be removed; ``reason`` is shown to the user (the first one given wins)."""
        self._frozen.append((ids.ravel(), reason))

    def rectangle(self, ids: IntArray) -> None:
        """An axis was split into the axes of ``ids``: what is removed must leave a full rectangle."""
        self._rectangles.append(np.squeeze(ids))

    def reduced(self, ids: IntArray, reason: str) -> None:
        """An operation mixes over these ids: removing one is legal, but changes values even when the unit is dead."""
        self._mixed.append((ids.ravel(), reason))

    def solve(self) -> Classes:
        """Join everything recorded, settle the rectangles, and name the frozen classes."""
        roots = self._components()
        for ids in self._rectangles:
            if not _closed(roots[ids]):
                # The units may lie on any one axis of a split. Nothing else decided, so the outer extents stay and the
                # innermost shrinks: that is what `view(batch, groups, -1)` does with a smaller tensor.
                self.join(ids, ids.reshape(-1, ids.shape[-1])[0])
                roots = self._components()
        frozen: dict[int, str] = {}
        for ids, reason in self._frozen:
            for root in np.unique(roots[ids]):
                frozen.setdefault(int(root), reason)
        mixed: dict[int, str] = {}
        for ids, reason in self._mixed:
            for root in np.unique(roots[ids]):
                mixed.setdefault(int(root), reason)
        return Classes(roots, frozen, mixed)

    def _components(self) -> IntArray:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if not self._joins or not self.count:
            return np.arange(self.count, dtype=np.int64)
        left = np.concatenate([a for a, _ in self._joins])
        right = np.concatenate([b for _, b in self._joins])
        # Folding the facts into one pair keeps a second solve from repeating the concatenation.
        self._joins = [(left, right)]
        graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(self.count, self.count))
        return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


@dataclass(frozen=True)
class Classes:
    """The solution: ``roots[id]`` is the class of an id; classes with a reason to stay, and those mixed over."""

    roots: IntArray
    frozen: dict[int, str]
    mixed: dict[int, str]


def _closed(roots: IntArray) -> bool:
    """Whether the classes of a split already lie on one axis of it (constant along all the others)."""
    for axis in range(roots.ndim):
        others = np.moveaxis(roots, axis, 0).reshape(roots.shape[axis], -1)
        if (others == others[:, :1]).all():
            return True
    return False
