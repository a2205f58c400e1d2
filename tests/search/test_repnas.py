"""RepNAS: the sampler by its formulas, budgets that are kept, and a search that finds what was planted."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwsearch.errors import AnswerIsNo, InfeasibleBudgetError, InputError
from hwsearch.models.repvgg import repvgg_small
from hwsearch.reparam.algebra import ConvShape
from hwsearch.reparam.fold import fold
from hwsearch.reparam.odbb import ODBB
from hwsearch.search.repnas import BranchBudget, RepNAS, RepNASConfig
from hwsearch.search.repnas_sampler import choose, choose_within_ms, gate_gradient, noise
from hwsearch.search.repnas_space import BranchSpace, FoldedMs
from hwsearch.train.data import TensorExamples
from hwsearch.train.loop import TrainConfig, train
from hwsearch.train.task import Regression

torch.set_num_threads(1)


def host(branches: object = "odbb") -> nn.Module:
    torch.manual_seed(0)
    return repvgg_small(branches=branches, widths=(4, 4, 8, 8))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def space() -> BranchSpace:
    return BranchSpace.of(host())


# --- the space ---


def test_the_identity_always_runs_and_is_not_searched(space: BranchSpace) -> None:
    assert space.branches == ("kxk", "1x1", "1xk", "kx1", "1x1-kxk", "1x1-avg")
    assert space.legal.all()
    assert space.skips.tolist() == [False, False, True, False, True, True, True]
    model = host()
    space.apply(model, np.zeros_like(space.legal) | (np.arange(6) == 1))
    assert [sum(block.mask) for block in space.blocks(model)] == [1, 1, 2, 1, 2, 2, 2]


def test_networks_without_a_choice_are_refused() -> None:
    with pytest.raises(InputError, match=r"has no ODBB block: make some with hwsearch.reparametrize"):
        BranchSpace.of(nn.Sequential(nn.Conv2d(3, 3, 3)))
    block = ODBB(ConvShape(4, 4, (3, 3), padding=((1, 1), (1, 1))), ("identity",))
    with pytest.raises(InputError, match="block '0' has no branch but the identity"):
        BranchSpace.of(nn.Sequential(block))


def test_costs_of_training(space: BranchSpace) -> None:
    model = host()
    costs = space.costs(model, torch.zeros(1, 1, 28, 28), "macs")
    assert costs[2, 0] == 4 * 4 * 9 * 14 * 14
    assert costs[2, 1] == 4 * 4 * 14 * 14
    assert (space.costs(model, torch.zeros(1, 1, 28, 28), "activation_bytes") > 0).all()
    assert space.costs(model, torch.zeros(0), "branches").sum() == 42
    assert model.training, "the mode was not given back"
    with pytest.raises(InputError, match="a branch has no 'ms' of its own"):
        space.costs(model, torch.zeros(1, 1, 28, 28), "ms")


# --- the sampler ---


def test_noise_is_logistic_and_a_function_of_seed_and_step() -> None:
    drawn = noise(0, 3, (100, 200))
    assert np.array_equal(drawn, noise(0, 3, (100, 200)))
    assert not np.array_equal(drawn, noise(0, 4, (100, 200)))
    assert not np.array_equal(drawn, noise(1, 3, (100, 200)))
    assert abs(drawn.mean()) < 0.05
    assert drawn.var() == pytest.approx(np.pi**2 / 3, rel=0.05)  # the variance of Logistic(0, 1)


@pytest.mark.parametrize("kept", [0.2, 0.34, 0.5, 1.0])
def test_the_number_of_branches_is_kept_exactly_and_no_layer_is_empty(space: BranchSpace, kept: float) -> None:
    units = space.legal.astype(float)
    amount = BranchBudget(limit=kept).amount(units)
    for step in range(50):
        mask = choose(space, noise(0, step, space.legal.shape), units, amount)
        assert mask.sum() == amount == np.floor(kept * 42)
        assert mask.any(axis=1).all()


def test_without_a_floor_it_is_the_top_of_the_whole_network(space: BranchSpace) -> None:
    """As in the paper; only layers without an identity keep their best (the published code runs a 3x3 there)."""
    units, empty = space.legal.astype(float), 0
    for step in range(50):
        scores = noise(0, step, space.legal.shape)
        mask = choose(space, scores, units, 14.0, floor=0)
        assert mask[~space.skips].any(axis=1).all()
        empty += int((~mask.any(axis=1)).sum())
        top = scores >= np.sort(scores, axis=None)[-14]
        if (top[~space.skips].any(axis=1)).all():
            assert np.array_equal(mask, top)
    assert empty > 0, "an identity alone was never left, so this tests nothing"


def test_a_layer_keeps_a_branch_as_free_as_its_kernel(space: BranchSpace) -> None:
    units = space.legal.astype(float)
    assert [name for name, on in zip(space.branches, space.whole[0], strict=True) if on] == ["kxk", "1x1-kxk"]
    without = 0
    for step in range(20):
        scores = noise(0, step, space.legal.shape)
        mask = choose(space, scores, units, 14.0, whole=True)
        assert mask.sum() == 14
        assert (mask & space.whole).any(axis=1).all()
        without += int((~(choose(space, scores, units, 14.0) & space.whole).any(axis=1)).sum())
        costs = np.where(space.whole, 2.0, 1.0)  # too little for any but the cheapest: these are still whole
        assert choose(space, scores, costs, 14.0, whole=True).sum() == 7
    assert without > 0, "no layer ever lost its whole kernel, so this tests nothing"
    bare = BranchSpace.of(host(("1x1", "1xk")))
    assert np.array_equal(bare.whole, bare.legal), "a layer without such a branch has to choose among all"


def test_shares_keep_the_spread_and_are_absorbed_by_the_norms(space: BranchSpace) -> None:
    mask = choose(space, noise(0, 1, space.legal.shape), space.legal.astype(float), 14.0)
    model, x = host(), torch.randn(16, 1, 12, 12)
    shares = space.shares(model, mask)
    counts = mask.sum(axis=1) + space.skips
    assert np.allclose(shares, counts**-0.5)
    space.apply(model, mask, torch.from_numpy(mask.astype(np.float32)), shares)
    expected = model(x)
    space.apply(model, mask)
    assert not torch.allclose(model(x), expected, rtol=1e-3)
    space.absorb(model, shares)
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-6)
    after = repvgg_small(branches="odbb", widths=(4, 4, 8, 8), post_norm=True)
    assert (space.shares(after, mask) == 1).all(), "a batch norm behind the sum takes any spread away"


def test_other_costs_are_kept_too(space: BranchSpace) -> None:
    costs = space.costs(host(), torch.zeros(1, 1, 28, 28), "macs")
    for step in range(30):
        mask = choose(space, noise(0, step, space.legal.shape), costs, 0.3 * costs.sum())
        assert costs[mask].sum() <= 0.3 * costs.sum()
        assert mask.any(axis=1).all()
    cheapest = costs.min(axis=1).sum()
    tight = choose(space, noise(0, 0, space.legal.shape), costs, cheapest)
    assert costs[tight].sum() == pytest.approx(cheapest)
    with pytest.raises(AnswerIsNo, match=r"below the .* that one branch a layer needs"):
        choose(space, noise(0, 0, space.legal.shape), costs, 0.99 * cheapest)


def test_the_gradient_of_the_gate_is_the_formula() -> None:
    """Against autograd through mask + sigmoid - stop_gradient(sigmoid)."""
    rng = np.random.default_rng(0)
    mask, scores, outer = rng.random((3, 4)) < 0.5, rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    leaf = torch.tensor(scores, requires_grad=True)
    sigmoid = leaf.sigmoid()
    gate = torch.tensor(mask) + (sigmoid - sigmoid.detach())
    (gate * torch.tensor(outer) * torch.tensor(mask)).sum().backward()
    assert leaf.grad is not None
    assert np.allclose(gate_gradient(mask, scores, outer), leaf.grad.numpy())


def test_masked_branches_do_not_run_and_only_sampled_ones_get_a_gradient(space: BranchSpace) -> None:
    model = host()
    mask = choose(space, noise(0, 0, space.legal.shape), space.legal.astype(float), 14.0)
    gate = torch.from_numpy(mask.astype(np.float32)).requires_grad_()
    space.apply(model, mask, gate)
    model(torch.randn(4, 1, 28, 28)).square().sum().backward()
    assert gate.grad is not None
    assert int((gate.grad != 0).sum()) == 14
    assert not (gate.grad.numpy()[~mask] != 0).any()
    idle = [block.branches[name] for number, block in enumerate(space.blocks(model))
            for column, name in enumerate(space.branches) if not mask[number, column]]  # fmt: skip
    assert all(p.grad is None for branch in idle for p in branch.parameters())


def test_all_gates_open_is_the_plain_sum(space: BranchSpace) -> None:
    model, x = host().eval(), torch.randn(2, 1, 28, 28)
    other = copy.deepcopy(model)
    space.apply(model, space.legal, torch.ones(space.legal.shape))
    assert torch.equal(model(x), other(x))


# --- milliseconds of the fold ---


def area_ms(model: nn.Module) -> float:
    """A device on which a layer takes as long as its folded kernel is large."""
    blocks = [module for module in model.modules() if isinstance(module, ODBB)]
    return float(sum(block.folded_shape().kernel[0] * block.folded_shape().kernel[1] for block in blocks))


@pytest.fixture(scope="module")
def folded(space: BranchSpace) -> FoldedMs:
    return FoldedMs.of(space, host(), area_ms)


def test_a_budget_in_ms_is_kept_by_smaller_kernels(space: BranchSpace, folded: FoldedMs) -> None:
    model = host()
    assert folded.whole_ms == 63
    assert {ms for _, ms in folded.shapes[0]} == {0, -6, -8}
    for max_ms in (63, 50, 33, 20, 9, 7):
        for step in range(4):
            mask = choose_within_ms(space, noise(0, step, space.legal.shape), folded, max_ms)
            assert folded.of_mask(mask) <= max_ms
            assert mask.any(axis=1).all()
            space.apply(model, mask)
            assert area_ms(model) == folded.of_mask(mask)
    assert choose_within_ms(space, noise(0, 0, space.legal.shape), folded, 63).all()
    with pytest.raises(InfeasibleBudgetError, match="folds into 6 ms: the smallest reachable is 7"):
        choose_within_ms(space, noise(0, 0, space.legal.shape), folded, 6)


def test_layers_that_matter_least_shrink_first(space: BranchSpace, folded: FoldedMs) -> None:
    scores = np.zeros(space.legal.shape)
    scores[3] = -20.0
    mask = choose_within_ms(space, scores, folded, 57)
    assert [mask[i].all() for i in range(7)] == [i != 3 for i in range(7)]


def test_ms_and_a_number_of_branches_together(space: BranchSpace, folded: FoldedMs) -> None:
    mask = choose_within_ms(space, noise(0, 0, space.legal.shape), folded, 33, count=10)
    assert mask.sum() <= 10
    assert folded.of_mask(mask) <= 33


# --- the search ---


class Planted:
    """Images and what one kernel without a centre makes of them: only the branch with those taps can learn it."""

    @staticmethod
    def task(kernel: tuple[int, int]) -> Regression:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(160, 4, 8, 8, generator=generator)
        weight = torch.randn(4, 4, *kernel, generator=generator)
        weight[:, :, kernel[0] // 2, kernel[1] // 2] = 0.0
        pads = (kernel[0] // 2, kernel[1] // 2)
        y = nn.functional.conv2d(x, weight, padding=pads)
        return Regression(TensorExamples(x[:128], y[:128]), TensorExamples(x[128:], y[128:]))

    @staticmethod
    def model() -> nn.Module:
        torch.manual_seed(0)
        shape = ConvShape(4, 4, (3, 3), padding=((1, 1), (1, 1)))
        return nn.Sequential(ODBB(shape, ("1x1", "1xk", "kx1")))


@pytest.mark.parametrize(("kernel", "branch", "restart"), [((1, 3), "1xk", True), ((3, 1), "kx1", False)])
def test_a_planted_branch_is_found(kernel: tuple[int, int], branch: str, restart: bool) -> None:
    config = RepNASConfig(
        BranchBudget(limit=1.0 / 3), warmup=0.0, search=0.8, alpha_rate=0.1, clip=None, restart=restart,
        training=TrainConfig(steps=60, batch_size=32, learning_rate=0.01, warmup=0.0),
    )  # fmt: skip
    found = RepNAS(Planted.model(), config).search(Planted.task(kernel), None)
    assert found.mask[0] == tuple(name == branch for name in found.branches)
    assert sum(found.sampled[0]) == pytest.approx(1.0)


def tiny_task() -> Regression:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 12, 12, generator=generator)
    y = torch.randn(64, 10, generator=generator)
    return Regression(TensorExamples(x[:48], y[:48]), TensorExamples(x[48:], y[48:]))


def tiny_config(**changes: object) -> RepNASConfig:
    training = TrainConfig(steps=10, batch_size=8, learning_rate=0.01, checkpoint_s=0)
    return RepNASConfig(**{"training": training, "warmup": 0.2, "search": 0.5, **changes})  # type: ignore[arg-type]


def test_the_fixed_branches_are_the_best_of_the_scores_and_the_fold_is_the_network() -> None:
    search = RepNAS(host(), tiny_config())
    found = search.search(tiny_task(), None)
    assert np.array_equal(search.select(np.array(found.scores)), np.array(found.mask))
    assert found.used == found.limit == 14
    model, x = found.model, torch.randn(2, 1, 12, 12)
    assert model is not None
    assert not model.training
    with torch.no_grad():
        expected = model(x)
        assert float((fold(model, x)(x) - expected).abs().max() / expected.abs().max()) < 1e-4
    other = host().eval()
    other.load_state_dict(model.state_dict())
    assert torch.allclose(other(x), model(x), atol=1e-5), "the mask is not part of the state"


def test_what_is_found_is_trained_as_if_it_had_never_been_searched() -> None:
    """With ``restart``: the bits of a plain training of these branches, for the steps that the search left."""
    found = RepNAS(host(), tiny_config()).search(tiny_task(), None)
    plain = host()
    BranchSpace.of(plain).apply(plain, np.array(found.mask))
    train(plain, tiny_task(), replace(tiny_config().training, steps=5))
    assert found.model is not None
    for one, other in zip(found.model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)


CALLBACK = """
import torch
from hwsearch.train.callback import Callback

seen = []


class Own(Callback):
    def begin(self, model, config, steps):
        self.total = torch.zeros(())
        seen.append(steps)

    def optimiser(self, groups, config):
        return torch.optim.AdamW(groups, lr=config.learning_rate)

    def update(self, optimiser, model, step):
        optimiser.step()
        self.total += 1

    def state(self):
        return {"total": self.total}


class Mortal(Own):
    alive = [True]

    def after_step(self, model, step, steps, loss):
        if step == 2 and self.alive:
            self.alive.pop()
            raise KeyboardInterrupt
"""


def test_the_users_own_steps_train_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of a plain training of these branches under the same callback; a kill in it changes nothing."""
    (tmp_path / "repnas_callback.py").write_text(CALLBACK)
    monkeypatch.syspath_prepend(str(tmp_path))
    steered = replace(tiny_config().training, callback="repnas_callback:Own")
    found = RepNAS(host(), tiny_config(training=steered)).search(tiny_task(), None)
    searched = RepNAS(host(), tiny_config()).search(tiny_task(), None)
    assert (found.mask, found.scores) == (searched.mask, searched.scores), "the search itself is the method's"
    assert found.loss != searched.loss
    plain = host()
    BranchSpace.of(plain).apply(plain, np.array(found.mask))
    train(plain, tiny_task(), replace(steered, steps=5))
    assert sys.modules["repnas_callback"].seen == [5, 5]
    assert found.model is not None
    for one, other in zip(found.model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    mortal = tiny_config(training=replace(steered, callback="repnas_callback:Mortal"))
    with pytest.raises(KeyboardInterrupt):
        RepNAS(host(), mortal).search(tiny_task(), None, folder=tmp_path / "run")
    again = RepNAS(host(), mortal).search(tiny_task(), None, folder=tmp_path / "run")
    assert (again.loss, again.metric) == (found.loss, found.metric)
    with pytest.raises(InputError, match="restart=True has and False has not"):
        tiny_config(training=steered, restart=False)


def test_the_published_search_inherits_its_weights() -> None:
    paper = RepNASConfig.published(training=TrainConfig(steps=10, batch_size=8, learning_rate=0.01))
    assert paper.rate_of_scores(175_000) == pytest.approx(1e-4)
    assert RepNASConfig().rate_of_scores(100) == pytest.approx(0.05)
    found = RepNAS(host(), paper).search(tiny_task(), None)
    ours = RepNAS(host(), replace(paper, restart=True)).search(tiny_task(), None)
    assert found.loss != ours.loss


class Killed(Exception):
    """Stands for a kill."""


class Dying(RepNAS):
    """Is killed after some steps."""

    def __init__(self, steps: int, config: RepNASConfig) -> None:
        super().__init__(host(), config)
        self.left = steps

    def _backward(self, loss: Tensor, gate: Tensor | None) -> Tensor:
        if not self.left:
            raise Killed
        self.left -= 1
        return super()._backward(loss, gate)


@pytest.mark.parametrize("restart", [True, False])
def test_a_search_goes_on_after_a_kill_and_ends_the_same(tmp_path: Path, restart: bool) -> None:
    config = tiny_config(restart=restart)
    whole = RepNAS(host(), config).search(tiny_task(), None, folder=tmp_path / "whole")
    for stop in (4,) if restart else (4, 7):  # in the search, and with the branches fixed
        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(Killed):
            Dying(stop, config).search(tiny_task(), None, folder=folder)
        torch.manual_seed(99)  # a new process may begin with other weights: those of the checkpoint count
        fresh = repvgg_small(branches="odbb", widths=(4, 4, 8, 8))
        again = RepNAS(fresh, config).search(tiny_task(), None, folder=folder)
        assert again == whole
        assert (folder / "branches.json").read_bytes() == (tmp_path / "whole/branches.json").read_bytes()
        for one, other in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):  # type: ignore[union-attr]
            assert torch.equal(one, other)
    with pytest.raises(InputError, match="belongs to another run: floor was 1, now 0"):
        RepNAS(host(), tiny_config(floor=0, restart=restart)).search(tiny_task(), None, folder=tmp_path / "whole")


def test_a_search_in_ms_ends_inside_its_budget() -> None:
    config = tiny_config(budget=BranchBudget("ms", 35.0), branches=20)
    found = RepNAS(host(), config, price=area_ms).search(tiny_task(), None)
    assert found.folded_ms is not None
    assert found.folded_ms == found.used <= 35
    assert sum(sum(row) for row in found.mask) <= 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepNAS(host(), tiny_config(budget=BranchBudget("ms", 5.0))), "a budget in ms needs price="),
        (lambda: RepNAS(host(), tiny_config(budget=BranchBudget("macs", 0.5))), "in macs needs example_input="),
        (lambda: BranchBudget("flops"), "counts 'flops': give one of branches, macs"),
        (lambda: BranchBudget(limit=0), "a branch budget is 0: give a number above 0"),
        (lambda: tiny_config(warmup=0.6), "give 0 <= warmup < search < 1"),
        (lambda: tiny_config(floor=2), "floor is 2: give 0 or 1"),
        (lambda: tiny_config(clip=0), "clip is 0: give a number above 0"),
        (lambda: tiny_config(branches=3), "branches stands beside a budget in ms"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


def test_a_budget_that_nothing_keeps_is_told_before_any_training() -> None:
    with pytest.raises(AnswerIsNo, match="one branch a layer needs"):
        RepNAS(host(), tiny_config(budget=BranchBudget(limit=6)))
    with pytest.raises(InfeasibleBudgetError, match="smallest reachable is 7 ms"):
        RepNAS(host(), tiny_config(budget=BranchBudget("ms", 5.0)), price=area_ms)
