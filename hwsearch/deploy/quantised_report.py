"""What 8 bits cost, layer by layer: ranges of the weights, and signal to noise of weights and outputs.

Decibels are ``10 log10(signal power / noise power)``; six are one bit. Of each layer:

* ``spread``: the largest weight of a channel over that of the median channel, for the channel where it is largest. One
  scale for all channels wastes its bits on that one.
* ``weight_db`` and ``weight_db_one_scale``: the folded weights in 8 bits, a scale a channel, and one for all.
* ``unfolded_db`` and ``folded_db``: the block's output with weights and outputs in 8 bits, before folding (each branch
  by itself, then the sum) and after, on the inputs that it gets in the float network.
* ``tensor_db``: the rounding of the layer's output alone; ``network_db``: that output in the 8-bit network against the
  float one, the errors of all layers before it included.
* ``alone_db``: the *network's* output with this layer alone in 8 bits: what its staying in float32 would save.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.deploy.quantise import Int8Scheme, KeepStep, MethodResult, Quantised, feeds_of, iter_reader
from hwsearch.deploy.verdict import sqnr_db

if TYPE_CHECKING:
    from torch import nn

SCHEMA, VERSION = "hwsearch.quantisation", 1
#: Images whose tensors are compared: all tensors of all of them are in memory at once.
_IMAGES = 8


@dataclass(frozen=True)
class WeightQuality:
    """Weights of one convolution in 8 bits."""

    spread: float
    weight_db: float
    weight_db_one_scale: float

    @classmethod
    def of(cls, weight: np.ndarray, half: int) -> WeightQuality:
        """Of weights (O, ...), output channels first.

        Args:
            half: largest weight in steps.
        """
        largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1)
        middle = float(np.median(largest))
        spread = float(largest.max()) / middle if middle > 0 else 1.0
        per_channel = sqnr_db(weight, rounded_weight(weight, half))
        return cls(spread, per_channel, sqnr_db(weight, rounded_weight(weight, half, per_channel=False)))


@dataclass(frozen=True)
class LayerReport:
    """One layer; see the head of this module. None where it could not be told."""

    name: str
    op: str
    kept: bool
    spread: float
    weight_db: float
    weight_db_one_scale: float
    branches: tuple[tuple[str, WeightQuality], ...]
    unfolded_db: float | None
    folded_db: float | None
    tensor_db: float | None
    network_db: float | None
    alone_db: float


@dataclass(frozen=True)
class QuantisedReport:
    """A network's way to 8 bits: scheme, calibrations compared, layers kept, and every layer."""

    scheme: Int8Scheme
    method: str
    methods: tuple[MethodResult, ...]
    kept: tuple[str, ...]
    steps: tuple[KeepStep, ...]
    sqnr_db: float
    kernels_db: float
    layers: tuple[LayerReport, ...]
    metric_name: str | None = None
    float_metric: float | None = None
    metric: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types with schema and version."""
        return {"schema": SCHEMA, "version": VERSION, **asdict(self)}

    def to_markdown(self) -> str:
        """As tables of text, the worst layer first."""
        return markdown(self.to_dict())


@dataclass(frozen=True)
class _Block:
    """A part of the unfolded network and what it folds into: decibels of its output in 8 bits, before and after."""

    branches: tuple[tuple[str, WeightQuality], ...]
    unfolded_db: float
    folded_db: float


def report(
    quantised: Quantised,
    network: bytes,
    model: nn.Module,
    folded: nn.Module,
    images: np.ndarray,
    *,
    metric_name: str | None = None,
) -> QuantisedReport:
    """Compare an 8-bit network with the float one and with the unfolded model.

    Args:
        network: the float ONNX that was quantised; ``folded`` is its module, ``model`` the one before folding.
        images: (K, C, ...) held-out inputs; a few are used.
    """
    tensors = _tensors(quantised, network, images[:_IMAGES])
    blocks = _blocks(model, folded, images[:_IMAGES], quantised.scheme)
    layers = []
    for layer in quantised.layers:
        quality = WeightQuality.of(layer.weight, quantised.scheme.half)
        block = blocks.get(layer.name)
        tensor_db, network_db = tensors.get(layer.output, (None, None))
        layers.append(
            LayerReport(
                layer.name,
                layer.op,
                layer.name in quantised.kept,
                quality.spread,
                quality.weight_db,
                quality.weight_db_one_scale,
                () if block is None else block.branches,
                None if block is None else block.unfolded_db,
                None if block is None else block.folded_db,
                tensor_db,
                network_db,
                quantised.alone_db[layer.name],
            )
        )
    return QuantisedReport(
        quantised.scheme, quantised.method, quantised.methods, quantised.kept, quantised.steps, quantised.sqnr_db,
        quantised.kernels_db, tuple(layers), metric_name, quantised.float_metric, quantised.metric,
    )  # fmt: skip


def rounded_weight(weight: np.ndarray, half: int, *, per_channel: bool = True) -> np.ndarray:
    """Weights (O, ...) as they are in 8 bits: whole steps of ``max|w| / half``, a step for each output channel.

    Example:
        >>> rounded_weight(np.array([[1.0, 0.26]], np.float32), 2).tolist()
        [[1.0, 0.5]]
    """
    magnitude = np.abs(weight).reshape(len(weight), -1).max(axis=1) if per_channel else np.abs(weight).max()
    step = np.where(magnitude > 0, magnitude, 1.0) / half
    step = step.reshape(-1, *[1] * (weight.ndim - 1)) if per_channel else step
    return np.asarray(np.clip(np.rint(weight / step), -half, half) * step, np.float64)


def rounded_tensor(values: np.ndarray) -> np.ndarray:
    """Values in 256 whole steps from their smallest (at most 0) to their largest (at least 0)."""
    low, high = min(0.0, float(values.min(initial=0))), max(0.0, float(values.max(initial=0)))
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)
    return np.asarray((np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step)


def _tensors(quantised: Quantised, network: bytes, images: np.ndarray) -> dict[str, tuple[float | None, float | None]]:
    """(rounding alone, against the float network) in dB of every quantised tensor, by ONNX Runtime's own tools."""
    from onnx import load_from_string, save_model
    from onnxruntime.quantization.qdq_loss_debug import (
        collect_activations,
        create_activation_matching,
        modify_model_output_intermediate_tensors,
    )

    models = {"float": load_from_string(network), "eight": load_from_string(quantised.onnx)}
    feeds = feeds_of(models["float"], images)
    found = {}
    with TemporaryDirectory() as folder:
        for name, model in models.items():
            path = Path(folder) / f"{name}.onnx"
            save_model(model, path)
            modify_model_output_intermediate_tensors(path, Path(folder) / f"{name}_all.onnx")
            found[name] = collect_activations(str(Path(folder) / f"{name}_all.onnx"), iter_reader(feeds))
    matched = create_activation_matching(found["eight"], found["float"])
    result: dict[str, tuple[float | None, float | None]] = {}
    for name, values in matched.items():
        before, after = (np.concatenate(list(values[key])) for key in ("pre_qdq", "post_qdq"))
        exact = np.concatenate(list(values["float"])) if "float" in values else None
        if exact is not None:  # the rounding may have swallowed a Relu
            before = np.clip(before, exact.min(), exact.max())
        result[name] = (sqnr_db(before, after), None if exact is None else sqnr_db(exact, after))
    for name, exact_parts in found["float"].items():
        if name not in result and name in found["eight"]:  # it stayed in float32
            parts = (np.concatenate(list(p)) for p in (exact_parts, found["eight"][name]))
            result[name] = (None, sqnr_db(*parts))
    return result


def _blocks(model: nn.Module, folded: nn.Module, images: np.ndarray, scheme: Int8Scheme) -> dict[str, _Block]:
    """Every block of branches, and every pair of a layer and a batch norm, by the name of its folded layer."""
    import torch

    from hwsearch.reparam.fold import plan_fold
    from hwsearch.reparam.foreign import record_calls

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    x = torch.from_numpy(np.ascontiguousarray(images, np.float32)).to(dtype)
    plan = plan_fold(model, x[:1])
    norms = dict(plan.pairs)
    names = (*(name for name, _ in plan.blocks), *norms)
    known = dict(model.named_modules())
    calls = record_calls(model, tuple(name for name in names if name in known), x)
    found = {}
    for name, call in calls.items():
        if len(call.args) != 1 or call.kwargs:
            continue
        before = [known[name]] if name not in norms else [known[name], known[norms[name]]]
        after = folded.get_submodule(name)
        with torch.no_grad():
            exact = torch.nn.Sequential(*before)(*call.args)
            if not isinstance(exact, torch.Tensor):
                continue
            unfolded = _unfolded(before, call.args, scheme)
            whole = _numpy(_in_eight_bits(after, scheme)(*call.args))
        found[name] = _Block(
            tuple(
                (inner or "conv", WeightQuality.of(_weight(module), scheme.half))
                for part in before
                for inner, module in part.named_modules()
                if _weighted(module)
            ),
            sqnr_db(_numpy(exact), unfolded),
            sqnr_db(_numpy(exact), rounded_tensor(whole)),
        )
    return found


def _unfolded(before: Sequence[nn.Module], args: tuple[Any, ...], scheme: Int8Scheme) -> np.ndarray:
    """A block in 8 bits before folding: every branch's weights and output, then their sum."""
    import torch

    from hwsearch.reparam.odbb import ODBB

    first = before[0]
    if isinstance(first, ODBB):
        running = [branch for branch, runs in zip(first.branches.values(), first.mask, strict=True) if runs]
        parts = [rounded_tensor(_numpy(_in_eight_bits(branch, scheme)(*args))) for branch in running]
        total = torch.from_numpy(np.sum(parts, axis=0)).to(args[0].dtype)
        return rounded_tensor(_numpy(first.post_norm(total)))
    out = _in_eight_bits(first, scheme)(*args)
    for norm in before[1:]:
        out = norm(torch.from_numpy(rounded_tensor(_numpy(out))).to(out.dtype))
    return rounded_tensor(_numpy(out))


def _in_eight_bits(module: nn.Module, scheme: Int8Scheme) -> nn.Module:
    """A copy whose convolutions and linear layers have rounded weights."""
    import torch

    module = copy.deepcopy(module)
    for inner in module.modules():
        if _weighted(inner):
            weight = inner.weight
            axis = 1 if "Transpose" in type(inner).__name__ else 0
            rounded = np.moveaxis(rounded_weight(np.moveaxis(_numpy(weight), axis, 0), scheme.half), 0, axis)
            inner.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(rounded)).to(weight), False)  # type: ignore[arg-type]
    return module


def _weighted(module: nn.Module) -> bool:
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    return isinstance(module, (_ConvNd, nn.Linear))


def _weight(module: nn.Module) -> np.ndarray:
    weight = _numpy(module.weight)
    return np.moveaxis(weight, 1, 0) if "Transpose" in type(module).__name__ else weight


def _numpy(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().double().numpy())


def markdown(report: Mapping[str, Any]) -> str:
    """What ``to_dict`` gave as text: calibrations, layers in float32, then a line a layer, the worst first."""
    scheme, name = report["scheme"], report["metric_name"] or "metric"
    bits = 7 if scheme["reduce_range"] else 8
    scales = "a scale a channel" if scheme["per_channel"] else "one scale"
    lines = [f"Activations {scheme['activations']}, weights int8 of {bits} bits with {scales}."]
    for result in report["methods"]:
        metric = "" if result["metric"] is None else f", {name} {result['metric']:.4g}"
        taken = " (taken)" if result["method"] == report["method"] else ""
        lines.append(f"Calibration {result['method']}: {result['sqnr_db']:.1f} dB of the output{metric}{taken}.")
    end = "" if report["metric"] is None else f"; {name} {report['metric']:.4g}, float {report['float_metric']:.4g}"
    kept = ", ".join(report["kept"]) or "none"
    lines.append(f"Layers in float32: {kept}. The output keeps {report['sqnr_db']:.1f} dB{end}.")
    lines += [
        "",
        "| layer | spread | weights dB | one scale | block unfolded dB | folded | output dB | alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layer in sorted(report["layers"], key=lambda layer: layer["alone_db"]):
        values = [layer[key] for key in ("weight_db", "weight_db_one_scale", "unfolded_db", "folded_db", "network_db")]
        cells = " | ".join("" if value is None else f"{value:.1f}" for value in (*values, layer["alone_db"]))
        mark = " (float32)" if layer["kept"] else ""
        lines.append(f"| {layer['name']}{mark} | {layer['spread']:.1f} | {cells} |")
    return "\n".join(lines)
