"""``SearchResult``: what a search found, in a file that is the same byte for byte whenever the search is.

The file holds no wall-clock time and no date (those go to the run folder's ``events.jsonl``), its keys are sorted and
its numbers are written so that they read back exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.errors import InputError, SchemaError
from hwsearch.search.evolution import Candidate
from hwsearch.search.journal import write_atomic

if TYPE_CHECKING:
    from torch import nn

    from hwsearch.graph.widths import WidthChoice

SCHEMA = "hwsearch.search_result"
VERSION = 1


@dataclass(frozen=True)
class LimitOutcome:
    """How the found network stands to one limit of the budget.

    ``predicted_ms`` and the interval are the predictor's own, before any correction; ``correction`` is the factor that
    the measurements of this search gave (1.0 where nothing was measured).
    """

    name: str
    max_ms: float
    predicted_ms: float
    low_ms: float | None = None
    high_ms: float | None = None
    measured_ms: float | None = None
    correction: float = 1.0


@dataclass(frozen=True)
class SearchResult:
    """The network that a search found.

    ``loss`` is the searcher's own score of the choice, ``metric`` the task's metric of the trained winner on data that
    was held out from training (None before it is trained). ``candidates`` are all scored choices, best first. ``extra``
    holds a method's own plain JSON values. ``model`` is the winner as a module; it is not part of the file.
    """

    method: str
    seed: int
    groups: tuple[str, ...]
    choice: WidthChoice
    limits: tuple[LimitOutcome, ...]
    loss: float
    metric: float | None
    macs: int
    parameters: int
    candidates: tuple[Candidate, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    model: nn.Module | None = field(default=None, compare=False, repr=False)

    @property
    def predicted_ms(self) -> float:
        """Predicted milliseconds on the first limit."""
        return self.limits[0].predicted_ms

    @property
    def measured_ms(self) -> float | None:
        """Measured milliseconds on the first limit; None where nothing was measured."""
        return self.limits[0].measured_ms

    @property
    def budget_ms(self) -> float:
        """The first limit's milliseconds."""
        return self.limits[0].max_ms

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low_ms, high_ms) of the prediction on the first limit, where the latency offers one."""
        first = self.limits[0]
        return None if first.low_ms is None or first.high_ms is None else (first.low_ms, first.high_ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with schema and version."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "method": self.method,
            "seed": self.seed,
            "groups": list(self.groups),
            "widths": list(self.choice.widths),
            "limits": [asdict(limit) for limit in self.limits],
            "loss": _number(self.loss),
            "metric": _number(self.metric),
            "macs": int(self.macs),
            "parameters": int(self.parameters),
            "candidates": [
                {"widths": list(c.choice.widths), "loss": _number(c.loss), "ms": list(c.ms)} for c in self.candidates
            ],
            "extra": dict(self.extra),
        }

    def to_json(self) -> str:
        """The text of ``result.json``: sorted keys, floats as the shortest text that reads back exactly."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False) + "\n"

    def save(self, path: Path) -> None:
        """Write ``result.json`` in one step.

        Raises:
            InputError: the folder cannot be written.
        """
        write_atomic(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path) -> SearchResult:
        """Read ``result.json`` (without the model).

        Raises:
            InputError: there is no such file.
            SchemaError: it is damaged, or of another schema or version.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; give a run folder of a finished search") from error
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"{path} is damaged (not JSON): run the search again to write it anew") from error
        found = (data.get("schema"), data.get("version")) if isinstance(data, dict) else (None, None)
        if found != (SCHEMA, VERSION):
            raise SchemaError(
                f"{path} is not a search result of version {VERSION} (schema {found[0]!r}, version {found[1]!r}): "
                "run the search with this version of hwsearch"
            )
        try:
            result = cls._from_dict(data)
            result.to_json()  # whatever it holds can be written again
            return result
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SchemaError(f"{path} is damaged ({error!r}): run the search again to write it anew") from error

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> SearchResult:
        from hwsearch.graph.widths import WidthChoice

        return cls(
            method=data["method"],
            seed=data["seed"],
            groups=tuple(data["groups"]),
            choice=WidthChoice(tuple(data["widths"])),
            limits=tuple(LimitOutcome(**limit) for limit in data["limits"]),
            loss=_loss(data["loss"]),
            metric=data["metric"],
            macs=data["macs"],
            parameters=data["parameters"],
            candidates=tuple(
                Candidate(WidthChoice(tuple(c["widths"])), _loss(c["loss"]), tuple(c["ms"])) for c in data["candidates"]
            ),
            extra=data["extra"],
        )


def _number(value: float | None) -> float | None:
    """JSON has no infinity: a loss that is not finite is written as null."""
    return None if value is None or not math.isfinite(value) else float(value)


def _loss(value: float | None) -> float:
    return math.inf if value is None else float(value)
