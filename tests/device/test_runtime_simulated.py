"""The simulated device has the habits of a real one, and gives the same answer whatever happened before."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hwsearch.device import runtime_simulated as simulated
from hwsearch.device.canary import canary_bytes, check_networks
from hwsearch.device.spec import Device
from hwsearch.device.stopwatch import PROFILE, Stopwatch, StopwatchSettings, Timing
from hwsearch.errors import DeviceJobError, InputError, NoisyDeviceError
from hwsearch.graph.kernel import Kernel

sys.path.insert(0, str(Path(__file__).parent))

from device_graphs import Graph, head, residual, separable

DEVICE = Device("simulated", "simulated")
QUIET = Device("simulated", "simulated", options={"noise": 0.0, "drift": 0.0, "spells": 0.0})


def kernels(network: bytes, device: Device = DEVICE) -> tuple[Kernel, ...]:
    return simulated.parse(simulated.optimise(device, network))


def time(
    network: bytes,
    device: Device = DEVICE,
    settings: StopwatchSettings = PROFILE,
    reference_ms: float | None = None,
    bench: simulated.Bench | None = None,
) -> Timing:
    """As the agent does it."""
    bench = bench or simulated.open_bench(device, canary_bytes())
    bench.begin(network, settings.seed)
    watch = Stopwatch(bench.canary, bench.clock, settings, reference_ms)
    ((_, outcome),) = watch.time([("net", lambda: bench.open("net", network))])
    if not isinstance(outcome, Timing):
        raise outcome
    return outcome


def truth(network: bytes, device: Device = QUIET) -> float:
    bench = simulated.open_bench(device, canary_bytes())
    return bench.open("net", network).total_ms


def test_the_blocked_path_pads_and_fuses() -> None:
    stem = kernels(residual(30))[0]
    assert (stem.family, stem.out_channels, stem.layout_out, stem.fused) == ("conv_first", 32, "nchwc", ("relu",))
    multiple = kernels(residual(32))
    assert [kernel.family for kernel in multiple] == [
        "conv_first",
        "conv",
        "conv",
        "global_pool",
        "reorder",
        "free",
        "gemm",
    ]
    assert multiple[2].fused == ("add", "relu")


def test_fusion_depends_on_the_shape() -> None:
    """At 30 channels the body leaves the blocked path, so its add is a kernel of its own, with reorders around."""
    odd = kernels(residual(30))
    assert "reorder" in [kernel.family for kernel in odd[:3]]
    assert any(kernel.op == "Add" for kernel in odd)
    assert not any("add" in kernel.fused for kernel in odd)
    assert len(odd) > len(kernels(residual(32)))


def test_a_depthwise_layer_leaves_the_blocked_path_at_odd_widths() -> None:
    assert [kernel.family for kernel in kernels(separable(32))][:3] == ["conv_first", "depthwise", "pointwise"]
    odd = kernels(separable(30))
    assert [kernel.family for kernel in odd][:3] == ["conv_first", "reorder", "depthwise"]
    assert odd[1].op == "ReorderOutput"
    assert (odd[1].in_channels, odd[1].out_channels) == (32, 30)
    assert odd[2].layout_in == "nchw"
    assert truth(separable(30)) > 1.15 * truth(separable(32))


def test_time_is_a_staircase_in_the_width() -> None:
    times = {width: truth(residual(width, side=28)) for width in (36, 40, 44, 48)}
    assert times[36] == pytest.approx(times[40], rel=0.02)
    assert times[44] == pytest.approx(times[48], rel=0.02)
    assert times[48] > 1.25 * times[40]


def test_a_batch_norm_is_folded_and_a_concat_needs_whole_blocks() -> None:
    graph = Graph(1, 3, 8, 8)
    graph.conv("input", "a", (3, 16))
    params = [graph.weight(name, 16) for name in ("scale", "shift", "mean", "var")]
    graph.node("BatchNormalization", ["a", *params], "n")
    graph.node("Relu", "n", "r")
    graph.node("Concat", ["r", "r"], "c", axis=1)
    assert [(kernel.op, kernel.fused) for kernel in kernels(head(graph, "c", 32))][:2] == [
        ("Conv", ("relu",)),
        ("Concat", ()),
    ]
    odd = Graph(1, 3, 8, 8)
    odd.conv("input", "a", (3, 12))
    odd.node("Concat", ["a", "a"], "c", axis=1)
    assert [kernel.op for kernel in kernels(head(odd, "c", 24))][:2] == ["Conv", "Concat"]
    ragged = Graph(1, 3, 8, 8)
    ragged.conv("input", "a", (3, 12))
    ragged.conv("input", "b", (3, 16))
    ragged.node("Concat", ["a", "b"], "c", axis=1)
    assert [kernel.op for kernel in kernels(head(ragged, "c", 28))][:5] == [
        "Conv",
        "Conv",
        "ReorderOutput",
        "ReorderOutput",
        "Concat",
    ]


def test_an_output_that_is_read_twice_is_not_fused_away() -> None:
    graph = Graph(1, 3, 8, 8)
    graph.conv("input", "a", (3, 16))
    graph.node("Relu", "a", "r")
    graph.node("Add", ["a", "r"], "s")
    assert [kernel.op for kernel in kernels(head(graph, "s", 16))][:3] == ["Conv", "Relu", "Add"]


def test_two_convolutions_into_one_add_fuse_into_the_later() -> None:
    graph = Graph(1, 8, 8, 8)
    graph.conv("input", "a", (8, 16), 1)
    graph.conv("input", "b", (8, 16))
    graph.node("Add", ["b", "a"], "s")
    listed = [kernel for kernel in kernels(head(graph, "s", 16)) if kernel.op == "Conv"]
    assert [(kernel.family, kernel.fused) for kernel in listed] == [("pointwise", ()), ("conv", ("add",))]


def test_the_graph_survives_its_file_and_others_are_refused() -> None:
    data = simulated.optimise(DEVICE, residual())
    assert simulated.optimise(DEVICE, residual()) == data
    assert all(kernel.node.startswith(f"{index:03d}_") for index, kernel in enumerate(simulated.parse(data)))
    for wrong in (b"", b"[]", b'{"schema": "x"}', json.dumps(json.loads(data) | {"version": 9}).encode(), residual()):
        with pytest.raises(DeviceJobError, match="not one of the simulated runtime"):
            simulated.parse(wrong)
    for broken in (b"", b"garbage"):
        with pytest.raises(DeviceJobError, match="no ONNX file"):
            simulated.optimise(DEVICE, broken)


def test_a_timing_depends_on_nothing_that_ran_before() -> None:
    bench = simulated.open_bench(DEVICE, canary_bytes())
    first = time(residual(), bench=bench)
    for name, network in check_networks():
        bench.open(name, network).run()
    assert time(residual(), bench=bench) == first
    assert time(residual()) == first
    assert time(residual(), settings=replace(PROFILE, seed=1)) != first
    other = Device("simulated", "simulated", options={"seed": 1})
    assert time(residual(), device=other) != first


def test_noise_and_drift_are_there_and_the_canary_sees_the_drift() -> None:
    reference = truth(canary_bytes())
    drifting = Device("simulated", "simulated", options={"drift": 0.12, "noise": 0.01})
    raw, corrected = [], []
    for width in range(8, 40, 3):
        timing = time(residual(width), drifting, reference_ms=reference)
        raw.append(abs(timing.raw_p50_ms / truth(residual(width)) - 1))
        corrected.append(abs(timing.measured_ms / truth(residual(width)) - 1))
    assert max(corrected) < 0.03
    assert np.mean(corrected) < 0.5 * np.mean(raw)
    quiet = time(residual(), QUIET, reference_ms=reference)
    assert quiet.measured_ms == pytest.approx(truth(residual()), rel=1e-4)
    assert quiet.raw_p90_ms == pytest.approx(quiet.raw_p50_ms, rel=1e-4)


def test_a_busy_machine_is_recognised() -> None:
    busy = Device("simulated", "simulated", options={"slowdown": 1.6})
    with pytest.raises(NoisyDeviceError, match="reference speed"):
        time(residual(), busy, reference_ms=truth(canary_bytes()))


def test_a_network_is_more_than_its_kernels() -> None:
    options = {"noise": 0.0, "overhead_us": 0.0, "node_us": 0.0, "drift": 0.0}
    bare = truth(residual(), Device("simulated", "simulated", options=options))
    assert truth(residual()) > bare + 0.012


def test_more_threads_are_faster_and_another_device() -> None:
    two = replace(QUIET, threads=2)
    assert truth(residual(side=28), two) < truth(residual(side=28))
    assert simulated.probe(two) != simulated.probe(QUIET)
    assert simulated.probe(DEVICE).cpu != simulated.probe(QUIET).cpu


def test_node_shares_sum_to_one_and_cost_time() -> None:
    bench = simulated.open_bench(DEVICE, canary_bytes())
    loaded = bench.open("net", residual())
    start = bench.clock()
    shares, optimised = loaded.profile(10, 1.0)
    assert bench.clock() > start
    assert sum(share for _, share in shares) == pytest.approx(1.0)
    assert [op for op, _ in shares] == [kernel.op for kernel in simulated.parse(optimised)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gmacs": 0}, "options.gmacs is 0"),
        ({"block": 7}, "options.block is 7; use 4, 8, 16 or 32"),
        ({"noise": -1}, "options.noise"),
        ({"drift": 1.5}, "options.drift"),
        ({"colour": 3}, "options.colour is unknown to simulated; known: block"),
        ({"noise": "much"}, "options.noise is 'much'"),
    ],
)
def test_senseless_options_are_refused(options: Mapping[str, float | str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulated.probe(Device("simulated", "simulated", options=options))
