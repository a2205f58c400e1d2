"""Every runtime keeps the promises of ``hwsearch.testing``. No test here looks at milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from hwsearch.device import runtime_simulated, runtime_tensorrt
from hwsearch.device.onnx_cuda import CUDA, providers
from hwsearch.device.spec import Device
from hwsearch.errors import CheckFailedError, DeviceJobError, DeviceUnavailableError
from hwsearch.graph.kernel import Kernel
from hwsearch.testing import RUNTIME_CHECKS, check_runtime

DEVICES = [
    Device("simulated", "simulated"),
    Device("ort", "onnxruntime"),
    Device("openvino", "openvino"),
    Device("tensorrt", "tensorrt"),
    Device("gpu", "onnxruntime", options={"provider": CUDA}),
]


@pytest.mark.parametrize("check", RUNTIME_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_a_runtime_keeps_its_promises(device: Device, check: Callable[[Device], None]) -> None:
    if device.runtime == "tensorrt":
        try:
            runtime_tensorrt.facts_of(device)
        except DeviceJobError as error:
            pytest.skip(str(error))
    elif device.name == "gpu":
        try:
            providers(device)
        except DeviceUnavailableError as error:
            pytest.skip(str(error))
    elif find_spec(device.runtime) is None and device.runtime != "simulated":
        pytest.skip(f"{device.runtime} is not installed")
    check(device)


def test_outcomes_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that loses a layer, forgets its options and lets garbage through fails just those checks."""
    parse = runtime_simulated.parse

    def forgetful(optimised: bytes) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in parse(optimised) if kernel.family != "pointwise")

    monkeypatch.setattr(runtime_simulated, "parse", forgetful)
    monkeypatch.setattr(runtime_simulated, "_options", lambda device: dict(runtime_simulated._DEFAULTS))
    device = Device("simulated", "simulated")
    outcomes = check_runtime(device, raise_on_failure=False)
    failed = {outcome.name: outcome.failure for outcome in outcomes if not outcome.passed}
    assert {"options", "nothing_dropped"} <= set(failed)
    assert "unknown option raised nothing" in failed["options"]
    assert "times the network's MACs" in failed["nothing_dropped"]
    assert "names" not in failed
    assert all(outcome.promise for outcome in outcomes)
    with pytest.raises(CheckFailedError, match=r"runtime simulated: \d+ of 13 checks failed: .*nothing_dropped"):
        check_runtime(device)
