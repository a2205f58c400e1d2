"""``NetworkLatency``: milliseconds of width choices, which is all that a search ever asks of a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwsearch.errors import InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.graph.widths import WidthChoice
from hwsearch.latency.features import weight_mb
from hwsearch.latency.lowering import Lowering
from hwsearch.latency.predictor import LatencyPredictor, NetworkEstimate

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace

Floats = NDArray[np.float64]


class NetworkLatency:
    """Predicted milliseconds over a width space on one device.

    A choice is lowered once and a kernel priced once; both are remembered, so asking again costs a look-up.

    Args:
        space: the widths.
        predictor: fitted for the device.
        lowering: turns choices into the device's kernels; by default one of its own, for the space's model, on the
            device that the predictor was made for.
        factor: every time is multiplied by it, see ``corrected``.

    Raises:
        InputError: the predictor was made for another device than the lowering asks.

    Example:
        >>> latency = NetworkLatency(space, predictor, Lowering(template, session))    # doctest: +SKIP
        >>> latency.evaluate(space.choice_array([space.full(), space.smallest()]))     # doctest: +SKIP
        array([3.02, 0.21])
    """

    def __init__(
        self, space: WidthSpace, predictor: LatencyPredictor, lowering: Lowering | None = None, *, factor: float = 1.0
    ) -> None:
        lowering = lowering if lowering is not None else Lowering.of(space, predictor.device_)
        if predictor.device_ != lowering.session.device.name:
            raise InputError(
                f"the predictor is for device {predictor.device_!r}, the lowering asks"
                f" {lowering.session.device.name!r}; use the predictor of that device"
            )
        if not (math.isfinite(factor) and factor > 0):
            raise InputError(f"the correction is {factor!r}; use measured over predicted, a positive number")
        self.space = space
        self.predictor = predictor
        self.lowering = lowering
        self.factor = factor
        self._memo = _Memo()

    def evaluate(self, choices: ArrayLike) -> Floats:
        """Milliseconds (N,) of choices, an int array (N, groups).

        Raises:
            InputError: a choice that does not belong to the template's space.
            DeviceJobError: the runtime rejects a candidate.
        """
        return np.asarray(self._priced(choices)[:, 0] * self.factor)

    def coverage(self, choices: ArrayLike) -> Floats:
        """Share of each choice's milliseconds that comes from kernels like profiled ones, (N,)."""
        return np.asarray(self._priced(choices)[:, 1])

    def interval(self, choices: ArrayLike, level: float = 0.9) -> tuple[Floats, Floats]:
        """(low_ms, high_ms), each (N,): what ``measured_ms`` lies between with probability ``level``."""
        priced = self._priced(choices)
        return self.predictor.interval(priced[:, 0] * self.factor, priced[:, 1], level)

    def estimate(self, choice: WidthChoice, level: float = 0.9) -> NetworkEstimate:
        """One choice in full: interval, coverage, unknown kernels, milliseconds of each kernel."""
        found = self.predictor.network(self.kernels(choice), level)
        if self.factor == 1.0:
            return found
        f = self.factor
        return replace(
            found, ms=found.ms * f, low_ms=found.low_ms * f, high_ms=found.high_ms * f, p90_ms=found.p90_ms * f,
            kernel_ms=tuple(ms * f for ms in found.kernel_ms),
        )  # fmt: skip

    def kernels(self, choice: WidthChoice) -> tuple[Kernel, ...]:
        """The kernels that a choice becomes on the device."""
        return self.lowering.kernels([choice])[0]

    def corrected(self, factor: float) -> NetworkLatency:
        """The same latency times ``factor`` (measured over predicted); what is known already is shared.

        Factors multiply: ``latency.corrected(1.1).corrected(1.1)`` is 1.21 times ``latency``.
        """
        other = NetworkLatency(self.space, self.predictor, self.lowering, factor=self.factor * factor)
        other._memo = self._memo
        return other

    def _priced(self, choices: ArrayLike) -> Floats:
        """(N, 2): milliseconds without the correction, and the share of them that known kernels take."""
        rows = np.asarray(choices, dtype=np.int64).reshape(-1, len(self.space.groups)).tolist()
        keys = [tuple(row) for row in rows]
        memo = self._memo
        new = [WidthChoice(key) for key in dict.fromkeys(keys) if key not in memo.networks]
        if new:
            memo.price(new, self.lowering.kernels(new), self.predictor)
        return np.array([memo.networks[key] for key in keys], dtype=np.float64).reshape(len(keys), 2)


class _Memo:
    """What was priced: kernels to (ms, megabytes of weights, known), width tuples to (ms, coverage)."""

    def __init__(self) -> None:
        self.kernels: dict[Kernel, tuple[float, float, bool]] = {}
        self.networks: dict[tuple[int, ...], tuple[float, float]] = {}

    def price(
        self, choices: Sequence[WidthChoice], networks: Sequence[tuple[Kernel, ...]], predictor: LatencyPredictor
    ) -> None:
        """Price networks; each new kernel once, all in one call."""
        new = list(dict.fromkeys(k for kernels in networks for k in kernels if k not in self.kernels))
        for kernel, ms, mb in zip(new, predictor.predict(new).tolist(), weight_mb(new).tolist(), strict=True):
            self.kernels[kernel] = (ms, mb, predictor.model_.doubt(kernel) is None)
        for choice, kernels in zip(choices, networks, strict=True):
            ms, mb, known = np.array([self.kernels[kernel] for kernel in kernels], dtype=np.float64).T
            whole = max(float(mb.sum()), 1e-12)
            priced = ms + mb / whole * predictor.context_ms(np.array([whole]))[0]
            total = float(priced.sum())
            guessed = float((priced * (1 - known)).sum())
            self.networks[choice.widths] = (total + predictor.overhead_ms, 1 - guessed / total)
