"""RepNAS: search which branches each block of a network trains with.

Random subsets of branches train first, then weights and scores together on the same batches, then the best subset
alone. In the paper that is one run, with inherited weights and one learning rate schedule. Here (``restart``) the
search is short, and the best subset is trained from the weights that the search began with: while subsets are drawn,
weights before a batch norm grow, and what follows in a run of ordinary length moves them little.

The branches are folded afterwards, so a budget in branches (the paper's), multiply-adds or activation memory limits
what *training* costs; a budget in milliseconds limits the folded network, which gets faster where only small branches
are left. ``RepNASConfig.published()`` is the paper's search.

Reference: Zhang et al., "RepNAS: Searching for Efficient Re-parameterizing Blocks", 2021, and its published code.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hwsearch.errors import InputError
from hwsearch.reparam.fold import fold
from hwsearch.search.cafenet import as_task
from hwsearch.search.journal import write_atomic
from hwsearch.search.repnas_sampler import BranchBudget, choose, choose_within_ms, gate_gradient, noise
from hwsearch.search.repnas_space import BranchSpace, Floats, FoldedMs, Mask, Price
from hwsearch.train import processes
from hwsearch.train.data import Batch
from hwsearch.train.loop import Progress, TrainConfig, evaluate, run_steps
from hwsearch.train.loop import train as fit
from hwsearch.train.task import Evaluation, Task

if TYPE_CHECKING:
    from hwsearch.device.session import DeviceSession
    from hwsearch.latency.predictor import LatencyPredictor

SCHEMA, VERSION = "hwsearch.branch_result", 1

#: How far chance alone may move a score in a search, whose noise has a standard deviation of 1.8.
_WANDER = 0.5


@dataclass(frozen=True)
class RepNASConfig:
    """Everything that RepNAS can be told.

    Args:
        budget: what the branches may cost, see ``BranchBudget``.
        branches: at most so many branches, beside a budget in ``ms``.
        warmup: share of all steps in which subsets are drawn evenly (the paper: 15 of 150 epochs).
        search: share of all steps until the subset is fixed (50 of 150).
        restart: search at the full learning rate, then train the best subset for the steps that are left, with their
            own schedule, from the weights that the search began with. The paper: False, one run.
        alpha_rate: Adam's rate of the scores; ``None``: as ``travel`` says.
        travel: how far a score can move in a search, steps times rate (the paper: 17.5, which is 1e-4 in each of
            175,000 steps); ``None``: the rate with which n steps of random sign move it by half a unit, 0.5 / sqrt(n).
        alpha_betas, alpha_decay: Adam's; the decay (added to the gradient) is annealed to 0 over the search.
        floor: branches that every layer keeps at least; 0, as in the paper, lets a layer be its identity alone.
        whole: the branch that a layer keeps at least can be any kernel of the layer's size (kxk or 1x1-kxk). ``None``:
            so, unless the budget is in ``ms``, which needs smaller kernels. The paper: False.
        balance: while subsets are drawn a block's sum of n branches is divided by sqrt(n), and what is fixed keeps its
            share in its batch norms; the paper adds up whatever runs.
        reset_norms: forget running statistics when the subset is fixed: each branch saw its own batches only.
        clip: largest norm of all gradients of the weights; ``None``: not clipped.
        training: of the whole run; its callback, where it has one, steers what follows the search after a ``restart``.
    """

    budget: BranchBudget = field(default_factory=BranchBudget)
    branches: int | None = None
    warmup: float = 0.03
    search: float = 0.1
    restart: bool = True
    alpha_rate: float | None = None
    travel: float | None = None
    alpha_betas: tuple[float, float] = (0.5, 0.999)
    alpha_decay: float = 5e-4
    floor: int = 1
    whole: bool | None = None
    balance: bool = True
    reset_norms: bool = True
    clip: float | None = 5.0
    training: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def published(cls, **changes: Any) -> RepNASConfig:
        """The paper's search, as its code runs it; ``changes`` override any field. The rate of the scores is such that
        one may travel as far as there, however few the steps are, unless ``alpha_rate`` is given.

        Example:
            >>> RepNASConfig.published(floor=1).restart
            False
        """
        paper: dict[str, Any] = {
            "warmup": 0.1, "search": 1 / 3, "restart": False, "travel": 17.5, "floor": 0, "whole": False,
            "balance": False,
        }  # fmt: skip
        return cls(**{**paper, **changes})

    def rate_of_scores(self, steps: int) -> float:
        """Adam's rate of the scores in a search of this many steps."""
        if self.alpha_rate is not None:
            return self.alpha_rate
        return _WANDER / max(steps, 1) ** 0.5 if self.travel is None else self.travel / max(steps, 1)

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.search < 1:
            raise InputError(f"warmup {self.warmup} and search {self.search}: give 0 <= warmup < search < 1")
        if self.floor not in (0, 1):
            raise InputError(f"floor is {self.floor}: give 0 or 1")
        if self.clip is not None and self.clip <= 0:
            raise InputError(f"clip is {self.clip}: give a number above 0, or None")
        if self.training.callback is not None and not self.restart:
            raise InputError(
                "a callback steers the training of what was found, which restart=True has and False has not"
            )
        if self.branches is not None and self.budget.kind != "ms":
            raise InputError("branches stands beside a budget in ms; give BranchBudget('branches', limit) instead")


@dataclass(frozen=True)
class BranchResult:
    """The branches that a search found.

    ``mask`` and ``scores`` are (L, N) by layer and branch; ``sampled`` is the share of the search's steps in which each
    branch ran. ``used`` is what the mask costs in the budget's unit, ``limit`` what it may. ``model`` is the trained
    network, unfolded, running these branches; it is not part of the file.
    """

    seed: int
    layers: tuple[str, ...]
    branches: tuple[str, ...]
    mask: tuple[tuple[bool, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    sampled: tuple[tuple[float, ...], ...]
    budget: str
    used: float
    limit: float
    folded_ms: float | None
    loss: float
    metric: float
    model: nn.Module | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with schema and version."""
        values = {name: value for name, value in self.__dict__.items() if name != "model"}
        return {"schema": SCHEMA, "version": VERSION, "method": "repnas", **values}

    def save(self, path: Path) -> None:
        """Write the result as JSON, the same bytes whenever the search is."""
        write_atomic(Path(path), json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n")

    def __str__(self) -> str:
        width = max(len(layer) for layer in self.layers)
        rows = [
            f"{layer:<{width}}  {', '.join(b for b, on in zip(self.branches, row, strict=True) if on) or 'identity'}"
            for layer, row in zip(self.layers, self.mask, strict=True)
        ]
        return "\n".join(rows)


class RepNAS:
    """RepNAS as a searcher over the branches of ODBB blocks.

    Args:
        model: a network of ODBB blocks (see ``hwsearch.reparametrize``); trained in place.
        config: see ``RepNASConfig``; its training carries the seed.
        price: milliseconds of a folded network, needed for a budget in ms; see ``predicted_ms``. Where it is given
            with another budget, the result tells them.
        example_input: (N, C, H, W), needed for budgets other than ``branches``.

    Raises:
        InputError: no block, or something that the budget needs is missing.

    Example:
        >>> found = RepNAS(model, RepNASConfig()).search(train, valid, folder=Path("run"))     # doctest: +SKIP
        >>> hs.fold(found.model)                                                               # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        config: RepNASConfig | None = None,
        *,
        price: Price | None = None,
        example_input: Tensor | None = None,
    ) -> None:
        self.model, self.config, self.price = model, config or RepNASConfig(), price
        self.space = BranchSpace.of(model)
        budget = self.config.budget
        if budget.kind == "ms" and price is None:
            raise InputError("a budget in ms needs price=, such as predicted_ms(predictor, session, example_input)")
        if budget.kind in ("macs", "activation_bytes") and example_input is None:
            raise InputError(f"a budget in {budget.kind} needs example_input=")
        self.folded = None if price is None or budget.kind != "ms" else FoldedMs.of(self.space, model, price)
        if budget.kind == "ms":
            self.costs = self.space.legal.astype(np.float64)
        else:
            example = torch.zeros(0) if example_input is None else example_input
            self.costs = self.space.costs(model, example, budget.kind)
        self.select(np.zeros(self.space.legal.shape))  # a budget that nothing keeps is told before any training

    def select(self, scores: Floats) -> Mask:
        """The branches (L, N) of highest score inside the budget."""
        config = self.config
        if self.folded is not None:
            limit = config.budget.limit
            return choose_within_ms(self.space, scores, self.folded, limit, config.branches, config.floor)
        whole = config.whole is not False
        return choose(self.space, scores, self.costs, config.budget.amount(self.costs), config.floor, whole)

    def search(
        self, train: Any, valid: Any, *, folder: Path | None = None, progress: Progress | None = None
    ) -> BranchResult:
        """Train, search and go on training, in one run; the same call with the same folder goes on after a kill.

        Args:
            train, valid: a Task and None, or training and held-out Examples.
        """
        task = as_task(train, valid)
        with tempfile.TemporaryDirectory(prefix="hwsearch-") as temporary:
            where = Path(temporary) if folder is None else Path(folder)
            net = _Net(self.model, self.space, keep=self.config.restart)
            training, state = self.config.training, where / "state" if folder is not None else None
            total = training.total_steps(len(task.train))
            if not self.config.restart:
                self._run(net, task, training, total, state, progress)
            else:
                _, fixed = self.phases(total)
                searching = replace(training, steps=fixed, warmup=0.0, final_rate=training.learning_rate)
                self._run(net, task, searching, total, state, progress)
                net.fix(self.select(net.alpha.numpy()), self.config.reset_norms)
                net.rewind()
                self.space.apply(self.model, net.chosen())
                fit(
                    self.model, task, replace(training, steps=total - fixed),
                    folder=None if state is None else state / "train", progress=_after(progress, fixed, total),
                )  # fmt: skip
            self.space.apply(self.model, net.chosen())
            result = self._result(net, evaluate(self.model, task, task.valid, self.config.training), total)
            if folder is not None:
                result.save(where / "branches.json")
        return result

    def _run(
        self, net: _Net, task: Task, training: TrainConfig, total: int, folder: Path | None, progress: Progress | None
    ) -> None:
        run_steps(
            net, task.train, training, self._step(net, task, total), identity=self._identity(), folder=folder,
            progress=_after(progress, 0, total),
        )  # fmt: skip

    def _step(self, net: _Net, task: Task, total: int) -> Any:
        config = self.config
        warm, fixed = self.phases(total)
        rate = config.rate_of_scores(fixed - warm)

        def step(number: int, batch: Batch) -> Tensor:
            if number >= fixed:
                if number == fixed:
                    mask = self.select(net.alpha.numpy())
                    net.fix(mask, config.reset_norms)
                    if config.balance:
                        self.space.absorb(self.model, self.space.shares(self.model, mask))
                self.space.apply(self.model, net.chosen())
                return self._backward(task.loss(net(batch[0]), batch), None)
            drawn = noise(config.training.seed, number, self.space.legal.shape)
            scores = drawn if number < warm else net.alpha.numpy() + drawn
            mask = self.select(scores)
            net.sampled += torch.from_numpy(mask.astype(np.float64))
            gate = torch.from_numpy(mask.astype(np.float32)).requires_grad_()
            self.space.apply(self.model, mask, gate, self.space.shares(self.model, mask) if config.balance else None)
            loss = self._backward(task.loss(net(batch[0]), batch), gate)
            if number >= warm and gate.grad is not None:
                gradient = gate_gradient(mask, scores, gate.grad.double().numpy())
                share = 0.5 * (1 + np.cos(np.pi * (number - warm) / max(fixed - warm, 1)))
                net.adam(gradient, rate, config.alpha_betas, config.alpha_decay * float(share), number - warm + 1)
            return loss

        return step

    def phases(self, total: int) -> tuple[int, int]:
        """(first step of the search, first step with fixed branches) of ``total``."""
        warm = round(self.config.warmup * total)
        return warm, min(max(round(self.config.search * total), warm + 1), total - 1)

    def _backward(self, loss: Tensor, gate: Tensor | None) -> Tensor:
        loss.backward()  # type: ignore[no-untyped-call]
        if gate is not None:
            processes.average_gradients([gate])  # type: ignore[list-item]
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        return loss.detach()

    def _identity(self) -> Mapping[str, Any]:
        settings = asdict(self.config)
        del settings["training"]
        folded = None if self.folded is None else [self.folded.whole_ms, self.folded.shapes]
        return {
            "kind": "repnas", "layers": self.space.layers, "branches": self.space.branches, **settings,
            "folded": folded,
        }  # fmt: skip

    def _result(self, net: _Net, evaluation: Evaluation, total: int) -> BranchResult:
        mask = net.chosen()
        _, fixed = self.phases(total)
        kind = self.config.budget.kind
        folded_ms = None if self.price is None else float(self.price(self.model))
        used = self.folded.of_mask(mask) if self.folded is not None else float(self.costs[mask].sum())
        return BranchResult(
            seed=self.config.training.seed,
            layers=self.space.layers,
            branches=self.space.branches,
            mask=tuple(tuple(row) for row in mask.tolist()),
            scores=tuple(tuple(row) for row in net.alpha.tolist()),
            sampled=tuple(tuple(row) for row in (net.sampled / fixed).tolist()),
            budget=kind,
            used=used,
            limit=self.config.budget.limit if kind == "ms" else self.config.budget.amount(self.costs),
            folded_ms=folded_ms,
            loss=evaluation.loss,
            metric=evaluation.metric,
            model=self.model,
        )


class _Net(nn.Module):
    """The network and the search's state, as buffers: a checkpoint of weights is a checkpoint of the search."""

    alpha: Tensor
    first: Tensor
    second: Tensor
    sampled: Tensor
    fixed: Tensor

    def __init__(self, model: nn.Module, space: BranchSpace, *, keep: bool) -> None:
        super().__init__()
        self.model = model
        tensors = model.state_dict() if keep else {}
        self._kept = {name: f"kept_{number}" for number, name in enumerate(tensors)}
        for name, buffer in self._kept.items():
            self.register_buffer(buffer, tensors[name].detach().clone())
        for name in ("alpha", "first", "second", "sampled"):
            self.register_buffer(name, torch.zeros(space.legal.shape, dtype=torch.float64))
        self.register_buffer("fixed", torch.from_numpy(space.legal.copy()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out

    def chosen(self) -> Mask:
        """The fixed mask (all branches before it is fixed)."""
        return np.asarray(self.fixed.numpy(), dtype=np.bool_)

    def fix(self, mask: Mask, reset_norms: bool) -> None:
        """Keep a mask for the rest of the run."""
        self.fixed.copy_(torch.from_numpy(mask))
        if reset_norms:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.reset_running_stats()

    def rewind(self) -> None:
        """Give the model the weights and statistics that the search began with."""
        self.model.load_state_dict({name: self.get_buffer(buffer) for name, buffer in self._kept.items()})

    def adam(self, gradient: Floats, rate: float, betas: tuple[float, float], decay: float, count: int) -> None:
        """One step of Adam on the scores, its decay added to the gradient."""
        whole = torch.from_numpy(gradient) + decay * self.alpha
        self.first.mul_(betas[0]).add_(whole, alpha=1 - betas[0])
        self.second.mul_(betas[1]).addcmul_(whole, whole, value=1 - betas[1])
        mean, square = self.first / (1 - betas[0] ** count), self.second / (1 - betas[1] ** count)
        self.alpha.sub_(rate * mean / (square.sqrt() + 1e-8))


def _after(progress: Progress | None, done: int, total: int) -> Progress | None:
    """Progress of a part of ``total`` steps that begins after ``done``."""
    if progress is None:
        return None
    return lambda step, _, words: progress(done + step, total, words)


def predicted_ms(predictor: LatencyPredictor, session: DeviceSession, example_input: Tensor) -> Price:
    """Predicted milliseconds of a network of blocks as it would be deployed: folded with minimal support and exported.

    The runtime of the session's device says which kernels the folded network becomes; nothing is timed.

    Example:
        >>> price = predicted_ms(predictor, session, torch.zeros(1, 1, 28, 28))                # doctest: +SKIP
    """
    import copy

    from hwsearch.graph.onnx_build import export_onnx

    def price(model: nn.Module) -> float:
        folded = fold(copy.deepcopy(model).eval(), example_input, require=False)
        kernels = session.lower([export_onnx(folded, example_input)])[0]
        return float(predictor.network(kernels).ms)

    return price
