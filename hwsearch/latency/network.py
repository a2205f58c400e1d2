"""``NetworkLatency``: milliseconds of every choice of a width space, as a ``Budget`` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hwsearch.errors import InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.latency.lowering import Lowering
from hwsearch.latency.predictor import LatencyPredictor, NetworkEstimate

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NetworkLatency:
    """Predicted milliseconds of choices of one space on one device.

    Each distinct choice is lowered once and each distinct kernel priced once; asking again is a look-up.

    Args:
        space: the width space; a space restricted from it is answered too, as its choices are choices of this one.
        predictor: prices kernels.
        lowering: a choice's kernels, from the runtime itself.
        factor: every time is multiplied by it; see ``corrected``.

    Example:
        >>> latency = NetworkLatency(space, predictor, Lowering(template, session))           # doctest: +SKIP
        >>> latency.evaluate(space.choice_array([space.full()]))                              # doctest: +SKIP
        array([3.02])
    """

    space: WidthSpace
    predictor: LatencyPredictor
    lowering: Lowering
    factor: float = 1.0
    _prices: dict[Kernel, tuple[float, bool]] = field(default_factory=dict, repr=False, compare=False)
    _sums: dict[tuple[int, ...], tuple[float, float]] = field(default_factory=dict, repr=False, compare=False)

    def evaluate(self, choices: NDArray[np.int64]) -> Floats:
        """Milliseconds (N,) of choices (N, G)."""
        return self._priced(choices)[:, 0]

    def interval(self, choices: NDArray[np.int64], level: float = 0.9) -> tuple[Floats, Floats]:
        """(low_ms, high_ms), each (N,), between which the measured time lies with probability ``level``."""
        priced = self._priced(choices)
        low, high = self.predictor.interval(priced[:, 0] / self.factor, priced[:, 1], level)
        return low * self.factor, high * self.factor

    def estimate(self, choice: WidthChoice, level: float = 0.9) -> NetworkEstimate:
        """One choice in full, kernel by kernel; not multiplied by ``factor``."""
        return self.predictor.network(self.kernels(choice), level)

    def kernels(self, choice: WidthChoice) -> tuple[Kernel, ...]:
        """The kernels that the runtime runs for a choice."""
        return self.lowering.kernels([choice])[0]

    def corrected(self, factor: float) -> NetworkLatency:
        """The same latency with every time multiplied by ``factor`` once more: measured over predicted.

        Raises:
            InputError: the factor is not a finite positive number.
        """
        if not np.isfinite(factor) or factor <= 0:
            raise InputError(f"a correction of {factor!r} makes no sense: give a finite number above 0")
        return NetworkLatency(
            self.space, self.predictor, self.lowering, self.factor * factor, self._prices, self._sums
        )

    def _priced(self, choices: NDArray[np.int64]) -> Floats:
        """(N, 2): milliseconds, and the share of them that comes from kernels like profiled ones."""
        rows = [tuple(map(int, row)) for row in np.asarray(choices, dtype=np.int64)]
        missing = list(dict.fromkeys(row for row in rows if row not in self._sums))
        if missing:
            networks = self.lowering.kernels([WidthChoice(row) for row in missing])
            self._price(networks)
            for row, kernels in zip(missing, networks, strict=True):
                prices = [self._prices[kernel] for kernel in kernels]
                total = float(np.sum([ms for ms, _ in prices]))
                known = float(np.sum([ms for ms, sure in prices if sure]))
                self._sums[row] = (total + self.predictor.overhead_ms, known / total)
        found = np.asarray([self._sums[row] for row in rows], dtype=np.float64).reshape(len(rows), 2)
        return found * [self.factor, 1.0]

    def _price(self, networks: Sequence[tuple[Kernel, ...]]) -> None:
        """Price all kernels that are new, in one call."""
        new = list(dict.fromkeys(k for kernels in networks for k in kernels if k not in self._prices))
        if new:
            sure = [self.predictor.model_.doubt(kernel) is None for kernel in new]
            self._prices.update(zip(new, zip(map(float, self.predictor.predict(new)), sure, strict=True), strict=True))
