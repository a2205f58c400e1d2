"""Latencies of a space's architectures on a new device, from a handful of them and what other devices' columns say.

For spaces whose architectures are known by a description only (NAS-Bench-201, FBNet): no kernels, no runtime, one
latency an architecture. Each device's latencies are a draw of a Gaussian process over the descriptions,

    f_device ~ GP(0, amplitude * (offset + C + K_features + noise))

``K_features`` is a weighted sum of a linear and a squared-exponential kernel for each group of features; its weights
are fitted to every source device by itself (type-II maximum likelihood, Rasmussen and Williams, ch. 5), and ``C`` is
the second moment of all sources' fitted functions: what devices have in common. A new device may resemble any of the
sources in its ways (its kernel weights and its noise). Each is a hypothesis; its posterior weight is its evidence under
the few samples (Bayesian model averaging, Hoeting et al. 1999).

Example:
    >>> rng = np.random.default_rng(0)
    >>> counts = rng.integers(0, 4, (60, 2)).astype(float)
    >>> sources = np.stack([1 + counts @ [3, 1], 2 + counts @ [1, 2], 1 + counts @ [2, 2]])
    >>> space = ArchitectureTransfer.learn([counts], sources)
    >>> new = 5 + counts @ [4, 1]
    >>> picked = space.choose(5)
    >>> found = space.fit(picked, new[picked]).predict()
    >>> bool(np.abs(found.ms / new - 1).max() < 0.1)
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hwsearch.errors import InputError
from hwsearch.latency.transfer_sampler import choose_rows

#: Kernel weights are fitted on so many architectures of a source, its function on all of them.
_FITTED_ON = 400
_OFFSET = 10.0
_JITTER = 1e-8
#: The weight of C: how closely a new device follows what the sources have in common.
_SPREAD = 3.0
#: A device is met as so many times noisier than the source that it resembles: it resembles it only in part.
_NOISIER = 10.0
_CLIPPED = 0.01
#: The choice of samples looks at this many architectures, and at this many directions of the prior among them.
_POPULATION, _LANDMARKS, _DIRECTIONS = 500, 300, 60


@dataclass(frozen=True)
class ArchitectureLatency:
    """Predictions: milliseconds and an interval, each (M,)."""

    ms: np.ndarray
    low_ms: np.ndarray
    high_ms: np.ndarray


@dataclass(frozen=True)
class ArchitectureTransfer:
    """What the sources taught.

    Attributes:
        groups: standardised features, each (N, D).
        weights: kernel weights of each source, linear and squared-exponential per group, then its noise, (S, 2G + 1).
        functions: each source's fitted function, standardised, (S, N).
        common: indices of architectures that are neither among the fastest nor the slowest tenth on the sources.
    """

    groups: tuple[np.ndarray, ...]
    weights: np.ndarray
    functions: np.ndarray
    common: np.ndarray

    @classmethod
    def learn(cls, groups: Sequence[np.ndarray], source_ms: np.ndarray) -> ArchitectureTransfer:
        """Fits every source; seconds a source for a thousand of its latencies.

        Args:
            groups: features of all N architectures, arrays (N, D); what belongs together (counts of operations, choices
                at each place) shares an array.
            source_ms: latencies on other devices, (S, N), NaN where nothing was measured.

        Raises:
            InputError: shapes that do not fit, a latency that is none, a source with too few.
        """
        source_ms = np.atleast_2d(np.asarray(source_ms, dtype=np.float64))
        _check(groups, source_ms)
        standard = tuple(_standardised(group) for group in groups)
        weights, functions = [], []
        for ms in source_ms:
            own = np.flatnonzero(np.isfinite(ms))
            # A few architectures may be degenerate (a network that is cut in two takes no time): they are pulled in.
            y = np.clip(ms[own], *np.quantile(ms[own], [_CLIPPED, 1 - _CLIPPED]))
            target = (y - y.mean()) / max(float(y.std()), 1e-12)
            some = np.linspace(0, len(own) - 1, min(_FITTED_ON, len(own))).astype(int)
            found = _fit_weights(standard, own[some], target[some])
            gram = _kernel(standard, found, own, own) + _OFFSET + np.eye(len(own)) * (found[-1] + _JITTER)
            alpha = np.linalg.solve(gram, target)
            every = np.arange(source_ms.shape[1])
            function = np.concatenate(
                [(_kernel(standard, found, part, own) + _OFFSET) @ alpha for part in np.array_split(every, 8)]
            )
            weights.append(found)
            functions.append(_standardised(function[:, None])[:, 0])
        ranks = np.mean(np.argsort(np.argsort(functions, axis=1), axis=1), axis=0)
        low, high = np.quantile(ranks, [0.1, 0.9])
        common = np.flatnonzero((ranks >= low) & (ranks <= high))
        return cls(standard, np.array(weights), np.array(functions), common)

    def choose(self, count: int, *, candidates: np.ndarray | None = None, seed: int | None = None) -> np.ndarray:
        """Which architectures to time on a new device, (count,) indices, the most telling one first.

        Args:
            count: how many.
            candidates: indices to choose from; None is all that are ``common``.
            seed: None for the best ones; a seed varies the choice.

        Raises:
            InputError: fewer candidates than asked for.
        """
        rows = self.common if candidates is None else np.asarray(candidates, dtype=np.int64)
        population = np.random.default_rng(0).permutation(self.common)[:_POPULATION]
        every = np.unique(np.concatenate([rows, population]))
        weights = self.weights.mean(axis=0)

        def prior(left: np.ndarray, right: np.ndarray) -> np.ndarray:
            return np.asarray(_kernel(self.groups, weights, left, right) + 1.0 + self._shared(left, right))

        # Nystroem: the directions of the prior that a few hundred architectures span.
        marks = population[:_LANDMARKS]
        values, vectors = np.linalg.eigh(prior(marks, marks))
        top = np.argsort(-values)[:_DIRECTIONS]
        factors = prior(every, marks) @ (vectors[:, top] / np.sqrt(np.maximum(values[top], 1e-9)))
        noise = float(np.median(self.weights[:, -1]))
        picked = choose_rows(
            factors,
            count,
            candidates=np.searchsorted(every, rows),
            population=np.searchsorted(every, population),
            noise=noise,
            seed=seed,
        )
        return np.asarray(every[picked])

    def fit(self, index: np.ndarray, ms: np.ndarray) -> ArchitectureFit:
        """The new device from its samples.

        Args:
            index: architectures that were timed, (k,), each once, 3 or more.
            ms: their latencies, (k,).

        Raises:
            InputError: too few, one twice, or a latency that is none.
        """
        index, ms = np.asarray(index, dtype=np.int64), np.asarray(ms, dtype=np.float64)
        if index.ndim != 1 or index.shape != ms.shape or len(index) < 3 or len(set(index.tolist())) != len(index):
            raise InputError(f"{index.size} indices and {ms.size} latencies; give 3 or more, all different")
        if not (np.isfinite(ms).all() and (ms > 0).all()):
            raise InputError(f"latency {ms[~(np.isfinite(ms) & (ms > 0))][0]} is no positive number; time it again")
        scale = float(ms.mean())
        shared = self._shared(index, index)
        found = []
        for weights in self.weights:
            gram = _kernel(self.groups, weights, index, index) + shared + _OFFSET
            gram += np.eye(len(ms)) * (_NOISIER * weights[-1] + _JITTER)
            found.append(_Hypothesis.of(weights, gram, ms / scale - 1))
        evidence = np.array([hypothesis.evidence for hypothesis in found])
        posterior = np.exp(evidence - evidence.max())
        return ArchitectureFit(self, index, scale, tuple(found), posterior / posterior.sum())

    def _shared(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """C: second moment of the sources' functions."""
        return np.asarray(_SPREAD * self.functions[:, left].T @ self.functions[:, right] / len(self.functions))


@dataclass(frozen=True)
class _Hypothesis:
    """One way a device may be, and what the samples say to it."""

    weights: np.ndarray
    inverse: np.ndarray
    alpha: np.ndarray
    amplitude: float
    evidence: float

    @classmethod
    def of(cls, weights: np.ndarray, gram: np.ndarray, y: np.ndarray) -> _Hypothesis:
        inverse = np.linalg.inv(gram)
        alpha = inverse @ y
        # The amplitude is integrated out over 1 / amplitude, which leaves a Student t.
        amplitude = max(float(y @ alpha) / len(y), 1e-12)
        evidence = -0.5 * float(np.linalg.slogdet(gram)[1]) - 0.5 * len(y) * float(np.log(amplitude))
        return cls(weights, inverse, alpha, amplitude, evidence)


@dataclass(frozen=True)
class ArchitectureFit:
    """A new device, fitted on its samples.

    Attributes:
        space: what the sources taught.
        index: architectures that were timed, (k,).
        scale_ms: their mean.
        hypotheses: ways the device may be; posterior: their probabilities.
    """

    space: ArchitectureTransfer
    index: np.ndarray
    scale_ms: float
    hypotheses: tuple[_Hypothesis, ...]
    posterior: np.ndarray

    def predict(self, index: np.ndarray | None = None, level: float = 0.9) -> ArchitectureLatency:
        """Milliseconds of architectures.

        Args:
            index: which, (M,); None is all.
            level: probability that a measurement lies in the interval, in (0, 1).

        Raises:
            InputError: a level outside (0, 1).
        """
        from scipy import stats

        if not 0 < level < 1:
            raise InputError(f"interval level is {level!r}; use a number between 0 and 1, such as 0.9")
        rows = np.arange(self.space.functions.shape[1]) if index is None else np.asarray(index, dtype=np.int64)
        mean, square = np.zeros(len(rows)), np.zeros(len(rows))
        shared = self.space._shared(rows, self.index)
        prior_shared = _SPREAD * (self.space.functions[:, rows] ** 2).mean(axis=0)
        for hypothesis, probability in zip(self.hypotheses, self.posterior, strict=True):
            if probability < 1e-4:
                continue
            weights = hypothesis.weights
            block = _kernel(self.space.groups, weights, rows, self.index) + shared + _OFFSET
            noise = _NOISIER * weights[-1]
            prior = _diagonal(self.space.groups, weights, rows) + prior_shared + _OFFSET + noise
            left = np.maximum(prior - ((block @ hypothesis.inverse) * block).sum(axis=1), noise)
            value = block @ hypothesis.alpha
            mean += probability * value
            square += probability * (value**2 + hypothesis.amplitude * left)
        width = np.sqrt(np.maximum(square - mean**2, 0.0)) * stats.t.ppf(0.5 + level / 2, df=len(self.index))
        ms, least = self.scale_ms * (1 + mean), 1e-3 * self.scale_ms
        low, high = ms - self.scale_ms * width, ms + self.scale_ms * width
        return ArchitectureLatency(np.maximum(ms, least), np.maximum(low, least), np.maximum(high, least))


def _check(groups: Sequence[np.ndarray], source_ms: np.ndarray) -> None:
    if not groups or any(group.ndim != 2 or len(group) != source_ms.shape[1] for group in groups):
        shapes = [group.shape for group in groups]
        raise InputError(f"features {shapes} and latencies {source_ms.shape}; give arrays (N, D) and (S, N) of one N")
    for number, ms in enumerate(source_ms):
        known = ms[np.isfinite(ms)]
        if len(known) < 20 or not (known > 0).all():
            raise InputError(
                f"source {number} has {len(known)} latencies, the smallest {known.min(initial=np.inf):g}; give 20 or"
                " more positive ones"
            )


def _standardised(values: np.ndarray) -> np.ndarray:
    scale = values.std(axis=0)
    return np.asarray((values - values.mean(axis=0)) / np.where(scale > 0, scale, 1.0))


def _kernel(groups: Sequence[np.ndarray], weights: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """K_features between two sets of architectures, (L, R)."""
    total = np.zeros((len(left), len(right)))
    for number, (linear, smooth) in enumerate(_blocks(groups, left, right)):
        total += weights[2 * number] * linear + weights[2 * number + 1] * smooth
    return total


def _blocks(groups: Sequence[np.ndarray], left: np.ndarray, right: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Linear and squared-exponential kernel of each group, with a length scale of 1.5 typical distances."""
    found = []
    for group in groups:
        a, b = group[left] / np.sqrt(group.shape[1]), group[right] / np.sqrt(group.shape[1])
        linear = a @ b.T
        apart = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * linear
        found.append((linear, np.exp(-0.5 * np.maximum(apart, 0) / 1.5**2)))
    return found


def _diagonal(groups: Sequence[np.ndarray], weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    linear = np.stack([(group[rows] ** 2).mean(axis=1) for group in groups])
    return np.asarray(weights[:-1:2] @ linear + weights[1:-1:2].sum())


def _fit_weights(groups: Sequence[np.ndarray], rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Kernel weights and noise of largest evidence, by coordinate ascent in their logarithms."""
    kernels = [kernel for pair in _blocks(groups, rows, rows) for kernel in pair]

    def evidence(logs: np.ndarray) -> float:
        weights = np.exp(logs)
        gram = np.full_like(kernels[0], _OFFSET)
        for weight, kernel in zip(weights[:-1], kernels, strict=True):
            gram += weight * kernel
        gram[np.diag_indices(len(rows))] += weights[-1] + _JITTER
        factor = np.linalg.cholesky(gram)
        white = np.linalg.solve(factor, target)
        return float(-np.log(np.diag(factor)).sum() - 0.5 * len(rows) * np.log(white @ white / len(rows)))

    logs = np.log(np.array([0.3, 0.03] * len(groups) + [0.05]))
    best = evidence(logs)
    for step in (2.5, 1.0):
        for place in range(len(logs)):
            for sign in (step, -step):
                while True:
                    tried = logs.copy()
                    tried[place] += sign
                    value = evidence(tried) if abs(tried[place]) < 14 else -np.inf
                    if value <= best + 0.3:
                        break
                    logs, best = tried, value
    weights = np.exp(logs)
    # One unit of variance: amplitudes are the device's own.
    return np.asarray(weights / weights[:-1].sum())
