"""TensorRT without a GPU: what its words mean to us, and that networks of ours parse and build.

The wheels ``tensorrt-rtx-cu13-libs`` and ``tensorrt-rtx-cu13-bindings`` build on a plain CPU; tests that need them skip
where they are not on the path. Layers as the inspector lists them are written here by its documentation.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hwsearch.device import runtime_tensorrt
from hwsearch.device.onnx_kernels import Reader
from hwsearch.device.spec import Device
from hwsearch.device.tensorrt_engine import EngineFacts, build_engine, flavour_of, pack_engine, unpack_engine
from hwsearch.device.tensorrt_kernels import kernels_by_layer, read_graph, shares_of, write_graph
from hwsearch.device.tensorrt_precision import typed
from hwsearch.errors import DeviceJobError, InputError
from hwsearch.graph.kernel import Kernel

sys.path.insert(0, str(Path(__file__).parent))

from device_graphs import Graph, head, residual

RTX = Device("rtx", "tensorrt", options={"flavour": "rtx"})
BUILT_FOR = ("sm_80", "sm_86", "sm_89")
needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None and find_spec("tensorrt_rtx_bindings") is None,
    reason="the wheels tensorrt-rtx-cu13-libs and tensorrt-rtx-cu13-bindings are not installed",
)


def nodes(network: bytes) -> dict[str, Kernel]:
    model = onnx.load_from_string(network)
    names = [node.name for node in model.graph.node]
    return dict(zip(names, Reader(model).kernels(), strict=True))


def layer(name: str, kind: str, metadata: str | None = None, formats: tuple[str, str] = ("", ""), **more: Any) -> dict:
    shape = [1, 32, 14, 14]
    linear = "Row major linear FP32"
    return {
        "Name": name, "LayerType": kind, "TacticName": "sm80_xmma_fprop", "StreamId": 0,
        "Inputs": [{"Name": "a", "Dimensions": shape, "Format/Datatype": formats[0] or linear}],
        "Outputs": [{"Name": "b", "Dimensions": shape, "Format/Datatype": formats[1] or linear}],
        **({} if metadata is None else {"Metadata": metadata}), **more,
    }  # fmt: skip


LAYERS = [
    layer("Reformatting CopyNode for Input Tensor 0 to stem + stem_relu", "Reformat", "",
          ("Row major linear FP32", "Channel major FP16 format where channel % 8 == 0")),
    layer("stem + stem_relu", "CaskConvolution", "[ONNX Layer: stem]\x1e[ONNX Layer: stem_relu]"),
    layer("a + a_relu", "CaskConvolution"),  # an older version gives no metadata
    layer("__myl_Conv_Add_Relu", "fusion", "[ONNX Layer: b]\x1f[ONNX Layer: sum]\x1f[ONNX Layer: sum_relu]",
          ("Thirty-two wide channel vectorized row major Int8 format",) * 2),
    layer("PWN(strange)", "PointWiseV2", "[ONNX Layer: strange]"),
    layer("signal_1", "signal", ""),
    layer("{ForeignNode[pooled...output]}", "Myelin", ""),
]  # fmt: skip


def document(layers: list[dict], network: bytes) -> bytes:
    return write_graph(json.dumps({"Layers": layers, "Bindings": ["input", "output"]}), nodes(network))


def test_layers_become_kernels_and_nothing_is_dropped() -> None:
    network = residual(30)
    kernels = runtime_tensorrt.parse(document(LAYERS, network))
    assert [kernel.family for kernel in kernels] == ["reorder", "conv_first", "conv", "conv", "other", "gemm"]
    assert sum(kernel.macs for kernel in kernels[:3]) + kernels[-1].macs == sum(
        kernel.macs for name, kernel in nodes(network).items() if name != "b"
    )
    reorder, stem, inner, fused, strange, region = kernels
    assert (reorder.layout_in, reorder.layout_out, reorder.dtype) == ("nchw", "nhwc", "float32>float16")
    assert (stem.fused, stem.source, stem.op) == (("relu",), ("stem",), "CaskConvolution/sm80_xmma_fprop")
    assert inner.source == ("a",)
    assert (fused.fused, fused.layout_in, fused.dtype) == (("add", "relu"), "nchw32c", "int8")
    assert (fused.in_channels, fused.out_channels) == (32, 32)  # 30, as they lie in memory
    assert strange.op.startswith("PointWiseV2")
    assert (region.in_channels, region.out_channels) == (30, 10)
    assert len({kernel.node for kernel in kernels}) == len(kernels)


def test_a_product_that_no_layer_names_is_an_error() -> None:
    with pytest.raises(DeviceJobError, match=r"no layer of the engine names the node 'a' \(1 in all\)"):
        runtime_tensorrt.parse(document([x for x in LAYERS if x["Name"] != "a + a_relu"], residual(30)))


def test_a_region_of_several_products_is_a_kernel_each_and_shares_its_time() -> None:
    network = residual(32)
    graph = read_graph(document([layer("{ForeignNode[stem...output]}", "Myelin", "")], network))
    (kernels,) = kernels_by_layer(graph)
    assert [kernel.source[0] for kernel in kernels] == ["stem", "a", "b", "fc"]
    assert sum(kernel.macs for kernel in kernels) == sum(kernel.macs for kernel in nodes(network).values())
    shares = shares_of(graph, {"{ForeignNode[stem...output]}": 2.0})
    assert sum(share for _, share in shares) == pytest.approx(1)
    assert shares[1][1] / shares[0][1] == pytest.approx(kernels[1].macs / kernels[0].macs)


def test_shares_are_in_the_order_of_kernels_and_none_is_zero() -> None:
    graph = read_graph(document(LAYERS, residual(30)))
    shares = shares_of(graph, {entry["Name"]: 1.0 for entry in LAYERS if entry["LayerType"] != "Reformat"})
    assert [op for op, _ in shares] == [kernel.op for kernels in kernels_by_layer(graph) for kernel in kernels]
    assert sum(share for _, share in shares) == pytest.approx(1)
    assert min(share for _, share in shares) > 0
    assert shares[0][1] < shares[1][1] / 100  # what was not reported


@pytest.mark.parametrize("data", [b"", b"[]", b'{"schema": "other"}', b'{"schema": "hwsearch.tensorrt-graph"}'])
def test_what_is_no_engine_graph_is_refused(data: bytes) -> None:
    with pytest.raises(DeviceJobError, match="not one of TensorRT"):
        runtime_tensorrt.parse(data)
    for text in ("", "{}", '{"Layers": ["a name only"]}'):
        with pytest.raises(DeviceJobError, match="engine"):
            write_graph(text, {})


def test_an_engine_is_refused_by_another_version_or_gpu() -> None:
    made = EngineFacts("tensorrt", "10.16.0", ("sm_86", "sm_89"))
    packed = pack_engine(b"\x00engine", made)
    assert unpack_engine(packed, EngineFacts("tensorrt", "10.16.0", ("sm_89",))) == b"\x00engine"
    for here, message in (
        (EngineFacts("tensorrt", "11.0.1", ("sm_86",)), "one of tensorrt 10.16.0, here is tensorrt 11.0.1"),
        (EngineFacts("rtx", "10.16.0", ("sm_86",)), "one of tensorrt 10.16.0, here is rtx"),
        (EngineFacts("tensorrt", "10.16.0", ("sm_80",)), "built for sm_86, sm_89, this GPU is sm_80"),
    ):
        with pytest.raises(DeviceJobError, match=message):
            unpack_engine(packed, here)
    for broken in (b"", b"engine", packed[:20], packed[:22] + b"x" + packed[23:]):
        with pytest.raises(DeviceJobError, match="build it again"):
            unpack_engine(broken, made)


def test_precision_is_written_into_the_graph() -> None:
    network = residual(16)
    assert typed(network, "float32") == network
    half = onnx.load_from_string(typed(network, "float16"))
    kinds = {tensor.data_type for tensor in half.graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert half.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert {node.name for node in onnx.load_from_string(network).graph.node} <= {node.name for node in half.graph.node}
    with pytest.raises(InputError, match="bfloat16"):
        typed(network, "bfloat16")


@pytest.mark.parametrize("seed", range(4))
def test_eight_bits_become_signed_and_stay_near(seed: int) -> None:
    from hwsearch.device import runtime_onnxruntime
    from hwsearch.latency.random_quantised import random_family, random_network

    rng = np.random.default_rng(seed)
    network = random_network(random_family(rng), rng)
    signed = typed(network, "int8")
    model = onnx.load_from_string(signed)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    assert {kinds[node.input[2]] for node in pairs} == {onnx.TensorProto.INT8}
    assert onnx.TensorProto.INT32 not in kinds.values()
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    values = {"input": rng.standard_normal(shape).astype(np.float32)}
    ort = Device("ort", "onnxruntime")
    before, after = (runtime_onnxruntime.run(ort, data, values)["output"] for data in (network, signed))
    noise = float(((before - after) ** 2).mean() / (before**2).mean())
    assert noise < 0.1


def test_wrong_options_and_a_machine_without_it_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"options\.turbo is unknown to tensorrt; known: flavour, workspace_mb"):
        flavour_of(Device("x", "tensorrt", options={"turbo": 1}))
    with pytest.raises(InputError, match=r"options\.flavour is 'lean'; known: tensorrt, rtx"):
        flavour_of(Device("x", "tensorrt", options={"flavour": "lean"}))
    monkeypatch.setattr("hwsearch.device.tensorrt_engine.find_spec", lambda name: None)
    with pytest.raises(
        DeviceJobError, match="no module tensorrt or tensorrt_rtx or tensorrt_rtx_bindings is installed"
    ):
        flavour_of(Device("x", "tensorrt"))


def models() -> dict[str, Any]:
    """The reference networks: name to (model, input shape)."""
    from hwsearch.models.mobilenetv2 import mobilenetv2_small
    from hwsearch.models.mobileone import mobileone_s0
    from hwsearch.models.repvgg import repvgg_small
    from hwsearch.models.resnet import resnet_small
    from hwsearch.models.vgg import vgg_small

    return {
        "vgg": (vgg_small, 1), "resnet": (resnet_small, 1), "mobilenetv2": (mobilenetv2_small, 1),
        "repvgg": (repvgg_small, 1), "mobileone": (mobileone_s0, 3),
    }  # fmt: skip


@needs_rtx
@pytest.mark.parametrize("name", ["vgg", "resnet", "mobilenetv2", "repvgg", "mobileone"])
def test_the_reference_networks_build_for_three_gpus_without_one(name: str) -> None:
    """As exported with their branches and norms, folded, and folded in float16."""
    import torch

    from hwsearch.graph.onnx_build import export_onnx
    from hwsearch.reparam.fold import fold

    make, channels = models()[name]
    model, example = make().eval(), torch.zeros(1, channels, 28, 28)
    plain, folded = export_onnx(model, example), export_onnx(fold(model, example, require=False), example)
    for network in (plain, folded, typed(folded, "float16")):
        engine, timings = build_engine(RTX, network, capabilities=BUILT_FOR)
        assert len(engine) > 10_000
        assert timings is None  # this one times nothing while it builds


@needs_rtx
def test_what_campaigns_draw_builds_too() -> None:
    from hwsearch.latency import random_quantised
    from hwsearch.latency.random_networks import random_family, random_network

    for number in range(4):
        rng = np.random.default_rng(number)
        build_engine(RTX, random_network(random_family(rng), rng), capabilities=BUILT_FOR)
        rng = np.random.default_rng(number)
        eight = random_quantised.random_network(random_quantised.random_family(rng), rng)
        build_engine(RTX, typed(eight, "int8"), capabilities=BUILT_FOR)


@needs_rtx
def test_what_cannot_be_built_says_why_in_one_line() -> None:
    graph = Graph(0, 3, 8, 8)
    graph.conv("input", "x", (3, 8))
    for data in (b"", b"garbage", residual()[:300], head(graph, "x", 8)):
        with pytest.raises(DeviceJobError) as caught:
            build_engine(RTX, data, capabilities=("sm_86",))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="compute capability 'sm_10' is unknown"):
        build_engine(RTX, residual(), capabilities=("sm_10",))
    with pytest.raises(DeviceJobError, match=r"options\.dla is given, but there is no DLA here"):
        build_engine(Device("x", "tensorrt", options={"flavour": "rtx", "dla": 0}), residual())


@needs_rtx
@pytest.mark.parametrize("sparse", [0, 1])
def test_2_4_blocks_build_and_the_builder_is_told_of_them(sparse: int) -> None:
    import torch
    from torch import nn

    from hwsearch.device import tensorrt_engine
    from hwsearch.graph.onnx_build import export_onnx
    from hwsearch.search.mgas_weights import two_of_four

    device = Device("x", "tensorrt", options={"flavour": "rtx", "sparse": sparse})
    trt = tensorrt_engine.load("rtx")
    builder = trt.Builder(tensorrt_engine._logger(trt))
    config = tensorrt_engine._config(device, trt, builder, builder.create_network(0))
    assert config.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS) == bool(sparse)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight *= two_of_four(model[0].weight.abs())
    network = typed(export_onnx(model, torch.zeros(1, 8, 14, 14)), "float16")
    engine, _ = build_engine(device, network, capabilities=BUILT_FOR)
    assert len(engine) > 1000
