"""Measured milliseconds of width choices, for the benches that compare what searches found."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.graph.onnx_build import OnnxTemplate
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.latency.measure import measure_many
from hwsearch.latency.profile import current_check
from hwsearch.reparam.fold import fold

_TOGETHER = 12  # networks that are timed in turn, so that a slow minute hits all of them


def text(widths: Sequence[int]) -> str:
    """Widths as they stand in a file and in a network's name."""
    return "-".join(map(str, widths))


def measured_ms(
    model: nn.Module, space: WidthSpace, example: Tensor, choices: Sequence[WidthChoice], device_name: str
) -> Iterator[tuple[WidthChoice, float]]:
    """Each choice with its milliseconds, by the one code path for measuring; holds the timing lock meanwhile."""
    device = Device.load(device_name)
    with open_session(device) as session:
        reference_ms = current_check(device, session, lambda line: print(line, file=sys.stderr)).reference_ms
        template = OnnxTemplate(space, fold(model, example, require=False), example)
        for start in range(0, len(choices), _TOGETHER):
            part = choices[start : start + _TOGETHER]
            files = [(text(choice.widths), template.slice(choice)) for choice in part]
            timings = measure_many(files, session, reference_ms=reference_ms)
            yield from zip(part, (found.measured_ms for found in timings), strict=True)
