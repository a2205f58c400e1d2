"""What a runtime without ONNX graphs of its own gets like any other: lowering templates, estimates."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hwsearch.device.machine import processor
from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.estimation import estimate
from hwsearch.latency.lowering import Lowering
from hwsearch.latency.lowering_learning import learn
from hwsearch.model_argument import load_model_argument

sys.path.insert(0, str(Path(__file__).parent))

from template_models import onnx_template

pytestmark = [
    pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed"),
    pytest.mark.skipif("avx2" not in processor()[1], reason="the caps are of x86 CPUs"),
]


def test_a_template_foretells_what_openvino_makes() -> None:
    """With SSE4.1 alone a convolution of whole blocks of 8 takes another implementation than the rest: a stair."""
    template = onnx_template("residual", 4)
    with open_session(Device.load("x86-openvino-1t-sse41")) as session:
        learnt = learn(Lowering(template, session), most=64)
    assert learnt.check.choices > 0
    assert learnt.check.wrong == 0
    used = {slot.op for slot in learnt.slots if slot.op.startswith("Convolution/")}
    assert used == {"Convolution/jit_sse42", "Convolution/jit_gemm"}


def test_an_estimate_has_the_kernels_of_openvino_and_the_memory_of_the_network(campaign: Any) -> None:
    model = load_model_argument("hwsearch.models.vgg:vgg_small", (1, 1, 28, 28))
    device = Device.load("x86-openvino-1t-sse41")  # one process has one cap
    with open_session(device) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another device's predictor: what it says is not looked at
        found = estimate(model, device, session, campaign.predictor)
    assert any(kernel.op.startswith("Convolution/") for kernel in found.kernels)
    assert found.memory.weight_bytes == pytest.approx(
        4 * sum(p.numel() for p in model.need_module().parameters()), rel=0.02
    )
    assert found.memory.peak_activation_bytes >= 2 * 4 * 28 * 28
