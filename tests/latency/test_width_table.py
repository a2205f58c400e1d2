"""The table is the predictor: the same milliseconds as pricing the same kernels one by one, for every way of asking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_models import MODELS, onnx_template, other

from hwsearch.device.spec import Fingerprint
from hwsearch.errors import InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.graph.widths import WidthChoice
from hwsearch.latency import width_table
from hwsearch.latency.lowering import Lowering
from hwsearch.latency.lowering_learning import learn
from hwsearch.latency.lowering_template import (
    Check,
    Extent,
    LoweringTemplate,
    Quantity,
    Slot,
    Split,
    Variant,
    network_key,
)
from hwsearch.latency.network import USABLE_ERROR, NetworkLatency
from hwsearch.latency.predictor import OutOfRangeWarning
from hwsearch.latency.width_program import Program, StateIndex
from hwsearch.latency.width_table import Prices, WidthTable

pytestmark = pytest.mark.filterwarnings("ignore::hwsearch.latency.predictor.OutOfRangeWarning")


@pytest.fixture(scope="module")
def templates(campaign: Any) -> Any:
    """Templates of the models on the campaign's device; learnt from few choices, since the rules may be wrong here."""
    known: dict[str, LoweringTemplate] = {}

    def get(model: str) -> LoweringTemplate:
        if model not in known:
            known[model] = learn(Lowering(onnx_template(model), campaign.session), most=200)
        return known[model]

    return get


@pytest.mark.parametrize("model", MODELS)
def test_the_table_is_the_predictor(campaign: Any, templates: Any, model: str) -> None:
    template, space, predictor = templates(model), onnx_template(model).space, campaign.predictor
    table = WidthTable(space, template, predictor)

    @settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(*(st.sampled_from(group.widths) for group in space.groups)), min_size=1, max_size=4))
    def same(rows: list[tuple[int, ...]]) -> None:
        choices = [WidthChoice(row) for row in rows]
        found = [predictor.network(template.kernels(choice)) for choice in choices]
        array = space.choice_array(choices)
        assert table.evaluate(array) == pytest.approx([f.ms for f in found], rel=1e-9)
        assert table.coverage(array) == pytest.approx([f.coverage for f in found], rel=1e-9)
        low, high = table.interval(array, 0.8)
        wanted = [predictor.network(template.kernels(choice), 0.8) for choice in choices]
        assert low == pytest.approx([f.low_ms for f in wanted], rel=1e-9)
        assert high == pytest.approx([f.high_ms for f in wanted], rel=1e-9)
        assert table.kernel_terms(array) == sum(len(f.kernel_ms) for f in found)
        own = predictor.predict(template.kernels(choices[0])).sum()
        assert table.kernel_ms(array)[0].sum() == pytest.approx(own, rel=1e-9)

    same()


def test_weights_beyond_the_caches_are_priced(campaign: Any, templates: Any) -> None:
    """The network's own terms hang on all its weights together; here they are made to matter."""

    class Heavy:
        model_, profiled_, overhead_ms = campaign.predictor.model_, campaign.predictor.profiled_, 0.5
        predict = staticmethod(campaign.predictor.predict)

        @staticmethod
        def stretched(ms: np.ndarray) -> np.ndarray:
            return ms

        @staticmethod
        def context_ms(network_mb: np.ndarray) -> np.ndarray:
            return np.asarray(1000 * network_mb**1.5)

    space, template = onnx_template("plain").space, templates("plain")
    table = WidthTable(space, template, Heavy())  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    choices = [space.sample(rng) for _ in range(50)]
    wanted = []
    for choice in choices:
        kernels = template.kernels(choice)
        mb = width_table.weight_mb(kernels).sum()
        wanted.append(campaign.predictor.predict(kernels).sum() + 1000 * mb**1.5 + 0.5)
    assert table.evaluate(space.choice_array(choices)) == pytest.approx(wanted, rel=1e-9)


def test_asking_in_parts_in_another_order_or_all_at_once_gives_equal_bits(campaign: Any, templates: Any) -> None:
    space, template = onnx_template("joined").space, templates("joined")
    rng = np.random.default_rng(0)
    rows = space.choice_array([space.sample(rng) for _ in range(300)])
    lazy, whole = WidthTable(space, template, campaign.predictor), WidthTable(space, template, campaign.predictor)
    assert whole.expand() == whole.entries
    assert whole.expand() == 0
    parts = np.concatenate([lazy.evaluate(rows[i : i + 7]) for i in range(0, 300, 7)])
    assert (parts == whole.evaluate(rows)).all()
    assert (lazy.evaluate(rows[::-1])[::-1] == parts).all()


def test_many_candidates_are_worked_off_in_chunks(campaign: Any, templates: Any, monkeypatch: Any) -> None:
    space, template = onnx_template("residual").space, templates("residual")
    rng = np.random.default_rng(0)
    rows = space.choice_array([space.sample(rng) for _ in range(100)])
    wanted = WidthTable(space, template, campaign.predictor).evaluate(rows)
    monkeypatch.setattr(width_table, "CHUNK", 7)
    assert (WidthTable(space, template, campaign.predictor).evaluate(rows) == wanted).all()
    assert WidthTable(space, template, campaign.predictor).evaluate(rows[:0]).shape == (0,)


@pytest.mark.parametrize("width", [0, -1, -5, 13, 99999])
def test_a_width_that_is_not_allowed_is_named(campaign: Any, templates: Any, width: int) -> None:
    space = onnx_template("residual").space
    table = WidthTable(space, templates("residual"), campaign.predictor)
    rows = space.choice_array([space.full(), space.full()])
    rows[1, 1] = width
    with pytest.raises(InputError, match=rf"cannot be {width} wide"):
        table.evaluate(rows)


def test_unknown_kernels_lower_the_coverage(campaign: Any, templates: Any) -> None:
    space, template = onnx_template("residual").space, templates("residual")
    form = Variant(Kernel("other", "Strange", source=("x",)), (Extent("in_channels", 0),))
    strange = Slot(("x",), "Strange", 0, (form,), 0)
    odd = replace(template, slots=(*template.slots, strange))
    table = WidthTable(space, odd, campaign.predictor)
    rng = np.random.default_rng(0)
    choices = [space.sample(rng) for _ in range(20)]
    with pytest.warns(OutOfRangeWarning):
        wanted = [campaign.predictor.network(odd.kernels(choice)).coverage for choice in choices]
    assert max(wanted) < 1
    assert table.coverage(space.choice_array(choices)) == pytest.approx(wanted, rel=1e-9)


def test_a_rule_over_many_groups_has_few_states(campaign: Any) -> None:
    """A node that is there only where eight groups are all multiples of four: eight look-ups of two states."""
    space = onnx_template("joined").space
    groups = tuple(replace(space.groups[0], name=f"g{i}") for i in range(8))
    wide = replace(space, groups=groups)
    rule: Any = 0
    for group in range(8):
        rule = Split(group, 4, 0, rule, -1)
    form = Variant(Kernel("concat", "Concat", source=("c",)), (Extent("in_channels", 8),))
    slot = Slot(("c",), "Concat", 0, (form,), rule)
    quantities = (*(Quantity(0, ((i, 1),)) for i in range(8)), Quantity(0, tuple((i, 1) for i in range(8))))
    fingerprint = campaign.session.fingerprint
    template = LoweringTemplate(
        "simulated", fingerprint, network_key(wide), tuple((g.name, g.widths) for g in groups), quantities, (slot,),
        Check(0, 0, 0.0, 0),
    )  # fmt: skip
    program = Program.of(template, wide)
    assert program is not None
    states = [index for index in program.indices if isinstance(index, StateIndex)]
    assert [state.size for state in states] == [2] * 8
    table = WidthTable(wide, template, campaign.predictor)
    assert table.entries == 2 * (8 * 15 + 1), "two states times the values of the sum"
    rng = np.random.default_rng(0)
    rows = 4 * rng.integers(1, 5, (40, 8))
    rows[::2, 3] = 7
    has = table.evaluate(rows) > campaign.predictor.overhead_ms
    assert has.tolist() == [False, True] * 20


def test_prices_are_asked_once(campaign: Any) -> None:
    asked: list[int] = []

    class Counting:
        model_, profiled_ = campaign.predictor.model_, campaign.predictor.profiled_

        def predict(self, kernels: list[Kernel]) -> np.ndarray:
            asked.append(len(kernels))
            return np.ones(len(kernels))

    prices = Prices(Counting())  # type: ignore[arg-type]
    one, two = Kernel("conv", "Conv"), Kernel("conv", "Conv", in_channels=2)
    assert [p.ms for p in prices.of([one, two, one])] == [1, 1, 1]
    prices.of([two])
    assert asked == [2]


def test_a_space_that_is_too_large_is_priced_one_by_one(campaign: Any, templates: Any, monkeypatch: Any) -> None:
    space, template = onnx_template("plain").space, templates("plain")
    wanted = NetworkLatency(space, campaign.predictor, template=template)
    assert wanted.by_look_up
    monkeypatch.setattr(width_table, "MOST_ENTRIES", 10)
    with pytest.raises(InputError, match="too large"):
        WidthTable(space, template, campaign.predictor)
    slow = NetworkLatency(space, campaign.predictor, template=template)
    assert not slow.by_look_up
    rows = space.choice_array([space.full(), space.smallest()])
    assert slow.evaluate(rows) == pytest.approx(wanted.evaluate(rows), rel=1e-9)
    assert slow.coverage(rows) == pytest.approx(wanted.coverage(rows), rel=1e-9)


def test_a_restricted_space_uses_the_template_of_the_whole(campaign: Any, templates: Any) -> None:
    space, template = onnx_template("residual").space, templates("residual")
    small = other(space, {0: (4, 8), 1: (6,)})
    rows = small.choice_array([small.full(), small.smallest()])
    whole = WidthTable(space, template, campaign.predictor)
    assert WidthTable(small, template, campaign.predictor).evaluate(rows) == pytest.approx(whole.evaluate(rows))
    with pytest.raises(InputError, match="another width space"):
        WidthTable(onnx_template("plain").space, template, campaign.predictor)


def test_a_template_needs_no_device(campaign: Any, templates: Any) -> None:
    space, template = onnx_template("residual").space, templates("residual")
    latency = NetworkLatency(space, campaign.predictor, template=template)
    assert latency.lowering is None
    assert latency.template == template
    full = latency.estimate(space.full())
    assert full.ms == pytest.approx(latency.evaluate(space.choice_array([space.full()]))[0], rel=1e-9)


def test_a_template_of_another_space_or_device_is_refused(campaign: Any, templates: Any) -> None:
    template = templates("residual")
    with pytest.raises(InputError, match=r"another space: it has network \w+ instead of \w+"):
        NetworkLatency(onnx_template("plain").space, campaign.predictor, template=template)
    far: Fingerprint = replace(template.fingerprint, cpu="another", threads=64)
    with pytest.raises(InputError, match=r"cpu 'another' instead of '.*'; threads 64 instead of 1"):
        NetworkLatency(onnx_template("residual").space, campaign.predictor, template=replace(template, fingerprint=far))


def test_a_template_that_failed_some_checks_covers_less(campaign: Any, templates: Any) -> None:
    space = onnx_template("residual").space
    template = replace(templates("residual"), check=Check(100, 0, 0.0, 300))
    right = NetworkLatency(space, campaign.predictor, template=template)
    doubtful = NetworkLatency(space, campaign.predictor, template=replace(template, check=Check(100, 2, 0.25, 300)))
    rows = space.choice_array([space.full()])
    assert doubtful.coverage(rows) == pytest.approx(right.coverage(rows) * (1 - 0.02 * 0.25))
    assert doubtful.interval(rows)[1] > right.interval(rows)[1]
    full = doubtful.estimate(space.full())
    assert (full.low_ms, full.high_ms) == (
        pytest.approx(doubtful.interval(rows)[0][0]), pytest.approx(doubtful.interval(rows)[1][0])
    )  # fmt: skip
    assert USABLE_ERROR < 0.05
