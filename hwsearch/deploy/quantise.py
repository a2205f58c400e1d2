"""Static 8 bits for a folded network: ONNX Runtime's own quantiser, several calibrations compared, worst layers kept.

Weights are signed with a scale for each output channel, activations have one scale a tensor (QDQ). What the processor
can do decides the rest (``scheme_for``). Every calibration method is tried, and the one that leaves the most of the
network's output is taken. Layers can stay in float32: those named, the worst few, or as many as it takes.

How bad a layer is: the signal-to-noise ratio of the *network's* output when that layer alone is in 8 bits.

Reference: Nagel et al., A White Paper on Neural Network Quantization, 2021 (section 3); Chu et al., QARepVGG, AAAI
2024.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hwsearch.deploy.layers import Layer, hold_in_float, layers_of, outputs_of
from hwsearch.deploy.verdict import sqnr_db
from hwsearch.errors import CheckFailedError, InputError

METHODS = ("minmax", "percentile", "entropy")
#: How a device's instruction set names whole 8-bit dot products, which cannot overflow.
_DOT_PRODUCTS = ("vnni", "amx_int8")
_ARM = ("neon", "asimd")
#: Images that layers are judged on one by one: each costs a run for every layer.
_LAYER_IMAGES = 32
#: The calibrator keeps every tensor of the images it is given at once.
_CHUNK = 16

#: A network's metric from its ONNX bytes, such as its accuracy on held-out examples.
Judge = Callable[[bytes], float]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Int8Scheme:
    """Types of activations and weights; ``reduce_range``: weights of 7 bits, so that pairs of products fit in 16;
    ``per_channel``: weights have a scale for each output channel."""

    activations: str = "uint8"
    reduce_range: bool = True
    per_channel: bool = True

    @property
    def half(self) -> int:
        """Largest weight in steps."""
        return 64 if self.reduce_range else 127


@dataclass(frozen=True)
class Int8Settings:
    """How a network is brought to 8 bits.

    Attributes:
        methods: calibrations to compare, of ``METHODS``.
        percentile: share of values, in per cent, inside the range that ``percentile`` finds.
        images: held-out training images to calibrate on.
        keep_fp32: layers that stay in float32: names, how many of the worst, or ``"auto"``: the worst one after the
            other, until what is lost is within ``tolerance`` (with a judge) or the output has ``min_sqnr_db``.
        tolerance: how much of the metric may be lost, absolute: 0.005 is half a point of accuracy.
        min_sqnr_db: for ``"auto"`` without a judge.

    Raises:
        InputError: a value out of range.

    Example:
        >>> Int8Settings(keep_fp32="auto").tolerance
        0.005
    """

    methods: tuple[str, ...] = METHODS
    percentile: float = 99.99
    images: int = 256
    keep_fp32: int | str | tuple[str, ...] = 0
    tolerance: float = 0.005
    min_sqnr_db: float = 20.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise InputError(f"calibration methods are {list(self.methods)}: give some of {', '.join(METHODS)}")
        if not 50 < self.percentile <= 100:
            raise InputError(f"percentile is {self.percentile!r}: give per cent above 50, at most 100, such as 99.99")
        if isinstance(self.images, bool) or self.images < 1:
            raise InputError(f"images is {self.images!r}: give at least one image to calibrate on")
        kept = self.keep_fp32
        if isinstance(kept, str):
            if kept != "auto":
                raise InputError(f'keep_fp32 is {kept!r}: give "auto", a number of layers, or a list of their names')
        elif not isinstance(kept, tuple) and (isinstance(kept, bool) or kept < 0):
            raise InputError(f"keep_fp32 is {kept!r}: give 0 or more layers")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise InputError(f"tolerance is {self.tolerance!r}: give how much of the metric may be lost, 0 or more")


@dataclass(frozen=True)
class MethodResult:
    """One calibration: what it leaves of the network's output (dB), and the metric where there is a judge."""

    method: str
    sqnr_db: float
    metric: float | None


@dataclass(frozen=True)
class KeepStep:
    """What 8 bits cost with these layers in float32."""

    kept: tuple[str, ...]
    sqnr_db: float
    metric: float | None


@dataclass(frozen=True)
class Quantised:
    """An 8-bit network and how it came about.

    Attributes:
        onnx: the network, QDQ.
        kept: layers in float32; ``alone_db`` of every layer: the output's dB with that layer alone in 8 bits.
        kernels_db: this runtime's whole-number kernels against the same graph computed in float32; a low number means
            that they overflow.
        kernels_error: the largest difference between the two, absolute.
        steps: what the automatic choice tried, in order; otherwise the end alone.
    """

    onnx: bytes = field(repr=False)
    scheme: Int8Scheme
    method: str
    methods: tuple[MethodResult, ...]
    kept: tuple[str, ...]
    steps: tuple[KeepStep, ...]
    alone_db: Mapping[str, float] = field(hash=False)
    layers: tuple[Layer, ...] = field(repr=False)
    float_metric: float | None
    kernels_db: float
    kernels_error: float

    @property
    def sqnr_db(self) -> float:
        """The output's dB, 8 bits against float32."""
        return self.steps[-1].sqnr_db

    @property
    def metric(self) -> float | None:
        """The 8-bit network's metric where there was a judge."""
        return self.steps[-1].metric


def scheme_for(isa: str) -> Int8Scheme:
    """What is right for a processor, by the instruction sets that its device reports.

    x86 multiplies unsigned by signed; without VNNI or AMX two products are added in 16 bits, which overflow with whole
    8-bit weights, so weights get 7. An unknown processor is taken for such a one. ARM wants signed activations around
    zero.

    Example:
        >>> scheme_for("avx2 fma").reduce_range, scheme_for("avx2 avx512_vnni").reduce_range
        (True, False)
        >>> scheme_for("asimd asimddp").activations
        'int8'
    """
    if any(flag in isa for flag in _DOT_PRODUCTS):
        return Int8Scheme(reduce_range=False)
    if any(flag in isa.split() for flag in _ARM):
        return Int8Scheme("int8", reduce_range=False)
    return Int8Scheme()


def quantise(
    network: bytes,
    calibration: np.ndarray,
    held_out: np.ndarray,
    *,
    settings: Int8Settings | None = None,
    scheme: Int8Scheme | None = None,
    judge: Judge | None = None,
    higher_is_better: bool = True,
    tell: Tell | None = None,
) -> Quantised:
    """Quantise a float network.

    Args:
        network: folded, static shapes, one input.
        calibration: (M, C, ...) float32 inputs that ranges are taken from; never of the test set.
        held_out: (K, C, ...) other inputs, on which methods and layers are compared.
        scheme: see ``scheme_for``; None is what is safe on any processor.
        judge: the metric of a network; it decides where methods differ by more than a quarter of the tolerance, and
            when ``keep_fp32="auto"`` is done.
        tell: told in a line what was found.
    Raises:
        InputError: a layer that is not there, or images that do not fit.
        CheckFailedError: ``"auto"`` kept every layer and 8 bits still lose too much, or the runtime's kernels overflow.

    Example:
        >>> found = quantise(export_onnx(folded, x), images[:200], images[200:])          # doctest: +SKIP
        >>> found.method, round(found.sqnr_db, 1)                                         # doctest: +SKIP
        ('percentile', 31.2)
    """
    work = _Work(network, held_out, settings or Int8Settings(), scheme or Int8Scheme(), judge, higher_is_better,
                 tell or (lambda text: None))  # fmt: skip
    named = work.settings.keep_fp32 if isinstance(work.settings.keep_fp32, tuple) else ()
    work.check_names(named)
    ranges = work.calibrate(calibration)
    results = [work.result(method, ranges[method], named) for method in work.settings.methods]
    method = work.best(results).method
    work.tell(f"calibration: {', '.join(f'{r.method} {r.sqnr_db:.1f} dB' for r in results)}; {method} is taken")
    alone = {layer.name: work.alone(layer, ranges[method]) for layer in work.layers}
    onnx, steps = work.keep(ranges[method], alone, named)
    exact = outputs_of(onnx, held_out, exact=True)
    ran = outputs_of(onnx, held_out)
    kernels_db = sqnr_db(exact, ran)
    if kernels_db < steps[-1].sqnr_db - 6:
        raise CheckFailedError(
            f"this runtime's 8-bit kernels overflow: their output has {kernels_db:.1f} dB against exact arithmetic, "
            f"8 bits themselves leave {steps[-1].sqnr_db:.1f} dB: use weights of 7 bits (reduce_range)"
        )
    return Quantised(
        onnx, work.scheme, method, tuple(results), steps[-1].kept, tuple(steps), alone, work.layers,
        work.float_metric, kernels_db, float(np.abs(exact - ran).max(initial=0.0)),
    )  # fmt: skip


@dataclass
class _Work:
    """One network on its way to 8 bits."""

    network: bytes
    held_out: np.ndarray
    settings: Int8Settings
    scheme: Int8Scheme
    judge: Judge | None
    higher_is_better: bool
    tell: Tell

    @cached_property
    def model(self) -> Any:
        """The float network with the shapes of its tensors, its nodes named."""
        from onnx import load_from_string
        from onnx.shape_inference import infer_shapes

        model = load_from_string(self.network)
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f"node_{index}"
        return infer_shapes(model)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Everything with weights."""
        return layers_of(self.model)

    @cached_property
    def expected(self) -> np.ndarray:
        """The float network's outputs on the held-out inputs, (K, ...)."""
        return outputs_of(self.network, self.held_out)

    @cached_property
    def float_metric(self) -> float | None:
        """What the judge says of the float network."""
        return None if self.judge is None else self.judge(self.network)

    def check_names(self, names: Sequence[str]) -> None:
        """Every named layer is there."""
        known = [layer.name for layer in self.layers]
        for name in names:
            if name not in known:
                raise InputError(f"keep_fp32 names {name!r}, which is no layer; the layers are {', '.join(known)}")

    def calibrate(self, images: np.ndarray) -> dict[str, Any]:
        """The ranges of all tensors by each method."""
        from onnx import save_model
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        kinds = {
            "minmax": (CalibrationMethod.MinMax, {}),
            "percentile": (CalibrationMethod.Percentile, {"percentile": self.settings.percentile, "symmetric": False}),
            "entropy": (CalibrationMethod.Entropy, {"num_bins": 512, "num_quantized_bins": 128}),
        }
        feeds = feeds_of(self.model, images)
        found = {}
        with TemporaryDirectory() as folder:
            path = Path(folder) / "float.onnx"
            save_model(self.model, path)
            for method in self.settings.methods:
                kind, options = kinds[method]
                calibrator = create_calibrator(
                    path, [], str(Path(folder) / f"{method}.onnx"), kind, extra_options=options
                )
                # it writes to standard output, which belongs to results
                with contextlib.redirect_stdout(io.StringIO()):
                    for start in range(0, len(feeds), _CHUNK):
                        calibrator.collect_data(iter_reader(feeds[start : start + _CHUNK]))
                    found[method] = calibrator.compute_data()
        return found

    def quantised(self, ranges: Any, *, only: Sequence[Layer] = (), kept: Sequence[str] = ()) -> bytes:
        """The QDQ network: all of it but the kept layers, or a few layers alone."""
        import copy

        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

        signed = self.scheme.activations == "int8"
        by_name = {layer.name: layer.node for layer in self.layers}
        quantiser = QDQQuantizer(
            copy.deepcopy(self.model),
            self.scheme.per_channel,
            self.scheme.reduce_range,
            QuantType.QInt8,
            QuantType.QInt8 if signed else QuantType.QUInt8,
            ranges,
            [layer.node for layer in only],
            [by_name[name] for name in kept],
            sorted({*QLinearOpsRegistry, *QDQRegistry}),
            {"ActivationSymmetric": signed, "WeightSymmetric": True},
        )
        # onnxruntime warns of every batch norm that stands alone, which has no axis of channels to quantise along
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)
        try:
            quantiser.quantize_model()
        finally:
            root.setLevel(level)
        model = quantiser.model.model
        hold_in_float(model, {by_name[name] for name in kept})
        quantiser.model.topological_sort()
        del model.metadata_props[:]
        return bytes(model.SerializeToString(deterministic=True))

    def step(self, onnx: bytes, kept: Sequence[str]) -> KeepStep:
        """What an 8-bit network is worth."""
        db = sqnr_db(self.expected, outputs_of(onnx, self.held_out))
        return KeepStep(tuple(kept), db, None if self.judge is None else self.judge(onnx))

    def result(self, method: str, ranges: Any, kept: Sequence[str]) -> MethodResult:
        """What a calibration is worth."""
        step = self.step(self.quantised(ranges, kept=kept), kept)
        return MethodResult(method, step.sqnr_db, step.metric)

    def best(self, results: Sequence[MethodResult]) -> MethodResult:
        """Of those whose metric is as good as the best one's, the one that leaves most of the output."""
        if self.judge is not None:
            losses = {result.method: self.lost(result.metric) for result in results}
            least = min(losses.values())
            results = [r for r in results if losses[r.method] <= least + self.settings.tolerance / 4]
        return max(results, key=lambda result: result.sqnr_db)

    def lost(self, metric: float | None) -> float:
        """How much of the metric 8 bits cost; below 0 where they gain."""
        assert metric is not None
        assert self.float_metric is not None
        lost = self.float_metric - metric
        return lost if self.higher_is_better else -lost

    def alone(self, layer: Layer, ranges: Any) -> float:
        """The output's dB with this layer alone in 8 bits."""
        some = self.held_out[:_LAYER_IMAGES]
        return sqnr_db(self.expected[: len(some)], outputs_of(self.quantised(ranges, only=[layer]), some))

    def keep(self, ranges: Any, alone: Mapping[str, float], named: Sequence[str]) -> tuple[bytes, list[KeepStep]]:
        """The network with the layers that settings keep, and what was tried on the way."""
        worst = sorted(alone, key=lambda name: alone[name])
        wanted = self.settings.keep_fp32
        if wanted != "auto":
            kept = list(named) if isinstance(wanted, tuple) else worst[: int(wanted)]
            if len(kept) == len(self.layers):
                raise InputError(f"keep_fp32 keeps all {len(kept)} layers in float32: deploy in float32 instead")
            onnx = self.quantised(ranges, kept=kept)
            return onnx, [self.step(onnx, kept)]
        steps: list[KeepStep] = []
        for count in range(len(worst)):
            onnx = self.quantised(ranges, kept=worst[:count])
            steps.append(self.step(onnx, worst[:count]))
            self.tell(_told(steps[-1]))
            if self.enough(steps[-1]):
                return onnx, steps
        best = max(steps, key=lambda step: step.sqnr_db)
        goal = (
            f"the metric within {self.settings.tolerance:g} of {self.float_metric:.4g}"
            if self.judge is not None
            else f"{self.settings.min_sqnr_db:g} dB"
        )
        raise CheckFailedError(
            f"8 bits lose too much with any of the {len(worst)} layers in float32: {goal} is wanted, the best has "
            f"{best.sqnr_db:.1f} dB: deploy in float32, or train with a batch norm after the sum (post_norm)"
        )

    def enough(self, step: KeepStep) -> bool:
        """Whether what is lost is within the tolerance."""
        if self.judge is None:
            return step.sqnr_db >= self.settings.min_sqnr_db
        return self.lost(step.metric) <= self.settings.tolerance


def _told(step: KeepStep) -> str:
    metric = "" if step.metric is None else f", metric {step.metric:.4g}"
    return f"{len(step.kept)} layers in float32: {step.sqnr_db:.1f} dB{metric}"


def feeds_of(model: Any, images: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Inputs (N, ...) as feeds of the network's own batch; what does not fill a batch is left out."""
    (value,) = [v for v in model.graph.input if v.name not in {item.name for item in model.graph.initializer}]
    shape = tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
    batch = shape[0]
    if images.ndim != len(shape) or images.shape[1:] != shape[1:] or len(images) < batch:
        raise InputError(
            f"the images have shape {images.shape}, the network takes {shape}: give at least one batch of its own shape"
        )
    whole = np.ascontiguousarray(images[: len(images) // batch * batch], np.float32)
    return [{value.name: whole[start : start + batch]} for start in range(0, len(whole), batch)]


def iter_reader(feeds: Sequence[dict[str, np.ndarray]]) -> Any:
    """Feeds as ONNX Runtime's calibrators read them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    return Reader()
