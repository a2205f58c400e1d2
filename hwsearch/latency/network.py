"""``NetworkLatency``: milliseconds of width choices, which is all that a search ever asks of a device.

A choice is priced by look-up in a ``WidthTable``, which needs the space's ``LoweringTemplate``. That one is kept beside
the device's table, and learnt from the device the first time a space is asked about; with it the device is not needed.
Where the runtime's decisions could not be learnt well enough every choice is lowered by the runtime itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwsearch.device.spec import Device
from hwsearch.errors import InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.graph.widths import WidthChoice
from hwsearch.latency.lowering import Lowering
from hwsearch.latency.lowering_template import LoweringTemplate, differences, stored_path
from hwsearch.latency.predictor import LatencyPredictor, NetworkEstimate
from hwsearch.latency.width_table import Prices, WidthTable

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace

Floats = NDArray[np.float64]

#: A template is used when at most this share of the choices it was checked on had any wrong kernel.
USABLE_ERROR = 0.03


@dataclass
class _Shared:
    """What corrected copies of a latency have in common."""

    prices: Prices
    ready: bool = False
    template: LoweringTemplate | None = None
    table: WidthTable | None = None
    #: Without a table: widths to (milliseconds, coverage, novelty).
    networks: dict[tuple[int, ...], tuple[float, float, float]] = field(default_factory=dict)


class NetworkLatency:
    """Predicted milliseconds over a width space on one device.

    Args:
        space: the widths.
        predictor: fitted for the device.
        lowering: asks the runtime for the kernels of choices; by default one of its own, for the space's model, on the
            device that the predictor was made for, opened only if no template is found.
        template: the space's lowering as learnt before; by default the one beside the device's table, or a new one.
        lower_each: ask the runtime about every choice instead of using a template.
        factor: every time is multiplied by it, see ``corrected``.

    Raises:
        InputError: the predictor was made for another device than the lowering asks or the template is of, or the
            template is of another space.

    Example:
        >>> latency = NetworkLatency(space, predictor, Lowering(template, session))    # doctest: +SKIP
        >>> latency.evaluate(space.choice_array([space.full(), space.smallest()]))     # doctest: +SKIP
        array([3.02, 0.21])
    """

    def __init__(
        self,
        space: WidthSpace,
        predictor: LatencyPredictor,
        lowering: Lowering | None = None,
        *,
        template: LoweringTemplate | None = None,
        lower_each: bool = False,
        factor: float = 1.0,
    ) -> None:
        if not (math.isfinite(factor) and factor > 0):
            raise InputError(f"the correction is {factor!r}; use measured over predicted, a positive number")
        if template is not None:
            _check_template(template, space, predictor)
        elif lowering is None:
            template = None if lower_each else _stored(space, predictor)
            lowering = Lowering.of(space, predictor.device_) if template is None else None
        if lowering is not None and predictor.device_ != lowering.session.device.name:
            raise InputError(
                f"the predictor is for device {predictor.device_!r}, the lowering asks"
                f" {lowering.session.device.name!r}; use the predictor of that device"
            )
        self.space = space
        self.predictor = predictor
        self.lowering = lowering
        self.lower_each = lower_each
        self.factor = factor
        self._shared = _Shared(Prices(predictor), template=template)

    def prepare(self, progress: Callable[[int, int, str], None] | None = None) -> NetworkLatency:
        """Find or learn the template and lay out the table now, instead of when the first choice is asked about.

        Args:
            progress: told (choices lowered, most that may be, what is going on) while a template is learnt.

        Raises:
            DeviceJobError: the runtime rejects a candidate.
            InputError: the template cannot be kept beside the device's table.
        """
        shared = self._shared
        if shared.ready or self.lower_each:
            return self
        if shared.template is None and self.lowering is not None:
            shared.template = learnt(self.lowering, self.space, progress)
        usable = shared.template is not None and shared.template.check.error <= USABLE_ERROR
        if not usable and self.lowering is None:
            self.lowering = Lowering.of(self.space, self.predictor.device_)
        if shared.template is not None and usable and WidthTable.fits(self.space, shared.template):
            shared.table = WidthTable(self.space, shared.template, self.predictor, shared.prices)
        shared.template = shared.template if usable else None
        shared.ready = True
        return self

    @property
    def table(self) -> WidthTable | None:
        """The look-up table; None where choices are priced one by one."""
        return self.prepare()._shared.table

    @property
    def template(self) -> LoweringTemplate | None:
        """The template; None where every choice is lowered by the runtime."""
        return self.prepare()._shared.template

    @property
    def by_look_up(self) -> bool:
        """Whether a choice costs a look-up only, so that it is not worth finding equal ones."""
        return self.table is not None

    def evaluate(self, choices: ArrayLike) -> Floats:
        """Milliseconds (N,) of choices, an int array (N, groups).

        Raises:
            InputError: a choice that does not belong to the template's space.
            DeviceJobError: the runtime rejects a candidate.
        """
        table = self.table
        found = table.evaluate(choices) if table is not None else self._priced(choices)[:, 0]
        return np.asarray(found * self.factor)

    def coverage(self, choices: ArrayLike) -> Floats:
        """Share of each choice's milliseconds that comes from kernels like profiled ones, (N,).

        Where a template failed some of its own checks, the share that it may get wrong is taken off.
        """
        table = self.table
        found = table.coverage(choices) if table is not None else self._priced(choices)[:, 1]
        return np.asarray(found * self._trust)

    def interval(self, choices: ArrayLike, level: float = 0.9) -> tuple[Floats, Floats]:
        """(low_ms, high_ms), each (N,): what ``measured_ms`` lies between with probability ``level``."""
        table = self.table
        novelty = table.novelty(choices) if table is not None else self._priced(choices)[:, 2]
        return self.predictor.interval(self.evaluate(choices), self.coverage(choices), level, novelty)

    def estimate(self, choice: WidthChoice, level: float = 0.9) -> NetworkEstimate:
        """One choice in full: interval, coverage, unknown kernels, milliseconds of each kernel."""
        found = self.predictor.network(self.kernels(choice), level)
        if self._trust < 1:
            low, high = self.interval(np.array([choice.widths]), level)
            low, high = low / self.factor, high / self.factor
            coverage = found.coverage * self._trust
            found = replace(found, coverage=coverage, low_ms=float(low[0]), high_ms=float(high[0]))
        if self.factor == 1.0:
            return found
        f = self.factor
        return replace(
            found, ms=found.ms * f, low_ms=found.low_ms * f, high_ms=found.high_ms * f, p90_ms=found.p90_ms * f,
            kernel_ms=tuple(ms * f for ms in found.kernel_ms),
        )  # fmt: skip

    def kernels(self, choice: WidthChoice) -> tuple[Kernel, ...]:
        """The kernels that a choice becomes on the device."""
        return self._lowered([choice])[0]

    def corrected(self, factor: float) -> NetworkLatency:
        """The same latency times ``factor`` (measured over predicted); what is known already is shared.

        Factors multiply: ``latency.corrected(1.1).corrected(1.1)`` is 1.21 times ``latency``.
        """
        if not (math.isfinite(factor) and factor > 0):
            raise InputError(f"the correction is {factor!r}; use measured over predicted, a positive number")
        other: NetworkLatency = object.__new__(NetworkLatency)
        other.__dict__.update(self.__dict__, factor=self.factor * factor)
        return other

    @property
    def _trust(self) -> float:
        template = self.template
        return 1.0 if template is None else 1 - template.check.error * template.check.worst

    def _lowered(self, choices: Sequence[WidthChoice]) -> list[tuple[Kernel, ...]]:
        template = self.template
        for choice in choices:
            self.space.validate(choice)
        if template is not None:
            return template.lower([choice.widths for choice in choices])
        assert self.lowering is not None  # without a usable template there is one
        return self.lowering.kernels(choices)

    def _priced(self, choices: ArrayLike) -> Floats:
        """(N, 3), one by one: milliseconds without the correction, the share of known kernels in them, the novelty."""
        rows = np.asarray(choices, dtype=np.int64).reshape(-1, len(self.space.groups)).tolist()
        keys = [tuple(row) for row in rows]
        networks = self._shared.networks
        new = [WidthChoice(key) for key in dict.fromkeys(keys) if key not in networks]
        for choice, kernels in zip(new, self._lowered(new) if new else [], strict=True):
            prices = self._shared.prices.of(kernels)
            ms, mb, guessed, novelty = np.array([(p.ms, p.mb, *p.marks) for p in prices], dtype=np.float64).T
            whole = max(float(mb.sum()), 1e-12)
            priced = ms + mb / whole * self.predictor.context_ms(np.array([whole]))[0]
            total = float(priced.sum())
            shares = (float((priced * mark).sum()) / total for mark in (guessed, novelty))
            stretched = float(self.predictor.stretched(np.array([total + self.predictor.overhead_ms]))[0])
            networks[choice.widths] = (stretched, 1 - next(shares), next(shares))
        return np.array([networks[key] for key in keys], dtype=np.float64).reshape(len(keys), 3)


def learnt(
    lowering: Lowering, space: WidthSpace, progress: Callable[[int, int, str], None] | None = None
) -> LoweringTemplate:
    """The template of a space on the lowering's device: the one beside the device's table, else a new one, kept there.

    Raises:
        DeviceJobError: the runtime rejects a candidate.
        InputError: the folder cannot be written.
    """
    from hwsearch.latency.lowering_learning import learn

    folder, fingerprint = lowering.session.device.table_folder, lowering.session.fingerprint
    path = stored_path(folder, space, fingerprint)
    if path.exists():
        return LoweringTemplate.load(path, space, fingerprint)
    template = learn(lowering, progress=progress)
    template.save(path.parent)
    return template


def _stored(space: WidthSpace, predictor: LatencyPredictor) -> LoweringTemplate | None:
    """The template beside the table of the predictor's device, or None."""
    path = stored_path(Device.load(predictor.device_).table_folder, space, predictor.fingerprint_)
    return LoweringTemplate.load(path, space, predictor.fingerprint_) if path.exists() else None


def _check_template(template: LoweringTemplate, space: WidthSpace, predictor: LatencyPredictor) -> None:
    reason = template.foreign(space)
    if reason is not None:
        raise InputError(f"the template is of another space: it has {reason}; learn one for this space")
    different = differences(template.fingerprint, predictor.fingerprint_)
    if different:
        raise InputError(f"the template is of another device than the predictor: {different}; learn it on that device")
