"""3x3 convolutions on GPUs: how cuDNN cuts them into blocks, and a model of log(ms / ideal ms) on top.

A GPU runs whole blocks on whole processors (SMs), so time rises in steps. What the blocks are follows from the
algorithm; the grids that NeuSight's tables record (Lee et al., ASPLOS 2025) show three, and ``describe`` counts the
blocks of each:

* implicit GEMM: tiles of 128 output positions x 32, 64 or 128 channels;
* fused Winograd F(2x2): one image's 8 x 16 outputs x 32 channels a block;
* non-fused Winograd F(4x4): 36 GEMMs over the 4x4 output tiles, *the batch padded to a multiple of 16*.

Which of them cuDNN takes is left to the trees.

A campaign may drift: in those tables every reading holds a further time that grows linearly with its place in the
campaign (0.4 ms from the first row to the last on the T4, several times what the smallest convolutions take).
``fit_drift`` finds it with the model, so that prices are of the kernel, not of the moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hwsearch.errors import InputError

_IMPLICIT = ((128, 32), (128, 64), (128, 128))
_WINOGRAD = ((64, 64), (128, 64), (128, 32))
_SEEDS = 2
_SETTINGS = {
    "objective": "reg:squarederror", "eta": 0.08, "max_depth": 6, "min_child_weight": 3, "subsample": 0.8,
    "colsample_bytree": 0.4, "reg_lambda": 1.0, "tree_method": "hist", "max_bin": 128, "nthread": 1,
}  # fmt: skip
_ROUNDS = 400
_QUICK_ROUNDS = 120


@dataclass(frozen=True)
class GpuSpec:
    """What a data sheet says.

    Attributes:
        flops: single-precision operations a second; bandwidth_bytes: bytes a second from memory.
        processors: streaming multiprocessors; cache_bytes: of the L2 cache.
    """

    flops: float
    bandwidth_bytes: float
    processors: int
    cache_bytes: float


@dataclass(frozen=True)
class Drift:
    """What a campaign adds to a reading: ``start_ms + slope_ms * position``, position from 0 to 1."""

    start_ms: float = 0.0
    slope_ms: float = 0.0

    def ms(self, position: np.ndarray) -> np.ndarray:
        """Added milliseconds, (N,)."""
        return np.asarray(self.start_ms + self.slope_ms * position)


def describe(shapes: np.ndarray, gpu: GpuSpec) -> tuple[np.ndarray, np.ndarray]:
    """Features and ideal milliseconds of 3x3 convolutions, stride 1, padding 1.

    Args:
        shapes: (N, 4): batch, input channels, output channels, side of the square image.
        gpu: the data sheet.

    Returns:
        (features (N, F) float64, ideal_ms (N,)): the ideal is the best algorithm's, whole waves of blocks at full rate.

    Example:
        >>> t4 = GpuSpec(8.141e12, 320e9, 40, 4 * 2**20)
        >>> features, ideal_ms = describe(np.array([[8, 64, 64, 28]]), t4)
        >>> round(float(ideal_ms[0]), 3)
        0.029
    """
    shapes = np.asarray(shapes, dtype=np.float64)
    if shapes.ndim != 2 or shapes.shape[1] != 4 or not (shapes >= 1).all():
        raise InputError(f"shapes is {shapes.shape}; give rows of batch, channels in, channels out, side")
    batch, ins, outs, side = shapes.T
    rate, bandwidth = gpu.flops / 1e3, gpu.bandwidth_bytes / 1e3  # a millisecond
    positions = batch * side**2
    work = 2 * positions * outs * ins * 9
    moved = 4 * (positions * ins + 9 * ins * outs + positions * outs)
    roof = np.maximum(work / rate, moved / bandwidth)
    columns = [*shapes.T, *(np.log(v) for v in (positions, work, moved, work / moved, roof, positions * ins,
                                                9 * ins * outs, positions * outs))]  # fmt: skip
    columns += [ins % m for m in (2, 4, 8, 16, 32)] + [outs % m for m in (2, 4, 8, 32, 64)]
    columns += [side % m for m in (2, 4, 8, 16)] + [side**2 % 4, positions % 4, batch % 16]
    ideals: list[np.ndarray] = []

    def algorithm(blocks: np.ndarray, block_work: np.ndarray, further_ms: np.ndarray | float = 0.0) -> None:
        waves = np.ceil(blocks / gpu.processors)
        ideals.append(waves * gpu.processors * block_work / rate + further_ms)
        columns.extend([np.log(blocks / gpu.processors), np.log(ideals[-1] / roof)])
        # How full the last wave is when each processor holds one, two or four blocks at once.
        columns.extend(w / np.ceil(w) for w in (blocks / (gpu.processors * at_once) for at_once in (1, 2, 4)))

    depth = np.ceil(9 * ins / 8) * 8
    for rows, cols in _IMPLICIT:
        algorithm(np.ceil(positions / rows) * np.ceil(outs / cols), rows * cols * depth * 2)
    fused = batch * np.ceil(outs / 32) * np.ceil(side / 8) * np.ceil(side / 16)
    algorithm(fused, 32 * 32 * 16 * np.ceil(ins / 8) * 8 * 2)
    tiles = np.ceil(batch / 16) * 16 * np.ceil(side / 4) ** 2
    transforms = 4 * (positions * ins + 72 * tiles * ins + 81 * ins * outs + 72 * tiles * outs + positions * outs)
    for rows, cols in _WINOGRAD:
        blocks = 36 * np.ceil(tiles / rows) * np.ceil(outs / cols)
        algorithm(blocks, rows * cols * np.ceil(ins / 8) * 8 * 2, transforms / bandwidth)
    columns += [side**2 / (np.ceil(side / 8) * 8 * np.ceil(side / 16) * 16), outs / (np.ceil(outs / 32) * 32)]
    columns += [np.log(transforms / bandwidth / roof), positions / (tiles * 16), np.log(tiles)]
    cached = (4 * positions * ins, 36 * ins * outs, 144 * tiles * (ins + outs))
    columns += [np.log(v / gpu.cache_bytes) for v in cached]
    every = np.stack(ideals, axis=1)
    ideal = every.min(axis=1)
    columns += [np.log(ideal / roof), every.argmin(axis=1).astype(np.float64)]
    return np.stack(columns, axis=1), ideal


@dataclass(frozen=True)
class GpuConvolutions:
    """A fitted model: ``ms = ideal_ms * exp(mean of the trees)``.

    Attributes:
        gpu: the data sheet.
        boosters: XGBoost models that differ in their seeds.
        drift: what the campaign added to its readings.
    """

    gpu: GpuSpec
    boosters: tuple[Any, ...]
    drift: Drift

    @classmethod
    def fit(
        cls,
        shapes: np.ndarray,
        ms: np.ndarray,
        gpu: GpuSpec,
        *,
        position: np.ndarray | None = None,
        others: np.ndarray | None = None,
        rounds: int = _ROUNDS,
        seed: int = 0,
    ) -> GpuConvolutions:
        """Some ten seconds for 4,000 convolutions.

        Args:
            shapes: (N, 4), see ``describe``.
            ms: measured, (N,).
            gpu: the data sheet.
            position: place of each reading in its campaign, 0 to 1, (N,); None: the campaign does not drift.
            others: what other devices say of the same convolutions, (N, D), see ``other_devices``.
            rounds: of boosting.
            seed: of the trees.

        Raises:
            InputError: shapes that do not fit, or a latency that is no positive number.
        """
        ms = np.asarray(ms, dtype=np.float64)
        features, ideal = describe(shapes, gpu)
        if ms.shape != ideal.shape or not (np.isfinite(ms).all() and (ms > 0).all()):
            raise InputError(f"{len(ms)} latencies for {len(ideal)} convolutions; give one positive number each")
        if others is not None:
            features = np.hstack([features, others])
        drift = Drift() if position is None else fit_drift(features, ideal, ms, position, seed)
        target = np.log(_without(ms, drift, position) / ideal)
        return cls(gpu, tuple(_grow(features, target, rounds, seed * _SEEDS + s) for s in range(_SEEDS)), drift)

    def predict(
        self, shapes: np.ndarray, *, position: np.ndarray | None = None, others: np.ndarray | None = None
    ) -> np.ndarray:
        """Milliseconds, (N,).

        Args:
            shapes: (N, 4).
            position: with it, what the campaign would have read there; without, what the kernel takes.
            others: as in ``fit``.
        """
        import xgboost

        features, ideal = describe(shapes, self.gpu)
        matrix = xgboost.DMatrix(features if others is None else np.hstack([features, others]), nthread=1)
        log = np.mean([booster.predict(matrix) for booster in self.boosters], axis=0)
        ms = ideal * np.exp(log)
        return np.asarray(ms if position is None else ms + np.maximum(self.drift.ms(position), 0.0))


def fit_drift(features: np.ndarray, ideal_ms: np.ndarray, ms: np.ndarray, position: np.ndarray, seed: int = 0) -> Drift:
    """What a campaign adds to its readings: a robust line through what out-of-fold predictions leave.

    The model is fitted without the drift found so far, the drift without the model's times, in turn. A constant cannot
    be told from the kernels' own start, so ``start_ms`` is what is left at position 0, held at 0 or above.
    """
    drift = Drift()
    fold = np.random.default_rng([seed, len(ms)]).permutation(len(ms)) % 3
    line = np.stack([np.ones(len(ms)), position], axis=1)
    for _ in range(3):
        target = np.log(_without(ms, drift, position) / ideal_ms)
        log = np.zeros(len(ms))
        for number in range(3):
            booster = _grow(features[fold != number], target[fold != number], _QUICK_ROUNDS, seed, eta=0.1)
            log[fold == number] = _margin(booster, features[fold == number])
        left = ms - ideal_ms * np.exp(log)
        weight = 1 / ms
        for _ in range(10):
            start, slope = np.linalg.lstsq(line * weight[:, None], left * weight, rcond=None)[0]
            off = np.abs(left - line @ np.array([start, slope])) / ms
            weight = 1 / ms / np.sqrt(np.maximum(1, off / 0.1))
        drift = Drift(max(float(start), 0.0), max(float(slope), 0.0))
    return drift


def other_devices(
    shapes: np.ndarray,
    tables: Mapping[str, tuple[np.ndarray, np.ndarray, GpuSpec]],
    *,
    drift: bool = True,
    seed: int = 0,
) -> np.ndarray:
    """What other GPUs' tables say of convolutions: log(ms / ideal ms) there, (N, D); NaN where one was not timed.

    Args:
        shapes: (N, 4).
        tables: device name to (shapes, ms, data sheet); rows in the order of the campaign.
        drift: take the campaigns' own drifts out first.
        seed: of the model that this takes.
    """
    place = {tuple(row): number for number, row in enumerate(np.asarray(shapes, dtype=np.int64).tolist())}
    columns = []
    for own_shapes, ms, gpu in tables.values():
        features, ideal = describe(own_shapes, gpu)
        times = np.asarray(ms, dtype=np.float64)
        if drift:
            position = np.arange(len(times)) / max(len(times) - 1, 1)
            times = _without(times, fit_drift(features, ideal, times, position, seed), position)
        column = np.full(len(place), np.nan)
        for row, value in zip(np.asarray(own_shapes, dtype=np.int64).tolist(), np.log(times / ideal), strict=True):
            if tuple(row) in place:
                column[place[tuple(row)]] = value
        columns.append(column)
    return np.stack(columns, axis=1)


def _without(ms: np.ndarray, drift: Drift, position: np.ndarray | None) -> np.ndarray:
    """Readings without the drift; never less than a tenth of them."""
    return ms if position is None else np.maximum(ms - drift.ms(position), 0.1 * ms)


def _grow(features: np.ndarray, target: np.ndarray, rounds: int, seed: int, **changes: float) -> Any:
    import xgboost

    return xgboost.train(_SETTINGS | {"seed": seed} | changes, xgboost.DMatrix(features, target, nthread=1), rounds)


def _margin(booster: Any, features: np.ndarray) -> np.ndarray:
    import xgboost

    return np.asarray(booster.predict(xgboost.DMatrix(features, nthread=1)))
