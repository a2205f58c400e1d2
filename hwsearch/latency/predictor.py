"""``LatencyPredictor``: fitted on a table, prices kernels and whole networks in ms, and knows how sure it is.

Example:
    >>> predictor = LatencyPredictor().fit(LatencyTable.load("latency_tables/x86-ort-1t"))     # doctest: +SKIP
    >>> estimate = predictor.network(kernels)                                                  # doctest: +SKIP
    >>> estimate.ms, estimate.low_ms, estimate.high_ms, estimate.coverage                      # doctest: +SKIP
    (3.02, 2.86, 3.17, 1.0)
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils import RegressorTags

from hwsearch.device.spec import Fingerprint
from hwsearch.errors import InputError, SchemaError
from hwsearch.graph.kernel import FAMILIES, Kernel
from hwsearch.latency.boosting import BoostSettings
from hwsearch.latency.features import weight_mb
from hwsearch.latency.interval import Intervals, Profiled
from hwsearch.latency.model import KernelModel
from hwsearch.latency.table import LatencyTable, read_manifest, write_atomic
from hwsearch.latency.training import Rows
from hwsearch.latency.validation import (
    Calibration,
    OutOfFold,
    Progress,
    out_of_fold,
    random_folds,
    source_folds,
)

SCHEMA = "hwsearch.predictor"
VERSION = 4
_REMEDY = "run `hwsearch fit` to make one"

#: A predictor holds for one setting of each of these; the rest of a fingerprint may differ.
BINDING = ("cpu", "isa", "runtime", "runtime_version", "threads", "precision")

#: So many steady networks are enough to do without the others.
_STEADY = 20
#: Octaves: networks further than this on the mean from what was profiled are made of other kernels.
_KNOWN = 1.0

#: A kernel that was never profiled may take this many times its price, or a part of it as small.
_GUESS = 2.0


@dataclass(frozen=True)
class NetworkEstimate:
    """What a network is expected to take.

    Attributes:
        ms: predicted milliseconds at the device's reference speed.
        low_ms, high_ms: interval that ``measured_ms`` lies in with the asked probability.
        p90_ms: ninetieth percentile of single runs, as the clock sees them when the machine is at its reference speed.
        coverage: share of the milliseconds that comes from kernels like profiled ones (1 is best).
        unknown: the others, one line each.
        kernel_ms: milliseconds of each kernel; with the overhead of a network they sum to ``ms``.
    """

    ms: float
    low_ms: float
    high_ms: float
    p90_ms: float
    coverage: float
    unknown: tuple[str, ...]
    kernel_ms: tuple[float, ...]


#: What the trees are compared with under ``tune``.
OTHERS: tuple[dict[str, Any], ...] = ({"max_depth": 7, "min_child_weight": 20.0}, {"min_child_weight": 20.0})
TUNED_FROM = 200


class OutOfRangeWarning(UserWarning):
    """A network has kernels unlike any that was profiled; their prices are guesses."""


class LatencyPredictor(BaseEstimator):  # type: ignore[misc]
    """Milliseconds of kernels and networks on one device.

    ``x = a * sum_i base(i) * exp(trees(i)) + b * nodes + c``, ``ms = x (1 + d log(1 + x))``: an analytic base per
    kernel family, XGBoost on what it leaves (``boosting.py``), and a calibration on networks predicted out of fold.
    Intervals are conformal, on out-of-fold errors of whole networks, and wider for networks unlike the profiled ones.

    Args:
        rounds: boosting rounds (0: the analytic base alone).
        learning_rate, max_depth, min_child_weight, l2, subsample, column_sample: of the trees.
        network_weight: weight of the networks' totals against the kernels' shares.
        tune: compare the trees with ``OTHERS`` by the same cross-validation, and take the best; not below
            ``TUNED_FROM`` networks, where the comparison would be a lottery.
        folds: of the cross-validation by network that calibrates and gives the intervals.
        out_of_range: what to do about kernels unlike any that was profiled: ``"warn"`` (an ``OutOfRangeWarning``; they
            are priced all the same and widen the interval) or ``"raise"``.
        seed: of folds and trees; one thread throughout, so equal tables give equal predictors.

    Attributes:
        model_: the kernel model fitted on the whole table.
        settings_: of the trees as they were grown, after ``tune``.
        kinds_: what corrects each family's base: trees, ridge regression, a table or nothing, by cross-validation.
        calibration_: a, b, c and d.
        log_errors_: log(measured / predicted) of every network while its fold was held out, sorted.
        cross_validation_, family_validation_: those predictions in full, and those with whole source families held
            out, None where there is one family only (not saved; the card is made of them).
        intervals_, profiled_: how errors grow with novelty, and what was profiled (``interval.py``).
        fingerprint_, device_, reference_ms_, noise_floor_, networks_, kernels_: of the table.
    """

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn may expect: a regressor of tables, so no arrays are validated."""
        tags = super().__sklearn_tags__()
        tags.estimator_type = "regressor"
        tags.regressor_tags = RegressorTags()
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        return tags

    def __init__(
        self,
        *,
        rounds: int = 60,
        learning_rate: float = 0.15,
        max_depth: int = 5,
        min_child_weight: float = 5.0,
        l2: float = 1.0,
        subsample: float = 0.8,
        column_sample: float = 0.5,
        network_weight: float = 1.0,
        tune: bool = True,
        folds: int = 5,
        out_of_range: str = "warn",
        seed: int = 0,
    ) -> None:
        self.rounds = rounds
        self.learning_rate = learning_rate
        self.max_depth = max_depth
        self.min_child_weight = min_child_weight
        self.l2 = l2
        self.subsample = subsample
        self.column_sample = column_sample
        self.network_weight = network_weight
        self.tune = tune
        self.folds = folds
        self.out_of_range = out_of_range
        self.seed = seed

    def fit(self, table: LatencyTable, y: None = None, *, progress: Progress | None = None) -> LatencyPredictor:
        """Fit on a table; a few seconds for a thousand networks.

        Args:
            table: what was measured.
            y: not used, there for scikit-learn.
            progress: told (steps done, steps, message).

        Raises:
            InputError: a hyper-parameter that makes no sense, or an unusable table.
        """
        settings = self._settings()
        if not isinstance(table, LatencyTable):
            raise InputError(f"fit takes a LatencyTable, not a {type(table).__name__}: kernels are no rows of numbers")
        table.validate()
        if not table.networks:
            raise InputError(f"the table of {table.device!r} is empty; profile the device first")
        rows = Rows.of(table.networks)
        fold = random_folds(len(table.networks), self.folds, self.seed)
        checked = out_of_fold(rows, fold, settings, progress)
        for other in OTHERS if self.tune and settings.rounds and len(table.networks) >= TUNED_FROM else ():
            tried = replace(settings, **other)
            rival = out_of_fold(rows, fold, tried, progress, "other trees", checked.kinds)
            if np.abs(rival.log_error).mean() < np.abs(checked.log_error).mean():
                settings, checked = tried, rival
        self.settings_ = settings
        families = source_folds(rows)
        left_out = None
        if families.any():
            left_out = out_of_fold(rows, families, settings, progress, "families held out", checked.kinds)
        if progress is not None:
            progress(1, 1, "fitting on the whole table")
        self.kinds_ = dict(checked.kinds)
        self.model_ = KernelModel.fit(rows, settings, self.kinds_)
        overhead = self.model_.overhead_ms
        self.calibration_ = Calibration.fit(checked.total_ms, rows.nodes, rows.measured_ms, overhead)
        self.log_errors_ = np.round(np.sort(checked.log_error), 6)  # as saved: a loaded predictor answers alike
        self.cross_validation_: OutOfFold = checked
        self.family_validation_: OutOfFold | None = left_out
        self.profiled_ = Profiled.of(rows.kernels)
        self.intervals_ = fit_intervals(checked, left_out)
        self.p90_ = _p90_line(table)
        self.device_ = table.device
        self.fingerprint_ = table.fingerprint
        self.reference_ms_ = table.reference_ms
        self.noise_floor_ = table.noise_floor
        self.networks_ = len(table.networks)
        self.kernels_ = table.kernel_count
        return self

    def predict(self, kernels: Sequence[Kernel]) -> np.ndarray:
        """Milliseconds of each kernel, (N,), calibrated, its weights in a cache.

        A network is the sum of its kernels, of ``context_ms`` of its weights, and of ``overhead_ms``, ``stretched``.

        Raises:
            InputError: kernels unlike any that was profiled, under ``out_of_range="raise"``.
            NotFittedError: ``fit`` or ``load`` comes first.
        """
        self._fitted()
        if self.out_of_range == "raise":
            doubts = (f"{kernel.op}: {self.model_.doubt(kernel)}" for kernel in kernels if self.model_.doubt(kernel))
            self._guard(tuple(doubts), len(kernels))
        return self._calibrated(self.model_.ms(list(kernels)))

    def context_ms(self, network_mb: np.ndarray) -> np.ndarray:
        """Milliseconds, (M,), that the weights of networks cost beyond their kernels' own price.

        Args:
            network_mb: megabytes (2^20) of weights of each network, (M,), see ``features.weight_mb``.
        """
        self._fitted()
        return np.asarray(self.calibration_.a * self.model_.context_ms(network_mb) * network_mb)

    @property
    def overhead_ms(self) -> float:
        """What a network takes beyond its kernels."""
        self._fitted()
        return self.calibration_.c

    def stretched(self, ms: np.ndarray) -> np.ndarray:
        """Milliseconds of whole networks, (M,), from the sum of kernels, context and overhead, (M,).

        Long networks take a little more than their parts: see ``Calibration``.
        """
        self._fitted()
        return self.calibration_.stretch(np.asarray(ms, dtype=np.float64))

    def network(self, kernels: Sequence[Kernel], level: float = 0.9) -> NetworkEstimate:
        """A whole network.

        Args:
            kernels: every node, from the runtime's own optimised graph.
            level: probability of the interval, in (0, 1).

        Raises:
            InputError: no kernels, a level outside (0, 1), or kernels unlike any that was profiled under
                ``out_of_range="raise"``.
            NotFittedError: ``fit`` or ``load`` comes first.
        """
        self._fitted()
        if not kernels:
            raise InputError("a network without kernels cannot be priced; was the model empty?")
        megabytes = weight_mb(kernels)
        whole = max(float(megabytes.sum()), 1e-12)
        further = self.context_ms(np.array([whole]))[0]
        kernel_ms = self._calibrated(self.model_.ms(kernels)) + megabytes / whole * further
        doubts = [self.model_.doubt(kernel) for kernel in kernels]
        unknown = tuple(f"{k.node or k.op}: {doubt}" for k, doubt in zip(kernels, doubts, strict=True) if doubt)
        self._guard(unknown, len(kernels))
        ms = float(self.stretched(np.array([kernel_ms.sum() + self.overhead_ms]))[0])
        # an overhead beyond all measure, of a file that was changed, must leave something to divide by
        kernel_ms = np.maximum(kernel_ms * (ms - self.overhead_ms) / kernel_ms.sum(), 1e-12)
        guessed = sum(float(ms) for ms, doubt in zip(kernel_ms, doubts, strict=True) if doubt)
        coverage = 1 - guessed / float(kernel_ms.sum())
        novelty = float((self.profiled_.novelty(kernels) * kernel_ms).sum() / kernel_ms.sum())
        low, high = self.interval(np.array([ms]), np.array([coverage]), level, np.array([novelty]))
        p90 = self.p90_ms(np.array([ms]))
        times = tuple(map(float, kernel_ms))
        return NetworkEstimate(ms, float(low[0]), float(high[0]), float(p90[0]), coverage, unknown, times)

    def p90_ms(self, ms: np.ndarray) -> np.ndarray:
        """Ninetieth percentile of the single runs, (M,), of networks predicted at ``ms``, (M,).

        Short networks scatter more than long ones: the ratio of the two is a line over log(ms), fitted robustly.
        """
        self._fitted()
        ms = np.asarray(ms, dtype=np.float64)
        return np.asarray(ms * np.exp(np.maximum(self.p90_[0] + self.p90_[1] * np.log(np.maximum(ms, 1e-6)), 0.0)))

    def interval(
        self, ms: np.ndarray, coverage: np.ndarray, level: float = 0.9, novelty: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Interval of predicted networks.

        Args:
            ms: predictions, (M,).
            coverage: share of each that comes from known kernels, (M,); the rest widens the interval.
            level: probability, in (0, 1).
            novelty: of each, (M,), see ``interval.py``; None is 0: networks of a space that was profiled.

        Returns:
            (low_ms, high_ms), each (M,).
        """
        self._fitted()
        if not (isinstance(level, Real) and 0 < level < 1):
            raise InputError(f"interval level is {level!r}; use a number between 0 and 1, such as 0.9")
        low, high = self.intervals_.log_bounds(np.zeros(len(ms)) if novelty is None else novelty, float(level))
        guess = 1 - np.clip(coverage, 0, 1)
        low_ms = ms * np.exp(low) * (1 - guess * (1 - 1 / _GUESS))
        return low_ms, ms * np.exp(high) * (1 + guess * (_GUESS - 1))

    def save(self, folder: str | Path) -> None:
        """Write ``manifest.json`` and one XGBoost UBJ file a family.

        Raises:
            InputError: the folder cannot be written.
            NotFittedError: ``fit`` comes first.
        """
        self._fitted()
        document, files = self.model_.to_files()
        manifest = {
            "schema": SCHEMA,
            "version": VERSION,
            "device": self.device_,
            "fingerprint": self.fingerprint_.to_dict(),
            "reference_ms": self.reference_ms_,
            "noise_floor": self.noise_floor_,
            "networks": self.networks_,
            "kernels": self.kernels_,
            "parameters": self.get_params(),
            "settings": asdict(self.settings_),
            "kinds": self.kinds_,
            "calibration": asdict(self.calibration_),
            "log_errors": self.log_errors_.tolist(),
            "p90": list(self.p90_),
            "intervals": {"a": self.intervals_.a, "b": self.intervals_.b, "scores": self.intervals_.scores.tolist()},
            "profiled": self.profiled_.to_dict(),
            "model": document,
        }
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                write_atomic(folder / name, data)
            write_atomic(folder / "manifest.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
            for stale in set(folder.glob("*.ubj")) - {folder / name for name in files}:
                stale.unlink()
        except OSError as error:
            raise InputError(f"cannot write the predictor to {folder}: {error}; choose another folder") from None

    @classmethod
    def load(cls, folder: str | Path, fingerprint: Fingerprint | None = None) -> LatencyPredictor:
        """Read a predictor.

        Args:
            folder: where ``save`` wrote it.
            fingerprint: what the device is now; None skips the comparison.

        Raises:
            InputError: there is none, or it was made for another runtime version, CPU, precision ...: both are named.
            SchemaError: damaged, or of another schema or version.
        """
        folder = Path(folder)
        path = folder / "manifest.json"
        manifest = read_manifest(path, SCHEMA, VERSION, "predictor", _REMEDY)
        try:
            made_for = Fingerprint.from_dict(manifest["fingerprint"])
            _refuse_other(path, made_for, fingerprint)
            predictor = cls(**manifest["parameters"])
            predictor.settings_ = BoostSettings(**manifest["settings"])
            predictor.model_ = KernelModel.from_files(manifest["model"], _files(folder, manifest["model"]["files"]))
            predictor.kinds_ = {str(family): str(kind) for family, kind in manifest["kinds"].items()}
            predictor.calibration_ = Calibration(**{k: float(v) for k, v in manifest["calibration"].items()})
            predictor.log_errors_ = np.sort(np.array(manifest["log_errors"], dtype=np.float64))
            fitted = manifest["intervals"]
            scores = np.array(fitted["scores"], dtype=np.float64)
            predictor.intervals_ = Intervals(float(fitted["a"]), float(fitted["b"]), np.sort(scores))
            predictor.profiled_ = Profiled.from_dict(manifest["profiled"])
            start, slope = map(float, manifest["p90"])
            predictor.p90_ = start, slope
            predictor.device_ = str(manifest["device"])
            predictor.fingerprint_ = made_for
            predictor.reference_ms_ = float(manifest["reference_ms"])
            predictor.noise_floor_ = float(manifest["noise_floor"])
            predictor.networks_, predictor.kernels_ = int(manifest["networks"]), int(manifest["kernels"])
            errors = np.concatenate([predictor.log_errors_, scores])
            if not len(predictor.log_errors_) or not len(scores) or not np.isfinite(errors).all():
                raise SchemaError("it has no out-of-fold errors")
            if not _all_finite(manifest):
                raise SchemaError(f"a number in it is not finite; {_REMEDY}")
        except SchemaError as error:
            raise SchemaError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise SchemaError(f"{path}: field {error} is missing or wrong; {_REMEDY}") from None
        return predictor

    def _calibrated(self, ms: np.ndarray) -> np.ndarray:
        return np.asarray(np.maximum(self.calibration_.a * ms + self.calibration_.b, 1e-5))

    def _guard(self, doubts: Sequence[str], count: int) -> None:
        """Warn of, or refuse, kernels whose price is a guess."""
        if not doubts:
            return
        text = f"{len(doubts)} of {count} kernels are unlike any profiled on {self.device_!r} (the first, {doubts[0]})"
        if self.out_of_range == "raise":
            raise InputError(f"{text}; profile the device with this model (--model)")
        warnings.warn(f"{text}; their prices are guesses", OutOfRangeWarning, stacklevel=3)

    def _fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise NotFittedError(
                "this LatencyPredictor is not fitted; call fit(table) or LatencyPredictor.load(folder)"
            )

    def _settings(self) -> BoostSettings:
        """The trees' settings, checked."""
        whole = {"rounds": 0, "max_depth": 1, "folds": 2, "seed": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise InputError(f"{name} is {value!r}; use a whole number from {least} up")
        above = {"learning_rate": 1.0, "subsample": 1.0, "column_sample": 1.0}
        for name in (*above, "min_child_weight", "l2", "network_weight"):
            value, limit = getattr(self, name), above.get(name, math.inf)
            usable = isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= limit
            if not usable or (name in above and value == 0):
                start = "above 0" if name in above else "from 0"
                raise InputError(f"{name} is {value!r}; use a number {start} up to {limit:g}")
        if self.out_of_range not in ("warn", "raise"):
            raise InputError(f"out_of_range is {self.out_of_range!r}; use 'warn' or 'raise'")
        names = (f for f in BoostSettings.__dataclass_fields__)
        return BoostSettings(**{name: getattr(self, name) for name in names})


def fit_intervals(checked: OutOfFold, left_out: OutOfFold | None, own: np.ndarray | None = None) -> Intervals:
    """Intervals from both kinds of held-out errors, of some networks (a mask (M,)) or of all.

    Two kinds of errors say nothing of the predictor: those of networks that were timed on a disturbed machine, and
    those of networks mostly made of kernels whose kind went with the family held out, which coverage widens for.
    """
    mask = np.ones(len(checked.fold), dtype=bool) if own is None else own
    steady = mask & checked.steady
    mask = steady if steady.sum() >= _STEADY else mask
    sets = [(checked, mask)] if left_out is None else [(checked, mask), (left_out, mask & (left_out.novelty < _KNOWN))]
    errors, novelty = (np.concatenate([getattr(s, name)[m] for s, m in sets]) for name in ("log_error", "novelty"))
    return Intervals.fit(errors, novelty)


def _p90_line(table: LatencyTable) -> tuple[float, float]:
    """(start, slope) of log(p90 / p50) over log(ms), robustly (Theil-Sen: the median of slopes, then of levels)."""
    log_ms = np.log([network.measured_ms for network in table.networks])
    ratio = np.log([max(network.raw_p90_ms / network.raw_p50_ms, 1.0) for network in table.networks])
    half = len(log_ms) // 2
    order = np.argsort(log_ms, kind="stable")
    low, high = order[:half], order[len(order) - half :]
    apart = log_ms[high] - log_ms[low]
    usable = apart > 1e-9
    slope = float(np.median((ratio[high] - ratio[low])[usable] / apart[usable])) if usable.any() else 0.0
    return round(float(np.median(ratio - slope * log_ms)), 6), round(slope, 6)


def _all_finite(value: object) -> bool:
    """Whether every number of a JSON value can be computed with."""
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list):
        return all(map(_all_finite, value))
    return not isinstance(value, int | float) or -1e300 <= value <= 1e300


def _refuse_other(path: Path, made_for: Fingerprint, now: Fingerprint | None) -> None:
    if now is None:
        return
    pairs = [(name, getattr(made_for, name), getattr(now, name)) for name in BINDING]
    changed = [(name, mine, theirs) for name, mine, theirs in pairs if mine != theirs]
    if changed:
        different = "; ".join(f"{name} {theirs!r} instead of {mine!r}" for name, mine, theirs in changed)
        remedy = "profile and fit again"
        if [name for name, _, _ in changed] == ["runtime_version"]:
            remedy = f"`hwsearch device revalidate --accept` tells whether it holds all the same, or {remedy}"
        raise InputError(f"{path}: made for another device: this one has {different}; {remedy}")


def _files(folder: Path, listed: dict[str, str]) -> dict[str, bytes]:
    """The listed files; only plain family names are read, and only with the right content."""
    found = {}
    for name, digest in listed.items():
        if name not in {f"{family}.ubj" for family in FAMILIES}:
            raise SchemaError(f"it lists a file {name!r} that no predictor has; {_REMEDY}")
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise SchemaError(f"{name} cannot be read ({error.strerror}); {_REMEDY}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise SchemaError(f"{name} changed since it was written (SHA-256 differs); {_REMEDY}")
        found[name] = data
    return found
