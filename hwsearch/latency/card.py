"""The error card: what a predictor gets wrong, on networks it did not see, beside the noise and simpler rivals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hwsearch.errors import InputError
from hwsearch.latency.corrections import TREES
from hwsearch.latency.predictor import LatencyPredictor, fit_intervals
from hwsearch.latency.rivals import rival_predictions
from hwsearch.latency.table import LatencyTable
from hwsearch.latency.training import Rows
from hwsearch.latency.validation import OutOfFold, Progress, out_of_fold, random_folds, source_folds

_LEVEL = 0.9
#: Of the residuals of a kernel family.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RIVAL_NAMES = {
    "macs_line": "a line through the MACs",
    "nn_meter": "nn-Meter's features and random forest",
    "raw_boosting": "XGBoost on plain features",
}


@dataclass(frozen=True)
class ErrorRow:
    """Errors over ``count`` samples; shares and errors are fractions (0.05 = 5 %).

    ``spearman`` is NaN-free: 0 where all values agree. ``coverage`` is the share inside the 90 % interval, None where
    there is no interval.
    """

    count: int
    mape: float
    rmspe: float
    within_5: float
    within_10: float
    spearman: float
    coverage: float | None = None

    @classmethod
    def of(cls, predicted: np.ndarray, measured: np.ndarray, inside: np.ndarray | None = None) -> ErrorRow:
        """The errors of predictions (N,) against measurements (N,)."""
        error = np.abs(predicted / measured - 1)
        return cls(
            count=len(error),
            mape=float(error.mean()),
            rmspe=float(np.sqrt((error**2).mean())),
            within_5=float((error <= 0.05).mean()),
            within_10=float((error <= 0.10).mean()),
            spearman=spearman(predicted, measured),
            coverage=None if inside is None else float(inside.mean()),
        )


@dataclass(frozen=True)
class ErrorCard:
    """What to expect of a predictor.

    Attributes:
        device: its name; networks, kernels: in the table.
        seconds: device time that the measurements took.
        noise_floor: p95 of the relative test-retest error: nothing below it can be claimed.
        unseen: networks whose fold was held out.
        unseen_family: networks whose whole source family was held out; None when there is one family only.
        rivals: simpler predictors on the same folds, by name; see ``rivals.py``.
        by_source: of ``unseen``, by the family that a network came from.
        by_family: kernels of held-out networks, by kernel family: how well their profiled shares are told.
        kinds: by kernel family, what cross-validation chose to correct its analytic base: trees, ridge, table or base.
        interval: median half-width of the 90 % interval, relative.
        points: of ``unseen``: (measured_ms, predicted_ms, source) of each network.
        bounds: of ``points``: (low_ms, high_ms) of the 90 % interval, fitted without the network's fold.
        residuals: by kernel family, the 5, 25, 50, 75 and 95 % quantiles of predicted over observed, less 1.
    """

    device: str
    networks: int
    kernels: int
    seconds: float
    noise_floor: float
    unseen: ErrorRow
    unseen_family: ErrorRow | None
    rivals: Mapping[str, ErrorRow]
    by_source: Mapping[str, ErrorRow]
    by_family: Mapping[str, ErrorRow]
    kinds: Mapping[str, str]
    interval: float
    points: tuple[tuple[float, float, str], ...]
    bounds: tuple[tuple[float, float], ...] = ()
    residuals: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, predictor: LatencyPredictor, table: LatencyTable, *, progress: Progress | None = None) -> ErrorCard:
        """The card of a predictor and the table that it was fitted on.

        Args:
            predictor: fitted; its own cross-validation is used, or done now when it was loaded from files.
            table: the table.
            progress: told (steps done, steps, message); the held-out families take a fit each.

        Raises:
            InputError: fewer than two networks, or not the table of this predictor.
        """
        if len(table.networks) < 2:
            raise InputError(f"an error card needs 2 networks or more, the table of {table.device!r} has fewer")
        rows = Rows.of(table.networks)
        settings = predictor.settings_
        checked: OutOfFold | None = getattr(predictor, "cross_validation_", None)
        if checked is None:
            fold = random_folds(len(rows.nodes), predictor.folds, predictor.seed)
            checked = out_of_fold(rows, fold, settings, progress)
        if len(checked.fold) != len(rows.nodes) or not np.array_equal(checked.measured_ms, rows.measured_ms):
            raise InputError("the table is not the one that this predictor was fitted on; fit it again")
        families = source_folds(rows)
        other: OutOfFold | None = getattr(predictor, "family_validation_", None)
        if other is None and families.any():
            other = out_of_fold(rows, families, settings, progress, "families held out", checked.kinds)
        inside, low, high = _judge(checked, checked, other)
        left_out = None
        if other is not None:
            left_out = ErrorRow.of(other.predicted_ms, other.measured_ms, _judge(other, checked, other)[0])
        others = rival_predictions(rows, checked.fold, progress)
        kernel_family = np.array([k.family for k in rows.kernels], dtype=object)[rows.kernel]
        return cls(
            device=table.device,
            networks=len(table.networks),
            kernels=table.kernel_count,
            seconds=float(sum(n.seconds for n in table.networks)),
            noise_floor=table.noise_floor,
            unseen=ErrorRow.of(checked.predicted_ms, checked.measured_ms, inside),
            unseen_family=left_out,
            rivals={name: ErrorRow.of(ms, checked.measured_ms) for name, ms in others.items()},
            by_source={
                source: ErrorRow.of(checked.predicted_ms[own], checked.measured_ms[own], inside[own])
                for source in table.sources
                if (own := rows.source == source).any()
            },
            by_family={
                family: ErrorRow.of(checked.kernel_seen_ms[own], checked.kernel_observed_ms[own])
                for family in sorted(set(kernel_family))
                if (own := kernel_family == family).any()
            },
            kinds=dict(predictor.kinds_),
            interval=float(np.median((np.exp(high) - np.exp(low)) / 2)),
            points=tuple(
                (float(f"{measured:.6g}"), float(f"{predicted:.6g}"), str(source))
                for measured, predicted, source in zip(
                    checked.measured_ms, checked.predicted_ms, rows.source, strict=True
                )
            ),
            bounds=tuple(
                (float(f"{least:.6g}"), float(f"{most:.6g}"))
                for least, most in zip(
                    checked.predicted_ms * np.exp(low), checked.predicted_ms * np.exp(high), strict=True
                )
            ),
            residuals={
                family: _quantiles(checked.kernel_seen_ms[own] / checked.kernel_observed_ms[own] - 1)
                for family in sorted(set(kernel_family))
                if (own := kernel_family == family).any()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The card as a Markdown page."""
        lines = [
            f"# Latency predictor of {self.device}: error card",
            "",
            f"{self.networks} networks, {self.kernels} kernel instances, {self.seconds / 60:.1f} minutes of measuring."
            f" Noise floor (p95 of test against retest): {self.noise_floor:.1%}.",
            "",
            "| networks | n | MAPE | RMSPE | within 5 % | within 10 % | Spearman | in 90 % interval |",
            "|---|---|---|---|---|---|---|---|",
            _line("held out at random", self.unseen),
        ]
        if self.unseen_family is not None:
            lines.append(_line("whole family held out", self.unseen_family))
        lines += [_line(f"rival: {RIVAL_NAMES[name]}", row) for name, row in self.rivals.items()]
        lines += [_line(f"held out at random, {source}", row) for source, row in self.by_source.items()]
        lines += ["", f"Median half-width of the 90 % interval: {self.interval:.1%}.", ""]
        lines += [
            "Kernels of networks held out, against their profiled shares (the profiler's own addition on both sides):",
            "",
            "| kernel family | n | MAPE | RMSPE | within 5 % | within 10 % | Spearman |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_line(family, row, interval=False) for family, row in self.by_family.items()]
        other = [f"{family} ({kind})" for family, kind in sorted(self.kinds.items()) if kind != TREES]
        lines += ["", f"Corrected by other means than trees, which erred more held out: {', '.join(other) or 'none'}."]
        return "\n".join(lines) + "\n"


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Rank correlation; 0 where a side has no order."""
    from scipy.stats import rankdata

    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(two) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(one), rankdata(two))[0, 1])


def _line(name: str, row: ErrorRow, *, interval: bool = True) -> str:
    cells = [name, str(row.count), f"{row.mape:.1%}", f"{row.rmspe:.1%}", f"{row.within_5:.0%}", f"{row.within_10:.0%}"]
    cells.append(f"{row.spearman:.3f}")
    if interval:
        cells.append("" if row.coverage is None else f"{row.coverage:.0%}")
    return f"| {' | '.join(cells)} |"


def _quantiles(residuals: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{value:.5g}") for value in np.quantile(residuals, QUANTILES))


def _judge(
    judged: OutOfFold, checked: OutOfFold, left_out: OutOfFold | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which networks lie in their 90 % interval, (M,), and its ends as log(measured / predicted), each (M,).

    The networks of a fold are judged by intervals fitted on the errors of the others.
    """
    low, high = np.zeros(len(judged.fold)), np.zeros(len(judged.fold))
    for number in range(int(judged.fold.max()) + 1):
        held = judged.fold == number
        low[held], high[held] = fit_intervals(checked, left_out, ~held if not held.all() else held).log_bounds(
            judged.novelty[held], _LEVEL
        )
    return (judged.log_error >= low) & (judged.log_error <= high), low, high
