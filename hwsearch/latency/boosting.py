"""Gradient boosting of all kernel families together, on two things at once: kernels' shares and networks' totals.

Each family has its own XGBoost model of log(ms / base). They are grown in turn, a tree each a round, under the loss::

    sum_i w_i/2 (log(ms_i + x_i + p) - log(observed_i))^2
    + r sum_n W_n/2 (log(sum_{i in n} (ms_i + x_i) + c) - log(measured_n))^2

``p`` is what the profiler adds to a node, ``c`` a network's overhead, ``x`` what a kernel's weights cost in a network
of so many, all three known from the base; ``r`` is the number of kernels per network (so that both sums
weigh the same). Shares are noisy, biased and integers of microseconds; totals are none of that. The second-order term
of a network's part is its share-weighted upper bound (Jensen), so every round goes down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_KERNEL_LIMIT, _NETWORK_LIMIT = 0.5, 0.3  # residuals beyond count linearly
_BASE_SPREAD = 0.03


@dataclass(frozen=True)
class BoostSettings:
    """Hyper-parameters of the trees; see ``LatencyPredictor``."""

    rounds: int = 60
    learning_rate: float = 0.15
    max_depth: int = 5
    min_child_weight: float = 5.0
    l2: float = 1.0
    subsample: float = 0.8
    column_sample: float = 0.5
    network_weight: float = 1.0
    seed: int = 0

    def parameters(self) -> dict[str, Any]:
        """XGBoost's own names; one thread and a fixed seed, so that equal tables give equal models."""
        return {
            "tree_method": "hist", "max_bin": 128, "nthread": 1, "base_score": 0.0, "seed": self.seed,
            "eta": self.learning_rate, "max_depth": self.max_depth, "min_child_weight": self.min_child_weight,
            "reg_lambda": self.l2, "subsample": self.subsample, "colsample_bytree": self.column_sample,
            "disable_default_eval_metric": True,
        }  # fmt: skip


@dataclass(frozen=True)
class BoostData:
    """What is fitted: R kernel rows in M networks.

    Attributes:
        members: rows of each family that gets a model.
        features: (R, F) float32.
        log_base: log of the analytic base in ms, (R,).
        context_ms: x of the module's formula, (R,).
        observed_ms: as the profiler saw it, (R,).
        network: network of each row, (R,).
        measured_ms, spread, nodes: of each network, (M,).
        share: share of each row, (R,).
        profiler_ms, overhead_ms: p and c of the module's formula.
    """

    members: Mapping[str, np.ndarray]
    features: np.ndarray
    log_base: np.ndarray
    context_ms: np.ndarray
    observed_ms: np.ndarray
    network: np.ndarray
    measured_ms: np.ndarray
    spread: np.ndarray
    nodes: np.ndarray
    share: np.ndarray
    profiler_ms: float
    overhead_ms: float


def row_trust(share: np.ndarray, nodes: np.ndarray, network: np.ndarray) -> np.ndarray:
    """Weight of each row, (R,): what makes up a larger part of a network matters more, and is measured better."""
    return np.asarray(np.sqrt(np.clip(share * nodes[network], 0.1, 10)))


def boost(data: BoostData, settings: BoostSettings) -> dict[str, Any]:
    """One ``xgboost.Booster`` a family, predicting log(ms / base)."""
    import xgboost

    matrices = {family: xgboost.DMatrix(data.features[rows]) for family, rows in data.members.items()}
    models = {family: xgboost.Booster(settings.parameters(), [matrix]) for family, matrix in matrices.items()}
    log_observed, log_measured = np.log(data.observed_ms), np.log(data.measured_ms)
    networks = len(data.measured_ms)
    trust = row_trust(data.share, data.nodes, data.network)
    steadiness = 1 / (_BASE_SPREAD**2 + data.spread**2)
    steadiness *= settings.network_weight * len(data.network) / networks / steadiness.mean()
    ms = np.exp(data.log_base)
    totals = np.bincount(data.network, ms + data.context_ms, minlength=networks) + data.overhead_ms
    for round_number in range(settings.rounds):
        for family, rows in data.members.items():
            network = data.network[rows]
            part = ms[rows] / totals[network]
            off = np.clip(np.log(totals) - log_measured, -_NETWORK_LIMIT, _NETWORK_LIMIT)[network]
            seen = ms[rows] + data.context_ms[rows] + data.profiler_ms
            own = np.clip(np.log(seen) - log_observed[rows], -_KERNEL_LIMIT, _KERNEL_LIMIT)
            slope = ms[rows] / seen
            weight = steadiness[network]
            gradient = trust[rows] * own * slope + weight * off * part
            curvature = trust[rows] * slope**2 + weight * part + 1e-3
            models[family].boost(matrices[family], iteration=round_number, grad=gradient, hess=curvature)
            margin = models[family].predict(matrices[family], output_margin=True)
            new = np.exp(data.log_base[rows] + margin)
            totals += np.bincount(network, new - ms[rows], minlength=networks)
            ms[rows] = new
    return models
