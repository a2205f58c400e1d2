"""Which networks to time next: those made of kernels that the predictor gets wrong, by their part of the time.

After each round of a campaign a quick predictor is fitted on what was measured and judged by cross-validation. That
gives each kind of kernel an error, and each size a novelty (``interval.py``). Of several candidates for a place of the
plan the one is timed whose expected error, weighted by the milliseconds of its kernels, is largest; every other place
keeps the plan's own draw, so that the sample stays spread over everything. nn-Meter (MobiSys 2021, section 4.3) also
samples around what it gets wrong, but kernel by kernel and alone; here kernels stand in networks, and how often one
occurs counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.boosting import BoostSettings
from hwsearch.latency.features import layouts
from hwsearch.latency.interval import Profiled
from hwsearch.latency.model import KernelModel
from hwsearch.latency.table import NetworkSample
from hwsearch.latency.training import Rows
from hwsearch.latency.validation import out_of_fold, random_folds

#: Steps of a campaign between two fits, and networks that are needed for the first.
ROUND, FEWEST = 6, 64
#: Candidates for a place; the first is the plan's own.
CANDIDATES = 4
_QUICK = BoostSettings(rounds=15, learning_rate=0.3)
_FOLDS = 3
_PRIOR = 10.0  # a kind's error is held towards that of all kernels by as much as this many kernels would


@dataclass(frozen=True)
class Need:
    """What is still worth timing.

    Attributes:
        mape: mean absolute relative error of whole networks, held out; 0.05 is 5 %.
        errors: mean absolute log error of held-out kernels, by kind.
        typical: of all kernels: for kinds that were not seen.
        profiled: where the measured kernels lie.
        model: quick predictor, for the share of a network's time that a kernel takes.
    """

    mape: float
    errors: Mapping[str, float]
    typical: float
    profiled: Profiled
    model: KernelModel

    @classmethod
    def of(cls, samples: Sequence[NetworkSample], seed: int = 0) -> Need:
        """From what was measured so far: ``FEWEST`` networks or more."""
        rows = Rows.of(samples)
        checked = out_of_fold(rows, random_folds(len(samples), _FOLDS, seed), _QUICK)
        off = np.abs(np.log(checked.kernel_seen_ms / checked.kernel_observed_ms))
        kinds = np.array([_kind(kernel) for kernel in rows.kernels], dtype=object)[rows.kernel]
        typical = float(off.mean())
        errors = {
            str(kind): float((off[kinds == kind].sum() + _PRIOR * typical) / ((kinds == kind).sum() + _PRIOR))
            for kind in sorted(set(kinds))
        }
        mape = float(np.abs(checked.predicted_ms / checked.measured_ms - 1).mean())
        return cls(mape, errors, typical, Profiled.of(rows.kernels), KernelModel.fit(rows, _QUICK))

    def score(self, kernels: Sequence[Kernel]) -> float:
        """How much is to be learnt of a network: the expected error of its kernels, weighted by their time."""
        ms = self.model.ms(list(kernels))
        error = np.array([self.errors.get(_kind(kernel), 2 * self.typical) for kernel in kernels])
        return float((ms * error * (1 + self.profiled.novelty(kernels))).sum() / ms.sum())


def _kind(kernel: Kernel) -> str:
    return f"{kernel.family}|{kernel.op}|{layouts(kernel)}"
