"""Trials of CONetV2: short trainings whose layer quality is kept after every epoch, and survives a kill.

``state/trials.jsonl`` says which widths were trained, ``state/quality.jsonl`` what their layers looked like, one line
an epoch. Quality is a function of the weights alone, so an epoch that is trained again after a kill writes nothing new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.errors import SchemaError
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.journal import Journal
from hwsearch.search.layer_rates import rate_factors, scale_gradients
from hwsearch.search.quality import NetworkQuality, Side, network_quality
from hwsearch.train import processes
from hwsearch.train.data import Batch, Shuffle
from hwsearch.train.loop import Progress, TrainConfig, run_steps

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hwsearch.train.task import Task

TRIALS, QUALITY = "trials.jsonl", "quality.jsonl"


@dataclass(frozen=True)
class Trial:
    """A trained choice: its quality after each epoch, oldest first."""

    choice: WidthChoice
    epochs: tuple[NetworkQuality, ...]

    def best(self, guard: bool = True) -> dict[Side, float]:
        """QC of every side, the largest over the trial's epochs; as published where ``guard`` is false."""
        found: dict[Side, float] = {}
        for quality in self.epochs:
            for side, value in quality.by_side("quality" if guard else "published_quality").items():
                found[side] = max(value, found.get(side, value))
        return found

    def mean(self, guard: bool = True) -> float:
        """Mean QC of the network after the last epoch."""
        return self.epochs[-1].mean_of("quality" if guard else "published_quality")


class TrialLog:
    """The trials so far, on the disk and in memory; made by ``open``."""

    def __init__(self, trials: Journal, quality: Journal) -> None:
        self._trials, self._quality = trials, quality
        self.started: list[tuple[int, ...]] = []
        self._known: dict[tuple[int, int], NetworkQuality] = {}

    @classmethod
    def open(cls, folder: Path, belongs: Mapping[str, Any]) -> TrialLog:
        """Open or create the two files in ``folder``; ``belongs`` is the search that they are of.

        Raises:
            InputError: a file belongs to another search, or cannot be written.
            SchemaError: a file is damaged before its last line.
        """
        log = cls(
            Journal(folder / TRIALS, {"schema": "hwsearch.trials", "version": 1, **belongs}),
            Journal(folder / QUALITY, {"schema": "hwsearch.layer_quality", "version": 1, **belongs}),
        )
        try:
            log.started = [tuple(int(w) for w in record["widths"]) for record in log._trials.open()]
            for record in log._quality.open():
                quality = NetworkQuality.from_list(record["layers"])
                log._known[int(record["trial"]), int(record["epoch"])] = quality
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SchemaError(f"a trial's record in {folder} is damaged ({error!r}): use another run name") from error
        log.started, log._known = processes.from_first((log.started, log._known))
        return log

    def start(self, number: int, choice: WidthChoice) -> None:
        """Note that trial ``number`` trains these widths."""
        self._trials.append({"trial": number, "widths": list(choice.widths)})
        self.started.append(choice.widths)

    def epochs(self, number: int) -> tuple[NetworkQuality, ...]:
        """What is known of one trial, epoch by epoch."""
        found: list[NetworkQuality] = []
        while (number, len(found)) in self._known:
            found.append(self._known[number, len(found)])
        return tuple(found)

    def trials(self, count: int) -> list[Trial]:
        """The first ``count`` trials."""
        return [Trial(WidthChoice(widths), self.epochs(at)) for at, widths in enumerate(self.started[:count])]

    def note(self, number: int, epoch: int, step: int, quality: NetworkQuality) -> None:
        """Keep the quality after an epoch (0-based) of a trial; what is known already is left as it is."""
        if (number, epoch) in self._known:
            return
        self._known[number, epoch] = quality
        self._quality.append(
            {
                "trial": number,
                "epoch": epoch,
                "step": step,
                "widths": list(self.started[number]),
                "mean_quality": quality.mean,
                "layers": quality.to_list(),
            }
        )


def train_trial(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    log: TrialLog,
    number: int,
    *,
    beta: float | None = None,
    linear: bool = False,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Train ``model`` in place as trial ``number`` and note its quality after every epoch, and at the end.

    Args:
        beta: of AdaS, see ``layer_rates``; None: one rate for all layers.
        linear: measure linear layers too.
        folder: of the checkpoint; the same call again goes on from it.
    """
    total = config.total_steps(len(task.train))
    per_epoch = min(Shuffle(len(task.train), config.batch_size, config.seed).steps_per_epoch, total)

    def step(at: int, batch: Batch) -> Tensor:
        # Before step k * per_epoch the weights are those after k epochs, whether they were trained or read back.
        if at > 0 and at % per_epoch == 0:
            log.note(number, at // per_epoch - 1, at, network_quality(model, linear=linear))
        loss = task.loss(model(batch[0]), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if beta is not None:
            scale_gradients(model, rate_factors(log.epochs(number)[: at // per_epoch], config.learning_rate, beta))
        return loss.detach()

    identity = {"kind": "trial", "trial": number, "widths": list(log.started[number]), "adas": beta}
    run_steps(model, task.train, config, step, identity=identity, folder=folder, progress=progress)
    log.note(number, -(-total // per_epoch) - 1, total, network_quality(model, linear=linear))
