"""Milliseconds of cells on a device: what is priced without an export is what the exported network costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.graph.onnx_build import export_onnx
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.latency.profile import profile
from hwsearch.models.cells import OPERATIONS, Blueprint, CellNetwork, Genotype
from hwsearch.reparam.fold import fold
from hwsearch.search.budget import Budget, Limit
from hwsearch.search.mgas import start_of
from hwsearch.search.mgas_cost import DeviceCost, Sized, worth
from hwsearch.search.mgas_onnx import cells_onnx

torch.set_num_threads(1)
SHAPE = (1, 1, 16, 16)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceSession]:
    device = Device(name="simulated", runtime="simulated", home=tmp_path_factory.mktemp("home"))
    with open_session(device) as opened:
        yield opened


def drawn(blueprint: Blueprint, seed: int, share: float, quantum: int = 2) -> Sized:
    """A genotype with about this share of its operations, and widths that differ where they may."""
    rng, genotype = np.random.default_rng(seed), Genotype.full(blueprint)
    for unit in list(genotype.operations()):
        cell, edge, name = unit
        node = blueprint.edges()[edge][1]
        ends = [u for u in genotype.operations() if u[0] == cell and blueprint.edges()[u[1]][1] == node]
        if rng.random() > share and len(ends) > 1:
            genotype = genotype.without(cell, edge, name)
    widths = genotype.widths()
    for tied in genotype.ties():
        width = int(rng.integers(1, widths[tied[0]] // quantum + 1)) * quantum
        widths |= dict.fromkeys(tied, width)
    return genotype, widths


def test_the_file_lowers_to_the_kernels_of_the_exported_network(session: DeviceSession) -> None:
    genotype, widths = drawn(Blueprint(channels=8, operations=OPERATIONS), seed=1, share=0.25)
    example = torch.zeros(SHAPE)
    network = CellNetwork(genotype, widths).eval()
    exported = export_onnx(fold(network, example, require=False), example)
    mine, theirs = session.lower([cells_onnx(genotype, widths, SHAPE), exported])
    assert Counter(k.key for k in mine) == Counter(k.key for k in theirs)


def test_a_price_is_that_of_the_same_choice_of_widths(session: DeviceSession) -> None:
    table = profile(session.device, minutes=60, networks=24, session=session)
    predictor = LatencyPredictor(rounds=8, folds=2).fit(table)
    cost = DeviceCost(predictor, session, SHAPE)
    genotype, widths = drawn(Blueprint(channels=8, cells=1, reductions=(0,)), seed=2, share=0.4)
    whole = genotype.widths()
    full = float(cost.ms([(genotype, whole)])[0])
    narrow = cost.narrowed(CellNetwork(genotype), Budget([Limit(_Any(), 0.5 * full, 0.5)]), quantum=2)
    choice = start_of(narrow.space, genotype, widths)
    priced = cost.ms([(genotype, widths), (genotype, whole)])
    evaluated = narrow.budget.limits[0].evaluate(np.asarray([choice, narrow.space.full().widths]))
    assert priced == pytest.approx(evaluated, rel=1e-9)
    assert narrow.budget.limits[0].max_ms == 0.5 * full
    known = worth(cost, (genotype, whole), quantum=2)
    assert known.ms == priced[1]
    assert max(known.operations.values(), default=0.0) <= known.ms
    assert 0 < sum(each * whole[tied[0]] for tied, each in known.filters.items()) < 4 * known.ms
    assert cost.ms([(genotype, whole)])[0] == priced[1], "asked once"


class _Any:
    def evaluate(self, rows: np.ndarray) -> np.ndarray:
        return np.ones(len(rows))


def test_files_are_the_same_bytes() -> None:
    genotype, widths = drawn(Blueprint(), seed=3, share=0.5)
    assert cells_onnx(genotype, widths, SHAPE) == cells_onnx(genotype, dict(widths), SHAPE)
