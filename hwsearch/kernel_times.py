"""The found network's kernels on the run's first device: predicted, and as the runtime's profiler divides its time."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from hwsearch.errors import DeviceJobError, NoisyDeviceError
from hwsearch.preparation import Prepared

if TYPE_CHECKING:
    from hwsearch.search.result import SearchResult


def time_kernels(ready: Prepared, result: SearchResult, measured_ms: float) -> None:
    """Profile the found network once and write ``kernels.json`` of the run folder.

    A device that cannot be profiled now leaves the run without that file: its answer does not hang on it.

    Args:
        measured_ms: what the network takes as a whole, which is divided.
    """
    from hwsearch.device.stopwatch import PROFILE
    from hwsearch.latency.predictor import OutOfRangeWarning
    from hwsearch.report.kernels_section import write_kernel_times
    from hwsearch.report.run_data import KernelTime

    target = ready.first
    network = ("the found network", target.template.slice(result.choice))
    try:
        (timing,) = target.session.time([network], reference_ms=target.reference_ms, settings=PROFILE, nodes=True)
    except (DeviceJobError, NoisyDeviceError) as error:
        ready.console.say(f"  its kernels are not timed one by one: {error}")
        return
    kernels, shares = timing.kernels or (), timing.node_shares or ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutOfRangeWarning)
        predicted = target.latency.predictor.network(kernels).kernel_ms
    rows = [
        KernelTime(kernel.node, kernel.family, ms, share * measured_ms)
        for kernel, ms, (_, share) in zip(kernels, predicted, shares, strict=True)
    ]
    write_kernel_times(ready.run.path, target.device.name, measured_ms, rows)
