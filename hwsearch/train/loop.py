"""The training loop: SGD with momentum under a cosine, resumable bit for bit after a kill at any moment.

``train`` fits a model to a task. ``run_steps`` is the same loop around any step that calls ``backward``: a
super-network trains through it too. Everything random is a function of (seed, step), so a checkpoint holds weights,
momenta and a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hwsearch.device.lock import background_lock
from hwsearch.errors import InputError
from hwsearch.graph.capture import evaluation_mode
from hwsearch.train import checkpoint, processes
from hwsearch.train.callback import OwnSteps
from hwsearch.train.data import Batch, Examples, Shuffle, in_order
from hwsearch.train.held_out import Looks
from hwsearch.train.optimiser_state import put_back, remembered
from hwsearch.train.seeds import generator, torch_seed
from hwsearch.train.strides import strided_inputs
from hwsearch.train.task import Evaluation, Task

#: Called with (steps done, steps in all, a few words such as the loss).
Progress = Callable[[int, int, str], None]

#: One step: forward and backward of a batch, leaving gradients; returns the loss (scalar).
Step = Callable[[int, Batch], Tensor]

_LOCK_S = 1.0  # a timing waits for background work at most about this long
_HISTORY_POINTS = 200
_OPTIMISER = "optimiser."  # of the user's own: what it remembers, in a checkpoint
_NOT_IDENTITY = ("checkpoint_s",)  # how often a checkpoint is written changes no bit of the result


class DivergedError(InputError):
    """The training loss is infinite or not a number."""


@dataclass(frozen=True)
class TrainConfig:
    """How weights are fitted.

    Args:
        epochs: passes over the training examples (may be a fraction); ``steps`` overrides it.
        learning_rate: peak, reached after ``warmup`` (a share of all steps), then a cosine down to ``final_rate``.
        weight_decay: on weights of two and more dimensions, never on biases and normalisation.
        clip: the gradient is shortened to this norm where it is longer; None: it is taken as it is.
        precision: ``float32``, or ``bfloat16`` autocast where the CPU has instructions for it.
        channels_last: memory layout; many times faster for depth-wise layers on CPUs.
        threads: torch threads; pinned, because they change the bits of sums.
        checkpoint_s: seconds between checkpoints; 0 writes one after every step.
        callback: ``module:name`` of code of the user's own in trainings by ``train``, see ``Callback``.
    """

    epochs: float = 5.0
    steps: int | None = None
    batch_size: int = 128
    learning_rate: float = 0.1
    final_rate: float = 1e-5
    warmup: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    clip: float | None = None
    precision: str = "float32"
    channels_last: bool = True
    threads: int = 1
    seed: int = 0
    checkpoint_s: float = 20.0
    callback: str | None = None

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("threads", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}; give {low} or more")
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; give a number above 0")
        for name in ("final_rate", "momentum", "weight_decay", "checkpoint_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise InputError(f"clip is {self.clip}; give a norm above 0, or leave it out")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps is {self.steps}; give 1 or more")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup is {self.warmup}; give a share of all steps, 0 or more and below 1")
        if self.nesterov and self.momentum == 0:
            raise InputError("nesterov needs a momentum above 0; set momentum, or nesterov to false")
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision is {self.precision!r}; give float32 or bfloat16")

    def total_steps(self, examples: int) -> int:
        """Steps in all for a training set of this size."""
        if self.steps is not None:
            return self.steps
        return max(round(self.epochs * Shuffle(examples, self.batch_size, 0).steps_per_epoch), 1)

    def rate(self, step: int, total: int) -> float:
        """Learning rate of one step (0-based) of ``total``: linear warm-up, then half a cosine."""
        warm = int(self.warmup * total)
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        place = (step - warm) / max(total - warm, 1)
        return self.final_rate + 0.5 * (self.learning_rate - self.final_rate) * (1 + float(np.cos(np.pi * place)))


@dataclass(frozen=True)
class OwnRate:
    """How a parameter learns that has a group of its own: its learning rate over everybody else's, and its momentum.
    It has no weight decay."""

    factor: float
    momentum: float = 0.0


@dataclass(frozen=True)
class TrainReport:
    """What a training did: steps taken, examples seen, and (step, mean training loss up to it) along the way.

    ``scores`` are (step, loss, metric) on some held-out examples, see ``Looks``.
    """

    steps: int
    examples: int
    history: tuple[tuple[int, float], ...]
    scores: tuple[tuple[int, float, float], ...] = ()

    @property
    def final_loss(self) -> float:
        """Mean training loss over the last point of the history."""
        return self.history[-1][1]


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig | None = None,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> TrainReport:
    """Fit ``model`` in place to ``task.train`` and leave it in evaluation mode.

    Args:
        folder: holds the checkpoint; the same call again goes on from it (or returns at once where it had finished).

    Raises:
        InputError: the checkpoint belongs to another run, the folder cannot be written, the loss is not finite, or the
            callback fails.

    Example:
        >>> train(model, task, TrainConfig(epochs=3), folder=Path("run/winner"))      # doctest: +SKIP
    """
    config = config or TrainConfig()
    steered = None if config.callback is None else OwnSteps(config.callback)

    def step(number: int, batch: Batch) -> Tensor:
        loss = task.loss(model(batch[0]), batch) if steered is None else steered.loss(batch, task, number)
        loss.backward()
        return loss.detach()

    total = config.total_steps(len(task.train))
    looks = Looks.of(task.valid, total, config.batch_size) if processes.rank() == 0 else None

    def score() -> tuple[float, float]:
        assert looks is not None  # else nobody asks
        kept = [(buffer, buffer.clone()) for buffer in model.buffers()]  # a forward may count its calls
        with evaluation_mode(model):
            found = evaluate(model, task, looks.examples, config)
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        return found.loss, found.metric

    return run_steps(
        model, task.train, config, step, folder=folder, progress=progress, identity={"kind": "train"}, steered=steered,
        scored=None if looks is None else (looks.steps, score),
    )  # fmt: skip


def run_steps(
    model: nn.Module,
    examples: Examples,
    config: TrainConfig,
    step: Step,
    *,
    identity: Mapping[str, Any],
    own: Mapping[str, OwnRate] | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    steered: OwnSteps | None = None,
    scored: tuple[frozenset[int], Callable[[], tuple[float, float]]] | None = None,
) -> TrainReport:
    """Take all steps that are left, each: zero gradients, ``step``, SGD update; write checkpoints on the way.

    Args:
        model: owns the parameters and buffers that a checkpoint keeps; left in evaluation mode.
        step: must derive what is random in it from its number alone.
        identity: what else makes this run what it is; a checkpoint of another identity is refused.
        own: names of parameters that learn in a group of their own.
        steered: the user's callback, where there is one (``step`` asks it for the loss).
        scored: steps behind which the model is looked at, and what gives (loss, metric) then; see ``Looks``.
    """
    looked_at, score = (frozenset(), lambda: (0.0, 0.0)) if scored is None else scored
    total = config.total_steps(len(examples))
    shuffle = Shuffle(len(examples), config.batch_size, config.seed)
    whole = {**_identity(config), **identity, "steps": total, "data": examples.identity}
    if own:
        whole["own"] = {name: asdict(rate) for name, rate in own.items()}
    with settings(config), strided_inputs(model), processes.whole_batch_statistics(model):
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if steered is not None:
            torch.manual_seed(torch_seed(config.seed, "callback"))
            steered.begin(model, config, total)
        optimiser, foreign = _optimiser(model, config, own or {}, steered)
        state = _State(model, optimiser, folder, whole, foreign, {} if steered is None else steered.state())
        if state.step == 0:
            state.save()  # where a run starts from belongs to it: a new process may draw other first weights
        written = time.monotonic()
        model.train()

        def waiting(message: str) -> None:
            if progress is not None:
                progress(state.step, total, message)

        while state.step < total:
            with background_lock(waiting):
                chunk_end = time.monotonic() + _LOCK_S  # from now: waiting for the lock is not the chunk's time
                while state.step < total and time.monotonic() < chunk_end:
                    loss = _one_step(state.step, total, examples, shuffle, config, step, optimiser, steered)
                    state.note(loss, total)
                    if steered is not None:
                        steered.after_step(state.step - 1, total, loss)
                    if state.step in looked_at:
                        break  # the lock is let go first: looking takes it by itself
                    if state.step == total or time.monotonic() - written >= config.checkpoint_s:
                        state.save()
                        written = time.monotonic()
            if state.step in looked_at:
                state.scores.append((state.step, *score()))
                if state.step == total or time.monotonic() - written >= config.checkpoint_s:
                    state.save()
                    written = time.monotonic()
            if progress is not None:
                progress(state.step, total, f"loss {state.recent_loss():.3f}")
        if steered is not None:
            steered.end()
        model.eval()
    return TrainReport(total, total * shuffle.batch_size, tuple(state.history), tuple(state.scores))


def evaluate(model: nn.Module, task: Task, examples: Examples, config: TrainConfig | None = None) -> Evaluation:
    """The task's loss and metric of ``model`` on ``examples``, in evaluation mode (restored afterwards).

    Example:
        >>> evaluate(model, task, task.valid).metric                                  # doctest: +SKIP
    """
    config = config or TrainConfig()
    was_training = model.training
    model.eval()
    total: Tensor | None = None
    with settings(config), torch.no_grad():
        for batch in background(in_order(examples, max(config.batch_size, 250))):
            batch = laid_out(batch, config)
            tally = task.tally(model(batch[0]), batch)
            total = tally if total is None else total + tally
    model.train(was_training)
    if total is None:
        raise InputError("there is nothing to evaluate on; give at least one example")
    return task.summary(total)


@contextmanager
def settings(config: TrainConfig) -> Iterator[None]:
    """Pinned threads, autocast where asked for, and torch's global generator left as it was found."""
    if config.precision == "bfloat16" and not _has_bfloat16():
        raise InputError("precision is bfloat16 but this CPU has no bfloat16 instructions; use float32")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bfloat16"),
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def laid_out(batch: Batch, config: TrainConfig) -> Batch:
    """The batch with its input in the memory layout that the configuration asks for."""
    if config.channels_last and batch[0].dim() == 4:
        # a copy: contiguous() leaves one-channel images with strides that convolutions take for the other layout
        return (torch.empty_like(batch[0], memory_format=torch.channels_last).copy_(batch[0]), *batch[1:])
    return batch


def background(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each handed out under the lock by which background work makes room for timing."""
    for batch in batches:
        with background_lock():
            yield batch


def training_batch(step: int, examples: Examples, shuffle: Shuffle, config: TrainConfig) -> Batch:
    """What step number ``step`` trains on: shuffled and augmented by (seed, step); of several processes, this one's
    part of it (augmented on its own)."""
    augment = generator(config.seed, "augment", step, *([processes.rank()] if processes.count() > 1 else []))
    return laid_out(examples.take(processes.share(shuffle.indices(step)), augment=augment), config)


class _State:
    """Where a training stands, and its checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        folder: Path | None,
        identity: Mapping[str, Any],
        foreign: bool,
        more: Mapping[str, Tensor],
    ) -> None:
        self.step = 0
        self.history: list[tuple[int, float]] = []
        self.scores: list[tuple[int, float, float]] = []
        self._sum, self._count = 0.0, 0
        self._identity = identity
        self._path = folder / checkpoint.NAME if folder is not None else None
        self._model, self._foreign = model, optimiser if foreign else None
        self._tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        self._tensors |= {f"callback.{name}": value for name, value in more.items()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not foreign:
                self._tensors[f"momentum.{name}"] = optimiser.state[parameter]["momentum_buffer"]
        memory: Any = None
        first = processes.rank() == 0
        if first and self._path is not None and (found := checkpoint.load(self._path, identity=identity)) is not None:
            tensors, self.step, notes = found
            checkpoint.copy_into(self._tensors, tensors, self._path)
            self.history = [(int(step), float(loss)) for step, loss in notes["history"]]
            self.scores = [(int(step), float(loss), float(metric)) for step, loss, metric in notes.get("scores", [])]
            self._sum, self._count = float(notes["sum"]), int(notes["count"])
            mine = {name.removeprefix(_OPTIMISER): t for name, t in tensors.items() if name.startswith(_OPTIMISER)}
            memory = mine, notes.get("optimiser", {})
        processes.tensors_from_first(list(self._tensors.values()))
        if self._foreign is not None and (memory := processes.from_first(memory)) is not None:
            put_back(self._foreign, model, *memory)
        self.step, self.history, self._sum, self._count = processes.from_first(
            (self.step, self.history, self._sum, self._count)
        )

    def note(self, loss: float, total: int) -> None:
        """Count one step and its loss; the history keeps a mean for every ``total / 200`` steps."""
        self.step += 1
        self._sum, self._count = self._sum + loss, self._count + 1
        if self.step == total or self.step % max(total // _HISTORY_POINTS, 1) == 0:
            self.history.append((self.step, self._sum / self._count))
            self._sum, self._count = 0.0, 0

    def recent_loss(self) -> float:
        """Mean loss since the last point of the history, or that point."""
        return self._sum / self._count if self._count else self.history[-1][1]

    def save(self) -> None:
        """Write the checkpoint, where there is a folder."""
        if self._path is not None and processes.rank() == 0:
            notes: dict[str, Any] = {
                "history": self.history, "scores": self.scores, "sum": self._sum, "count": self._count,
            }  # fmt: skip
            tensors = self._tensors
            if self._foreign is not None:
                memory, notes["optimiser"] = remembered(self._foreign, self._model)
                tensors = tensors | {f"{_OPTIMISER}{name}": value for name, value in memory.items()}
            checkpoint.save(self._path, tensors, step=self.step, identity=self._identity, notes=notes)


def _one_step(
    step: int,
    total: int,
    examples: Examples,
    shuffle: Shuffle,
    config: TrainConfig,
    run: Step,
    optimiser: torch.optim.Optimizer,
    steered: OwnSteps | None,
) -> float:
    batch = training_batch(step, examples, shuffle, config)
    torch.manual_seed(torch_seed(config.seed, "torch", step))  # dropout and the like
    rate = config.rate(step, total)
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
    optimiser.zero_grad(set_to_none=True)
    loss = processes.mean(float(run(step, batch)))
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    processes.average_gradients(parameters)
    if config.clip is not None:
        nn.utils.clip_grad_norm_(parameters, config.clip, foreach=False)
    if not np.isfinite(loss):
        rate = config.learning_rate
        raise DivergedError(f"the loss is {loss} at step {step} of {total}; lower learning_rate ({rate})")
    if steered is None:
        optimiser.step()
    else:
        steered.update(optimiser, step)
    return loss


def _optimiser(
    model: nn.Module, config: TrainConfig, own: Mapping[str, OwnRate], steered: OwnSteps | None
) -> tuple[torch.optim.Optimizer, bool]:
    """The optimiser, and whether it is the user's own."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    common = [parameter for name, parameter in named if name not in own]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in common if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in common if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups += [
        {
            "params": [parameter for name, parameter in named if own.get(name) == rate],
            "weight_decay": 0.0,
            "factor": rate.factor,
            "momentum": rate.momentum,
            "nesterov": config.nesterov and rate.momentum > 0,
        }
        for rate in dict.fromkeys(own.values())
    ]
    groups = [group for group in groups if group["params"]]
    if steered is not None and (found := steered.optimiser(groups, config)) is not None:
        return found, True
    # one tensor at a time: the grouped kernels may round differently for other strides
    optimiser = torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov, foreach=False
    )
    for parameter in parameters:  # torch would create them at the first step, with the gradient's strides
        optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimiser, False


def _identity(config: TrainConfig) -> dict[str, Any]:
    kept = {field.name for field in fields(config)} - set(_NOT_IDENTITY)
    return {name: value for name, value in asdict(config).items() if name in kept}


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and "bf16" in Path("/proc/cpuinfo").read_text()
