"""What the units of a network of cells cost in milliseconds: each operation, and each filter of every width.

Nothing is summed from tables of single operations: the whole network is lowered by the device's own runtime and priced
kernel by kernel, and an operation costs what the network without it saves, with the layout changes and sums around it.
A filter costs its share of the next channels that can go together: a finite difference, because milliseconds fall in
steps.

Reference: MGAS (arXiv 2310.15074) leaves a place for the cost of an operation in its loss, which its code sets to 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.latency.lowering import Lowering
from hwsearch.latency.network import NetworkLatency
from hwsearch.latency.quantising import quantise_network, template_for
from hwsearch.latency.width_table import Prices
from hwsearch.models.cells import CellNetwork, Genotype
from hwsearch.search.budget import Budget, Limit
from hwsearch.search.mgas_onnx import cells_onnx

if TYPE_CHECKING:
    from hwsearch.device.session import DeviceSession
    from hwsearch.latency.predictor import LatencyPredictor

Floats = NDArray[np.float64]
#: A genotype and its widths (``Genotype.widths``).
Sized = tuple[Genotype, Mapping[str, int]]
#: An operation: cell, edge, name.
Unit = tuple[int, int, str]

_BATCH = 32  # networks a job


class CellCost(Protocol):
    """What a search of cells asks about milliseconds."""

    def ms(self, networks: Sequence[Sized]) -> Floats:
        """Predicted milliseconds (N,)."""

    def narrowed(self, network: CellNetwork, budget: Budget, quantum: int) -> Narrowed:
        """The widths of one network, and the budget over them."""


@dataclass(frozen=True)
class Narrowed:
    """One genotype as an ordinary network with widths: where a search ends exactly on its budget.

    ``template`` slices the network's ONNX (None where nothing is exported).
    """

    space: WidthSpace
    budget: Budget
    template: Any = None


class DeviceCost:
    """Milliseconds on a device: predicted from the kernels that its runtime makes, and measured where asked for.

    Args:
        predictor: fitted for the device.
        session: an open session on it; it stays the caller's to close.
        input_shape: ``(1, C, H, W)``.
        measure: milliseconds of an ONNX file measured on the device; None where predictions are to decide.

    Example:
        >>> cost = DeviceCost(predictor, session, (1, 1, 28, 28))                     # doctest: +SKIP
        >>> cost.ms([(genotype, genotype.widths())])                                  # doctest: +SKIP
        array([1.84])
    """

    def __init__(
        self,
        predictor: LatencyPredictor,
        session: DeviceSession,
        input_shape: Sequence[int],
        *,
        measure: Callable[[bytes], float] | None = None,
    ) -> None:
        self.predictor, self.session, self.input_shape = predictor, session, tuple(input_shape)
        self.measure = measure
        self._prices = Prices(predictor)
        self._known: dict[Any, float] = {}

    def ms(self, networks: Sequence[Sized]) -> Floats:
        """Predicted milliseconds (N,); what was asked before is remembered.

        Raises:
            DeviceJobError: the runtime rejects a network.
        """
        keys = [(genotype.blueprint, genotype.kept, tuple(sorted(widths.items()))) for genotype, widths in networks]
        new = {key: sized for key, sized in zip(keys, networks, strict=True) if key not in self._known}
        for start in range(0, len(new), _BATCH):
            part = list(new.items())[start : start + _BATCH]
            files = [cells_onnx(genotype, widths, self.input_shape) for _, (genotype, widths) in part]
            if self.session.device.precision == "int8":
                files = [quantise_network(file) for file in files]
            for (key, _), kernels in zip(part, self.session.lower(files), strict=True):
                self._known[key] = self._priced(kernels)
        return np.asarray([self._known[key] for key in keys], dtype=np.float64)

    def narrowed(self, network: CellNetwork, budget: Budget, quantum: int) -> Narrowed:
        """The widths of one network in steps of ``quantum``, and the budget's first limit over them.

        Raises:
            UnsupportedModelError: the network cannot be exported.
        """
        import torch

        from hwsearch.graph.onnx_build import OnnxTemplate
        from hwsearch.reparam.fold import fold

        example = torch.zeros(self.input_shape)
        plain = copy.deepcopy(network).eval()
        space = WidthSpace.from_model(plain, example, quantum=quantum)
        template = template_for(
            OnnxTemplate(space, fold(plain, example, require=False), example), self.session.device.precision
        )
        latency = NetworkLatency(space, self.predictor, Lowering(template, self.session), lower_each=True)
        limit, measure = budget.limits[0], None
        if self.measure is not None:
            timed = self.measure

            def measure(choice: WidthChoice) -> float:
                return timed(template.slice(choice))

        narrow = Limit(latency, limit.max_ms, limit.quantile, limit.name, measure=measure)
        return Narrowed(space, Budget([narrow], floor=budget.floor), template)

    def _priced(self, kernels: Sequence[Any]) -> float:
        """One network's kernels as ``NetworkLatency`` prices them."""
        prices = self._prices.of(kernels)
        mb = max(sum(price.mb for price in prices), 1e-12)
        total = sum(price.ms for price in prices) + float(self.predictor.context_ms(np.array([mb]))[0])
        return float(self.predictor.stretched(np.array([total + self.predictor.overhead_ms]))[0])


@dataclass(frozen=True)
class Worth:
    """Milliseconds of a network and of its units.

    Attributes:
        ms: of the whole.
        operations: what the network without each saves, 0 or more; none for the last one of a node.
        filters: per tie (``Genotype.ties``) the milliseconds of one filter, 0 or more.
    """

    ms: float
    operations: Mapping[Unit, float]
    filters: Mapping[tuple[str, ...], float]


def rounded(widths: Mapping[str, int], full: Mapping[str, int], quantum: int) -> dict[str, int]:
    """Widths as they would be built: up to the next multiple of the quantum, at most the full one."""
    return {name: min(-(-width // quantum) * quantum, full[name]) for name, width in widths.items()}


def without(sized: Sized, unit: Unit) -> Sized | None:
    """A network with one operation less, or None where that is the last one of its node."""
    genotype, widths = sized
    cell, edge, name = unit
    node = genotype.blueprint.edges()[edge][1]
    entering = [u for u in genotype.operations() if u[0] == cell and genotype.blueprint.edges()[u[1]][1] == node]
    if len(entering) == 1:
        return None
    left = genotype.without(cell, edge, name)
    return left, {place: widths[place] for place in left.widths()}


def narrower(sized: Sized, tied: Sequence[str], width: int) -> Sized:
    """A network whose tied widths are ``width``."""
    return sized[0], {**sized[1], **dict.fromkeys(tied, width)}


def worth(cost: CellCost, sized: Sized, quantum: int, *, least: int = 1, filters: bool = True) -> Worth:
    """Price a network and every unit of it.

    Args:
        sized: widths are multiples of the quantum, or full ones (``rounded``).
        least: no width is asked about below this.
    """
    genotype, widths = sized
    units = list(genotype.operations())
    reduced = {unit: less for unit in units if (less := without(sized, unit)) is not None}
    steps: list[tuple[tuple[str, ...], int]] = []
    for tied in genotype.ties() if filters else ():
        now = widths[tied[0]]
        # two steps: one alone may save nothing, where time falls every other step
        steps += [(tied, now - k * quantum) for k in (1, 2) if now - k * quantum >= max(least, 1)]
    times = cost.ms([sized, *reduced.values(), *(narrower(sized, tied, width) for tied, width in steps)])
    whole, saved = float(times[0]), times[0] - times[1:]
    operations = {unit: max(float(ms), 0.0) for unit, ms in zip(reduced, saved[: len(reduced)], strict=True)}
    found = dict.fromkeys(genotype.ties() if filters else (), 0.0)
    for (tied, width), ms in zip(steps, saved[len(reduced) :], strict=True):
        found[tied] = max(found[tied], float(ms) / (widths[tied[0]] - width))
    return Worth(whole, operations, found)


def cheapest(cost: CellCost, genotype: Genotype, quantum: int, least: int = 1) -> tuple[Sized, float]:
    """The network of fewest milliseconds among the plainest: one operation a node, the same everywhere, and every width
    at its smallest; and its milliseconds."""
    blueprint, tries = genotype.blueprint, []
    edges = blueprint.edges()
    for operation in blueprint.operations:
        for source in (0, 1):
            one = tuple((operation,) if at == source else () for at, _ in edges)
            plain = Genotype(blueprint, (one,) * blueprint.cells)
            smallest = {name: min(max(quantum, least), width) for name, width in plain.widths().items()}
            tries.append((plain, smallest))
    times = cost.ms(tries)
    at = int(np.argmin(times))
    return tries[at], float(times[at])
