"""RepNAS: search which branches each block of a network trains with.

One training run: random subsets of branches first, then weights and scores together on the same batches, then the best
subset alone, with its inherited weights and the same learning rate schedule. The branches are folded afterwards, so a
budget in branches (the paper's), multiply-adds or activation memory limits what *training* costs; a budget in
milliseconds limits the folded network, which gets faster where only small branches are left.

Reference: Zhang et al., "RepNAS: Searching for Efficient Re-parameterizing Blocks", 2021, and its published code.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
from hwsearch.train.task import Evaluation, Task

if TYPE_CHECKING:
    from hwsearch.device.session import DeviceSession
    from hwsearch.latency.predictor import LatencyPredictor

SCHEMA, VERSION = "hwsearch.branch_result", 1

#: How far a score may travel in the paper's search: 35 epochs of 5,004 steps of Adam at 1e-4.
_TRAVEL = 17.5


@dataclass(frozen=True)
class RepNASConfig:
    """Everything that RepNAS can be told.

    Args:
        budget: what the branches may cost, see ``BranchBudget``.
        branches: at most so many branches, beside a budget in ``ms``.
        warmup: share of all steps in which subsets are drawn evenly (the paper: 15 of 150 epochs).
        search: share of all steps until the subset is fixed (50 of 150).
        alpha_rate: Adam's rate of the scores; ``None``: what lets a score travel as far as in the paper, however few
            the steps are (the paper: 1e-4 over 175,000 steps).
        alpha_betas, alpha_decay: Adam's; the decay (added to the gradient) is annealed to 0 over the search.
        floor: branches that every layer keeps at least; 0, as in the paper, lets a layer be its identity alone.
        reset_norms: forget running statistics when the subset is fixed: each branch saw its own batches only.
        clip: largest norm of all gradients of the weights; ``None``: not clipped.
        training: of the whole run.
    """

    budget: BranchBudget = field(default_factory=BranchBudget)
    branches: int | None = None
    warmup: float = 0.1
    search: float = 1 / 3
    alpha_rate: float | None = None
    alpha_betas: tuple[float, float] = (0.5, 0.999)
    alpha_decay: float = 5e-4
    floor: int = 1
    reset_norms: bool = True
    clip: float | None = 5.0
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.search < 1:
            raise InputError(f"warmup {self.warmup} and search {self.search}: give 0 <= warmup < search < 1")
        if self.floor not in (0, 1):
            raise InputError(f"floor is {self.floor}: give 0 or 1")
        if self.clip is not None and self.clip <= 0:
            raise InputError(f"clip is {self.clip}: give a number above 0, or None")
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
        return choose(self.space, scores, self.costs, config.budget.amount(self.costs), config.floor)

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
            net = _Net(self.model, self.space)
            total = self.config.training.total_steps(len(task.train))
            run_steps(
                net, task.train, self.config.training, self._step(net, task, total), identity=self._identity(),
                folder=None if folder is None else where / "state", progress=progress,
            )  # fmt: skip
            self.space.apply(self.model, net.chosen())
            result = self._result(net, evaluate(self.model, task, task.valid, self.config.training), total)
            if folder is not None:
                result.save(where / "branches.json")
        return result

    def _step(self, net: _Net, task: Task, total: int) -> Any:
        config = self.config
        warm, fixed = self.phases(total)
        rate = config.alpha_rate if config.alpha_rate is not None else _TRAVEL / max(fixed - warm, 1)

        def step(number: int, batch: Batch) -> Tensor:
            if number >= fixed:
                if number == fixed:
                    net.fix(self.select(net.alpha.numpy()), config.reset_norms)
                self.space.apply(self.model, net.chosen())
                return self._backward(task.loss(net(batch[0]), batch), None)
            drawn = noise(config.training.seed, number, self.space.legal.shape)
            scores = drawn if number < warm else net.alpha.numpy() + drawn
            mask = self.select(scores)
            net.sampled += torch.from_numpy(mask.astype(np.float64))
            gate = torch.from_numpy(mask.astype(np.float32)).requires_grad_()
            self.space.apply(self.model, mask, gate)
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

    def __init__(self, model: nn.Module, space: BranchSpace) -> None:
        super().__init__()
        self.model = model
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

    def adam(self, gradient: Floats, rate: float, betas: tuple[float, float], decay: float, count: int) -> None:
        """One step of Adam on the scores, its decay added to the gradient."""
        whole = torch.from_numpy(gradient) + decay * self.alpha
        self.first.mul_(betas[0]).add_(whole, alpha=1 - betas[0])
        self.second.mul_(betas[1]).addcmul_(whole, whole, value=1 - betas[1])
        mean, square = self.first / (1 - betas[0] ** count), self.second / (1 - betas[1] ** count)
        self.alpha.sub_(rate * mean / (square.sqrt() + 1e-8))


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
