"""Templates: the kernels they foretell are those that the runtime makes, for choices that nothing was learnt from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_models import MODELS, onnx_template, other

from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.errors import InputError, SchemaError
from hwsearch.graph.kernel import Kernel
from hwsearch.graph.onnx_export import export_onnx
from hwsearch.graph.widths import WidthChoice
from hwsearch.latency.lowering import Lowering, with_distinct_biases
from hwsearch.latency.lowering_learning import channel_quantities, learn, slot_names, slot_order
from hwsearch.latency.lowering_template import LoweringTemplate, Quantity, Split, same_kernels, stored_path
from hwsearch.reparam.fold import fold

RUNTIMES = ("simulated", "onnxruntime")


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, DeviceSession]]:
    home = tmp_path_factory.mktemp("home")
    found = {name: open_session(Device(name=name, runtime=name, home=home)) for name in RUNTIMES}
    yield found
    for session in found.values():
        session.close()


@pytest.fixture(scope="module")
def learnt(sessions: dict[str, DeviceSession]) -> Any:
    """(lowering, template) by (model, runtime), each learnt once."""
    known: dict[tuple[str, str], tuple[Lowering, LoweringTemplate]] = {}

    def get(model: str, runtime: str) -> tuple[Lowering, LoweringTemplate]:
        if (model, runtime) not in known:
            lowering = Lowering(onnx_template(model), sessions[runtime])
            known[model, runtime] = lowering, learn(lowering)
        return known[model, runtime]

    return get


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("model", MODELS)
def test_a_template_foretells_the_runtime(learnt: Any, model: str, runtime: str) -> None:
    lowering, template = learnt(model, runtime)
    space = lowering.template.space
    assert template.check.choices >= 90
    assert template.check.wrong == 0, template.check

    @settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*(st.sampled_from(group.widths) for group in space.groups)))
    def foretells(widths: tuple[int, ...]) -> None:
        choice = WidthChoice(widths)
        real, told = lowering.kernels([choice])[0], template.kernels(choice)
        assert same_kernels(told, real) == 0
        assert len(told) == len(real)

    foretells()


def test_learning_is_repeatable(sessions: dict[str, DeviceSession]) -> None:
    lowering = Lowering(onnx_template("depthwise", 4), sessions["simulated"])
    one, two = learn(lowering, most=300), learn(lowering, most=300)
    assert one == two
    assert learn(lowering, most=300, seed=1).network == one.network


def test_progress_is_told(sessions: dict[str, DeviceSession]) -> None:
    told: list[tuple[int, int, str]] = []
    learn(Lowering(onnx_template("depthwise", 8), sessions["simulated"]), most=200, progress=lambda *a: told.append(a))
    assert told
    assert all(done <= 200 + 100 and most == 200 for done, most, _ in told)


def test_a_small_space_is_known_altogether(sessions: dict[str, DeviceSession]) -> None:
    space = onnx_template("depthwise", 8).space
    lowering = Lowering(onnx_template("depthwise", 8), sessions["onnxruntime"])
    template = learn(lowering)
    every = [WidthChoice(widths) for widths in itertools.product(*(group.widths for group in space.groups))]
    assert template.check.wrong == 0
    for choice, real in zip(every, lowering.kernels(every), strict=True):
        assert template.kernels(choice) == real, "in the same order, too"


def test_kernels_are_numbered_and_named(learnt: Any) -> None:
    _, template = learnt("residual", "onnxruntime")
    kernels = template.lower([tuple(widths[-1] for _, widths in template.groups)])[0]
    assert [k.node[:3] for k in kernels] == [f"{i:03d}" for i in range(len(kernels))]
    assert kernels[0].source == ("stem",)


def test_saved_and_loaded_is_the_same(learnt: Any, tmp_path: Path) -> None:
    lowering, template = learnt("joined", "onnxruntime")
    path = template.save(tmp_path / "templates")
    space, fingerprint = lowering.template.space, lowering.session.fingerprint
    assert path == stored_path(tmp_path, space, fingerprint)
    loaded = LoweringTemplate.load(path, space, fingerprint)
    assert loaded == template
    rows = [space.sample(np.random.default_rng(i)).widths for i in range(20)]
    assert loaded.lower(rows) == template.lower(rows)
    first = path.read_bytes()
    loaded.save(tmp_path / "templates")
    assert path.read_bytes() == first


def test_a_template_of_another_space_or_device_is_refused(learnt: Any, tmp_path: Path) -> None:
    lowering, template = learnt("joined", "simulated")
    path = template.save(tmp_path)
    space, fingerprint = lowering.template.space, lowering.session.fingerprint
    with pytest.raises(InputError, match=r"another space: it has network [0-9a-f]+ instead of [0-9a-f]+"):
        LoweringTemplate.load(path, onnx_template("plain").space)
    newer = replace(fingerprint, runtime_version="99.1")
    with pytest.raises(InputError, match=r"another device: it has runtime_version '1' instead of '99\.1'"):
        LoweringTemplate.load(path, space, newer)
    fewer = other(space, {0: (4, 8)})
    assert LoweringTemplate.load(path, fewer, fingerprint) == template, "fewer widths are covered"
    narrow = replace(template, groups=((template.groups[0][0], (4, 16)), *template.groups[1:]))
    with pytest.raises(InputError, match=r"widths 4 to 16 of group stem, without 1"):
        LoweringTemplate.load(narrow.save(tmp_path), space)
    with pytest.raises(InputError, match="no lowering template"):
        LoweringTemplate.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(version=99),
        lambda d: d.pop("slots"),
        lambda d: d["slots"][0].update(rule=57),
        lambda d: d["slots"][0].update(rule=[999, 4, 0, 0, -1]),
        lambda d: d["slots"][0].update(rule=[0, -4, 0, 0, -1]),
        lambda d: d["slots"][0]["variants"][0].update(extents=[["family", 0, 1]]),
        lambda d: d["quantities"].append([0, [[99, 1]]]),
        lambda d: d.update(fingerprint={}),
        lambda d: d.update(check={"choices": 1}),
    ],
)
def test_a_damaged_template_is_refused(learnt: Any, tmp_path: Path, damage: Any) -> None:
    path = learnt("joined", "simulated")[1].save(tmp_path)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(SchemaError, match=str(path)):
        LoweringTemplate.load(path)
    path.write_text("{")
    with pytest.raises(SchemaError, match="not JSON"):
        LoweringTemplate.load(path)


def test_quantities_of_a_concatenation_are_sums() -> None:
    space = onnx_template("joined").space
    found = channel_quantities(space)
    assert [q.terms for q in found[:4]] == [((0, 1),), ((1, 1),), ((2, 1),), ((3, 1),)]
    assert Quantity(0, ((0, 1), (1, 1), (2, 1))) in found
    rows = np.array([[16, 8, 8, 16], [5, 3, 1, 2]])
    assert Quantity(0, ((0, 1), (1, 1), (2, 1))).of(rows).tolist() == [32, 9]
    flat = channel_quantities(onnx_template("plain").space)
    assert Quantity(0, ((1, 16),)) in flat, "a flattened channel is 16 features"


def test_slots_are_named_alike_in_every_network() -> None:
    conv = Kernel("conv", "Conv", layout_out="nchwc", source=("a",))
    out = Kernel("reorder", "ReorderOutput", layout_in="nchwc", source=("ReorderOutput",))
    into = Kernel("reorder", "ReorderInput", layout_out="nchwc", source=("ReorderInput",))
    last = Kernel("conv", "Conv", layout_in="nchwc", layout_out="nchwc", source=("b", "shared"))
    assert slot_names([conv, out, into, last]) == [
        (("a",), "Conv", 0), (("a",), "ReorderOutput", 0), (("b",), "ReorderInput", 0), (("b",), "Conv", 0),
    ]  # fmt: skip
    assert [number for *_, number in slot_names([conv, conv])] == [0, 1]


def test_slots_are_put_in_an_order_that_all_networks_have() -> None:
    names = [((letter,), "Conv", 0) for letter in "abcd"]
    a, b, c, d = names
    kernel = Kernel("conv", "Conv")
    networks = [{a: kernel, c: kernel, d: kernel}, {a: kernel, b: kernel, c: kernel}, {b: kernel, d: kernel}]
    assert slot_order(networks) == [a, b, c, d]


def test_biases_are_made_distinct_and_nothing_else_changes() -> None:
    import onnx

    network = onnx_template("plain").slice(onnx_template("plain").space.full())
    before, after = onnx.load_from_string(network), onnx.load_from_string(with_distinct_biases(network))
    biases = [onnx.numpy_helper.to_array(t) for t in after.graph.initializer if len(t.dims) == 1 and t.data_type == 1]
    assert len(np.unique(np.concatenate(biases))) == sum(map(len, biases))
    assert [(t.name, t.dims) for t in before.graph.initializer] == [(t.name, t.dims) for t in after.graph.initializer]
    assert before.graph.node == after.graph.node


def test_scales_of_a_resized_map_are_no_biases() -> None:
    """They are one-dimensional weights too: changed, maps that are joined later no longer fit."""
    from hwsearch.models.segmenter import Segmenter

    model, example = Segmenter((4, 4)).eval(), torch.zeros(1, 1, 8, 8)
    folded = fold(model, example)
    network = with_distinct_biases(export_onnx(folded, example))
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": example.numpy()})[0].shape == (1, 11, 8, 8)


def test_a_rule_is_a_tree() -> None:
    rule = Split(0, 4, 3, 1, Split(0, 0, 16, -1, 0))
    assert Split(0, 4, 3, 1, 0).test(np.array([2, 3, 4, 8])).tolist() == [True, False, True, True]
    from hwsearch.latency.lowering_template import decide, walk

    assert decide(rule, np.array([[4], [17], [3]]), 3).tolist() == [1, 0, -1]
    assert [r for r in walk(rule) if not isinstance(r, Split)] == [1, -1, 0]
