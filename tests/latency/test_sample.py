"""Plans: every family's networks load and run, the same seed gives the same bytes, templates get their half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthChoice
from hwsearch.latency.random_networks import FAMILIES, random_family, random_network
from hwsearch.latency.sample import SamplingPlan, spread_choice


@dataclass(frozen=True)
class Group:
    name: str
    widths: tuple[int, ...]


class Space:
    """Three groups of widths, without torch."""

    groups = (Group("a", (8, 16, 24, 32)), Group("b", (1, 2, 3, 4, 5)), Group("c", (64,)))

    def full(self) -> WidthChoice:
        return WidthChoice(tuple(g.widths[-1] for g in self.groups))

    def smallest(self) -> WidthChoice:
        return WidthChoice(tuple(g.widths[0] for g in self.groups))

    def sample(self, rng: np.random.Generator) -> WidthChoice:
        return WidthChoice(tuple(int(rng.choice(g.widths)) for g in self.groups))


class Template:
    def __init__(self, name: str = "t") -> None:
        self.name, self.space = name, Space()

    def slice(self, choice: Any) -> bytes:
        return f"{self.name}{choice.widths}".encode()


@pytest.mark.real
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_networks_that_run(family: str) -> None:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    sizes = set()
    for seed in range(12):
        data = random_network(family, np.random.default_rng([seed]))
        onnx.checker.check_model(data)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        (value,) = session.get_inputs()
        assert value.name == "input"
        x = np.random.default_rng(0).standard_normal(value.shape, dtype=np.float32)
        (y,) = session.run(["output"], {"input": x})
        assert np.isfinite(y).all()
        assert np.abs(y).max() > 1e-6, "activations vanished: denormals would be timed"
        sizes.add(value.shape[2])
        assert len(data) < 80e6
    assert len(sizes) > 2, "one resolution only"


def test_networks_stay_small_and_differ_in_alignment() -> None:
    import onnx

    counts, unaligned = [], 0
    for seed in range(40):
        rng = np.random.default_rng([9, seed])
        model = onnx.load_from_string(random_network(random_family(rng), rng))
        counts.append(len(model.graph.node))
        channels = [w.dims[0] for w in model.graph.initializer if len(w.dims) == 4]
        unaligned += any(c % 8 for c in channels)
    assert max(counts) <= 130
    assert 5 < unaligned < 38


def test_the_plan_has_an_end_for_every_network() -> None:
    # Blocks that do not fit any more are left out; this must not be tried for ever.
    plan = SamplingPlan(seed=0)
    assert all(plan.network(index).onnx for index in range(352, 372))


def test_the_same_seed_and_place_give_the_same_network() -> None:
    plans = [SamplingPlan(seed=3), SamplingPlan(seed=3), SamplingPlan(seed=4)]
    assert plans[0].key == plans[1].key != plans[2].key
    assert plans[0].network(7) == plans[1].network(7)
    assert plans[0].network(7).id != plans[2].network(7).id
    assert len({plans[0].network(i).id for i in range(30)}) == 30


def test_half_of_a_campaign_is_the_users_own_models() -> None:
    plan = SamplingPlan(templates=(Template("t"), Template("u")))
    sources = [plan.network(i).source for i in range(16)]
    assert sum(s.startswith("random:") for s in sources) == 8
    assert len({s for s in sources if s.startswith("space:")}) == 2
    assert plan.network(1).onnx == b"t(32, 5, 64)", "the full network comes first"
    assert plan.network(5).onnx == b"t(8, 1, 64)", "then the smallest"
    assert plan.key != SamplingPlan().key
    assert plan.key != SamplingPlan(templates=(Template("u"), Template("t"))).key


def test_widths_spread_over_the_whole_range_of_sizes() -> None:
    rng, space = np.random.default_rng(0), Space()
    choices = [spread_choice(space, turn, rng) for turn in range(60)]
    for group, widths in zip(space.groups, zip(*(c.widths for c in choices), strict=True), strict=True):
        assert set(widths) == set(group.widths)
    # Uniform and independent widths would make the sum of shares a narrow hump in the middle.
    share = np.array([(c.widths[0] - 8) / 24 + (c.widths[1] - 1) / 4 for c in choices]) / 2
    assert (share < 0.25).sum() >= 6
    assert (share > 0.75).sum() >= 6


@pytest.mark.parametrize("seed", [-1, 1.5, True, "a"])
def test_a_senseless_seed_is_refused(seed: Any) -> None:
    with pytest.raises(InputError, match="seed"):
        SamplingPlan(seed=seed)


def test_an_int8_device_gets_eight_bit_networks_of_its_own_plan() -> None:
    import onnx

    plan = SamplingPlan(seed=1, precision="int8")
    assert plan.key != SamplingPlan(seed=1).key
    for index in range(4):
        network = plan.network(index)
        operators = {node.op_type for node in onnx.load_from_string(network.onnx).graph.node}
        assert {"QuantizeLinear", "DequantizeLinear"} <= operators
        assert network.id == SamplingPlan(seed=1, precision="int8").network(index).id
