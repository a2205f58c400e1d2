"""``P90Latency``: a budget that nine runs of ten must keep, instead of the undisturbed time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from hwsearch.latency.network import NetworkLatency


class P90Latency:
    """The ninetieth percentile of a network's single runs, as a latency that a ``Limit`` takes.

    Short networks scatter more than long ones; by how much was fitted on the campaign's raw runs
    (``LatencyPredictor.p90_ms``). Such a limit is predicted, not measured: a search corrects the time itself.

    Args:
        latency: of the device, see ``NetworkLatency``.

    Example:
        >>> Limit(P90Latency(latency), max_ms=3.0, name="x86-ort-1t, p90")                    # doctest: +SKIP
    """

    def __init__(self, latency: NetworkLatency) -> None:
        self.latency = latency

    def evaluate(self, choices: ArrayLike) -> NDArray[np.float64]:
        """Milliseconds (N,) of choices, an int array (N, groups)."""
        return self._p90(self.latency.evaluate(choices))

    def interval(self, choices: ArrayLike, level: float = 0.9) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(low_ms, high_ms), each (N,): the percentile at either end of the time's own interval."""
        low, high = self.latency.interval(choices, level)
        return self._p90(low), self._p90(high)

    def corrected(self, factor: float) -> P90Latency:
        """The same with every time multiplied by ``factor``."""
        return P90Latency(self.latency.corrected(factor))

    def _p90(self, ms: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self.latency.predictor.p90_ms(ms))
