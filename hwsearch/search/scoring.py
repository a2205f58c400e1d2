"""``Scorer``: the loss of sub-networks with shared weights, which is what evolution minimises.

Batch-norm statistics are measured afresh for every sub-network. Where several patterns of a choice are tried, the best
one is picked on one half of the held-out examples and its loss reported on the other: the smallest of several noisy
losses would flatter every choice, and wide zones most.

Reference: CafeNet (ICLR 2021): the value of a width is that of its best pattern; batch-norm recalibration as in Yu and
Huang (2019), section 3.3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from hwsearch.device.lock import background_lock
from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.patterns import Pattern, bins_of, draw, leftmost, rightmost
from hwsearch.train import processes
from hwsearch.train.data import Batch, Examples, in_order, limit
from hwsearch.train.loop import TrainConfig, laid_out, settings
from hwsearch.train.seeds import generator

if TYPE_CHECKING:
    from hwsearch.search.supernet import SuperNet
    from hwsearch.train.task import Task


@dataclass(frozen=True)
class ScoringConfig:
    """How a sub-network is judged.

    Args:
        calibration_images: training examples (not augmented) that batch-norm statistics are measured on.
        images: held-out examples that the loss is taken on; ``None``: all of them.
        patterns: patterns tried for each choice: 1 is the leftmost alone; of more, the leftmost is always one.
        batch_size: examples at once.
    """

    calibration_images: int = 512
    images: int | None = 1000
    patterns: int = 1
    batch_size: int = 128

    def __post_init__(self) -> None:
        for name, low in (("calibration_images", 2), ("patterns", 1), ("batch_size", 2)):
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}; give {low} or more")
        if self.images is not None and self.images < 2:
            raise InputError(f"images is {self.images}; give 2 or more, or leave it out for all")


class Scorer:
    """Losses of width choices under a trained super-network; the same choice always has the same loss.

    Args:
        net: the trained super-network.
        task: gives the loss, training examples for the statistics, held-out ones for the loss.
        config: see ``ScoringConfig``.
        training: threads, precision, memory layout and seed are taken from here.
        offset, bin_units: of the patterns that are tried, where there are several.
        bilateral: judge a choice from the left and from the right and take the mean (BCNet); no patterns are tried.

    Example:
        >>> Scorer(net, task)(space.choice_array([space.uniform(0.5), space.full()]))      # doctest: +SKIP
        array([0.61, 0.48])
    """

    def __init__(
        self,
        net: SuperNet,
        task: Task,
        config: ScoringConfig | None = None,
        training: TrainConfig | None = None,
        *,
        offset: int = 1,
        bin_units: int | None = None,
        bilateral: bool = False,
    ) -> None:
        self.net, self.task = net, task
        self.config, self.training = config or ScoringConfig(), training or TrainConfig()
        self._offset, self._bins, self._bilateral = offset, bins_of(net.space, bin_units), bilateral
        self._examples = limit(task.valid, self.config.images, self.training.seed)
        held_out = self._laid_out(self._examples)
        half = len(held_out) // 2 if self.config.patterns > 1 and not bilateral else 0
        if self.config.patterns > 1 and not bilateral and half == 0:
            raise InputError(
                f"{len(self._examples)} held-out examples are one batch of {self.config.batch_size}; patterns are "
                "picked on one half and judged on the other: hold out more, or use patterns = 1"
            )
        self._picking, self._judging = held_out[:half], held_out[half:]
        self._calibration_examples = limit(task.train, self.config.calibration_images, self.training.seed)
        self._calibration = self._laid_out(self._calibration_examples)
        self._known: dict[tuple[int, ...], float] = {}
        #: where several choices at once are handed to others that know the same losses (a cluster's workers)
        self.spread: Callable[[Sequence[tuple[int, ...]]], Sequence[float]] | None = None

    def __call__(self, choices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Losses (N,) of widths (N, G)."""
        with settings(self.training):
            keys = [tuple(row) for row in np.asarray(choices).tolist()]
            missing = [key for key in dict.fromkeys(keys) if key not in self._known]
            if self.spread is not None and missing:
                self._known.update(zip(missing, self.spread(missing), strict=True))
                missing = []
            # Of several processes, each scores some of the choices; all of them know all losses.
            mine = missing[processes.rank() :: processes.count()]
            self._known.update(processes.gathered([(key, self._loss(key)) for key in mine]))
            return np.asarray([self._known[key] for key in keys], dtype=np.float64)

    def loss(self, widths: tuple[int, ...]) -> float:
        """The loss of one choice."""
        with settings(self.training):
            if widths not in self._known:
                self._known[widths] = self._loss(widths)
            return self._known[widths]

    def calibration(self) -> list[Batch]:
        """The batches that statistics are measured on."""
        return self._calibration

    def pattern(self, choice: WidthChoice) -> Pattern:
        """The pattern that stands for a choice: the best of those tried on the picking half."""
        with settings(self.training):
            return self._pick(choice)

    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with the weights, the examples or the way of judging."""
        parts = hashlib.sha256(
            repr(
                (
                    self.config,
                    self._offset,
                    self._bins,
                    self._bilateral,
                    self._examples.identity,
                    self._calibration_examples.identity,
                )
            ).encode()
        )
        for name, value in sorted(self.net.state_dict().items()):
            parts.update(name.encode())
            parts.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return parts.hexdigest()[:16]

    def _loss(self, widths: tuple[int, ...]) -> float:
        choice = WidthChoice(widths)
        patterns = [self._pick(choice), *([rightmost(self.net.space, choice)] if self._bilateral else [])]
        losses = [self._run(pattern, self._judging) for pattern in patterns]
        return sum(losses) / len(losses)

    def _pick(self, choice: WidthChoice) -> Pattern:
        if self.config.patterns == 1 or self._bilateral:
            return leftmost(choice)
        rng = generator(self.training.seed, "score", *choice.widths)
        drawn = [draw(self.net.space, choice, self._offset, self._bins, rng) for _ in range(self.config.patterns - 1)]
        return min([leftmost(choice), *drawn], key=lambda pattern: self._run(pattern, self._picking))

    def _run(self, pattern: Pattern, batches: list[Batch]) -> float:
        """Loss of one sub-network; makes room for a timing between sub-networks."""
        with background_lock(), torch.no_grad():
            self.net.activate(pattern)
            self.net.calibrate(self._calibration)
            tallies = [self.task.tally(self.net(batch[0]), batch) for batch in batches]
            return self.task.summary(torch.stack(tallies).sum(dim=0)).loss

    def _laid_out(self, examples: Examples) -> list[Batch]:
        """Batches kept in memory: they are the same for every sub-network."""
        return [laid_out(batch, self.training) for batch in in_order(examples, self.config.batch_size)]
