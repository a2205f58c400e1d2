"""``Candidates``: what a search does with one candidate, in a form that can be sent to the workers of a cluster."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hwsearch import __version__
from hwsearch.graph.widths import WidthChoice
from hwsearch.search.winner import finish
from hwsearch.train import cluster
from hwsearch.train.loop import DivergedError, Progress, TrainConfig

if TYPE_CHECKING:
    from hwsearch.search.scoring import Scorer


@dataclass(frozen=True)
class Candidates:
    """Losses of width choices: under shared weights, and after a short training from them.

    Args:
        scorer: of the trained super-network.
        training: the short one.
        progress: of the short trainings that are done in this process.
    """

    scorer: Scorer
    training: TrainConfig
    progress: Progress | None = None

    def loss(self, widths: tuple[int, ...]) -> float:
        """Held-out loss of one choice under shared weights."""
        return self.scorer.loss(widths)

    def trained(self, widths: tuple[int, ...]) -> float:
        """Held-out loss of one choice that inherits the shared weights and is trained shortly."""
        scorer = self.scorer
        small = scorer.net.extract(scorer.pattern(WidthChoice(widths)), scorer.calibration())
        try:
            return finish(small, scorer.task, self.training, progress=self.progress)[1].loss
        except DivergedError:
            return float("inf")  # one that cannot be trained is the last, not the end of the search

    def proof(self) -> Any:
        """Versions, and the losses of the smallest and the full network: all kernels and both ends of the sizes."""
        space = self.scorer.net.space
        losses = [self.loss(choice.widths) for choice in (space.smallest(), space.full())]
        return [f"hwsearch {__version__}", f"torch {torch.__version__}", *losses]

    def crew(self) -> cluster.Crew | None:
        """Workers that hold a copy of this, where the program has joined a cluster."""
        joined = cluster.current()
        return None if joined is None else joined.crew(self.portable(), self.scorer.training.threads)

    def portable(self) -> Candidates:
        """The same without what cannot be sent, and is not needed: the exported program, the caller's callback."""
        scorer, net = copy.copy(self.scorer), copy.copy(self.scorer.net)
        network: Any = replace(net.space.network, program=None)  # type: ignore[arg-type]
        net.space = replace(net.space, network=network, model=None)
        scorer.net, scorer.spread = net, None
        return replace(self, scorer=scorer, progress=None)
