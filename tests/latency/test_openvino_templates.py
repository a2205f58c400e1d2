"""Lowering templates are learnt of OpenVINO as of any runtime: nothing of it is known there."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hwsearch.device.machine import processor
from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.latency.lowering import Lowering
from hwsearch.latency.lowering_learning import learn

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
