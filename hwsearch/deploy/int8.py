"""The 8-bit half of ``deploy``: which images, what the network is worth in 8 bits, and what its bundle may promise.

Images come from held-out *training* data: the first part of a task's ``valid`` calibrates, the rest judges. The test
set is never looked at.

An 8-bit network is held to two promises. Its golden outputs are its own: another machine's kernels round ties and sum
floats in another order, so the tolerance is four times what this runtime's own two ways of computing it differ by
(whole numbers, and exact arithmetic), and at least two steps of the output. And it leaves of the float network's output
what it left here, less one decibel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.deploy.layers import outputs_of, session_of
from hwsearch.deploy.quantise import Int8Scheme, Int8Settings, Judge, Quantised, quantise
from hwsearch.deploy.quantised_report import QuantisedReport, report
from hwsearch.deploy.reader import Golden
from hwsearch.deploy.verdict import sqnr_db
from hwsearch.errors import CheckFailedError, InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hwsearch.train.task import Task

#: Held-out images that a judge looks at, and those on which outputs are compared.
_JUDGED, _COMPARED = 2000, 64
_MARGIN_DB = 1.0
_LARGEST_TOLERANCE = 0.1


@dataclass(frozen=True)
class Int8Network:
    """An 8-bit network with its golden cases and what it promises.

    ``relative_tolerance``: of its golden outputs; ``promised_sqnr_db``: of the float network's.
    """

    quantised: Quantised
    report: QuantisedReport
    cases: tuple[Golden, ...]
    relative_tolerance: float
    promised_sqnr_db: float

    def facts(self) -> dict[str, Any]:
        """What a manifest says of it; the rest is in the report."""
        found = self.quantised
        return {
            "promised_sqnr_db": self.promised_sqnr_db, "method": found.method, "keep_fp32": list(found.kept),
            "metric": found.metric, "float_metric": found.float_metric,
        }  # fmt: skip


def int8_network(
    model: nn.Module,
    folded: nn.Module,
    network: bytes,
    *,
    calibration: Tensor | None,
    task: Task | None,
    settings: Int8Settings,
    scheme: Int8Scheme,
    cases: int,
    tell: Callable[[str], None] | None = None,
) -> Int8Network:
    """Quantise an exported network and find out what may be promised of it.

    Args:
        model, folded, network: the network before folding, after it, and as ONNX.
        calibration: (N, C, ...) held-out training inputs, as the network gets them; the last quarter is compared on.
        task: where they come from otherwise, and what judges.
    Raises:
        InputError: neither images nor a task, or too few.
        CheckFailedError: see ``quantise``; or this runtime's kernels do not agree with exact arithmetic.
    """
    ranges, held_out, judge = _images(calibration, task, settings)
    found = quantise(
        network, ranges, held_out, settings=settings, scheme=scheme, judge=judge,
        higher_is_better=task is None or task.higher_is_better, tell=tell,
    )  # fmt: skip
    told = report(found, network, model, folded, held_out, metric_name=None if task is None else task.metric_name)
    batch = _batch(network)
    golden = held_out[: min(cases, len(held_out) // batch) * batch]
    mine, exact = outputs_of(found.onnx, golden), outputs_of(network, golden)
    scale = max(float(np.abs(mine).max(initial=0.0)), 1e-30)
    tolerance = max(4 * found.kernels_error, 2 * _output_step(found.onnx)) / scale
    if tolerance > _LARGEST_TOLERANCE:
        raise CheckFailedError(
            f"8 bits are not repeatable enough to be verified: outputs may differ by {tolerance:.0%} of the largest "
            "from one processor to the next: keep the last layers in float32 (keep_fp32)"
        )
    golden_cases = tuple(
        Golden(*(part[start : start + batch].astype(np.float32) for part in (golden, mine, exact)))
        for start in range(0, len(golden), batch)
    )
    return Int8Network(found, told, golden_cases, max(tolerance, 1e-4), sqnr_db(exact, mine) - _MARGIN_DB)


def _images(
    calibration: Tensor | None, task: Task | None, settings: Int8Settings
) -> tuple[np.ndarray, np.ndarray, Judge | None]:
    """(inputs to calibrate on, inputs to compare on, judge)."""
    if calibration is not None:
        images = np.asarray(calibration.detach().cpu().float().numpy())
        count = min(settings.images, len(images) * 3 // 4)
        if count < 1:
            raise InputError(f"{len(images)} calibration images are too few: give at least 4 held-out training images")
        rest = images[count : count + _COMPARED]
        return images[:count], rest, None if task is None else judge_of(task, np.arange(len(task.valid)))
    if task is None:
        raise InputError(
            "8 bits need images to be calibrated on: give a task (its held-out training images are used), or "
            "calibration; on the command line --data"
        )
    count = min(settings.images, len(task.valid) // 2)
    if count < 1:
        raise InputError("the task holds out no examples: 8 bits are calibrated on held-out training images")
    judged = np.arange(count, min(len(task.valid), count + _JUDGED))
    ranges, held_out = (
        np.asarray(task.valid.take(which)[0].float().numpy()) for which in (np.arange(count), judged[:_COMPARED])
    )
    return ranges, held_out, judge_of(task, judged)


def judge_of(task: Task, which: np.ndarray, *, examples: Any = None) -> Judge:
    """The task's metric of an ONNX network on examples by index; on those of ``task.valid`` unless others are given."""
    import torch

    inputs, *targets = (task.valid if examples is None else examples).take(which)
    images = np.asarray(inputs.float().numpy())

    def judge(network: bytes) -> float:
        outputs = torch.from_numpy(outputs_of(network, images)).float()
        whole = (inputs[: len(outputs)], *(target[: len(outputs)] for target in targets))
        return float(task.summary(task.tally(outputs, whole)).metric)

    return judge


def _batch(network: bytes) -> int:
    return int(session_of(network, exact=True).get_inputs()[0].shape[0])


def _output_step(network: bytes) -> float:
    """The step of the network's output where it is a quantised tensor, else 0."""
    from onnx import load_from_string, numpy_helper

    graph = load_from_string(network).graph
    maker = next(node for node in graph.node if graph.output[0].name in node.output)
    if maker.op_type != "DequantizeLinear":
        return 0.0
    scale = next((item for item in graph.initializer if item.name == maker.input[1]), None)
    return 0.0 if scale is None else float(numpy_helper.to_array(scale).max())
