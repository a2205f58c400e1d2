"""Cross-validation by whole networks: what the predictor says about networks that it has not seen.

Two splits: random networks held out (what to expect of a model whose space was profiled), and whole source families
held out (what to expect of anything else). Kernels of one network never stand on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from hwsearch.device.stopwatch import COARSE_SPREAD
from hwsearch.latency.boosting import BoostSettings, row_trust
from hwsearch.latency.corrections import KINDS, TREES, choose
from hwsearch.latency.interval import Profiled
from hwsearch.latency.model import KernelModel
from hwsearch.latency.training import Rows

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """Networks from kernels: ``ms = x (1 + d log(1 + x))`` with ``x = a * sum of kernel ms + b * nodes + c``.

    ``d`` is for long networks: short disturbances, which a short network's fastest runs miss, they cannot dodge.
    """

    a: float
    b: float
    c: float
    d: float = 0.0

    @classmethod
    def fit(cls, total_ms: np.ndarray, nodes: np.ndarray, measured_ms: np.ndarray, overhead_ms: float) -> Calibration:
        """Robust least squares on relative errors, held towards (1, 0, ``overhead_ms``, 0); ``d`` is not negative.

        Args:
            total_ms: sums of kernels predicted *out of fold*, (M,).
            nodes, measured_ms: of each network, (M,).
            overhead_ms: the base's overhead of a network.
        """
        start = np.array([1.0, 0.0, overhead_ms, 0.0])
        if len(total_ms) < 8:
            return cls(*map(float, start))
        columns = [total_ms, nodes, np.ones(len(nodes)), total_ms * np.log1p(total_ms)]
        design = np.stack(columns, axis=1) / measured_ms[:, None]
        # A prior worth a few networks: 0.1 of a, a microsecond of b, ten microseconds of c, 0.03 of d.
        prior = np.diag([1 / 0.1, 1 / 1e-3, 1 / 1e-2, 1 / 0.03]) * 0.1
        for used in (4, 3):
            trust = np.ones(len(nodes))
            change = np.zeros(used)
            for _ in range(5):
                left = np.vstack([design[:, :used] * trust[:, None], prior[:used, :used]])
                right = np.concatenate([(1 - design @ start) * trust, np.zeros(used)])
                change = np.linalg.lstsq(left, right, rcond=None)[0]
                residual = np.abs(1 - design @ start - design[:, :used] @ change)
                trust = np.sqrt(1 / np.maximum(1, residual / 0.05))
            found = start.copy()
            found[:used] += change
            if found[3] >= 0:
                break
        a, b, c, d = map(float, found)
        return cls(a, b, max(c, 0.0), max(d, 0.0))

    def stretch(self, ms: np.ndarray) -> np.ndarray:
        """Milliseconds of networks, (M,), from the sum of their kernels and overhead, (M,)."""
        return np.asarray(ms * (1 + self.d * np.log1p(np.maximum(ms, 0.0))))

    def apply(self, total_ms: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Milliseconds of networks, (M,)."""
        return self.stretch(np.maximum(self.a * total_ms + self.b * nodes + self.c, 1e-4))


@dataclass(frozen=True)
class OutOfFold:
    """Predictions for networks whose fold was held out. Shapes: M networks, R kernel rows.

    Attributes:
        fold: fold of each network, (M,).
        predicted_ms: calibrated on the other folds, (M,).
        total_ms: the sum of kernels, (M,); overhead_ms: of the model that predicted each, (M,).
        measured_ms: (M,).
        kernel_ms: of each row, (R,).
        kernel_seen_ms: what the profiler would have shown of it, (R,), to be compared with ...
        kernel_observed_ms: what it showed, (R,).
        novelty: of each network against the kernels of the other folds, (M,), see ``interval.py``.
        steady: whether each network was timed at the device's reference speed, (M,).
        kinds: what corrects each family's base, as ``corrections.choose`` found on these very rows.
    """

    fold: np.ndarray
    predicted_ms: np.ndarray
    total_ms: np.ndarray
    overhead_ms: np.ndarray
    measured_ms: np.ndarray
    kernel_ms: np.ndarray
    kernel_seen_ms: np.ndarray
    kernel_observed_ms: np.ndarray
    novelty: np.ndarray
    steady: np.ndarray
    kinds: Mapping[str, str]

    @property
    def log_error(self) -> np.ndarray:
        """log(measured / predicted) of each network, (M,)."""
        return np.asarray(np.log(self.measured_ms / self.predicted_ms))


def random_folds(networks: int, folds: int, seed: int) -> np.ndarray:
    """A fold for each network, (M,), of nearly equal sizes."""
    return np.asarray(np.random.default_rng([seed, networks]).permutation(networks) % max(1, min(folds, networks)))


def source_folds(rows: Rows) -> np.ndarray:
    """A fold for each source family, (M,)."""
    return np.asarray(np.unique(rows.source, return_inverse=True)[1])


def out_of_fold(
    rows: Rows,
    fold: np.ndarray,
    settings: BoostSettings,
    progress: Progress | None = None,
    title: str = "cross-validation",
    kinds: Mapping[str, str] | None = None,
) -> OutOfFold:
    """Fit once a fold, on all others, and predict it.

    Args:
        rows: the table.
        fold: fold of each network, (M,); with a single fold nothing can be held out and it predicts itself.
        settings: of the trees.
        progress: told (folds done, folds, message).
        title: begins the message.
        kinds: what corrects each family's base; None compares all kinds and takes the best for each family.
    """
    networks, count = len(fold), int(fold.max()) + 1
    overhead, novelty = np.zeros(networks), np.zeros(networks)
    kernel, profiler, observed, further = (np.zeros(len(rows.kernel)) for _ in range(4))
    by_kind = {kind: np.zeros(len(rows.kernel)) for kind in KINDS}
    for number in range(count):
        if progress is not None:
            progress(number, count, f"{title}: fold {number + 1} of {count}")
        held = fold == number if count > 1 else np.ones(networks, dtype=bool)
        rest = rows.only(~held) if count > 1 else rows
        model = KernelModel.fit(rest, settings, kinds)
        own = held[rows.network]
        further[own] = (model.context_ms(rows.network_mb)[rows.network] * rows.weight_mb[rows.kernel])[own]
        if kinds is None:
            for kind, ms in model.alternatives(rest, rows.only(held)).items():
                by_kind[kind][own] = ms
            kernel[own] = by_kind[TREES][own]
        else:
            kernel[own] = model.row_ms(rows)[rows.kernel][own]
        profiler[own] = model.profiler_ms
        observed[own] = rows.observed_ms(model.profiler_ms, model.overhead_ms)[own]
        overhead[held] = model.overhead_ms
        novelty[held] = _novelty(rows, ~held if count > 1 else held, kernel + further)[held]
    chosen = dict(kinds or {})
    if kinds is None:
        trust = row_trust(rows.share, rows.nodes, rows.network)
        families = np.array([k.family for k in rows.kernels], dtype=object)[rows.kernel]
        for family in sorted(set(families)):
            mine = families == family
            errors = {
                kind: np.abs(np.log((ms + further + profiler)[mine] / observed[mine])) for kind, ms in by_kind.items()
            }
            chosen[family] = choose(errors, trust[mine])
            kernel[mine] = by_kind[chosen[family]][mine]
    kernel += further
    seen = kernel + profiler
    total = np.bincount(rows.network, kernel, minlength=networks)
    predicted = np.zeros(networks)
    for number in range(count):
        held = fold == number
        rest = ~held if count > 1 else held
        calibration = Calibration.fit(total[rest], rows.nodes[rest], rows.measured_ms[rest], float(np.median(overhead)))
        predicted[held] = calibration.apply(total[held], rows.nodes[held])
    steady = rows.spread < COARSE_SPREAD
    return OutOfFold(
        fold, predicted, total, overhead, rows.measured_ms, kernel, seen, observed, novelty, steady, chosen
    )  # fmt: skip


def _novelty(rows: Rows, training: np.ndarray, kernel_ms: np.ndarray) -> np.ndarray:
    """Novelty of each network, (M,), against the kernels of the ``training`` ones (a mask (M,))."""
    known = Profiled.of([rows.kernels[index] for index in np.unique(rows.kernel[training[rows.network]])])
    each = known.novelty(rows.kernels)[rows.kernel]
    networks = len(rows.nodes)
    weight = np.bincount(rows.network, kernel_ms, minlength=networks)
    return np.asarray(np.bincount(rows.network, kernel_ms * each, minlength=networks) / np.maximum(weight, 1e-12))
