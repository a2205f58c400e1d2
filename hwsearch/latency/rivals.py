"""Simpler predictors, fitted on the same networks and judged on the same folds: what a predictor must beat.

``macs_line``
    ``ms = a * MACs + b`` of a whole network, a and b >= 0.
``nn_meter``
    nn-Meter's recipe (Zhang et al., MobiSys 2021): a random forest per kernel family on that project's features
    (side, channels, window, stride, and FLOPs and parameters *as if the convolution were dense*), kernels summed. The
    original has no model for reorders and other small nodes and drops them; here they get a forest on side and
    channels, as its element-wise ones do, so nothing is missing from the sum.
``raw_boosting``
    One XGBoost per family on the kernel's plain fields, log target, library defaults; kernels summed.

All three are given the kernels of the runtime's optimised graph and their profiled shares of the measured time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.features import layouts, tail
from hwsearch.latency.training import Rows
from hwsearch.latency.validation import Progress

#: Convolutions that nn-Meter prices with one model, as dense ones.
_NN_METER_CONV = ("conv", "conv_first", "pointwise", "grouped", "conv_transpose")
_TREES, _DEPTH = 60, 70
_FEW = 5

Splits = list[tuple[np.ndarray, np.ndarray]]
Estimator = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def rival_predictions(
    rows: Rows, fold: np.ndarray, progress: Progress | None = None, *, judged: Sequence[int] | None = None
) -> Mapping[str, np.ndarray]:
    """Out-of-fold milliseconds of each network, (M,), by rival.

    Args:
        rows: the table.
        fold: fold of each network, (M,).
        progress: told (rivals done, rivals, message).
        judged: folds to hold out, each in turn; None: every one. Networks of other folds are predicted as 1e-6.
    """
    splits = _splits(fold, range(int(fold.max()) + 1) if judged is None else judged)
    kernels = rows.kernels
    makers: dict[str, Callable[[], np.ndarray]] = {
        "macs_line": lambda: _macs_line(rows, splits),
        "nn_meter": lambda: _by_kernel(rows, splits, _nn_meter_features(kernels), _nn_meter_families(kernels), _forest),
        "raw_boosting": lambda: _by_kernel(rows, splits, _raw_features(rows), _families(rows), _boosting),
    }
    found = {}
    for number, (name, make) in enumerate(makers.items()):
        if progress is not None:
            progress(number, len(makers), f"fitting the rival {name}")
        found[name] = np.maximum(make(), 1e-6)
    return found


def _macs_line(rows: Rows, splits: Splits) -> np.ndarray:
    """Relative least squares on the other folds, (M,)."""
    from scipy.optimize import nnls

    networks = len(rows.nodes)
    macs = np.bincount(rows.network, np.array([float(k.macs) for k in rows.kernels])[rows.kernel], minlength=networks)
    design = np.stack([macs / 1e6, np.ones(networks)], axis=1)
    predicted = np.zeros(networks)
    for held, rest in splits:
        scaled = design[rest] / rows.measured_ms[rest, None]
        weights = nnls(scaled, np.ones(int(rest.sum())))[0]
        predicted[held] = design[held] @ weights
    return predicted


def _by_kernel(
    rows: Rows, splits: Splits, features: np.ndarray, families: np.ndarray, fit_predict: Estimator
) -> np.ndarray:
    """Kernels priced by a model per family, fitted on the other folds' profiled times, and summed by network, (M,)."""
    observed = rows.observed_ms(0.0)
    predicted = np.zeros(len(rows.nodes))
    for held, rest in splits:
        ms = np.zeros(len(rows.kernels))
        training = rest[rows.network]
        count = np.bincount(rows.kernel[training], minlength=len(ms))
        mean = np.bincount(rows.kernel[training], observed[training], minlength=len(ms)) / np.maximum(count, 1)
        wanted = np.bincount(rows.kernel[held[rows.network]], minlength=len(ms)) > 0
        for family in sorted(set(families)):
            own = families == family
            known, asked = np.flatnonzero(own & (count > 0)), np.flatnonzero(own & wanted)
            if not len(asked):
                continue
            if len(known) < _FEW:
                ms[asked] = mean[known].mean() if len(known) else 0.0
            else:
                ms[asked] = fit_predict(features[known], mean[known], features[asked])
        own_rows = held[rows.network]
        total = np.bincount(rows.network[own_rows], ms[rows.kernel[own_rows]], minlength=len(predicted))
        predicted[held] = total[held]
    return predicted


def _splits(fold: np.ndarray, judged: Sequence[int]) -> Splits:
    """(held out, the rest) of each fold, masks (M,); a single fold cannot be held out and is judged by itself."""
    masks = [fold == number for number in judged]
    return [(held, ~held if not held.all() else held) for held in masks]


def _forest(known: np.ndarray, ms: np.ndarray, asked: np.ndarray) -> np.ndarray:
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(_TREES, max_depth=_DEPTH, random_state=0, n_jobs=1)
    return np.asarray(forest.fit(known, ms).predict(asked))


def _boosting(known: np.ndarray, ms: np.ndarray, asked: np.ndarray) -> np.ndarray:
    from xgboost import XGBRegressor

    model = XGBRegressor(random_state=0, n_jobs=1)
    return np.asarray(np.exp(model.fit(known, np.log(ms)).predict(asked)), dtype=np.float64)


def _families(rows: Rows) -> np.ndarray:
    return np.array([kernel.family for kernel in rows.kernels], dtype=object)


def _nn_meter_families(kernels: tuple[Kernel, ...]) -> np.ndarray:
    return np.array(["conv" if k.family in _NN_METER_CONV else k.family for k in kernels], dtype=object)


def _nn_meter_features(kernels: tuple[Kernel, ...]) -> np.ndarray:
    """(U, 7): H, Cin, Cout, window, stride, FLOPs / 2e6, parameters / 1e6; a grouped convolution counts as dense."""
    values = []
    for k in kernels:
        dense = k.in_channels if k.family != "depthwise" else 1
        weights = dense * k.out_channels * k.kernel_height * k.kernel_width if k.weight_elements else 0
        work = weights * k.out_height * k.out_width
        values.append(
            (k.in_height, k.in_channels, k.out_channels, k.kernel_height, k.stride, work / 1e6, weights / 1e6)
        )
    return np.array(values, dtype=np.float64).reshape(len(kernels), 7)


def _raw_features(rows: Rows) -> np.ndarray:
    """(U, 19): the kernel's fields as they are; texts as numbers."""
    known = rows.vocabulary
    codes = [
        {text: number for number, text in enumerate(texts)}
        for texts in (known.tails, known.ops, known.layouts, known.dtypes)
    ]
    return np.array(
        [
            (
                k.batch, k.in_channels, k.in_height, k.in_width, k.out_channels, k.out_height, k.out_width,
                k.kernel_height, k.kernel_width, k.stride, k.dilation, k.groups, k.inputs, k.macs, k.memory_bytes,
                codes[0][tail(k)], codes[1][k.op], codes[2][layouts(k)], codes[3][k.dtype],
            )
            for k in rows.kernels
        ],
        dtype=np.float64,
    ).reshape(len(rows.kernels), 19)  # fmt: skip
