"""``low_rank``: the part of a matrix that is signal, by empirical variational Bayes; no threshold to choose.

A layer's weights are what was learnt plus what is left of the random start. Empirical variational Bayesian matrix
factorisation (EVBMF) splits the two: it estimates the noise variance from the spectrum itself, drops the singular
values that noise alone explains and shrinks the others. Its global optimum is known in closed form up to one scalar
(the variance), so there is no iteration that could end elsewhere.

Reference: Nakajima, Sugiyama, Babacan, Tomioka: "Global analytic solution of fully-observed variational Bayesian matrix
factorization", JMLR 14 (2013), theorem 2 and corollary 2 (the empirical form, with the noise variance estimated).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwsearch.errors import InputError

Floats = NDArray[np.float64]

#: Singular values below this share of the largest are rounding, not data: without a floor a matrix of exactly low rank
#: would have a noise variance of 0, and its free energy no minimum.
_FLOOR = 1e-7
_GRID = 128  # variances tried before the best is refined: the free energy can have several valleys


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is left of a matrix when noise is taken out of it.

    Attributes:
        values: (R,) shrunk singular values, the largest first; R is the estimated rank.
        rows, columns: shape of the matrix.
        noise_variance: estimated variance of one entry's noise.
    """

    values: Floats
    rows: int
    columns: int
    noise_variance: float

    @property
    def rank(self) -> int:
        """R: how many directions are more than noise."""
        return len(self.values)

    @property
    def condition(self) -> float:
        """Largest over smallest kept singular value, 1 or more; 0 where nothing is kept."""
        return float(self.values[0] / self.values[-1]) if self.rank else 0.0

    @property
    def stable_rank(self) -> float:
        """Sum of the squared singular values over the largest one squared, from 1 to R; 0 where nothing is kept."""
        return float(np.sum((self.values / self.values[0]) ** 2)) if self.rank else 0.0

    @property
    def gain(self) -> float:
        """Sum of the singular values over the largest one, from 1 to R; 0 where nothing is kept.

        Divided by the number of channels it is the "knowledge gain" of CONet and AdaS.
        """
        return float(np.sum(self.values / self.values[0])) if self.rank else 0.0


def low_rank(matrix: ArrayLike) -> LowRank:
    """Estimate noise and signal of a matrix (any shape: a tall one is turned first, which changes nothing).

    Args:
        matrix: (rows, columns) real numbers.

    Raises:
        InputError: it is no matrix, is empty, or holds a number that is not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> noise, signal = rng.normal(size=(40, 90)), np.outer(rng.normal(size=40), rng.normal(size=90))
        >>> low_rank(noise).rank, low_rank(noise + 3 * signal).rank
        (0, 1)
    """
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"a matrix of shape {array.shape} has no singular values; give (rows, columns), both above 0")
    if not np.isfinite(array).all():
        raise InputError("a matrix holds a number that is not finite: the weights diverged; lower the learning rate")
    short, long = sorted(array.shape)
    largest = float(np.abs(array).max())
    if largest == 0.0:
        return LowRank(np.zeros(0), array.shape[0], array.shape[1], 0.0)
    # In units of the largest entry, so that neither tiny nor huge weights leave the range of floating point.
    spectrum = np.linalg.svd(array / largest, compute_uv=False)
    spectrum = np.maximum(spectrum, _FLOOR * spectrum[0])
    variance = _noise_variance(spectrum, short, long)
    kept = spectrum[spectrum > math.sqrt(long * variance * _threshold(short / long))]
    values = _shrunk(kept, variance, short, long)
    return LowRank(values * largest, array.shape[0], array.shape[1], variance * largest**2)


def _threshold(alpha: float) -> float:
    """x: a singular value counts where its square exceeds x times (long side) times (noise variance). Equation 17."""
    tau = 2.5129 * math.sqrt(alpha)
    return (1 + tau) * (1 + alpha / tau)


def _shrunk(kept: Floats, variance: float, short: int, long: int) -> Floats:
    """The posterior mean of the singular values that count (theorem 2)."""
    squared = kept**2
    centre = 1 - (short + long) * variance / squared
    inner = centre**2 - 4 * short * long * variance**2 / squared**2
    return np.asarray(kept / 2 * (centre + np.sqrt(np.maximum(inner, 0.0))), dtype=np.float64)


def _noise_variance(spectrum: Floats, short: int, long: int) -> float:
    """The variance of least free energy inside the bounds of corollary 2."""
    alpha = short / long
    last = min(math.ceil(short / (1 + alpha)) - 1, short) - 1
    tail = spectrum[last + 1 :]
    high = float(np.sum(spectrum**2)) / (short * long)
    low = max(float(tail[0] ** 2) / (long * _threshold(alpha)), float(np.mean(tail**2)) / long)
    if not low < high:
        return high
    tried = np.geomspace(low, high, _GRID)
    energies = _free_energy(tried, spectrum, short, long)
    at = int(np.argmin(energies))
    return _refined(float(tried[max(at - 1, 0)]), float(tried[min(at + 1, _GRID - 1)]), spectrum, short, long)


def _refined(low: float, high: float, spectrum: Floats, short: int, long: int) -> float:
    """The minimum inside one valley; brackets shrink by a fixed rule, so that equal input gives equal bits."""
    from scipy.optimize import minimize_scalar

    def energy(log_variance: float) -> float:
        return float(_free_energy(np.asarray([math.exp(log_variance)]), spectrum, short, long)[0])

    bounds = (math.log(low), math.log(high))
    found = minimize_scalar(energy, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return math.exp(float(found.x))


def _free_energy(variances: Floats, spectrum: Floats, short: int, long: int) -> Floats:
    """Free energy (V,) of noise variances (V,), up to a constant and a factor (equation 20)."""
    alpha = short / long
    scaled = spectrum**2 / (long * variances[:, None])
    counts = scaled > _threshold(alpha)
    # Below the threshold the root has no real value; those entries take the other branch.
    above = np.where(counts, scaled, _threshold(alpha))
    rest = above - (1 + alpha)
    tau = 0.5 * (rest + np.sqrt(np.maximum(rest**2 - 4 * alpha, 0.0)))
    signal = above - tau + np.log((tau + 1) / above) + alpha * np.log(tau / alpha + 1)
    return np.asarray(np.where(counts, signal, scaled - np.log(scaled)).sum(axis=1), dtype=np.float64)
