"""Explanations: every millisecond has a layer and a kind, edges are the predictions' own, sentences say what is so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hwsearch.errors import InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.graph.onnx_build import OnnxTemplate
from hwsearch.graph.widths import WidthChoice, WidthGroup, WidthSpace
from hwsearch.latency.explain import (
    BOUNDS,
    Explanation,
    KernelCost,
    LayerCost,
    Parts,
    explain,
    explain_choice,
    kind_of,
    named_kernels,
)
from hwsearch.latency.features import TERMS
from hwsearch.latency.layers import LayerNames
from hwsearch.latency.lowering import Lowering
from hwsearch.latency.network import NetworkLatency
from hwsearch.latency.reasons import reasons
from hwsearch.latency.stairs import StairCurve, curves, looked_at


@pytest.fixture(scope="module")
def template() -> Iterator[OnnxTemplate]:
    import torch
    from torch import nn

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 66, 3, padding=1), nn.ReLU(),
        nn.Conv2d(66, 32, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    example = torch.zeros(1, 1, 14, 14)
    yield OnnxTemplate(WidthSpace.from_model(model, example), model, example, check=False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def latency(campaign: Any, template: OnnxTemplate) -> NetworkLatency:
    return NetworkLatency(template.space, campaign.predictor, Lowering(template, campaign.session))


@pytest.fixture(scope="module")
def found(latency: NetworkLatency, template: OnnxTemplate) -> Explanation:
    full = template.space.full()
    return explain_choice(latency, full, template.slice(full))


def test_the_parts_make_the_whole(found: Explanation, latency: NetworkLatency) -> None:
    estimate = latency.estimate(latency.space.full())
    assert found.ms == estimate.ms
    assert sum(layer.ms for layer in found.layers) + found.overhead_ms == pytest.approx(found.ms)
    assert sum(layer.share for layer in found.layers) == pytest.approx(1 - found.overhead_ms / found.ms)
    costs = [cost for layer in found.layers for cost in layer.kernels]
    assert sorted(cost.ms for cost in costs) == pytest.approx(sorted(estimate.kernel_ms))
    for cost in costs:
        assert cost.parts.ms == pytest.approx(cost.ms)
        assert min(cost.parts.compute_ms, cost.parts.memory_ms, cost.parts.overhead_ms) >= 0


def test_layers_have_the_models_names_and_true_channels(found: Explanation) -> None:
    layers = {layer.name: layer for layer in found.layers}
    assert list(layers) == ["0", "2", "4", "8"]
    assert [layer.channels for layer in found.layers] == [16, 66, 32, 10]
    assert layers["2"].runs_as == 72, "66 channels in blocks of 8"
    assert layers["0"].runs_as == 16
    # 66 is no multiple of 4, so the next layer runs in the plain layout, with the reorder that this takes.
    families = [cost.kernel.family for cost in layers["4"].kernels]
    assert families[0] == "reorder"
    assert "conv" in families


def test_the_stair_below_66_is_found_and_named(found: Explanation, latency: NetworkLatency) -> None:
    layer = next(layer for layer in found.layers if layer.name == "2")
    stair = layer.stair
    assert stair is not None
    assert stair.layers == ("2",)
    assert stair.touched == ("2", "4")
    assert stair.width == 66
    assert stair.down in (64, 65)
    assert stair.up is None, "66 is the full width"
    rows = np.array([latency.space.full().widths] * len(stair.widths))
    rows[:, 1] = stair.widths
    assert np.array(stair.ms) == pytest.approx(latency.evaluate(rows))
    assert stair.saved_ms == pytest.approx(stair.at(66) - stair.at(stair.down))
    assert stair.saved_ms > 0.02 * found.ms
    assert any(reason.startswith(f"2: 66 channels run as 72: {stair.down} would save") for reason in found.reasons)
    assert 1 <= len(found.reasons) <= 2


def test_a_narrower_choice_can_be_widened_for_nothing(latency: NetworkLatency, template: OnnxTemplate) -> None:
    choice = WidthChoice((16, 36, 32))
    stair = explain_choice(latency, choice, template.slice(choice)).stairs[1]
    assert stair.width == 36
    assert stair.up is not None
    assert stair.at(stair.up) <= 1.001 * stair.now_ms
    assert all(ms > stair.now_ms for w, ms in zip(stair.widths, stair.ms, strict=True) if w > stair.up)


def test_a_correction_scales_everything(found: Explanation, latency: NetworkLatency, template: OnnxTemplate) -> None:
    full = template.space.full()
    twice = explain_choice(latency.corrected(2.0), full, template.slice(full))
    assert twice.ms == pytest.approx(2 * found.ms)
    assert [layer.ms for layer in twice.layers] == pytest.approx([2 * layer.ms for layer in found.layers])
    assert [layer.bound for layer in twice.layers] == [layer.bound for layer in found.layers]
    assert twice.stairs[1].down == found.stairs[1].down


def test_without_a_space_everything_but_the_stairs(found: Explanation, latency: Any, template: OnnxTemplate) -> None:
    full = template.space.full()
    bare = explain(template.slice(full), latency.kernels(full), latency.predictor, note="no stairs here")
    assert bare.stairs == ()
    assert bare.note == "no stairs here"
    assert [(x.name, x.ms, x.bound, x.channels) for x in bare.layers] == [
        (x.name, pytest.approx(x.ms), x.bound, x.channels) for x in found.layers
    ]
    assert bare.reasons


def test_it_is_plain_values_for_json(found: Explanation) -> None:
    facts = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert facts["layers"][1]["down"] == found.stairs[1].down
    assert {layer["bound"] for layer in facts["layers"]} <= set(BOUNDS)
    assert facts["stairs"][1]["widths"][-1] == 66
    assert len(facts["stairs"][1]["ms"]) == len(facts["stairs"][1]["widths"])


def test_a_choice_of_another_space_is_refused(latency: NetworkLatency) -> None:
    with pytest.raises(InputError, match="9999"):
        curves(latency, WidthChoice((16, 9999, 32)))


def test_every_term_has_a_kind() -> None:
    kinds = {kind: [term for term in TERMS if kind_of(term) == kind] for kind in BOUNDS}
    assert kinds["overhead"] == ["one", "calls_plain"]
    assert all(term.startswith(("bytes", "columns")) for term in kinds["memory"])
    assert all(term.startswith(("macs", "partial", "rows", "gate")) for term in kinds["compute"]), "a new term: decide"


@pytest.mark.parametrize("bound", BOUNDS)
def test_what_a_kernel_is_bound_by_follows_the_device(campaign: Any, bound: str) -> None:
    kernel = {
        "compute": Kernel("conv", "Conv", layout_in="nchwc", layout_out="nchwc", in_channels=64, out_channels=64,
                          in_height=28, in_width=28, out_height=28, out_width=28, kernel_height=3, kernel_width=3),
        "memory": Kernel("elementwise", "Add", layout_in="nchwc", layout_out="nchwc", in_channels=64, out_channels=64,
                         in_height=56, in_width=56, out_height=56, out_width=56, inputs=2),
        "overhead": Kernel("elementwise", "Relu", in_channels=8, out_channels=8),
    }[bound]  # fmt: skip
    import onnx
    from onnx import helper

    empty = helper.make_model(helper.make_graph([], "none", [], [])).SerializeToString()
    assert onnx.load_from_string(empty).graph.name == "none"
    found = explain(empty, [kernel], campaign.predictor)
    assert found.layers[0].bound == bound


# ---------------------------------------------------------------- names


def node(op: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(op, inputs, [output], name=name or f"n_{output}", **attributes)


def names(nodes: list[Any], weights: dict[str, tuple[int, ...]]) -> LayerNames:
    from onnx import TensorProto, helper

    initializers = [helper.make_tensor(k, TensorProto.FLOAT, s, np.zeros(s).ravel()) for k, s in weights.items()]
    return LayerNames.of(helper.make_model(helper.make_graph(nodes, "g", [], [], initializers)).SerializeToString())


def kernel(family: str, *source: str) -> Kernel:
    return Kernel(family, family, source=source)


def test_tails_belong_to_the_layer_before_and_reorders_to_the_one_after() -> None:
    found = names(
        [
            node("Conv", ["x", "a.weight", "a.bias"], "a"),
            node("Relu", ["a"], "r"),
            node("Conv", ["r", "b.weight"], "b"),
            node("Add", ["b", "a"], "sum"),
            node("Gemm", ["sum", "fc.weight"], "y", transB=1),
        ],
        {"a.weight": (8, 3, 3, 3), "a.bias": (8,), "b.weight": (16, 8, 1, 1), "fc.weight": (10, 16)},
    )
    assert found.channels == {"a": 8, "b": 16, "fc": 10}
    kernels = [
        kernel("reorder", "ReorderInput"), kernel("conv", "a"), kernel("elementwise", "n_r"),
        kernel("reorder", "x"), kernel("conv", "sum"), kernel("reorder"), kernel("gemm", "fc"), kernel("free"),
    ]  # fmt: skip
    assert found.layers_of(kernels) == ["a", "a", "a", "b", "b", "fc", "fc", "fc"]


def test_names_of_other_exporters() -> None:
    found = names(
        [node("Conv", ["x", "onnx::Conv_12"], "y", "/layer1/layer1.0/conv1/Conv")], {"onnx::Conv_12": (24, 3, 3, 3)}
    )
    assert found.channels == {"layer1/layer1.0/conv1": 24}
    assert found.layers_of([kernel("conv", "y")]) == ["layer1/layer1.0/conv1"]


def test_weights_behind_quantisation_and_transposed_ones() -> None:
    found = names(
        [
            node("DequantizeLinear", ["a.weight", "scale"], "w"),
            node("Conv", ["x", "w"], "a"),
            node("ConvTranspose", ["a", "up.weight"], "u", group=2),
            node("MatMul", ["u", "m.weight"], "y"),
        ],
        {"a.weight": (8, 3, 3, 3), "scale": (1,), "up.weight": (8, 6, 2, 2), "m.weight": (12, 7)},
    )
    kernels = [kernel("conv", "a"), kernel("conv_transpose", "up"), kernel("gemm", "m")]
    assert found.layers_of(kernels) == ["a", "up", "m"]
    assert found.channels["up"] == 12
    assert found.channels["m"] == 7


def test_layers_are_found_in_a_real_runtimes_own_graph() -> None:
    """Nothing is timed: the graph is optimised, and its fused, renamed nodes are led back to the model's layers."""
    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device
    from hwsearch.model_argument import load_model_argument

    onnx = load_model_argument("hwsearch.models.resnet:resnet_small", (1, 1, 28, 28)).to_onnx()
    with open_session(Device("here", "onnxruntime", options={"spinning": 0})) as session:
        plain = session.lower([onnx])[0]
        named = named_kernels(onnx, plain, session)
    assert named == plain
    found = LayerNames.of(onnx)
    assert found.channels["stages.1.0.shortcut.0"] == 32
    weighted = [(layer, k) for layer, k in zip(found.layers_of(named), named, strict=True) if k.weight_elements]
    assert sorted(layer for layer, _ in weighted) == sorted(found.channels), "each layer has its own kernel"
    assert all(k.out_channels >= found.channels[layer] for layer, k in weighted)


# ---------------------------------------------------------------- sentences


def layer(name: str, ms: float, *, family: str = "conv", layout: str = "nchwc", **parts: float) -> LayerCost:
    one = Kernel(family, family, layout_out=layout, in_channels=8, out_channels=72, kernel_height=3, kernel_width=3)
    known = {"compute_ms": ms, "memory_ms": 0.0, "overhead_ms": 0.0} | parts
    return LayerCost(name, (KernelCost(one, ms, Parts(**known)),), 0.0)


def whole(*layers: LayerCost, stairs: tuple[StairCurve, ...] = ()) -> Explanation:
    ms = sum(x.ms for x in layers)
    return Explanation(ms, 0.0, tuple(replace(x, share=x.ms / ms) for x in layers), stairs, ())


def test_reorders_are_blamed_on_the_layers_that_leave_the_blocked_layout() -> None:
    found = whole(layer("a", 6.0), layer("b", 1.0, layout="nchw"), layer("b", 3.0, family="reorder"))
    (text,) = reasons(found)
    assert text.startswith("30 % of the time is in 1 reorder because b cannot run in the blocked layout")


def test_overhead_and_memory_are_told_the_larger_first() -> None:
    found = whole(
        layer("a", 4.0, compute_ms=0.0, overhead_ms=4.0),
        layer("b", 5.0, compute_ms=0.0, memory_ms=5.0),
        layer("c", 1.0),
    )
    first, second = reasons(found)
    assert first.startswith("50 % of the time moves memory, most of it in b")
    assert second.startswith("40 % of the time is paid for starting 3 kernels")


def test_padding_is_told_where_no_stairs_are_known() -> None:
    padded = replace(layer("a", 5.0), channels=60, runs_as=72)
    assert reasons(whole(padded, layer("b", 5.0))) == (
        "a (50 % of the time): 60 channels run as 72, so 17 % of its arithmetic is padding",
    )


def test_a_network_of_pure_arithmetic_is_told_so() -> None:
    (text,) = reasons(whole(layer("a", 8.0), layer("b", 1.0), layer("c", 1.0)))
    assert text.startswith("100 % of the time is arithmetic")
    assert "80 % in a:" in text


def test_edges_are_told_in_channels_where_a_unit_is_several() -> None:
    curve = StairCurve("g", ("a",), 24, 32, (21, 24, 28), (1.0, 10.0, 10.0))
    split = replace(layer("a", 5.0), channels=48, runs_as=48, stair=curve)
    assert (split.down, split.up) == (42, 56)
    assert (split.to_dict()["down"], split.to_dict()["up"]) == (42, 56)
    found = whole(split, layer("b", 5.0), stairs=(curve,))
    assert reasons(found)[0].startswith("a: 48 channels: 42 would save 9 ms")


def test_a_proportional_saving_is_no_stair() -> None:
    curve = StairCurve("g", ("a",), 64, 64, (32, 64), (7.5, 10.0))
    assert reasons(whole(layer("a", 5.0), layer("b", 5.0), stairs=(curve,)))[0].startswith("100 % of the time is arith")
    both = replace(curve, ms=(5.0, 10.0), touched=("a", "b"))
    assert reasons(whole(layer("a", 5.0), layer("b", 5.0), stairs=(both,)))[0].startswith("100 % of the time is arith")
    steep = replace(curve, widths=(60, 64), ms=(7.5, 10.0), layers=("a", "b"))
    (text, *_) = reasons(whole(layer("a", 5.0), layer("b", 5.0), stairs=(steep,)))
    assert text == "a (and 1 layer tied to it): 64 channels: 60 would save 2.5 ms (25 %)"


# ---------------------------------------------------------------- curves


def test_down_up_and_edges() -> None:
    curve = StairCurve("g", ("a",), 20, 40, (8, 16, 20, 24, 32, 40), (1.0, 2.0, 3.0, 3.0, 2.9999, 4.0))
    assert curve.down == 16
    assert curve.saved_ms == 1.0
    assert curve.up == 32
    assert curve.edges == (8, 16, 32, 40)
    flat = replace(curve, ms=(1.0,) * 6)
    assert (flat.down, flat.saved_ms, flat.up, flat.edges) == (None, 0.0, 40, (40,))
    first = replace(curve, width=8)
    assert (first.down, first.up) == (None, None)


def test_of_many_widths_multiples_are_looked_at() -> None:
    group = WidthGroup("g", 515, 1, 1, (), (), tuple(range(1, 516)))
    widths = looked_at(group, 301)
    assert 301 in widths
    assert 515 in widths
    assert len(widths) <= 66
    assert all(w % 16 == 0 for w in widths if w not in (301, 515))
    assert looked_at(replace(group, units=20, widths=tuple(range(1, 21))), 20) == tuple(range(1, 21))
