"""Several short visits to a network, minutes apart, made into one number.

Readings taken in a row agree with each other better than with the truth. Two things move them together, and more rounds
help against neither: where a session happens to find its memory (some 5 % on shared machines, anew each time a network
is loaded), and what the canary does not feel of the machine's moods (some 4 %, for seconds at a time, all networks
alike). So a network is loaded and timed several times, briefly, in different steps of the campaign, and the steps'
common errors are taken out by the two-way model

    log(ms of network n in step s) = network_n + step_s

fitted robustly; each step shares its networks with several others, so the steps are tied together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.table import NetworkSample

#: A step's common error is held towards 0 by as much as this many visits would.
_STEP_PRIOR = 4.0
#: Residuals beyond this many typical ones count linearly.
_HUBER = 2.0
_SMALLEST_MS = 1e-5


@dataclass(frozen=True)
class Network:
    """A network of the plan that was timed: identity, family and the kernels it became."""

    id: str
    source: str
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Visit:
    """One short timing.

    Attributes:
        network: its id.
        step: when it was: visits of one step were interleaved with each other.
        measured_ms: at reference speed; raw_p50_ms, raw_p90_ms: as the clock saw them.
        spread: relative half-width of the visit's own interval; rounds: kept ones; seconds: what it cost.
        shares: of the network's nodes, in order, summing to 1.
    """

    network: str
    step: str
    measured_ms: float
    raw_p50_ms: float
    raw_p90_ms: float
    spread: float
    rounds: int
    seconds: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Combined:
    """All visits together.

    Attributes:
        samples: one a network, sorted by id.
        retest: p95 of the relative difference between two such campaigns on the same network; None where networks were
            visited once only.
    """

    samples: tuple[NetworkSample, ...]
    retest: float | None


def combine(networks: Mapping[str, Network], visits: Sequence[Visit]) -> Combined:
    """One sample a network from all its visits.

    Args:
        networks: by id.
        visits: in any order; the result does not depend on it.
    """
    ordered = sorted(visits, key=lambda v: (v.network, v.step, v.measured_ms))
    if not ordered:
        return Combined((), None)
    names, network = np.unique([v.network for v in ordered], return_inverse=True)
    step = np.unique([v.step for v in ordered], return_inverse=True)[1]
    log_ms = np.log([v.measured_ms for v in ordered])
    level, left = two_way(log_ms, network, step)
    count = np.bincount(network)
    scatter = _scatter(left, network, count)
    # A network's own scatter is worth little with so few visits: it is mixed with everybody's.
    own = np.bincount(network, left**2)
    error = np.sqrt((own + 3 * scatter**2) / (np.maximum(count - 1, 0) + 3)) / np.sqrt(count)
    mine: list[list[Visit]] = [[] for _ in names]
    for index, visit in zip(network, ordered, strict=True):
        mine[index].append(visit)
    samples = tuple(
        _sample(networks[str(name)], mine[n], float(np.exp(level[n])), float(1.96 * error[n]))
        for n, name in enumerate(names)
    )
    return Combined(samples, _retest(left, network, count))


def two_way(log_ms: np.ndarray, network: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Robust additive fit.

    Args:
        log_ms: (V,); network, step: numbers from 0, (V,).

    Returns:
        (level of each network, (N,); residual of each visit, (V,)). Steps' errors are 0 on average.
    """
    weight = np.ones(len(log_ms))
    drift = np.zeros(int(step.max()) + 1)
    level = np.zeros(int(network.max()) + 1)
    for _ in range(40):
        level = np.bincount(network, weight * (log_ms - drift[step])) / np.bincount(network, weight)
        off = weight * (log_ms - level[network])
        drift = np.bincount(step, off) / (np.bincount(step, weight) + _STEP_PRIOR)
        drift -= np.average(drift, weights=np.bincount(step))
        left = log_ms - level[network] - drift[step]
        typical = max(1.48 * float(np.median(np.abs(left))), 1e-9)
        weight = 1 / np.maximum(1, np.abs(left) / (_HUBER * typical))
    level = np.bincount(network, weight * (log_ms - drift[step])) / np.bincount(network, weight)
    return level, log_ms - level[network] - drift[step]


def _scatter(left: np.ndarray, network: np.ndarray, count: np.ndarray) -> float:
    """Standard deviation of a visit around its network, robustly, over all networks with two visits or more."""
    often = count[network] > 1
    if not often.any():
        return 0.05
    unbias = np.sqrt(count / np.maximum(count - 1, 1))[network[often]]
    return float(1.48 * np.median(np.abs(left[often]) * unbias))


def _retest(left: np.ndarray, network: np.ndarray, count: np.ndarray) -> float | None:
    """p95 of test against retest, from the halves of the visits to each network that has several."""
    differences, usual = [], float(np.median(count))
    for index in np.flatnonzero(count >= 2):
        own = left[network == index]
        half = len(own) // 2
        # Means of ``half`` visits differ by more than those of as many as a network usually gets.
        differences.append(abs(own[:half].mean() - own[half : 2 * half].mean()) * np.sqrt(half / usual))
    return float(np.percentile(differences, 95)) if len(differences) >= 10 else None


def _sample(network: Network, visits: Sequence[Visit], measured_ms: float, spread: float) -> NetworkSample:
    shares = np.mean([visit.shares for visit in visits], axis=0)
    spread = max(spread, visits[0].spread) if len(visits) == 1 else spread
    return NetworkSample(
        id=network.id,
        source=network.source,
        kernels=network.kernels,
        node_ms=tuple(_rounded(max(float(share) * measured_ms, _SMALLEST_MS)) for share in shares / shares.sum()),
        measured_ms=_rounded(measured_ms),
        raw_p50_ms=_rounded(float(np.median([visit.raw_p50_ms for visit in visits]))),
        raw_p90_ms=_rounded(float(np.median([visit.raw_p90_ms for visit in visits]))),
        spread=_rounded(min(spread, 1.0)),
        rounds=sum(visit.rounds for visit in visits),
        seconds=_rounded(sum(visit.seconds for visit in visits)),
    )


def _rounded(value: float) -> float:
    """Six significant digits: far finer than any measurement, and short in a CSV file."""
    return float(f"{value:.6g}")
