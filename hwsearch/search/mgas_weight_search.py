"""The search of single weights: what of a found network's weights is kept under a size budget, or in 2:4 blocks.

It comes last, on the network at its final widths: zeros change no millisecond, so nothing of the search before depends
on them. Weights and thresholds learn together under a price of the size, masks are committed now and then and at the
end cut exactly to the budget; then weights learn on with masks frozen. What comes out is an ordinary dense network in
which numbers are zero.

Reference: MGAS (arXiv 2310.15074), weight granularity, whose published code compares its size without masks on
weights; the size budget, its controller and the commits are ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hwsearch.errors import AnswerIsNo, InternalError
from hwsearch.graph.onnx_export import export_onnx
from hwsearch.graph.onnx_packed import pack, packed_bytes
from hwsearch.graph.surgery import named_tensors
from hwsearch.reparam.fold import fold
from hwsearch.search.mgas_config import MgasConfig, Phase, schedule
from hwsearch.search.mgas_weights import WeightGate, WeightNet, is_two_of_four
from hwsearch.search.searcher import plain_settings
from hwsearch.train.data import Batch, Shuffle
from hwsearch.train.loop import OwnRate, Progress, evaluate, run_steps

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.mgas_weights_config import WeightConfig
    from hwsearch.search.run_folder import RunFolder
    from hwsearch.train.task import Evaluation, Task

#: The share of the searching steps after which the ramped target is the budget.
_RAMP = 0.8


@dataclass(frozen=True)
class Size:
    """How large a network with zeros is: ``parameters`` that are not zero, and ``bytes`` of its packed file in float32
    (None where nobody asks)."""

    parameters: int
    bytes: int | None


@dataclass(frozen=True)
class SizeCount:
    """The size of a deployed network in closed form from how many weights of every gated layer are not zero.

    What is counted is the network as it is deployed, folded: weights that are not zero, and all other numbers (biases,
    statistics of norms that were not folded); in bytes, its ONNX file with zeros packed away
    (``hwsearch.graph.onnx_packed``), graph and names included.

    Attributes:
        numbers: weights of every gated layer.
        parameters: other numbers.
        bytes: of all but the gated layers; None: not counted.
    """

    numbers: tuple[int, ...]
    parameters: int
    bytes: int | None

    @classmethod
    def of(cls, net: WeightNet, example: Tensor, *, in_bytes: bool) -> SizeCount:
        """The count of a gated network.

        Raises:
            UnsupportedModelError: bytes are asked for, and the network cannot be exported.
        """
        plain = fold(copy.deepcopy(net.model).eval(), example, require=False)
        numbers = tuple(weight.numel() for weight in net.weights())
        total, size = sum(t.numel() for t in _floats(plain)), None
        if in_bytes:
            rng = torch.Generator().manual_seed(0)
            with torch.no_grad():  # no number is zero by chance, and no two tensors are equal
                for tensor in _floats(plain):
                    tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)
            size = len(pack(export_onnx(plain, example))) - sum(packed_bytes(n, n) for n in numbers)
        return cls(numbers, total - sum(numbers), size)

    def at(self, on: Sequence[int]) -> Size:
        """The size with so many weights of every gated layer that are not zero."""
        size = self.bytes
        if size is not None:
            size += sum(packed_bytes(n, kept) for n, kept in zip(self.numbers, on, strict=True))
        return Size(self.parameters + sum(on), size)


def size_of(model: nn.Module, example: Tensor, *, in_bytes: bool = True) -> Size:
    """The real size of a network as it is deployed: folded, exported and packed.

    Example:
        >>> size_of(model, torch.zeros(1, 1, 28, 28))                                 # doctest: +SKIP
        Size(parameters=8120, bytes=51904)
    """
    plain = fold(copy.deepcopy(model).eval(), example, require=False)
    parameters = sum(int(torch.count_nonzero(t)) for t in _floats(plain))
    return Size(parameters, len(pack(export_onnx(plain, example))) if in_bytes else None)


@dataclass(frozen=True)
class Thinned:
    """A network with zeros: itself, its evaluation on held-out examples, its size, and per layer the share kept."""

    model: nn.Module
    evaluation: Evaluation
    before: Size
    size: Size
    kept: Mapping[str, float]

    def facts(self, config: WeightConfig) -> dict[str, Any]:
        """Plain values for a result's ``extra``."""
        return {
            "pattern": config.pattern,
            "parameters_before": self.before.parameters,
            "parameters": self.size.parameters,
            "bytes_before": self.before.bytes,
            "bytes": self.size.bytes,
            "max_parameters": config.max_parameters,
            "max_bytes": config.max_bytes,
            "kept": dict(self.kept),
        }


def thin_weights(
    model: nn.Module,
    task: Task,
    config: WeightConfig,
    example: Tensor,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
    tell: Callable[..., None] | None = None,
) -> Thinned:
    """Search the single weights of a trained network; the network itself is not touched.

    Args:
        example: input of the shape that is deployed.
        folder: of the checkpoint; the same call again goes on from it.
        tell: told of commits by name and values.

    Raises:
        AnswerIsNo: no masks keep the size budget; the message has the smallest size.
        InputError: no layer can be gated.
    """
    net = WeightNet(model, config.pattern, config.least)
    count = SizeCount.of(net, example, in_bytes=config.max_bytes is not None)
    before = count.at(count.numbers)
    per_epoch = Shuffle(len(task.train), config.training.batch_size, 0).steps_per_epoch
    times = MgasConfig(stages=1, warmup_epochs=0.0, final_epochs=config.epochs, prune_every=config.prune_every)
    (phase,) = schedule(times, per_epoch, 1)
    training = replace(config.training, steps=phase.steps + round(config.tuning_epochs * per_epoch))
    search = WeightSearch(Weights(net), task, count, config, phase, tell=tell or (lambda *_, **__: None))
    search.check_reachable()
    own = {
        f"net.gates.{index}.threshold": OwnRate(
            config.threshold_rate / training.learning_rate, config.threshold_momentum
        )
        for index in range(len(net.names) if config.sized else 0)
    }
    settings = {name: value for name, value in plain_settings(config).items() if name != "training"}
    run_steps(
        search.weights, task.train, training, search.step, identity={"kind": "mgas_weights", "config": settings},
        own=own, folder=folder, progress=progress,
    )  # fmt: skip
    thin = net.baked()
    tensors = dict(thin.named_parameters())
    if config.pattern == "2:4" and not all(is_two_of_four(tensors[name]) for name in net.names):
        raise InternalError("a 2:4 mask left more than two of four weights")
    on = [int(torch.count_nonzero(tensors[name])) for name in net.names]
    kept = {name: k / n for name, k, n in zip(net.names, on, count.numbers, strict=True)}
    return Thinned(thin, evaluate(thin, task, task.valid, training), before, count.at(on), kept)


def thinned(
    model: nn.Module,
    evaluation: Evaluation,
    task: Task,
    config: WeightConfig | None,
    space: WidthSpace,
    run: RunFolder,
    *,
    progress: Progress | None,
) -> tuple[nn.Module, Evaluation, dict[str, Any]]:
    """The end of a search: (network, its evaluation, what its result's ``extra`` says of its weights); all as it was
    where ``config`` is None."""
    if config is None:
        return model, evaluation, {}
    found = thin_weights(
        model, task, config, torch.zeros(space.network.input_shape), folder=run.state / "weights", progress=progress,
        tell=run.event,
    )  # fmt: skip
    return found.model, found.evaluation, {"weights": found.facts(config)}


def check_smallest(config: WeightConfig | None, space: WidthSpace) -> None:
    """Refuse a size budget that the narrowest network of a space misses, before anything is trained.

    Raises:
        AnswerIsNo: with a bound on the smallest size.
    """
    if config is None or not config.sized:
        return
    least = config.least * space.parameters(space.smallest())
    for limit, smallest, what in (
        (config.max_parameters, least, "parameters"),
        (config.max_bytes, 4 * least, "bytes"),
    ):
        if limit is not None and smallest > limit:
            raise AnswerIsNo(
                f"no network of this width space keeps {limit:,} {what}: {100 * config.least:g} % of its narrowest "
                f"has {math.ceil(smallest):,}; give a larger size budget, a smaller least, or allow narrower widths"
            )


class Weights(nn.Module):
    """Everything that changes during a search, so that a checkpoint holds it; ``control``: the multiplier, the use of
    the budget at the beginning."""

    control: Tensor

    def __init__(self, net: WeightNet) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("control", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """The masked network's output."""
        return self.net(x)  # type: ignore[no-any-return]


class WeightSearch:
    """The search as a step of the training loop: a function of its number and of what stands in ``Weights``."""

    def __init__(
        self,
        weights: Weights,
        task: Task,
        count: SizeCount,
        config: WeightConfig,
        phase: Phase,
        *,
        tell: Callable[..., None],
    ) -> None:
        self.weights, self.net, self.task, self.count = weights, weights.net, task, count
        self.config, self.phase, self.tell = config, phase, tell
        self._learnt = [p for p in self.net.model.parameters() if p.requires_grad]

    def step(self, number: int, batch: Batch) -> Tensor:
        """Gradients of one batch; returns the task's loss."""
        phase, control, sized = self.phase, self.weights.control, self.config.sized
        searching = number < phase.steps
        masks = self.net.masks()
        loss: Tensor = self.task.loss(self.net(batch[0], masks), batch)
        if not searching or not sized:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            use = self.use([int(mask.detach().sum()) for mask in masks])
            if number == 0:
                control[1] = use
            cost = torch.stack([mask.sum() for mask in masks]).sum() / sum(self.count.numbers)
            (loss + float(control[0]) * cost).backward()
            gain = self.config.rate / phase.steps * (use / self.target(number) - 1)
            control[0] = max(float(control[0]) + gain, 0.0)
        nn.utils.clip_grad_norm_(self._learnt, self.config.clip)
        if searching:
            self.net.observe()
            if sized and number + 1 in phase.commits:
                last = number + 1 == phase.steps
                fallen = self.commit(1.0 if last else self.target(number), cut=last)
                size = self.count.at(self.alive())
                self.tell("weights_committed", step=number + 1, weights=fallen, parameters=size.parameters,
                          bytes=size.bytes, multiplier=float(control[0]))  # fmt: skip
            if number + 1 == phase.steps:
                self.net.freeze()
        return loss.detach()

    def target(self, number: int) -> float:
        """The use of the budget to be at by now: from that at the beginning down to 1, geometrically."""
        start = float(self.weights.control[1])
        done = min((number + 1) / max(_RAMP * self.phase.steps, 1.0), 1.0)
        return float(start ** (1 - done)) if start > 1 else 1.0

    def alive(self) -> list[int]:
        """How many weights of every gated layer are not committed as off."""
        return [int(self.net.gate(index).alive.sum()) for index in range(len(self.net.names))]

    def use(self, on: Sequence[int]) -> float:
        """How much of the size budget so many weights use: the larger share of the two limits."""
        size, config = self.count.at(on), self.config
        shares = [0.0]
        if config.max_parameters is not None:
            shares.append(size.parameters / config.max_parameters)
        if config.max_bytes is not None and size.bytes is not None:
            shares.append(size.bytes / config.max_bytes)
        return max(shares)

    def check_reachable(self) -> None:
        """Refuse a size budget that not even the smallest share of every layer keeps.

        Raises:
            AnswerIsNo: with the smallest size.
        """
        if not self.config.sized:
            return
        least = [gate.least for gate in self.net.gates if isinstance(gate, WeightGate)]
        if self.use(least) <= 1.0:
            return
        size, config = self.count.at(least), self.config
        asked = " and ".join(
            f"{limit:,} {what}"
            for limit, what in ((config.max_parameters, "parameters"), (config.max_bytes, "bytes"))
            if limit is not None
        )
        smallest = f"{size.parameters:,} parameters" + ("" if size.bytes is None else f" in {size.bytes:,} bytes")
        raise AnswerIsNo(
            f"no masks on the weights of this network keep {asked}: with {100 * config.least:g} % of every layer it "
            f"has {smallest}; give a larger size budget, a smaller least, or a budget of fewer milliseconds"
        )

    @torch.no_grad()
    def commit(self, target: float, *, cut: bool = False) -> int:
        """Switch off for good what is below its threshold on average, furthest below first, until the size budget's use
        is at the target; how many weights that were.

        Args:
            cut: take weights above their thresholds as well, the nearest first: the end of the search.
        """
        alive, least = self.alive(), [gate.least for gate in self.net.gates if isinstance(gate, WeightGate)]
        margins, layers, places = [], [], []
        for index, most in enumerate(np.asarray(alive) - np.asarray(least)):
            gate = self.net.gate(index)
            average = gate.average.reshape(-1).cpu().double().numpy()
            living = np.flatnonzero(gate.alive.reshape(-1).cpu().numpy())
            order = living[np.argsort(average[living], kind="stable")][: int(most)]
            order = order if cut else order[average[order] <= 0]
            margins.append(average[order])
            layers.append(np.full(len(order), index))
            places.append(order)
        rank = np.argsort(np.concatenate(margins), kind="stable")
        layer, place = np.concatenate(layers)[rank], np.concatenate(places)[rank]

        def left(count: int) -> list[int]:
            return (np.asarray(alive) - np.bincount(layer[:count], minlength=len(alive))).tolist()  # type: ignore[no-any-return]

        low, high = 0, len(rank)  # fewer weights are never larger: the fewest that must go, by halving
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.use(left(middle)) <= target else (middle + 1, high)
        for index in range(len(alive)):
            mask = self.net.gate(index).alive
            flat = mask.reshape(-1).clone()  # in the order of the shape, whatever the memory layout
            flat[torch.from_numpy(place[:low][layer[:low] == index]).to(flat.device)] = False
            mask.copy_(flat.view(mask.shape))
        return low


def _floats(model: nn.Module) -> list[Tensor]:
    """The floating-point numbers that a model's ONNX file holds."""
    return [tensor for tensor in named_tensors(model).values() if tensor.is_floating_point()]
