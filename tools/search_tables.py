"""What the tables of the benches of searches share: one kind of milliseconds, and uniform scaling at any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Row = dict[str, str]


@dataclass(frozen=True)
class Found:
    """The finished networks of a setting, and the measured milliseconds of widths where they were measured."""

    rows: Sequence[Row]
    measured: dict[str, float]

    @staticmethod
    def of(lines: Sequence[Row], setting: str, part: str) -> Found:
        """The lines of one part of a setting that have a result."""
        mine = [row for row in lines if row["setting"] == setting]
        rows = [row for row in mine if row["part"] == part and row["accuracy"]]
        return Found(rows, {r["widths"]: float(r["note"].split()[0]) for r in mine if r["part"] == "measured"})

    @cached_property
    def kind(self) -> str:
        """``measured`` where every network was, else ``predicted`` for all of them."""
        return "measured" if all(row["widths"] in self.measured for row in self.rows) else "predicted"

    def ms(self, row: Row) -> float:
        """Milliseconds of a network."""
        return self.measured[row["widths"]] if self.kind == "measured" else float(row["predicted_ms"])

    @cached_property
    def uniform(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each seed milliseconds and metrics of ``uniform`` at all shares; a wider one that is worse is not used."""
        curves = {}
        for seed in {row["seed"] for row in self.rows if row["method"] == "uniform"}:
            mine = [r for r in self.rows if (r["method"], r["seed"]) == ("uniform", seed)]
            points = np.array(sorted({(self.ms(r), float(r["accuracy"])) for r in mine}))
            curves[seed] = (points[:, 0], np.maximum.accumulate(points[:, 1]))
        return curves

    def above_uniform(self, rows: Sequence[Row]) -> list[float]:
        """Differences to uniform scaling of the same seed at the same milliseconds: linear between its networks, beyond
        them the nearest."""
        return [
            float(row["accuracy"]) - float(np.interp(self.ms(row), *self.uniform[row["seed"]]))
            for row in rows
            if row["seed"] in self.uniform
        ]


def spread(gains: Sequence[float], scale: float = 100.0, digits: int = 2) -> str:
    """A mean difference with its standard error; empty without any."""
    if not len(gains):
        return ""
    values = scale * np.asarray(gains)
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():+.{digits}f}{error}"
