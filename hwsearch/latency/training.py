"""``Rows``: a table as arrays, made once and cut many times by cross-validation.

What a campaign knows of a kernel is its share of the profiled time. A runtime's profiler adds some microseconds to
every
node, which swells the shares of small kernels and squeezes those of large ones: the same convolution seems a third
faster inside a network of many tiny nodes. So the observation model is::

    share_i = (ms_i + profiler_ms) / (sum of ms + nodes * profiler_ms)

and ``profiler_ms`` is the value under which one kernel seen in several networks takes the same time in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.features import Vocabulary, cost_terms, describe, weight_mb
from hwsearch.latency.table import NetworkSample

_TRIED_MS = np.arange(0.0, 12.5, 0.5) * 1e-3


@dataclass(frozen=True)
class Rows:
    """Kernel instances of a table, one a row, with the network each belongs to.

    Shapes: R rows, U distinct kernels, M networks.

    Attributes:
        kernels: the distinct kernels, U of them.
        vocabulary: texts to numbers, from all of them.
        terms: ``cost_terms`` of the distinct kernels, (U, T).
        features: ``describe`` of them, (U, F); the column of the base is filled in by the fit.
        kernel: distinct kernel of each row, (R,).
        network: network of each row, (R,).
        share: share of its network's time, (R,).
        weight_mb: megabytes of weights of each distinct kernel, (U,).
        measured_ms, spread, nodes: of each network, (M,).
        source: family of each network, (M,).
    """

    kernels: tuple[Kernel, ...]
    vocabulary: Vocabulary
    terms: np.ndarray
    features: np.ndarray
    kernel: np.ndarray
    network: np.ndarray
    share: np.ndarray
    weight_mb: np.ndarray
    measured_ms: np.ndarray
    spread: np.ndarray
    nodes: np.ndarray
    source: np.ndarray

    @classmethod
    def of(cls, samples: Sequence[NetworkSample]) -> Rows:
        """The rows of these networks."""
        numbers: dict[Kernel, int] = {}
        kernel = [numbers.setdefault(k, len(numbers)) for sample in samples for k in sample.kernels]
        kernels = tuple(numbers)
        vocabulary = Vocabulary.of(kernels)
        return cls(
            kernels=kernels,
            vocabulary=vocabulary,
            terms=cost_terms(kernels, vocabulary),
            features=describe(kernels, vocabulary, np.zeros(len(kernels))),
            kernel=np.array(kernel, dtype=np.int64),
            network=np.repeat(np.arange(len(samples)), [len(s.kernels) for s in samples]),
            share=np.array([ms / sum(s.node_ms) for s in samples for ms in s.node_ms]),
            weight_mb=weight_mb(kernels),
            measured_ms=np.array([s.measured_ms for s in samples]),
            spread=np.array([s.spread for s in samples]),
            nodes=np.array([len(s.kernels) for s in samples]),
            source=np.array([s.source for s in samples]),
        )

    def only(self, networks: np.ndarray) -> Rows:
        """The rows of some networks (a mask (M,)), which are numbered anew; the distinct kernels stay."""
        rows = networks[self.network]
        return replace(
            self,
            kernel=self.kernel[rows],
            network=(np.cumsum(networks) - 1)[self.network[rows]],
            share=self.share[rows],
            measured_ms=self.measured_ms[networks],
            spread=self.spread[networks],
            nodes=self.nodes[networks],
            source=self.source[networks],
        )

    @property
    def network_mb(self) -> np.ndarray:
        """Megabytes of weights of each network, (M,)."""
        return np.bincount(self.network, self.weight_mb[self.kernel], minlength=len(self.nodes))

    def observed_ms(self, profiler_ms: float, overhead_ms: float = 0.0) -> np.ndarray:
        """Each kernel's time as the profiler saw it, its own addition included, at reference speed: (R,)."""
        total = np.maximum(self.measured_ms - overhead_ms, 0.2 * self.measured_ms) + self.nodes * profiler_ms
        return np.asarray(np.maximum(self.share * total[self.network], 1e-5))

    def profiler_ms(self) -> float:
        """What the profiler adds to every node (see the module); 0 where too few kernels were seen twice."""
        count = np.bincount(self.kernel, minlength=len(self.kernels))
        often = count[self.kernel] > 1
        if often.sum() < 50:
            return 0.0
        # A mean of two is nearer to both than the truth is: the usual n / (n - 1).
        unbias = np.sqrt(count / np.maximum(count - 1, 1))[self.kernel[often]]
        scatter = []
        for tried in _TRIED_MS:
            log = np.log(self.observed_ms(float(tried)))
            mean = np.bincount(self.kernel, log, minlength=len(count)) / np.maximum(count, 1)
            scatter.append(np.median(np.abs(log - mean[self.kernel])[often] * unbias))
        return float(_TRIED_MS[int(np.argmin(scatter))])
