"""Why a network takes the time it takes: milliseconds and bound of each layer, stair edges, and a sentence or two.

**Bound.** The analytic base of a kernel is a sum of terms (``base.TERMS``), each the cost of one thing that the kernel
must do. They fall into three kinds:

* *compute*: multiply-accumulates, and what the inner loops of a convolution do per row and per partial sum;
* *memory*: bytes read and written, windows copied before a plain convolution, weights that fall out of the caches;
* *overhead*: what is paid once a kernel or once a call, whatever its size.

A kernel's predicted milliseconds are divided in the proportion of its terms; a layer is *bound* by the kind that takes
the largest part. This is the predictor's own account of its price, not a reading of hardware counters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.features import TERMS, cost_terms
from hwsearch.latency.layers import LayerNames
from hwsearch.latency.lowering import with_distinct_biases
from hwsearch.latency.predictor import LatencyPredictor, NetworkEstimate
from hwsearch.latency.reasons import reasons
from hwsearch.latency.stairs import StairCurve, curves

if TYPE_CHECKING:
    from hwsearch.device.session import DeviceSession
    from hwsearch.graph.widths import WidthChoice
    from hwsearch.latency.network import NetworkLatency

BOUNDS = ("compute", "memory", "overhead")
_MEMORY, _OVERHEAD = ("bytes", "columns"), ("one", "calls")


@dataclass(frozen=True)
class Parts:
    """Milliseconds by kind, see the module."""

    compute_ms: float
    memory_ms: float
    overhead_ms: float

    @property
    def ms(self) -> float:
        """All of them."""
        return self.compute_ms + self.memory_ms + self.overhead_ms

    @property
    def bound(self) -> str:
        """The kind that takes the most: compute, memory or overhead."""
        values = (self.compute_ms, self.memory_ms, self.overhead_ms)
        return BOUNDS[values.index(max(values))]

    def __add__(self, other: Parts) -> Parts:
        return Parts(
            self.compute_ms + other.compute_ms, self.memory_ms + other.memory_ms, self.overhead_ms + other.overhead_ms
        )


@dataclass(frozen=True)
class KernelCost:
    """One executed kernel: its node, what it is, its predicted milliseconds by kind."""

    kernel: Kernel
    ms: float
    parts: Parts


@dataclass(frozen=True)
class LayerCost:
    """One layer with every kernel that serves it.

    Attributes:
        name: the layer's, as in the model.
        kernels: in order of execution.
        share: of the network's milliseconds.
        channels, runs_as: output channels as the model has them, and as the runtime pads them; None without a weight.
        stair: the curve of the width group that decides its output channels; None where no width can change.
    """

    name: str
    kernels: tuple[KernelCost, ...]
    share: float
    channels: int | None = None
    runs_as: int | None = None
    stair: StairCurve | None = None

    @property
    def parts(self) -> Parts:
        """Milliseconds by kind."""
        return sum((kernel.parts for kernel in self.kernels), Parts(0.0, 0.0, 0.0))

    @property
    def ms(self) -> float:
        """Predicted milliseconds."""
        return sum(kernel.ms for kernel in self.kernels)

    @property
    def bound(self) -> str:
        """compute, memory or overhead."""
        return self.parts.bound

    @property
    def down(self) -> int | None:
        """Output channels at the next stair edge below, see ``StairCurve.down``."""
        return None if self.stair is None else self.stair.channels_at(self.stair.down, self.channels)

    @property
    def up(self) -> int | None:
        """The most output channels that cost no more, see ``StairCurve.up``."""
        return None if self.stair is None else self.stair.channels_at(self.stair.up, self.channels)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the curves are listed once, beside the layers."""
        stair = self.stair
        return {
            "name": self.name, "ms": self.ms, "share": self.share, "bound": self.bound, **asdict(self.parts),
            "channels": self.channels, "runs_as": self.runs_as, "group": None if stair is None else stair.group,
            "down": self.down, "up": self.up,
            "saved_ms": 0.0 if stair is None else stair.saved_ms,
            "kernels": [
                {"node": k.node, "op": k.op, "family": k.family, "ms": cost.ms, "bound": cost.parts.bound}
                for cost in self.kernels
                for k in [cost.kernel]
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class Explanation:
    """A network's predicted milliseconds, taken apart.

    Attributes:
        ms: of the whole network; ``overhead_ms`` of it belongs to no kernel.
        layers: in order of execution; with ``overhead_ms`` they sum to ``ms``.
        stairs: a curve for each width group, in the space's order; empty where ``note`` says why.
        reasons: one or two sentences why the network is not faster.
        note: why there are no stairs, or "".
    """

    ms: float
    overhead_ms: float
    layers: tuple[LayerCost, ...]
    stairs: tuple[StairCurve, ...]
    reasons: tuple[str, ...]
    note: str = ""

    @property
    def parts(self) -> Parts:
        """Milliseconds of all layers by kind."""
        return sum((layer.parts for layer in self.layers), Parts(0.0, 0.0, 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "ms": self.ms, "overhead_ms": self.overhead_ms, "parts": asdict(self.parts),
            "layers": [layer.to_dict() for layer in self.layers],
            "stairs": [stair.to_dict() for stair in self.stairs],
            "reasons": list(self.reasons), "note": self.note,
        }  # fmt: skip


def explain(onnx: bytes, kernels: Sequence[Kernel], predictor: LatencyPredictor, *, note: str = "") -> Explanation:
    """Explain any network, without stair edges.

    Args:
        onnx: the network as exported: its layers' names and true channel counts.
        kernels: what the device makes of it, from ``named_kernels``.
        predictor: of that device.
        note: why there are no stair edges.

    Raises:
        InputError: the network has no kernel.
        NotFittedError: the predictor is not fitted.
    """
    found = predictor.network(kernels)
    return _explanation(onnx, kernels, found, kernel_parts(kernels, found, predictor), (), note)


def explain_choice(
    latency: NetworkLatency, choice: WidthChoice, onnx: bytes, *, told: Callable[[int, int, str], None] | None = None
) -> Explanation:
    """Explain one choice of a width space, with the stair edges of every group around it.

    Args:
        latency: predicts the space's networks on the device.
        choice: the network.
        onnx: the network of that choice.
        told: progress: (done, of, what), first of learning the space's lowering where that is new, then of the curves.

    Raises:
        InputError: the choice does not belong to the space.
        DeviceJobError: the runtime rejects a candidate.

    Example:
        >>> found = explain_choice(latency, space.full(), template.slice(space.full()))     # doctest: +SKIP
        >>> found.reasons[0]                                                                # doctest: +SKIP
        'layer2.conv1: 66 channels run as 72: 64 would save 0.12 ms (18 %)'
    """
    latency.prepare(told)
    kernels, lowering = latency.kernels(choice), latency.lowering
    if lowering is not None:  # else the kernels come from a stored template, which knows the layers
        kernels = named_kernels(onnx, kernels, lowering.session)
    found = latency.estimate(choice)
    parts = kernel_parts(kernels, found, latency.predictor, latency.factor)
    return _explanation(onnx, kernels, found, parts, curves(latency, choice, told=told), "")


def named_kernels(onnx: bytes, kernels: Sequence[Kernel], session: DeviceSession) -> tuple[Kernel, ...]:
    """The kernels of a network with the layers that they came from.

    A runtime stores equal tensors once, under one name, so the zero biases of an untrained network make one layer look
    like another. Here they are told apart; should that change the kernels themselves, the given ones stay.

    Args:
        onnx: the network.
        kernels: what the device makes of it.
        session: an open session on the device.
    """
    named = session.lower([with_distinct_biases(onnx)])[0]
    return named if named == tuple(kernels) else tuple(kernels)


def kind_of(term: str) -> str:
    """Which of ``BOUNDS`` a term of the analytic base counts as.

    Example:
        >>> kind_of("macs_full"), kind_of("bytes_far"), kind_of("one")
        ('compute', 'memory', 'overhead')
    """
    if term.startswith(_OVERHEAD):
        return "overhead"
    return "memory" if term.startswith(_MEMORY) else "compute"


def kernel_parts(
    kernels: Sequence[Kernel], found: NetworkEstimate, predictor: LatencyPredictor, factor: float = 1.0
) -> list[Parts]:
    """Each kernel's milliseconds by kind; they sum to ``found.kernel_ms``."""
    model = predictor.model_
    terms = cost_terms(kernels, model.vocabulary)
    weights = np.array([model.base.weights[model.base.group(kernel)] for kernel in kernels])
    kinds = np.array([BOUNDS.index(kind_of(term)) for term in TERMS])
    costs = np.stack([(weights * terms)[:, kinds == kind].sum(axis=1) for kind in range(len(BOUNDS))], axis=1)
    # A kernel of which the base knows nothing costs what starting it costs.
    costs[costs.sum(axis=1) <= 0, BOUNDS.index("overhead")] = 1.0
    total = np.array(found.kernel_ms)
    whole = found.ms / factor
    factor *= float(predictor.stretched(np.array([whole]))[0]) / whole  # nearly: what the whole adds, each part bears
    own = predictor.predict(kernels) * factor
    start = np.clip(predictor.calibration_.b * factor, 0, own)  # a constant for each kernel
    parts = costs / costs.sum(axis=1, keepdims=True) * (own - start)[:, None]
    parts[:, BOUNDS.index("overhead")] += start
    parts[:, BOUNDS.index("memory")] += np.maximum(total - own, 0)  # weights beyond the caches
    parts *= (total / parts.sum(axis=1))[:, None]
    return [Parts(*map(float, row)) for row in parts]


def _explanation(
    onnx: bytes,
    kernels: Sequence[Kernel],
    found: NetworkEstimate,
    parts: Sequence[Parts],
    stairs: tuple[StairCurve, ...],
    note: str,
) -> Explanation:
    names = LayerNames.of(onnx)
    grouped: dict[str, list[KernelCost]] = {}
    for layer, kernel, ms, part in zip(names.layers_of(kernels), kernels, found.kernel_ms, parts, strict=True):
        grouped.setdefault(layer, []).append(KernelCost(kernel, ms, part))
    of_layer = {layer: stair for stair in stairs for layer in stair.layers}
    layers = tuple(
        _layer(name, tuple(costs), found.ms, names.channels.get(name), of_layer.get(name))
        for name, costs in grouped.items()
    )
    explanation = Explanation(found.ms, found.ms - sum(found.kernel_ms), layers, stairs, (), note)
    return replace(explanation, reasons=reasons(explanation))


def _layer(
    name: str, costs: tuple[KernelCost, ...], network_ms: float, channels: int | None, stair: StairCurve | None
) -> LayerCost:
    wide = [cost.kernel.out_channels for cost in costs if cost.kernel.weight_elements]
    runs_as = max(wide, default=None) if channels is not None else None
    return LayerCost(name or "network", costs, sum(c.ms for c in costs) / network_ms, channels, runs_as, stair)
