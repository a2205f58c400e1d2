"""``WidthGrid``: the allowed widths of a space as arrays, so that whole populations move at once.

A population is an int64 array ``(N, G)`` of widths (rows: choices, columns: groups of the space, in its order).
Searchers work on *indices* into each group's allowed widths, because a step of one index is the smallest change that a
network can make.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwsearch.errors import InputError

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace

Widths = NDArray[np.int64]  #: (N, G) widths of N choices
Indices = NDArray[np.int64]  #: (N, G) positions in each group's allowed widths


@dataclass(frozen=True, eq=False)
class WidthGrid:
    """The allowed widths of every group, sorted ascending.

    ``allowed`` has one int64 array per group; ``names`` are the groups' names, for messages.
    """

    names: tuple[str, ...]
    allowed: tuple[NDArray[np.int64], ...]

    @classmethod
    def of(cls, space: WidthSpace) -> WidthGrid:
        """The grid of ``space``, in the order of its groups."""
        return cls(
            tuple(group.name for group in space.groups),
            tuple(np.asarray(sorted(group.widths), dtype=np.int64) for group in space.groups),
        )

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return len(self.allowed)

    @property
    def top(self) -> Indices:
        """Index of the full width of every group, shape (G,)."""
        return np.asarray([len(widths) - 1 for widths in self.allowed], dtype=np.int64)

    @property
    def full(self) -> Widths:
        """The full network, shape (G,)."""
        return np.asarray([widths[-1] for widths in self.allowed], dtype=np.int64)

    @property
    def smallest(self) -> Widths:
        """Every group at its smallest allowed width, shape (G,)."""
        return np.asarray([widths[0] for widths in self.allowed], dtype=np.int64)

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        """A hashable identity of the allowed widths."""
        return tuple(tuple(int(w) for w in widths) for widths in self.allowed)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that differ between spaces of different groups or allowed widths."""
        return hashlib.sha256(json.dumps([self.names, self.key]).encode()).hexdigest()[:16]

    def take(self, indices: ArrayLike) -> Widths:
        """Widths (N, G) at ``indices`` (N, G)."""
        rows = np.asarray(indices, dtype=np.int64)
        return np.stack([widths[rows[:, g]] for g, widths in enumerate(self.allowed)], axis=1)

    def nearest(self, widths: ArrayLike) -> Indices:
        """Indices (N, G) of the allowed widths nearest to real numbers ``widths`` (N, G); a tie goes to the wider."""
        rows = np.asarray(widths, dtype=np.float64)
        columns = []
        for g, allowed in enumerate(self.allowed):
            middle = (allowed[1:] + allowed[:-1]) / 2
            columns.append(np.searchsorted(middle, rows[:, g], side="right"))
        return np.stack(columns, axis=1).astype(np.int64)

    def at_least(self, widths: ArrayLike) -> Indices:
        """Indices (N, G) of the smallest allowed widths that are not narrower than ``widths`` (full width at most)."""
        rows = np.asarray(widths, dtype=np.float64)
        columns = [np.searchsorted(a, rows[:, g], side="left").clip(max=len(a) - 1) for g, a in enumerate(self.allowed)]
        return np.stack(columns, axis=1).astype(np.int64)

    def sample(self, count: int, rng: np.random.Generator) -> Widths:
        """``count`` choices with every group's width drawn uniformly from its allowed widths, shape (count, G)."""
        return self.take(rng.integers(0, self.top + 1, size=(count, self.groups)))

    def uniform(self, ratios: ArrayLike) -> Widths:
        """One choice per ratio: every group at the allowed width nearest to ``ratio`` times its full width."""
        return self.take(self.nearest(np.outer(np.atleast_1d(np.asarray(ratios, dtype=np.float64)), self.full)))

    def population(self, choices: ArrayLike | Iterable[WidthChoice]) -> Widths:
        """Any sequence of choices or array of widths as int64 (N, G).

        Raises:
            InputError: a row does not have one width per group.
        """
        if not isinstance(choices, np.ndarray):
            choices = np.asarray([getattr(choice, "widths", choice) for choice in choices])  # type: ignore[union-attr]
        rows = choices.astype(np.int64)
        rows = rows.reshape(0, self.groups) if rows.size == 0 else np.atleast_2d(rows)
        if rows.ndim != 2 or rows.shape[1] != self.groups:
            raise InputError(
                f"choices of shape {rows.shape} do not fit a width space of {self.groups} groups: "
                "give one width per group"
            )
        return rows


def row_keys(choices: Widths) -> list[tuple[int, ...]]:
    """Each row as a hashable tuple of plain integers."""
    return [tuple(row) for row in choices.tolist()]
