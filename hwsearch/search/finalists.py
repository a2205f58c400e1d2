"""``Finalists``: the few best candidates are trained for a short while, and the order is settled by that.

Shared weights rank thousands of candidates cheaply and coarsely: the one of least loss among many noisy losses is
rarely the best. So the best few that are unlike each other, together with the plain answers (uniform scaling, the
latency knapsack), inherit their shared weights and are fine-tuned for a fraction of the winner's training, and their
losses on held-out examples decide. What was trained goes to a journal; the same choice is never trained twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.errors import InternalError, SchemaError
from hwsearch.search.journal import Journal
from hwsearch.train import processes

if TYPE_CHECKING:
    from hwsearch.search.evolution import Candidate
    from hwsearch.train.cluster import Crew

#: A choice's widths -> its held-out loss after a short training.
ShortTraining = Callable[[tuple[int, ...]], float]

SCHEMA, VERSION = "hwsearch.finalists", 1
#: Finalists differ from each other by at least this share of a group's width, on average over the groups.
_APART = 0.04


class Finalists:
    """Short trainings of choices, cached and journalled.

    Args:
        train: see ``ShortTraining``; must give the same loss for the same widths.
        path: the journal; None: kept in memory only.
        belongs: what the losses depend on, as plain JSON values.
        crew: workers whose ``trained`` gives the same losses; None: one after another, here.

    Raises:
        InputError: the journal belongs to another search, or cannot be written.
        SchemaError: it is damaged before its last line.
    """

    def __init__(
        self,
        train: ShortTraining,
        path: Path | None = None,
        belongs: Mapping[str, Any] | None = None,
        crew: Crew | None = None,
    ) -> None:
        self._train, self._crew = train, crew
        path = path if processes.rank() == 0 else None
        header = {"schema": SCHEMA, "version": VERSION, **(belongs or {})}
        self._journal = Journal(path, header) if path else None
        self.known: dict[tuple[int, ...], float] = {}
        for record in self._journal.open() if self._journal else ():
            try:
                loss = record["loss"]
                self.known[tuple(int(width) for width in record["widths"])] = math.inf if loss is None else float(loss)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise SchemaError(f"{path} has a damaged record {record}: delete the file to start again") from error
        self.known = processes.from_first(self.known)

    def ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates, best first, their losses replaced by those after the short training."""
        missing = [candidate.choice.widths for candidate in candidates if candidate.choice.widths not in self.known]
        if self._crew is not None and len(missing) > 1:
            self._crew("trained", missing, self._keep)
        judged = [replace(candidate, loss=self.loss(candidate.choice.widths)) for candidate in candidates]
        return sorted(judged, key=lambda candidate: (candidate.loss, candidate.ms, candidate.choice.widths))

    def loss(self, widths: tuple[int, ...]) -> float:
        """The held-out loss of one choice after its short training."""
        if widths not in self.known:
            self._keep(widths, float(self._train(widths)))
        return self.known[widths]

    def _keep(self, widths: tuple[int, ...], loss: float) -> None:
        if math.isnan(loss):
            raise InternalError(f"a short training of {widths} gave no loss")
        self.known[widths] = loss
        if self._journal:
            self._journal.append({"widths": list(widths), "loss": loss if math.isfinite(loss) else None})


def unlike(
    ranked: Sequence[Candidate], count: int, full: Sequence[int], taken: Sequence[Candidate] = ()
) -> list[Candidate]:
    """The best ``count`` of ``ranked`` that differ from each other and from ``taken``; simply the best if too few do.

    Args:
        ranked: best first.
        full: full widths (G,), the measure of a difference.
    """
    scale = np.asarray(full, dtype=np.float64)
    chosen: list[Candidate] = []
    rest: list[Candidate] = []
    for candidate in ranked:
        others = [np.asarray(other.choice.widths) for other in (*taken, *chosen)]
        far = [float((np.abs(other - np.asarray(candidate.choice.widths)) / scale).mean()) for other in others]
        (chosen if min(far, default=1.0) >= _APART else rest).append(candidate)
        if len(chosen) == count:
            return chosen
    known = {candidate.choice.widths for candidate in taken}
    return [*chosen, *(c for c in rest if c.choice.widths not in known)][:count]
