"""A task whose process ends at one of its steps, for tests of searches that were killed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hwsearch.train.data import Batch
from hwsearch.train.task import Classification


class Killed(Exception):
    """Stands for a kill: raised in the middle of a step."""


@dataclass(frozen=True)
class Mortal(Classification):
    """The same task, which ends its process at one of its steps."""

    last: int = 0
    steps: list[int] = field(default_factory=list)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        self.steps.append(0)
        if len(self.steps) > self.last:
            raise Killed
        return super().loss(output, batch)
