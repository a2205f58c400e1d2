"""Which networks to time next: those made of kernels that the predictor gets wrong, by their part of the time.

After each round of a campaign a quick predictor is fitted on what was measured and judged by cross-validation. That
gives each kind of kernel an error, and each size a novelty (``interval.py``). Of several candidates for a place of the
plan the one is timed whose expected error, weighted by the milliseconds of its kernels, is largest; every other place
keeps the plan's own draw, so that the sample stays spread over everything. nn-Meter (MobiSys 2021, section 4.3) also
samples around what it gets wrong, but kernel by kernel and alone; here kernels stand in networks, and how often one
occurs counts.
"""

from __future__ import annotations

import math
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

#: Networks that are needed for the first fit. The first is due after ``FIRST`` steps of a campaign, each further one
#: when the steps have grown by half: what is known changes ever more slowly, and a fit costs ever more.
FEWEST, FIRST, _GROWTH = 64, 4, 1.5
#: Candidates for a place; the first is the plan's own.
CANDIDATES = 3
_QUICK = BoostSettings(rounds=15, learning_rate=0.3)
_FOLDS = 3
_PRIOR = 10.0  # a kind's error is held towards that of all kernels by as much as this many kernels would


def round_start(step: int) -> int:
    """The step before which the fit was made that step number ``step`` is chosen by; 0 where there is none yet.

    Example:
        >>> [round_start(step) for step in (0, 3, 4, 5, 6, 8, 9)]
        [0, 0, 4, 4, 6, 6, 9]
    """
    start = 0
    following = FIRST
    while following <= step:
        start, following = following, math.ceil(following * _GROWTH)
    return start


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
        checked = out_of_fold(rows, random_folds(len(samples), _FOLDS, seed), _QUICK, kinds={})
        off = np.abs(np.log(checked.kernel_seen_ms / checked.kernel_observed_ms))
        kinds = np.array([_kind(kernel) for kernel in rows.kernels], dtype=object)[rows.kernel]
        typical = float(off.mean())
        errors = {
            str(kind): float((off[kinds == kind].sum() + _PRIOR * typical) / ((kinds == kind).sum() + _PRIOR))
            for kind in sorted(set(kinds))
        }
        mape = float(np.abs(checked.predicted_ms / checked.measured_ms - 1).mean())
        return cls(mape, errors, typical, Profiled.of(rows.kernels), KernelModel.fit(rows, _QUICK))

    def scores(self, networks: Sequence[Sequence[Kernel]]) -> np.ndarray:
        """How much is to be learnt of each network, (M,): the expected error of its kernels, weighted by their time."""
        kernels = [kernel for network in networks for kernel in network]
        owner = np.repeat(np.arange(len(networks)), [len(network) for network in networks])
        ms = self.model.ms(kernels)
        error = np.array([self.errors.get(_kind(kernel), 2 * self.typical) for kernel in kernels])
        total = np.bincount(owner, ms * error * (1 + self.profiled.novelty(kernels)), minlength=len(networks))
        return np.asarray(total / np.maximum(np.bincount(owner, ms, minlength=len(networks)), 1e-12))


def _kind(kernel: Kernel) -> str:
    return f"{kernel.family}|{kernel.op}|{layouts(kernel)}"
