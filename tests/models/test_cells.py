"""Networks of cells: what a genotype says, and what is built from it."""

from __future__ import annotations

import json

import pytest
import torch

from hwsearch.errors import InputError
from hwsearch.graph.factory import build, find_factory
from hwsearch.models.cells import OPERATIONS, Blueprint, CellNetwork, Genotype, cells_full, cells_small

torch.set_num_threads(1)
SMALL = Blueprint(channels=4, cells=2, reductions=(1,), operations=OPERATIONS)


def test_the_default_suits_two_cores_and_the_full_one_is_the_papers() -> None:
    small, full = cells_small().genotype, cells_full().genotype
    assert (small.blueprint.cells, small.blueprint.nodes, len(small.blueprint.operations), small.count) == (3, 2, 4, 60)
    assert (full.blueprint.cells, full.blueprint.nodes, full.count) == (8, 4, 8 * 14 * 7)
    assert full.blueprint.reductions == (2, 5)
    assert [full.blueprint.width(c) for c in (1, 2, 5)] == [16, 32, 64]


def test_sides_halve_where_cells_reduce() -> None:
    network = CellNetwork(Genotype.full(SMALL)).eval()
    sides: list[tuple[int, ...]] = []
    for cell in network.cells:
        cell.register_forward_hook(lambda _module, _inputs, out: sides.append(tuple(out.shape[1:])))
    assert network(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    assert sides == [(8, 14, 14), (16, 7, 7)]
    assert network(torch.zeros(1, 1, 27, 27)).shape == (1, 10)


def test_ties_are_those_of_operations_without_weights() -> None:
    blueprint = Blueprint(cells=1, nodes=2, reductions=(), operations=("skip", "sep3", "max3"))
    kept = ((("sep3",), ("skip", "sep3"), (), (), ("max3",)),)
    genotype = Genotype(blueprint, kept)
    tied = [set(names) for names in genotype.ties() if len(names) > 1]
    assert tied == [{"0.pre1", "0.node0", "0.node1"}]
    reducing = Genotype(Blueprint(cells=1, nodes=2, reductions=(0,), operations=("skip", "sep3", "max3")), kept)
    assert [set(names) for names in reducing.ties() if len(names) > 1] == [{"0.node0", "0.node1"}]
    widths = genotype.widths() | {"0.pre1": 4}
    with pytest.raises(InputError, match="tied by a skip or a pool"):
        CellNetwork(genotype, widths)


def test_what_is_not_read_is_not_built() -> None:
    blueprint = Blueprint(cells=1, nodes=1, reductions=(), operations=("skip", "sep3"))
    network = CellNetwork(Genotype(blueprint, (((), ("sep3",)),)))
    assert [name for name, _ in network.cells[0].named_modules() if name in ("pre.0", "pre.1")] == ["pre.1"]
    assert "0.pre0" not in network.genotype.widths()


def test_a_genotype_is_plain_values_and_a_factory_builds_it() -> None:
    genotype = Genotype.full(SMALL).without(0, 1, "sep3").without(1, 4, "skip")
    told = json.loads(json.dumps(genotype.to_dict()))
    assert Genotype.from_dict(told) == genotype
    spec = "hwsearch.models.cells:cell_network"
    network = build(spec, find_factory(spec), told)
    assert isinstance(network, CellNetwork)
    assert network.genotype == genotype
    assert genotype.count == 2 * 5 * 7 - 2
    assert genotype.upto(1).kept == genotype.kept[:1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blueprint(operations=("sep7",)), "give different ones of skip"),
        (lambda: Blueprint(reductions=(3,)), "give cells from 0 to 2"),
        (lambda: Blueprint(channels=0), "give 1 or more"),
        (lambda: Genotype(SMALL, ((("skip",),),)), "needs 2 cells of 5 edges"),
        (lambda: Genotype(SMALL, ((("skip",), (), (), (), ()),) * 2), "node 1 of cell 0 has no operation"),
        (lambda: CellNetwork(Genotype.full(SMALL), {"stem": 4}), "needs widths"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
