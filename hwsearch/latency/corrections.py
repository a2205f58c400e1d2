"""What may stand in for a family's trees: ridge regression, a table of the very kernels, or nothing.

All correct the analytic base by a factor. Which one a family gets is decided by cross-validation (``choose``): trees
win nearly everywhere, but a family of few kernels, or of few distinct ones, may be told better by less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.features import FEATURES

TREES, RIDGE, TABLE, BASE = "trees", "ridge", "table", "base"
#: In order of preference among equals.
KINDS = (TREES, BASE, RIDGE, TABLE)

#: Numbers of texts have no order, so a line over them means nothing.
_LINEAR = [index for index, name in enumerate(FEATURES) if name not in ("tail", "op", "layout", "dtype")]
_PENALTY = 10.0
_LIMIT = 1.5  # a line extrapolates: no factor beyond exp of this
_BETTER = 0.97  # another kind must err by this much less than the trees


@dataclass(frozen=True)
class Correction:
    """Log factors on the base of one family, by ridge regression or by looking kernels up; neither: no factor.

    Attributes:
        centre, slope: of the linear features, after the constant ``start``; empty where it is no ridge.
        entries: log factor by ``Kernel.key``; empty where it is no table.
    """

    start: float = 0.0
    centre: tuple[float, ...] = ()
    slope: tuple[float, ...] = ()
    entries: Mapping[str, float] | None = None

    @classmethod
    def fit(
        cls, kind: str, kernels: Sequence[Kernel], features: np.ndarray, target: np.ndarray, weight: np.ndarray
    ) -> Correction:
        """Fit one kind.

        Args:
            kind: ``ridge``, ``table`` or ``base``.
            kernels: of each row, N.
            features: (N, F).
            target: log of observed over base, (N,).
            weight: trust in each row, (N,).
        """
        if kind == RIDGE:
            x = features[:, _LINEAR].astype(np.float64)
            total = weight.sum()
            centre, start = (weight @ x) / total, float(weight @ target / total)
            scale = np.sqrt(weight @ (x - centre) ** 2 / total)
            scale[scale < 1e-9] = np.inf
            z = (x - centre) / scale
            gram = (z * weight[:, None]).T @ z + _PENALTY * np.eye(z.shape[1])
            slope = np.linalg.solve(gram, z.T @ (weight * (target - start))) / scale
            return cls(start, tuple(map(float, centre)), tuple(map(float, slope)))
        if kind == TABLE:
            sums: dict[str, list[float]] = {}
            for kernel, value, trust in zip(kernels, target, weight, strict=True):
                entry = sums.setdefault(kernel.key, [0.0, 0.0])
                entry[0] += trust * value
                entry[1] += trust
            return cls(entries={key: sums[key][0] / sums[key][1] for key in sorted(sums)})
        return cls()

    def log_factor(self, kernels: Sequence[Kernel], features: np.ndarray) -> np.ndarray:
        """Log factor of each kernel, (N,), from its features (N, F); a kernel that no table holds gets none."""
        if self.entries is not None:
            return np.array([self.entries.get(kernel.key, 0.0) for kernel in kernels])
        if not self.slope:
            return np.zeros(len(kernels))
        x = features[:, _LINEAR].astype(np.float64) - np.array(self.centre)
        # Row by row: a matrix product's last bits depend on what else is asked about at the same time.
        line = self.start + (x * np.array(self.slope)).sum(axis=1)
        return np.asarray(np.clip(line, -_LIMIT, _LIMIT))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "start": self.start,
            "centre": list(self.centre),
            "slope": list(self.slope),
            "entries": None if self.entries is None else dict(self.entries),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Correction:
        """The inverse of ``to_dict``; KeyError, TypeError or ValueError on a damaged one."""
        centre, slope = (tuple(map(float, data[name])) for name in ("centre", "slope"))
        if len(centre) != len(slope) or len(slope) not in (0, len(_LINEAR)):
            raise ValueError(f"a line over {len(slope)} features instead of {len(_LINEAR)}")
        entries = data["entries"]
        known = None if entries is None else {str(key): float(value) for key, value in entries.items()}
        return cls(float(data["start"]), centre, slope, known)


def choose(errors: Mapping[str, np.ndarray], weight: np.ndarray) -> str:
    """The kind for a family: the trees, unless another one errs by clearly less on kernels held out.

    Args:
        errors: absolute log errors by kind, (N,) each.
        weight: of each row, (N,).

    Example:
        >>> choose({"trees": np.array([0.1, 0.1]), "base": np.array([0.0, 0.1])}, np.ones(2))
        'base'
    """
    mean = {kind: float(weight @ errors[kind]) for kind in KINDS if kind in errors}
    best = min(mean, key=lambda kind: mean[kind])
    return best if TREES not in mean or mean[best] < _BETTER * mean[TREES] else TREES
