"""The analytic base: a kernel's ms as a sum of what it must do, with weights >= 0 fitted per group of kernels.

A group is a family on one layout (with one implementation of a convolution, with one operation of what only moves
bytes). All groups are fitted together, so that kernels match their shares *and* their sums match the networks' totals,
which are known far better than any share.
The base extrapolates sanely, which trees do not, and it is all there is where a family has few samples.

One thing a kernel does not know of itself: whether its weights are still in a cache when its turn comes again. That
depends on how many weights the whole network has. So each megabyte of weights costs a further ``context_ms(network's
megabytes)``, a function that only rises, fitted with the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.features import CONVOLUTIONS, TERMS, Vocabulary, cost_terms, is_blocked
from hwsearch.latency.training import Rows

#: No kernel takes less: a fifth of a microsecond.
SMALLEST_MS = 2e-4
ANY = "any"
_FEW = 40
_HUBER = 0.3
#: Megabytes around which (an octave wide) the cost of a megabyte of weights may rise: sizes of caches.
CACHE_MB = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_SHOWN, _SHOWN_BY = 0.75, 3  # a step of the context is fitted when so many networks are so far beyond it

#: For groups with few samples: overhead, MACs and bytes only. Terms that count a part of another one's work are left
#: out.
_COARSE_OF = {
    "one": 0, "macs_full": 1, "macs_last_1": 1, "macs_last_2": 1, "macs_last_3": 1, "macs_plain": 1,
    "bytes_in": 2, "bytes_out": 2, "bytes_weights": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """Fitted weights.

    Attributes:
        weights: ms per unit of each of ``TERMS``, by group; ``any`` is the pooled group for kernels of no known one.
        overhead_ms: what a whole network takes beyond its kernels.
        context: rise of the cost of a megabyte of weights at each of ``CACHE_MB``, in ms.
    """

    weights: Mapping[str, tuple[float, ...]]
    overhead_ms: float
    context: tuple[float, ...]

    def group(self, kernel: Kernel) -> str:
        """The most special fitted group that a kernel belongs to."""
        return next((name for name in group_names(kernel) if name in self.weights), ANY)

    def ms(self, kernels: Sequence[Kernel], terms: np.ndarray) -> np.ndarray:
        """Milliseconds of each kernel, (N,), from its cost terms (N, T)."""
        matrix = np.array([self.weights[self.group(kernel)] for kernel in kernels]).reshape(len(kernels), len(TERMS))
        return np.asarray(np.maximum((matrix * terms).sum(axis=1), SMALLEST_MS))

    def of(self, kernels: Sequence[Kernel], vocabulary: Vocabulary) -> np.ndarray:
        """As ``ms``, with the terms computed."""
        return self.ms(kernels, cost_terms(kernels, vocabulary))

    def context_ms(self, network_mb: np.ndarray) -> np.ndarray:
        """Further milliseconds of each megabyte of weights, (M,), in networks of so many megabytes, (M,)."""
        octaves = np.log2(np.maximum(network_mb, 1e-6)) + 0.5
        total = np.zeros(np.shape(octaves))
        for mb, rise in zip(CACHE_MB, self.context, strict=True):
            if rise:  # most are 0, and a million networks are asked about at a time
                total += rise * np.clip(octaves - math.log2(mb), 0, 1)
        return total

    def to_dict(self) -> dict:
        """Plain values for a JSON file."""
        named = {group: dict(zip(TERMS, weights, strict=True)) for group, weights in self.weights.items()}
        return {
            "overhead_ms": self.overhead_ms,
            "weights": named,
            "context": dict(zip(map(str, CACHE_MB), self.context, strict=True)),
        }

    @classmethod
    def from_dict(cls, data: Mapping) -> Base:
        """The inverse of ``to_dict``; KeyError, TypeError or ValueError on a damaged one."""
        weights = {str(g): tuple(float(named[name]) for name in TERMS) for g, named in data["weights"].items()}
        if ANY not in weights:
            raise ValueError(f"no group {ANY!r}")
        return cls(weights, float(data["overhead_ms"]), tuple(float(data["context"][str(mb)]) for mb in CACHE_MB))


def group_names(kernel: Kernel) -> tuple[str, ...]:
    """Groups that a kernel may be priced in, the most special one first; precisions never share one."""
    layout = "blocked" if is_blocked(kernel.layout_out) else "plain"
    wide = f"{kernel.family}/{layout}"
    # Of convolutions the implementation counts where a runtime tells it: another one may take fifty times as long.
    path = kernel.op.partition("/")[2] if kernel.family in CONVOLUTIONS else kernel.op
    names = (f"{wide}/{path}", wide, kernel.family) if path else (wide, kernel.family)
    return names if kernel.dtype == "float32" else tuple(f"{name}@{kernel.dtype}" for name in names)


def _steps(network_mb: np.ndarray) -> np.ndarray:
    """How far each network is beyond each of ``CACHE_MB``, from 0 to 1 over an octave, (M, C)."""
    octaves = np.log2(np.maximum(network_mb, 1e-6))[:, None] - np.log2(np.array(CACHE_MB))
    return np.asarray(np.clip(octaves + 0.5, 0, 1))


def fit_base(rows: Rows, profiler_ms: float) -> Base:
    """Non-negative least squares on relative errors of all kernels and all networks' sums, outliers damped (Huber)."""
    grouped = _groups(rows)
    names = sorted(set(grouped))
    counts = Counter(grouped)
    blocks = {name: _columns(counts[name]) for name in names}
    solution, overhead, context = _solve(rows, grouped, blocks, profiler_ms, 0.0)
    if overhead > 0:
        solution, overhead, context = _solve(rows, grouped, blocks, profiler_ms, overhead)
    # For kernels of no fitted group: the family as a whole, and everything as a whole.
    families = np.array([kernel.family for kernel in rows.kernels], dtype=object)[rows.kernel]
    weights = _solve(rows, np.full(len(families), ANY), {ANY: _columns(0)}, profiler_ms, overhead)[0]
    weights |= _solve(rows, families, {f: _columns(0) for f in sorted(set(families))}, profiler_ms, overhead)[0]
    weights |= solution
    return Base({name: tuple(float(w) for w in weights[name]) for name in sorted(weights)}, overhead, context)


def _groups(rows: Rows) -> np.ndarray:
    """The group of each row (R,): the most special one with enough rows, else the family."""
    options = [group_names(kernel) for kernel in rows.kernels]
    times = np.bincount(rows.kernel, minlength=len(options))
    counts: Counter[str] = Counter()
    for names, count in zip(options, times, strict=True):
        counts.update(dict.fromkeys(names, int(count)))
    chosen = [next((name for name in names[:-1] if counts[name] >= _FEW), names[-1]) for names in options]
    return np.asarray(np.array(chosen, dtype=object)[rows.kernel])


def _columns(samples: int) -> np.ndarray:
    """Column of its group that each term is added to, (T,); -1 leaves it out."""
    if samples >= _FEW:
        return np.arange(len(TERMS))
    return np.array([_COARSE_OF.get(name, -1) for name in TERMS])


def _solve(
    rows: Rows, grouped: np.ndarray, blocks: Mapping[str, np.ndarray], profiler_ms: float, overhead_ms: float
) -> tuple[dict[str, np.ndarray], float, tuple[float, ...]]:
    """(weights by group, overhead of a network, context) by iteratively re-weighted non-negative least squares."""
    from scipy import sparse

    # Column 0 is the network's own overhead, then come the steps of the context, then the groups.
    starts, width = {}, 1 + len(CACHE_MB)
    for name, columns in blocks.items():
        starts[name], width = width, width + int(columns.max()) + 1
    observed = rows.observed_ms(profiler_ms, overhead_ms)
    index = np.stack([np.where(blocks[name] >= 0, starts[name] + blocks[name], -1) for name in blocks])
    place = {name: number for number, name in enumerate(blocks)}
    columns = index[np.array([place[name] for name in grouped])]
    values = rows.terms[rows.kernel]
    used = (columns >= 0) & (values > 0)
    row_number, _ = np.nonzero(used)
    shape = (len(observed), width)
    kernels = sparse.csr_matrix((values[used], (row_number, columns[used])), shape=shape)
    steps = _steps(rows.network_mb)
    # A rise that hardly any network shows in full would be found from its beginning, and be anything at its end.
    steps[:, (steps >= _SHOWN).sum(axis=0) < _SHOWN_BY] = 0.0
    context = rows.weight_mb[rows.kernel, None] * steps[rows.network]
    row_number, step = np.nonzero(context)
    kernels = kernels + sparse.csr_matrix((context[row_number, step], (row_number, 1 + step)), shape=shape)
    member = sparse.csr_matrix((np.ones(shape[0]), (rows.network, np.arange(shape[0]))))
    own = sparse.csr_matrix((np.ones(member.shape[0]), (np.arange(member.shape[0]), np.zeros(member.shape[0], int))),
                            shape=(member.shape[0], width))  # fmt: skip
    # All networks together weigh as much as all kernels together.
    weight = np.sqrt(len(observed) / len(rows.measured_ms))
    design = sparse.vstack(
        [
            sparse.diags_array(1 / observed) @ kernels,
            sparse.diags_array(weight / rows.measured_ms) @ (member @ kernels + own),
        ]
    ).tocsr()
    target = np.concatenate([1 - profiler_ms / observed, np.full(len(rows.measured_ms), weight)])
    limit = np.concatenate([np.full(len(observed), _HUBER), np.full(len(rows.measured_ms), _HUBER * weight)])
    solution = _robust_nnls(design, target, limit)
    found = {}
    for name, block in blocks.items():
        mine = np.append(solution[starts[name] :], 0.0)
        found[name] = np.where(block >= 0, mine[np.maximum(block, 0)], 0.0)
    return found, float(solution[0]), tuple(float(w) for w in solution[1 : 1 + len(CACHE_MB)])


def _robust_nnls(design, target: np.ndarray, limit: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """min ||design x - target|| over x >= 0, residuals beyond ``limit`` counting linearly; normal equations, (C,)."""
    from scipy import sparse
    from scipy.optimize import nnls

    trust = np.ones(len(target))
    solution = np.zeros(design.shape[1])
    for _ in range(3):
        scaled = sparse.diags_array(trust) @ design
        norm = np.sqrt(np.asarray(scaled.multiply(scaled).sum(axis=0)).ravel())
        some = norm > 0  # what nothing tells of stays 0: rounding alone would set it
        norm = norm[some]
        scaled = scaled.tocsc()[:, some] @ sparse.diags_array(1 / norm)
        gram = (scaled.T @ scaled).toarray() + 1e-9 * np.eye(len(norm))
        factor = np.linalg.cholesky(gram)
        right = np.linalg.solve(factor, scaled.T @ (target * trust))
        solution[some] = nnls(factor.T, right, maxiter=20 * len(norm))[0] / norm
        trust = np.sqrt(1 / np.maximum(1, np.abs(target - design @ solution) / limit))
    return solution
