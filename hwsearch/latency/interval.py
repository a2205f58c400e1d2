"""How sure a prediction is: conformal intervals that widen for networks unlike those that were profiled.

A kernel's *novelty* is how far, in octaves of its channels and positions, the nearest profiled kernel of its kind lies;
a network's is the mean over its kernels, weighted by their milliseconds. Errors of networks held out (at random, and by
whole families, whose kernels are newer to the model) grow with it. They are divided by a line ``a + b * novelty``
fitted to their size, and the quantiles of what is left are the interval: locally weighted split conformal prediction
(Lei et al., JASA 2018, section 5.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.features import layouts

#: Novelty of a kernel of a kind that was never profiled, and the most that any kernel has: octaves.
FARTHEST = 3.0
_STEP = 0.25  # coordinates are kept to a quarter of an octave
#: No interval is finer than what errors of networks scatter by whatever is done.
_LEAST_SCALE = 0.005


@dataclass(frozen=True)
class Profiled:
    """Where the profiled kernels lie: kind to distinct (in channels, out channels, positions), (n, 3), in quarter
    octaves."""

    cells: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, kernels: Sequence[Kernel]) -> Profiled:
        """The cells of these kernels."""
        found: dict[str, set[tuple[int, int, int]]] = {}
        for kernel in kernels:
            found.setdefault(_kind(kernel), set()).add(_cell(kernel))
        return cls({kind: np.array(sorted(cells), dtype=np.int64) for kind, cells in sorted(found.items())})

    def novelty(self, kernels: Sequence[Kernel]) -> np.ndarray:
        """Octaves to the nearest profiled kernel of the same kind, (N,), at most ``FARTHEST``."""
        known: dict[tuple[str, tuple[int, int, int]], float] = {}
        values = []
        for kernel in kernels:
            key = _kind(kernel), _cell(kernel)
            if key not in known:
                cells = self.cells.get(key[0])
                near = FARTHEST if cells is None else float(np.abs(cells - key[1]).sum(axis=1).min()) * _STEP
                known[key] = min(near, FARTHEST)
            values.append(known[key])
        return np.array(values, dtype=np.float64)

    def to_dict(self) -> dict[str, list[list[int]]]:
        """Plain values for JSON."""
        return {kind: cells.tolist() for kind, cells in self.cells.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[Sequence[int]]]) -> Profiled:
        """The inverse of ``to_dict``; ValueError or TypeError on a damaged one."""
        found = {str(kind): np.array(cells, dtype=np.int64).reshape(-1, 3) for kind, cells in data.items()}
        if empty := [kind for kind, cells in found.items() if not len(cells)]:
            raise ValueError(f"nothing was profiled of {empty[0]!r:.40}")
        return cls(found)


@dataclass(frozen=True)
class Intervals:
    """Fitted intervals.

    Attributes:
        a, b: the scale of log errors is ``a + b * novelty``.
        scores: log(measured / predicted) over that scale, sorted, of every network held out.
    """

    a: float
    b: float
    scores: np.ndarray

    @classmethod
    def fit(cls, log_errors: np.ndarray, novelty: np.ndarray) -> Intervals:
        """From errors of networks held out, (N,), and their novelty, (N,)."""
        from scipy.optimize import nnls

        size = np.abs(log_errors)
        design = np.stack([np.ones(len(size)), novelty], axis=1)
        trust = np.ones(len(size))
        line = np.zeros(2)
        for _ in range(20):  # least absolute deviations: single failures must not tilt the line
            line = nnls(design * trust[:, None], size * trust)[0]
            trust = 1 / np.sqrt(np.maximum(np.abs(size - design @ line), 1e-3))
        a, b = max(float(line[0]), _LEAST_SCALE), float(line[1])
        scores = np.sort(log_errors / (a + b * novelty))
        return cls(round(a, 6), round(b, 6), np.round(scores, 5))  # as saved: a loaded one answers alike

    def log_bounds(self, novelty: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of log(measured / predicted), each (M,), low <= 0 <= high, at a probability in (0, 1)."""
        low, high = conformal(self.scores, level)
        scale = self.a + self.b * np.asarray(novelty, dtype=np.float64)
        return np.minimum(low, 0.0) * scale, np.maximum(high, 0.0) * scale


def conformal(scores: np.ndarray, level: float) -> tuple[float, float]:
    """Lower and upper quantile of sorted scores that a further network's lies between with probability ``level``.

    Split conformal prediction, both sides on their own: rank ceil((n + 1) (1 - alpha / 2)). Where so extreme a rank
    does not exist the most extreme score is stretched by half.
    """
    count, alpha = len(scores), 1 - level
    rank = math.ceil((count + 1) * (1 - alpha / 2))
    if rank > count:
        return 1.5 * float(scores[0]), 1.5 * float(scores[-1])
    return float(scores[count - rank]), float(scores[rank - 1])


def _kind(kernel: Kernel) -> str:
    """What must agree before sizes can be compared."""
    window = f"{kernel.kernel_height}x{kernel.kernel_width}/{kernel.stride}"
    return f"{kernel.family}|{kernel.op}|{layouts(kernel)}|{window}|{kernel.dtype}"


def _cell(kernel: Kernel) -> tuple[int, int, int]:
    positions = kernel.batch * kernel.out_height * kernel.out_width
    first, second, third = (
        round(math.log2(max(size, 1)) / _STEP) for size in (kernel.in_channels, kernel.out_channels, positions)
    )
    return first, second, third
