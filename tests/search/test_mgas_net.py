"""The gated network of cells: what it computes is what the cut network computes, and stages stay apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hwsearch.errors import InputError
from hwsearch.models.cells import OPERATIONS, Blueprint, cells_full
from hwsearch.search.gates import DiscreteGate
from hwsearch.search.mgas_net import CellSuperNet
from hwsearch.search.mgas_physical import physical

torch.set_num_threads(1)
BLUEPRINT = Blueprint(channels=6, cells=3, reductions=(1, 2), operations=OPERATIONS)


def supernet(**changes: object) -> CellSuperNet:
    torch.manual_seed(3)
    return CellSuperNet(BLUEPRINT, stages=(1, 2, 3), **changes)  # type: ignore[arg-type]


def disturb(net: CellSuperNet, seed: int = 0, share: float = 0.4) -> None:
    """Scores and thresholds that switch some units off, statistics and affine parts that are not trivial."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, DiscreteGate):
                module.score.copy_(torch.randn(len(module)))
                module.threshold.fill_(share)
                module.average.copy_(module.scores() - module.threshold)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_cut_network_computes_what_the_gated_one_does(stage: int, committed: bool) -> None:
    net = supernet()
    disturb(net, seed=stage)
    x = torch.randn(2, 1, 28, 28)
    if committed:
        assert all(count > 0 for count in net.commit(3))
        disturb(net, seed=stage + 5, share=0.2)
    net.eval()
    with torch.no_grad():
        wanted, small = net(x, stage), physical(net, stage)
        got = small(x)
    assert wanted.abs().max() > 0.05
    assert torch.allclose(got, wanted, atol=1e-5, rtol=1e-5)
    assert small.genotype.count < 0.8 * small.genotype.full(small.genotype.blueprint).count


def test_committed_units_are_cut_out_of_the_passes_themselves() -> None:
    net = supernet()
    disturb(net)
    x = torch.randn(2, 1, 28, 28)
    net.eval()
    with torch.no_grad():
        before = net(x)
        net.commit(3)
        assert torch.allclose(net(x), before, atol=1e-5, rtol=1e-5)
    net.train()
    seen: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        net(x)
        after, seen[:] = sum(seen), []
        supernet().train()(x)
    assert after < 0.7 * sum(seen)


def test_training_statistics_of_living_channels_are_those_of_the_cut_network() -> None:
    net = supernet(filters=True)
    disturb(net)
    net.commit(3)
    net.reset_thresholds(3)
    small = physical(net).train()
    net.train()
    x = torch.randn(4, 1, 28, 28)
    net(x)
    small(x)
    norm, living = net.plain.stem[1], net.filter_gate("stem").alive
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert 0 < int(living.sum()) < 6
    assert torch.allclose(norm.running_mean[living], small.stem[1].running_mean, atol=1e-6)  # type: ignore[arg-type]


def test_what_is_counted_is_what_is_built() -> None:
    net = supernet()
    disturb(net)
    net.commit(3)
    for cells in (1, 2, 3):
        genotype, widths = net.genotype(cells), net.widths(net.genotype(cells))
        now = net.genotype(now=True)
        assert now.count <= net.genotype().count
        net.reset_thresholds(3)
        small = physical(net, cells - 1)
        assert small.genotype == genotype
        for name, width in widths.items():
            where, _, what = name.partition(".")
            if what.startswith("node"):
                edges = genotype.blueprint.edges()
                for (_, node), edge in zip(edges, small.cells[int(where)].edges, strict=True):  # type: ignore[union-attr,arg-type]
                    for module in edge.values():
                        if f"node{node}" == what and isinstance(module[-1], nn.BatchNorm2d):
                            assert module[-1].num_features == width


def test_a_stage_leaves_later_cells_without_gradient() -> None:
    net = supernet()
    net.train()
    net(torch.randn(2, 1, 28, 28), 1).sum().backward()
    graded = {name.split(".")[2] for name, p in net.named_parameters() if p.grad is not None and "cells" in name}
    assert graded == {"0", "1"}
    assert net.heads[1].weight.grad is not None
    assert net.heads[0].weight.grad is None
    assert net.plain.classifier.weight.grad is None
    assert net.operation_gate(2, 0).score.grad is None
    assert net.operation_gate(1, 0).score.grad is not None


def test_widths_are_tied_while_a_skip_or_pool_lives_and_may_part_afterwards() -> None:
    net = CellSuperNet(Blueprint(channels=4, cells=1, reductions=(), operations=("skip", "sep3")), stages=(1,))
    with torch.no_grad():
        net.filter_gate("0.node0").score.copy_(torch.tensor([2.0, -2.0, 2.0, -2.0]))
        net.filter_gate("0.node1").score.copy_(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    assert net.widths(net.genotype(), now=True)["0.node0"] == net.widths(net.genotype(), now=True)["0.node1"]
    for edge in range(5):
        net.close(0, edge, "skip")
    with torch.no_grad():
        for name in ("0.node0", "0.node1"):
            net.filter_gate(name).threshold.fill_(0.6)
    kept = {name: mask.tolist() for name, (mask, _) in net.masks(net.genotype()).items()}
    assert kept["0.node0"] == [1, 0, 1, 0]
    assert kept["0.node1"] == [0, 1, 0, 1]
    for name in ("0.node0", "0.node1"):
        net.filter_gate(name).commit(now=True)
    net.regrow(0, 4, "skip", seed=0)
    assert net.filter_gate("0.node0").alive.all()
    assert net.filter_gate("0.node1").alive.all()
    net.eval()
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.allclose(physical(net)(x), net(x), atol=1e-5)


def test_without_filters_only_operations_fall() -> None:
    net = supernet(filters=False)
    disturb(net)
    operations, filters = net.commit(3)
    assert operations > 0
    assert filters == 0
    assert net.widths(net.genotype()) == net.genotype().widths()
    with torch.no_grad():
        x = torch.randn(2, 1, 28, 28)
        net.eval()
        assert torch.allclose(physical(net)(x), net(x), atol=1e-5, rtol=1e-5)


def test_stages_must_end_with_the_last_cell() -> None:
    with pytest.raises(InputError, match="rising numbers up to 3"):
        CellSuperNet(BLUEPRINT, stages=(1, 2))


def kept_bytes(net: CellSuperNet, stage: int, side: int = 28) -> int:
    """Bytes that a forward pass keeps for the backward one, each tensor once."""
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net.train()(torch.zeros(8, 1, side, side), stage).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return sum(seen.values())


def test_a_search_in_stages_keeps_at_most_six_tenths_of_the_whole_in_memory() -> None:
    """Stages begin with what the ones before have left: here the strongest two operations of every node."""
    torch.manual_seed(0)
    net = CellSuperNet(Blueprint(), stages=(1, 2, 3))
    whole = kept_bytes(net, 2)
    largest = 0
    for stage in range(3):
        largest = max(largest, kept_bytes(net, stage))
        for node in range(2):
            gate = net.operation_gate(stage, node)
            gate.close(range(2, len(gate)))
    assert largest <= 0.6 * whole


def test_one_step_of_the_full_size_super_network() -> None:
    blueprint = cells_full().genotype.blueprint
    torch.manual_seed(0)
    net = CellSuperNet(blueprint, stages=(3, 6, 8)).train()
    assert net.genotype().count == 784
    loss = nn.functional.cross_entropy(net(torch.randn(2, 3, 8, 8)), torch.tensor([1, 2]))
    loss.backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD([p for p in net.parameters() if p.grad is not None], 0.1).step()
    assert torch.isfinite(loss)
    assert all(net.operation_gate(c, n).score.grad is not None for c in range(8) for n in range(4))
