"""From other devices' prices of a kernel to a new device's: rates of its parts, fitted on a few networks.

A predictor of another device says three things of a kernel: how much arithmetic it is, how many bytes it moves, what a
start costs (its analytic base, split by ``PARTS``), and how far its trees found such kernels to be off that formula.
The first three are rates of that device, the last is mostly the software's doing and carries over. So::

    ms_new(kernel) = sum over sources and parts of rate[source, part, family] * part_ms(source, kernel)

with the trees' factor inside ``part_ms``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.features import TERMS, cost_terms
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.latency.training import Rows

#: What a kernel's time is made of, as far as another device's rates are concerned.
PARTS = ("dispatch", "bytes", "arithmetic")
_PART_OF = np.array([0 if name == "one" else 1 if name.startswith("bytes") else 2 for name in TERMS])

#: Relative errors that a kernel's share and a network's total are met with; residuals beyond twice that count linearly.
_KERNEL_ERROR, _NETWORK_ERROR, _HUBER = 0.15, 0.03, 2.0
#: How far a part's rate may lie from "as much slower all over", and a family's from its part's (relative, one sigma).
_RATE_SCATTER, _FAMILY_SCATTER = 2.0, 0.3
_SMALLEST_MS = 2e-4


@dataclass(frozen=True)
class DeviceMap:
    """From other devices' prices to a new device's.

    Attributes:
        rates: ms of the new device per ms of each part of each source, (S, 3).
        families: the same for the kernels of a family, which may differ, (S, 3) each.
        overhead_ms: what a whole network takes beyond its kernels.
    """

    rates: np.ndarray
    families: Mapping[str, np.ndarray]
    overhead_ms: float

    def of(self, kernels: Sequence[Kernel]) -> np.ndarray:
        """Rates of each kernel, (N, S, 3)."""
        found = [self.families.get(kernel.family, self.rates) for kernel in kernels]
        return np.array(found).reshape(len(kernels), *self.rates.shape)

    def ms(self, kernels: Sequence[Kernel], parts: np.ndarray) -> np.ndarray:
        """Milliseconds of kernels, (N,), from their parts on each source, (N, S, 3)."""
        return np.asarray(np.maximum((self.of(kernels) * parts).sum(axis=(1, 2)), _SMALLEST_MS))


def parts_ms(source: LatencyPredictor, kernels: Sequence[Kernel]) -> np.ndarray:
    """A kernel's milliseconds on another device by ``PARTS``, (N, 3); they sum to its price, its weights at hand.

    Args:
        source: the other device's predictor.
        kernels: N kernels, of whatever device.
    """
    if not kernels:
        return np.zeros((0, len(PARTS)))
    model = source.model_
    terms = cost_terms(kernels, model.vocabulary)
    each = np.array([model.base.weights[model.base.group(kernel)] for kernel in kernels]) * terms
    split = np.stack([each[:, part == _PART_OF].sum(axis=1) for part in range(len(PARTS))], axis=1)
    whole = split.sum(axis=1)
    # Where the base knows nothing (all weights 0) the price counts as dispatch.
    split[whole <= 0, 0] = 1.0
    price = source.calibration_.a * model.ms(kernels)
    return np.asarray(split / split.sum(axis=1, keepdims=True) * price[:, None])


def network_parts(sources: Sequence[LatencyPredictor], rows: Rows) -> np.ndarray:
    """Parts of each kernel row on each source, (R, S, 3); what weights cost beyond the caches counts as bytes."""
    columns = []
    for source in sources:
        own = parts_ms(source, rows.kernels)[rows.kernel]
        further = source.calibration_.a * source.model_.context_ms(rows.network_mb)
        own[:, 1] += further[rows.network] * rows.weight_mb[rows.kernel]
        columns.append(own)
    return np.stack(columns, axis=1)


def fit_map(rows: Rows, parts: np.ndarray, profiler_ms: float = 0.0) -> DeviceMap:
    """Rates from the networks that were timed: non-negative least squares on relative errors, with Gaussian priors.

    Args:
        rows: them.
        parts: of each kernel row on each source, (R, S, 3).
        profiler_ms: what the runtime's profiler adds to every node.
    """
    networks, (count, sources, _) = len(rows.measured_ms), parts.shape
    width = sources * len(PARTS)
    flat = parts.reshape(count, width)
    names, family = np.unique([kernel.family for kernel in rows.kernels], return_inverse=True)
    family = family[rows.kernel]
    # Unknowns: the rates of each family, the common rates, the overhead.
    kernels = np.zeros((count, (len(names) + 1) * width + 1))
    for number in range(len(names)):
        own = family == number
        kernels[own, number * width : (number + 1) * width] = flat[own]
    sums = np.stack([np.bincount(rows.network, column, minlength=networks) for column in kernels.T], axis=1)
    sums[:, -1] = 1.0
    common = float(np.median(rows.measured_ms / np.maximum(sums[:, :-1].sum(axis=1) / sources, 1e-9))) / sources
    observed = rows.observed_ms(profiler_ms)
    weight = np.sqrt(np.clip(rows.share * rows.nodes[rows.network], 0.1, 3.0)) / _KERNEL_ERROR
    rates = np.eye(kernels.shape[1])
    tied = rates[: len(names) * width] - np.tile(rates[-1 - width : -1], (len(names), 1))
    start_ms = 0.05 * float(rows.measured_ms.min())
    left = np.vstack(
        [
            kernels * (weight / observed)[:, None],
            sums / rows.measured_ms[:, None] / _NETWORK_ERROR,
            tied / common / _FAMILY_SCATTER,
            rates[-1 - width : -1] / common / _RATE_SCATTER,
            rates[-1:] / start_ms,
        ]
    )
    right = np.concatenate(
        [
            weight * (1 - profiler_ms / observed),
            np.full(networks, 1 / _NETWORK_ERROR),
            np.zeros(len(tied)),
            np.full(width, 1 / _RATE_SCATTER),
            np.zeros(1),
        ]
    )
    limit = np.full(len(right), np.inf)
    limit[: count + networks] = _HUBER
    solution = _robust_nnls(left, right, limit, np.append(np.full(kernels.shape[1] - 1, common), start_ms))
    found = solution[:-1].reshape(len(names) + 1, sources, len(PARTS))
    return DeviceMap(found[-1], dict(zip(map(str, names), found[:-1], strict=True)), float(solution[-1]))


def _robust_nnls(left: np.ndarray, right: np.ndarray, limit: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """min ||left x - right||^2 over x >= 0, residuals beyond ``limit`` damped; ``scale``: x's typical size."""
    from scipy.optimize import nnls

    trust = np.ones(len(right))
    solution = scale
    for _ in range(4):
        design = left * trust[:, None] * scale
        # Normal equations: there are many more kernels than unknowns.
        factor = np.linalg.cholesky(design.T @ design + 1e-9 * np.eye(len(scale)))
        target = np.linalg.solve(factor, design.T @ (right * trust))
        solution = nnls(factor.T, target, maxiter=50 * len(scale))[0] * scale
        trust = np.sqrt(1 / np.maximum(1, np.abs(right - left @ solution) / limit))
    return np.asarray(solution)
