"""``Searcher``: the life-cycle that all search methods share.

A method says what decides its result (``_settings``) and how it searches (``_search``); the base refuses an infeasible
budget before any training, opens the run folder, continues where a killed run stopped, and writes the result.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, final

import numpy as np

from hwsearch.errors import InputError, InternalError
from hwsearch.search.evolution import Candidate, Progress
from hwsearch.search.grid import WidthGrid
from hwsearch.search.result import LimitOutcome, SearchResult
from hwsearch.search.run_folder import RunFolder, open_run
from hwsearch.train import processes

if TYPE_CHECKING:
    from torch import nn

    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.budget import Budget
    from hwsearch.search.settle import Settled
    from hwsearch.train.task import Evaluation, Task

Config = TypeVar("Config")
INTERVAL_LEVEL = 0.9  # two-sided level of the interval that results report


class Searcher(ABC):
    """Base of the search methods.

    Args:
        space: the allowed widths.
        budget: what the found network must keep.
        seed: fixes everything random.
        folder: the run folder, so that a killed search continues; or a ``RunFolder`` that the caller has open.
            None: a temporary one, gone when the search ends.
    """

    #: Name of the method, as it stands in results and on the command line.
    method: ClassVar[str]

    def __init__(
        self,
        space: WidthSpace,
        budget: Budget,
        *,
        seed: int = 0,
        folder: str | os.PathLike[str] | RunFolder | None = None,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed is {seed!r}: give a whole number of 0 or more")
        self.space, self.budget, self.seed, self.folder = space, budget, seed, folder

    @abstractmethod
    def _settings(self) -> Mapping[str, Any]:
        """What decides the result beside space, budget and seed, as plain JSON values."""

    @abstractmethod
    def _search(self, run: RunFolder, train: Any, valid: Any, progress: Progress | None) -> SearchResult:
        """Search. All state goes to ``run.state``; the same call after a kill must continue and end the same."""

    def identity(self) -> dict[str, Any]:
        """All that decides the result: a run folder belongs to one identity."""
        return {
            "method": self.method,
            "seed": self.seed,
            "space": WidthGrid.of(self.space).digest,
            "budget": {
                "floor": self.budget.floor,
                "limits": [[limit.name, limit.max_ms, limit.quantile] for limit in self.budget.limits],
            },
            "settings": dict(self._settings()),
        }

    @final
    def search(self, train: Any, valid: Any, *, progress: Progress | None = None) -> SearchResult:
        """Search the space, on training data and on data held out from training.

        Returns:
            The result; also in ``result.json`` of the run folder.

        Raises:
            InfeasibleBudgetError: nothing in the space keeps the budget (before any training).
            InputError: the run folder belongs to another search, is in use, or cannot be written.
        """
        self._check()
        with self._open() as run:
            run.event("search_started", method=self.method, resumed=run.resumed, seed=self.seed)
            result = self._search(run, train, valid, progress)
            if not isinstance(result, SearchResult) or len(result.choice.widths) != len(result.groups):
                raise InternalError(f"{type(self).__name__}._search must return a SearchResult, a width per group")
            if processes.rank() == 0:
                result.save(run.result_path)
            run.event("search_finished", method=self.method, measured_ms=result.measured_ms)
        return result

    def _result(
        self,
        settled: Settled,
        candidates: Sequence[Candidate],
        winner: tuple[nn.Module, Evaluation],
        task: Task,
        extra: Mapping[str, Any],
    ) -> SearchResult:
        """The result of widths that were settled on, and of the network of these widths, trained and judged."""
        choice, (model, evaluation) = settled.candidate.choice, winner
        return SearchResult(
            method=self.method,
            seed=self.seed,
            groups=tuple(group.name for group in self.space.groups),
            choice=choice,
            limits=limit_outcomes(self.budget, settled.candidate, settled),
            loss=settled.candidate.loss,
            metric=evaluation.metric,
            macs=self.space.macs(choice),
            parameters=self.space.parameters(choice),
            candidates=tuple(candidates),
            extra={
                "metric_name": task.metric_name,
                "winner_loss": evaluation.loss,
                "within_band": settled.within,
                "log10_space": self.space.log10_size,
                **extra,
            },
            model=model,
        )

    def _check(self) -> None:
        """Refuse a budget that nothing can keep, before anything is trained."""
        self.budget.check_reachable(self.space)

    @contextlib.contextmanager
    def _open(self) -> Iterator[RunFolder]:
        """The run folder: the caller's open one, a named one, or a temporary one."""
        if processes.rank() > 0:  # the first process keeps the run; the others need a place for their own events
            with tempfile.TemporaryDirectory(prefix="hwsearch-") as other, open_run(other, self.identity()) as run:
                yield run
        elif isinstance(self.folder, RunFolder):
            self.folder.bind(f"state/{self.method}.json", self.identity())
            yield self.folder
        elif self.folder is not None:
            with open_run(self.folder, self.identity()) as run:
                yield run
        else:
            with (
                tempfile.TemporaryDirectory(prefix="hwsearch-") as temporary,
                open_run(temporary, self.identity()) as run,
            ):
                yield run


class NetworkSearcher(Searcher, Generic[Config]):
    """Base of the methods that start from one network and have a config dataclass.

    Args:
        config: settings of the method; its trainings carry seeds of their own. None: the defaults.
        model: the network at full width; by default the one that the space was made from; never changed.

    Raises:
        InputError: there is no network.
    """

    #: Makes the default settings.
    defaults: ClassVar[Callable[[], Any]]

    def __init__(
        self,
        space: WidthSpace,
        budget: Budget,
        config: Config | None = None,
        *,
        model: nn.Module | None = None,
        seed: int = 0,
        folder: str | os.PathLike[str] | RunFolder | None = None,
    ) -> None:
        super().__init__(space, budget, seed=seed, folder=folder)
        full = model if model is not None else space.model
        if full is None:
            raise InputError(f"{type(self).__name__} needs the model that the space was made from: give model=")
        self.model: nn.Module = full
        self.config: Config = config if config is not None else type(self).defaults()

    def _settings(self) -> Mapping[str, Any]:
        return plain_settings(self.config)


def plain_settings(config: Any) -> dict[str, Any]:
    """A config dataclass as plain values, without how often its trainings write checkpoints, which decides nothing."""
    plain = asdict(config)
    sections = [plain]
    while sections:
        section = sections.pop()
        section.pop("checkpoint_s", None)
        sections += [value for value in section.values() if isinstance(value, dict)]
    return plain


def limit_outcomes(budget: Budget, candidate: Candidate, settled: Settled | None = None) -> tuple[LimitOutcome, ...]:
    """How a candidate stands to every limit: prediction, interval where the latency gives one, and measurement."""
    row = np.asarray([candidate.choice.widths], dtype=np.int64)
    outcomes = []
    for at, limit in enumerate(budget.limits):
        low = high = None
        if callable(getattr(limit.latency, "interval", None)):
            low, high = (float(np.asarray(end)[0]) for end in limit.latency.interval(row, INTERVAL_LEVEL))
        measured = settled.measured_ms[at] if settled and settled.measured_ms else None
        outcomes.append(
            LimitOutcome(
                name=limit.name,
                max_ms=limit.max_ms,
                predicted_ms=float(np.asarray(limit.latency.evaluate(row))[0]),
                low_ms=low,
                high_ms=high,
                measured_ms=measured,
                correction=settled.factors[at] if settled else 1.0,
            )
        )
    return tuple(outcomes)
