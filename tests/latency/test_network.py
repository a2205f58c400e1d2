"""Choices to milliseconds: lowered once, priced once, corrected, and the same number by every way of asking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hwsearch.errors import DeviceJobError, InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.graph.onnx_build import OnnxTemplate
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.latency.lowering import Lowering
from hwsearch.latency.lowering_template import Check, stored_path
from hwsearch.latency.network import NetworkLatency


class CountingSession:
    """A session that counts what it is asked."""

    def __init__(self, session: Any) -> None:
        self.session, self.device, self.fingerprint, self.asked = session, session.device, session.fingerprint, 0

    def lower(self, networks: Sequence[bytes], names: Sequence[str]) -> list[tuple[Kernel, ...]]:
        self.asked += len(networks)
        return self.session.lower(networks, names)


@pytest.fixture(scope="module")
def template() -> Iterator[OnnxTemplate]:
    import torch
    from torch import nn

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
    example = torch.zeros(1, 1, 14, 14)
    yield OnnxTemplate(WidthSpace.from_model(model, example), model, example, check=False)
    torch.set_num_threads(threads)


@pytest.fixture(params=["look-up", "lowering each"])
def latency(campaign: Any, template: OnnxTemplate, request: Any) -> NetworkLatency:
    session = CountingSession(campaign.session)
    lowering = Lowering(template, session)  # type: ignore[arg-type]
    return NetworkLatency(template.space, campaign.predictor, lowering, lower_each=request.param == "lowering each")


def asked(latency: NetworkLatency) -> int:
    assert latency.lowering is not None
    return latency.lowering.session.asked  # type: ignore[attr-defined, no-any-return]


def test_every_way_of_asking_gives_the_same_number(latency: NetworkLatency, campaign: Any) -> None:
    space = latency.space
    rng = np.random.default_rng(0)
    choices = [space.full(), space.smallest(), *(space.sample(rng) for _ in range(6))]
    array = space.choice_array(choices)
    ms = latency.evaluate(array)
    assert ms.shape == (8,)
    assert ms.dtype == np.float64
    for choice, value in zip(choices, ms, strict=True):
        found = latency.estimate(choice)
        assert found.ms == pytest.approx(value, rel=1e-9)
        assert campaign.predictor.network(latency.kernels(choice)).ms == pytest.approx(value, rel=1e-9)
        assert len(found.kernel_ms) == len(latency.kernels(choice))
    low, high = latency.interval(array, 0.9)
    assert (low <= ms).all()
    assert (ms <= high).all()
    estimate = latency.estimate(choices[0], 0.9)
    assert (low[0], high[0]) == (pytest.approx(estimate.low_ms), pytest.approx(estimate.high_ms))
    assert ((latency.coverage(array) >= 0) & (latency.coverage(array) <= 1)).all()
    assert ms[1] == min(ms)
    assert ms[0] < max(ms), "an unaligned choice takes slower kernels than the full network: no order by width"


def test_a_prediction_is_near_the_measurement(latency: NetworkLatency, campaign: Any, template: OnnxTemplate) -> None:
    choices = [latency.space.full(), latency.space.uniform(0.5)]
    jobs = [(str(c.widths), template.slice(c)) for c in choices]
    timed = {t.network: t.measured_ms for t in campaign.session.time(jobs, reference_ms=campaign.table.reference_ms)}
    measured = np.array([timed[name] for name, _ in jobs])
    assert latency.evaluate(latency.space.choice_array(choices)) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("latency", ["lowering each"], indirect=True)
def test_nothing_is_asked_twice(latency: NetworkLatency) -> None:
    space, rng = latency.space, np.random.default_rng(1)
    array = space.choice_array([space.sample(rng) for _ in range(5)])
    first = latency.evaluate(np.vstack([array, array]))
    assert asked(latency) == 5
    assert (first[:5] == first[5:]).all()
    assert (latency.evaluate(array) == first[:5]).all()
    latency.corrected(2.0).evaluate(array)
    assert asked(latency) == 5
    assert latency.evaluate(np.zeros((0, len(space.groups)), dtype=np.int64)).shape == (0,)


def test_a_template_is_learnt_once_and_kept_beside_the_table(campaign: Any, template: OnnxTemplate) -> None:
    def fresh() -> NetworkLatency:
        session = CountingSession(campaign.session)
        return NetworkLatency(template.space, campaign.predictor, Lowering(template, session))  # type: ignore[arg-type]

    space, rng = template.space, np.random.default_rng(5)
    array = space.choice_array([space.sample(rng) for _ in range(20)])
    first = fresh().prepare()
    path = stored_path(campaign.device.table_folder, space, campaign.session.fingerprint)
    assert path.exists()
    stored = path.read_bytes()
    again = fresh()
    assert (again.evaluate(array) == first.evaluate(array)).all()
    assert asked(again) == 0, "the second time it is read"
    assert again.template == first.template
    path.unlink()
    assert (fresh().evaluate(array) == first.evaluate(array)).all(), "made again it is the same"
    assert path.read_bytes() == stored
    told: list[str] = []
    path.unlink()
    fresh().prepare(lambda done, most, words: told.append(words))
    assert told


def test_the_look_up_is_what_lowering_gives(campaign: Any, template: OnnxTemplate) -> None:
    lowering = Lowering(template, campaign.session)
    table = NetworkLatency(template.space, campaign.predictor, lowering)
    each = NetworkLatency(template.space, campaign.predictor, lowering, lower_each=True)
    assert table.by_look_up
    assert not each.by_look_up
    rng = np.random.default_rng(6)
    array = template.space.choice_array([template.space.sample(rng) for _ in range(60)])
    assert table.evaluate(array) == pytest.approx(each.evaluate(array), rel=1e-9)
    assert table.coverage(array) == pytest.approx(each.coverage(array), rel=1e-9)


def test_a_template_that_does_not_hold_is_not_used(campaign: Any, template: OnnxTemplate) -> None:
    lowering = Lowering(template, campaign.session)
    good = NetworkLatency(template.space, campaign.predictor, lowering).template
    assert good is not None
    bad = replace(good, check=Check(choices=100, wrong=4, worst=0.1, asked=300), slots=good.slots[:1])
    latency = NetworkLatency(template.space, campaign.predictor, lowering, template=bad)
    assert latency.template is None
    assert latency.table is None
    each = NetworkLatency(template.space, campaign.predictor, lowering, lower_each=True)
    array = template.space.choice_array([template.space.full()])
    assert latency.evaluate(array) == each.evaluate(array)


def test_batches_are_cut_and_kept_in_order(campaign: Any, template: OnnxTemplate) -> None:
    space, rng = template.space, np.random.default_rng(2)
    choices = [space.sample(rng) for _ in range(70)]
    whole = Lowering(template, campaign.session).kernels(choices)
    assert len(whole) == 70
    for index in (0, 33, 69):
        assert whole[index] == Lowering(template, campaign.session).kernels([choices[index]])[0]


def test_a_correction_multiplies_everything(latency: NetworkLatency) -> None:
    array = latency.space.choice_array([latency.space.full()])
    more = latency.corrected(1.1).corrected(1.1)
    assert more.evaluate(array) == pytest.approx(1.21 * latency.evaluate(array))
    assert more.interval(array)[1] == pytest.approx(1.21 * latency.interval(array)[1])
    one, two = latency.estimate(latency.space.full()), more.estimate(latency.space.full())
    assert two.high_ms == pytest.approx(1.21 * one.high_ms)
    assert sum(two.kernel_ms) == pytest.approx(1.21 * sum(one.kernel_ms))
    assert two.coverage == one.coverage


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_correction(latency: NetworkLatency, factor: float) -> None:
    with pytest.raises(InputError, match="correction"):
        latency.corrected(factor)


def test_a_choice_of_another_space(latency: NetworkLatency) -> None:
    widths = list(latency.space.full().widths)
    widths[0] = 9999
    with pytest.raises(InputError, match="9999"):
        latency.evaluate(np.array([widths]))


def test_a_candidate_that_the_runtime_rejects_is_named(campaign: Any) -> None:
    class Broken:
        space = None

        def slice(self, choice: WidthChoice) -> bytes:
            return b"no onnx"

    with pytest.raises(DeviceJobError, match=r"widths \(3, 4\)"):
        Lowering(Broken(), campaign.session).kernels([WidthChoice((3, 4))])


def test_a_budget_that_nine_runs_of_ten_keep(latency: NetworkLatency) -> None:
    from hwsearch.latency.tail import P90Latency
    from hwsearch.search.budget import Budget, Limit

    choices = latency.space.choice_array([latency.space.full(), latency.space.uniform(0.5)])
    ms, tail = latency.evaluate(choices), P90Latency(latency)
    p90 = tail.evaluate(choices)
    assert (p90 >= ms).all()
    assert p90[0] == pytest.approx(latency.estimate(latency.space.full()).p90_ms, rel=1e-9)
    low, high = tail.interval(choices)
    assert (low <= p90).all()
    assert (p90 <= high).all()
    assert tail.corrected(2.0).evaluate(choices) == pytest.approx(latency.predictor.p90_ms(2 * ms))
    limit = float(p90[0] + ms[0]) / 2
    assert Budget([Limit(latency, limit, quantile=0.5)]).use(choices[:1])[0] < 1
    assert Budget([Limit(tail, limit, quantile=0.5)]).use(choices[:1])[0] > 1
