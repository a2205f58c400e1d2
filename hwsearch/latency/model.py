"""``KernelModel``: milliseconds of kernels; the analytic base of ``base.py`` times the trees of ``boosting.py``.

Where cross-validation says so, a family has one of ``corrections.py`` instead of its trees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hwsearch.errors import SchemaError
from hwsearch.graph.kernel import Kernel
from hwsearch.latency.base import Base, fit_base
from hwsearch.latency.boosting import BoostData, BoostSettings, boost, row_trust
from hwsearch.latency.corrections import BASE, KINDS, TREES, Correction
from hwsearch.latency.features import FEATURES, TERMS, Vocabulary, cost_terms, describe, layouts
from hwsearch.latency.training import Rows
from hwsearch.latency.trees import check_trees

#: A family with fewer kernel instances is priced by its base alone.
FEW = 20
#: Trees do not extrapolate: this far (a factor) beyond what was profiled a kernel still counts as known.
_MARGIN = 2.0
_RANGED = ("macs", "bytes", "in_channels", "out_channels", "positions")


@dataclass(frozen=True)
class KernelModel:
    """A fitted model of kernels.

    Attributes:
        vocabulary: texts that were profiled.
        base: the analytic part.
        boosters: XGBoost models by family.
        corrections: what other families have instead; one with neither is priced by its base.
        profiler_ms: what the runtime's profiler was found to add to every node.
        seen: (family, operation, layouts) that were profiled.
        ranges: by family, the (smallest, largest) profiled value of each of MACs, bytes, channels and positions.
    """

    vocabulary: Vocabulary
    base: Base
    boosters: Mapping[str, Any]
    corrections: Mapping[str, Correction]
    profiler_ms: float
    seen: frozenset[tuple[str, str, str]]
    ranges: Mapping[str, tuple[tuple[float, float], ...]]

    @classmethod
    def fit(cls, rows: Rows, settings: BoostSettings, kinds: Mapping[str, str] | None = None) -> KernelModel:
        """The model of a table's rows; equal arguments give an equal model.

        Args:
            rows: the table.
            settings: of the trees.
            kinds: by family, what corrects its base (``corrections.KINDS``); trees where it is not named.
        """
        profiler_ms = rows.profiler_ms()
        base = fit_base(rows, profiler_ms)
        log_base, features = _described(rows, base)
        families = np.array([kernel.family for kernel in rows.kernels], dtype=object)[rows.kernel]
        members = {family: np.flatnonzero(families == family) for family in sorted(set(families))}
        chosen = {family: (kinds or {}).get(family, TREES) for family in members}
        corrections, corrected = {}, log_base[rows.kernel]
        for family, own in members.items():
            if chosen[family] not in (TREES, BASE):
                corrections[family] = _correction(chosen[family], rows, base, profiler_ms, own)
                kernels = [rows.kernels[index] for index in rows.kernel[own]]
                corrected[own] += corrections[family].log_factor(kernels, features[rows.kernel[own]])
        data = BoostData(
            members={f: own for f, own in members.items() if len(own) >= FEW and chosen[f] == TREES},
            features=features[rows.kernel],
            log_base=corrected,
            context_ms=_context_ms(rows, base),
            observed_ms=rows.observed_ms(profiler_ms, base.overhead_ms),
            network=rows.network,
            measured_ms=rows.measured_ms,
            spread=rows.spread,
            nodes=rows.nodes,
            share=rows.share,
            profiler_ms=profiler_ms,
            overhead_ms=base.overhead_ms,
        )
        used = [rows.kernels[index] for index in np.unique(rows.kernel)]
        sizes = {family: np.array([_sizes(k) for k in used if k.family == family]) for family in members}
        return cls(
            vocabulary=rows.vocabulary,
            base=base,
            boosters=boost(data, settings) if settings.rounds else {},
            corrections=corrections,
            profiler_ms=profiler_ms,
            seen=frozenset((k.family, k.op, layouts(k)) for k in used),
            ranges={
                family: tuple((float(low), float(high)) for low, high in zip(s.min(axis=0), s.max(axis=0), strict=True))
                for family, s in sizes.items()
            },
        )

    def alternatives(self, rows: Rows, held: Rows) -> dict[str, np.ndarray]:
        """Milliseconds of other networks' rows, (H,), by every kind of correction.

        Args:
            rows: what this model was fitted on.
            held: rows of the same distinct kernels; a family that ``rows`` lacks has its base in all of them.
        """
        log_base, features = _described(held, self.base)
        families = np.array([kernel.family for kernel in held.kernels], dtype=object)
        seen, asked = families[rows.kernel], families[held.kernel]
        result = {TREES: self.row_ms(held)[held.kernel]}
        for kind in KINDS[1:]:
            log_ms = log_base[held.kernel].copy()
            for family in sorted(set(asked) & set(seen)):
                correction = _correction(kind, rows, self.base, self.profiler_ms, np.flatnonzero(seen == family))
                mine = held.kernel[asked == family]
                log_ms[asked == family] += correction.log_factor([held.kernels[i] for i in mine], features[mine])
            result[kind] = np.exp(log_ms)
        return result

    @property
    def overhead_ms(self) -> float:
        """What a network takes beyond its kernels."""
        return self.base.overhead_ms

    def context_ms(self, network_mb: np.ndarray) -> np.ndarray:
        """Further milliseconds of each megabyte of weights in networks of so many megabytes, (M,)."""
        return self.base.context_ms(network_mb)

    def ms(self, kernels: Sequence[Kernel]) -> np.ndarray:
        """Milliseconds of each kernel, (N,), its weights at hand; see ``context_ms`` for the rest."""
        if not kernels:
            return np.zeros(0)
        log_base = np.log(self.base.ms(kernels, cost_terms(kernels, self.vocabulary)))
        return self._finish(kernels, log_base, describe(kernels, self.vocabulary, log_base))

    def row_ms(self, rows: Rows) -> np.ndarray:
        """Milliseconds of each distinct kernel of some rows, (U,), from the features that the rows already hold."""
        log_base, features = _described(rows, self.base)
        return self._finish(rows.kernels, log_base, features)

    def _finish(self, kernels: Sequence[Kernel], log_base: np.ndarray, features: np.ndarray) -> np.ndarray:
        import xgboost

        result = log_base.copy()
        families = np.array([kernel.family for kernel in kernels], dtype=object)
        for family, booster in self.boosters.items():
            own = np.flatnonzero(families == family)
            if len(own):
                matrix = xgboost.DMatrix(features[own], nthread=1)
                result[own] += booster.predict(matrix, output_margin=True)
        for family, correction in self.corrections.items():
            own = np.flatnonzero(families == family)
            result[own] += correction.log_factor([kernels[int(index)] for index in own], features[own])
        return np.asarray(np.exp(result))

    def doubt(self, kernel: Kernel) -> str | None:
        """Why a kernel's price is a guess, or None when kernels like it were profiled."""
        if kernel.family not in self.ranges:
            return f"no kernel of family {kernel.family!r} was profiled"
        if (kernel.family, kernel.op, layouts(kernel)) not in self.seen:
            return f"no {kernel.op} ({kernel.family}) with layouts {layouts(kernel)} was profiled"
        if not self.vocabulary.knows(kernel):
            return f"fused tail {'+'.join(kernel.fused)!r} or precision {kernel.dtype} was not profiled"
        for name, value, (low, high) in zip(_RANGED, _sizes(kernel), self.ranges[kernel.family], strict=True):
            if value > high * _MARGIN or value < low / _MARGIN:
                return f"{name} {value:.4g} is outside the profiled {low:.4g} to {high:.4g}"
        return None

    def to_files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """(plain values for the manifest, file name to bytes)."""
        files = {f"{family}.ubj": bytes(booster.save_raw("ubj")) for family, booster in self.boosters.items()}
        vocabulary = {name: list(getattr(self.vocabulary, name)) for name in ("tails", "ops", "layouts", "dtypes")}
        document = {
            "features": list(FEATURES),
            "terms": list(TERMS),
            "vocabulary": vocabulary | {"block": self.vocabulary.block},
            "base": self.base.to_dict(),
            "corrections": {family: correction.to_dict() for family, correction in self.corrections.items()},
            "profiler_ms": self.profiler_ms,
            "seen": sorted(list(item) for item in self.seen),
            "ranges": {family: [list(pair) for pair in pairs] for family, pairs in self.ranges.items()},
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
        return document, files

    @classmethod
    def from_files(cls, document: Mapping[str, Any], files: Mapping[str, bytes]) -> KernelModel:
        """The inverse of ``to_files``.

        Raises:
            SchemaError: another release's features, or a damaged file.
        """
        import xgboost

        try:
            if tuple(document["features"]) != FEATURES or tuple(document["terms"]) != TERMS:
                raise SchemaError("it was fitted on other features than this release has; fit again")
            texts = document["vocabulary"]
            if not 1 <= int(texts["block"]) <= 64:
                raise SchemaError(f"channels stand in blocks of {texts['block']!r:.40}; fit again")
            boosters = {}
            for name in sorted(document["files"]):
                check_trees(files[name], len(FEATURES))
                booster = xgboost.Booster({"nthread": 1})
                booster.load_model(bytearray(files[name]))
                if booster.num_features() != len(FEATURES):
                    raise SchemaError(f"{name} takes {booster.num_features()} features instead of {len(FEATURES)}")
                boosters[name.removesuffix(".ubj")] = booster
            if any(len(pairs) != len(_RANGED) for pairs in document["ranges"].values()):
                raise SchemaError(f"a range for each of {', '.join(_RANGED)} is needed; fit again")
            return cls(
                vocabulary=Vocabulary(
                    tails=tuple(map(str, texts["tails"])),
                    ops=tuple(map(str, texts["ops"])),
                    layouts=tuple(map(str, texts["layouts"])),
                    dtypes=tuple(map(str, texts["dtypes"])),
                    block=int(texts["block"]),
                ),
                base=Base.from_dict(document["base"]),
                boosters=boosters,
                corrections={str(f): Correction.from_dict(item) for f, item in document["corrections"].items()},
                profiler_ms=float(document["profiler_ms"]),
                seen=frozenset((str(f), str(o), str(lay)) for f, o, lay in document["seen"]),
                ranges={
                    str(family): tuple((float(low), float(high)) for low, high in pairs)
                    for family, pairs in document["ranges"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, xgboost.core.XGBoostError) as error:
            reason = str(error).split("\n", 1)[0]
            raise SchemaError(f"it is damaged ({type(error).__name__}: {reason}); fit again") from None


def _described(rows: Rows, base: Base) -> tuple[np.ndarray, np.ndarray]:
    """(log of the base's ms, features with it filled in) of the distinct kernels, (U,) and (U, F)."""
    log_base = np.log(base.ms(rows.kernels, rows.terms))
    features = rows.features.copy()
    features[:, FEATURES.index("log_base")] = log_base
    return log_base, features


def _context_ms(rows: Rows, base: Base) -> np.ndarray:
    """What each row's weights cost beyond the kernel's own price, (R,)."""
    return np.asarray(base.context_ms(rows.network_mb)[rows.network] * rows.weight_mb[rows.kernel])


def _correction(kind: str, rows: Rows, base: Base, profiler_ms: float, own: np.ndarray) -> Correction:
    """One kind, fitted to the rows ``own`` (indices) of a family."""
    log_base, features = _described(rows, base)
    mine = rows.kernel[own]
    rest = rows.observed_ms(profiler_ms, base.overhead_ms) - profiler_ms - _context_ms(rows, base)
    target = np.log(np.maximum(rest[own], 0.2 * np.exp(log_base[mine]))) - log_base[mine]
    weight = row_trust(rows.share, rows.nodes, rows.network)[own]
    return Correction.fit(kind, [rows.kernels[index] for index in mine], features[mine], target, weight)


def _sizes(kernel: Kernel) -> tuple[float, ...]:
    """What the range guard looks at, in the order of ``_RANGED``; 1 and up, so that factors make sense."""
    return (
        float(max(kernel.macs, 1)),
        float(max(kernel.memory_bytes, 1)),
        float(kernel.in_channels),
        float(kernel.out_channels),
        float(kernel.batch * kernel.out_height * kernel.out_width),
    )
