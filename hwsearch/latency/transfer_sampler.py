"""Which few things to time on a new device: those that tell most about all the others.

What is known before anything is timed is a Gaussian prior over the latencies of everything: ``f = factors @ w`` with
``w ~ N(0, 1)``. Timing one candidate lowers the variance of all that is correlated with it; candidates are taken one
after the other, each the one that lowers the summed variance of the population most (I-optimal design; Seo et al.,
"Gaussian process regression: active data selection", IJCNN 2000, call it ALC).
"""

from __future__ import annotations

import numpy as np

from hwsearch.errors import InputError


def choose_rows(
    factors: np.ndarray,
    count: int,
    *,
    candidates: np.ndarray | None = None,
    population: np.ndarray | None = None,
    noise: float = 0.05,
    seed: int | None = None,
) -> np.ndarray:
    """Rows to measure, (count,), the most telling one first.

    Args:
        factors: prior of N latencies, (N, D): their covariance is ``factors @ factors.T``.
        count: how many.
        candidates: rows that may be chosen; None is all of them.
        population: rows whose variance counts; None is all of them.
        noise: variance of a measurement, in the same unit as the prior's variances.
        seed: None takes the best each time. With a seed each step takes one of the three best at random, so that
            repeats differ.

    Raises:
        InputError: fewer candidates than asked for.

    Example:
        >>> choose_rows(np.array([[0.1, 0.0], [1.0, 0.0], [0.0, 0.5]]), 2).tolist()
        [1, 2]
    """
    rows = np.arange(len(factors)) if candidates is None else np.asarray(candidates, dtype=np.int64)
    every = np.arange(len(factors)) if population is None else np.asarray(population, dtype=np.int64)
    if not 0 < count <= len(rows):
        raise InputError(f"{count} of {len(rows)} candidates cannot be chosen; ask for 1 to {len(rows)}")
    rng = None if seed is None else np.random.default_rng(seed)
    own, others = factors[rows].astype(np.float64), factors[every].astype(np.float64)
    gram = others.T @ others  # all that the population's summed variance needs
    left = np.ones(len(rows), dtype=bool)
    chosen: list[int] = []
    # Posterior covariance of w is I - sum of v v^T; factors are projected instead, so nothing larger than (N, D) is
    # held.
    covariance = np.eye(factors.shape[1])
    for _ in range(count):
        projected = own @ covariance
        variance = (projected * own).sum(axis=1) + noise
        gain = np.where(left, ((projected @ gram) * projected).sum(axis=1) / variance, -np.inf)
        pick = int(np.argmax(gain))
        if rng is not None:
            best = np.argsort(-gain, kind="stable")[: min(3, int(left.sum()))]
            pick = int(rng.choice(best))
        left[pick] = False
        chosen.append(int(rows[pick]))
        covariance -= np.outer(projected[pick], projected[pick]) / variance[pick]
    return np.array(chosen, dtype=np.int64)
