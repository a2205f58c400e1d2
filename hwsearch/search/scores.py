"""``Scores``: the losses of choices, asked for once and never lost.

A loss belongs to a choice, whatever the budget: searches under corrected budgets share one file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.errors import InternalError, SchemaError
from hwsearch.search.grid import Widths, row_keys
from hwsearch.search.journal import Journal
from hwsearch.train import cluster, processes

if TYPE_CHECKING:
    from hwsearch.search.budget import Floats

Score = Callable[[Widths], "Floats"]  #: int64 (N, G) widths -> losses (N,), smaller is better

SCHEMA, VERSION = "hwsearch.losses", 1


class Scores:
    """Losses by choice, cached and journalled: asks ``score`` only for what no earlier run has finished.

    Args:
        score: see ``Score``; must give the same loss for the same widths. A loss that is not finite becomes infinity.
        batch: choices handed to ``score`` at once.
        path: the journal; None: kept in memory only.
        belongs: what the losses depend on, as plain JSON values; a journal of anything else is refused.

    Raises:
        InputError: the journal belongs to another search, or cannot be written.
        SchemaError: it is damaged before its last line.
    """

    def __init__(self, score: Score, batch: int, path: Path | None, belongs: Mapping[str, Any]) -> None:
        joined = cluster.current()
        # of several processes, or of a cluster, each part has something to do
        self._score, self._batch = score, max(batch, processes.count(), 2 * joined.processors if joined else 1)
        path = path if processes.rank() == 0 else None
        self._journal = Journal(path, {"schema": SCHEMA, "version": VERSION, **belongs}) if path else None
        self._known: dict[tuple[int, ...], float] = {}
        for record in self._journal.open() if self._journal else ():
            try:
                loss = record["loss"]
                self._known[tuple(int(width) for width in record["widths"])] = math.inf if loss is None else float(loss)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise SchemaError(f"{path} has a damaged record {record}: delete the file to start again") from error
        self._known = processes.from_first(self._known)

    def __call__(self, choices: Widths, report: Callable[[int], None] = lambda done: None) -> list[float]:
        """Losses of choices (N, G), in their order; ``report`` hears how many are done."""
        keys = row_keys(choices)
        missing = [at for at, key in enumerate(keys) if key not in self._known]
        for start in range(0, len(missing), self._batch):
            rows = missing[start : start + self._batch]
            losses = np.asarray(self._score(choices[rows]), dtype=np.float64).reshape(-1)
            if losses.shape != (len(rows),):
                raise InternalError(f"score gave {losses.shape[0]} losses for {len(rows)} choices")
            for row, loss in zip(rows, losses.tolist(), strict=True):
                self._known[keys[row]] = loss if math.isfinite(loss) else math.inf
                if self._journal:
                    # JSON has no infinity
                    self._journal.append({"widths": list(keys[row]), "loss": loss if math.isfinite(loss) else None})
            report(len(keys) - len(missing) + start + len(rows))
        return [self._known[key] for key in keys]
