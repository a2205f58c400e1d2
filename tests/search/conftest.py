"""A toy space and synthetic staircases: search is tested without any device or network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from hwsearch.graph.widths import WidthGroup, WidthSpace
from hwsearch.search.budget import Budget, Limit


@dataclass
class Staircase:
    """Milliseconds of a chain of layers whose widths are padded to blocks; a width just above a block edge is slow.

    ``bump`` makes time non-monotone: a width of ``8 k + 2`` costs as much as one of ``8 k + 2 + 8 * bump``.
    """

    block: int = 8
    bump: float = 0.0
    scale: float = 1e-3
    fixed_ms: float = 0.05
    predictions: int = field(default=0, compare=False)

    def evaluate(self, choices: np.ndarray) -> np.ndarray:
        rows = np.asarray(choices)
        self.predictions += len(rows)
        padded = np.ceil(rows / self.block) * self.block + np.where(rows % self.block == 2, 8 * self.bump, 0.0)
        chain = np.concatenate([np.full((len(rows), 1), 8.0), padded], axis=1)
        return self.fixed_ms + self.scale * (chain[:, :-1] * chain[:, 1:]).sum(axis=1)

    def interval(self, choices: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
        middle = self.evaluate(choices)
        return middle * (1 - 0.2 * level), middle * (1 + 0.2 * level)


class Toy:
    """What the tests build with."""

    Staircase = Staircase

    @staticmethod
    def space(allowed: Sequence[Sequence[int]] | None = None, *, groups: int = 6, units: int = 32, step: int = 2):
        """A space of the given allowed widths, or of equal groups."""
        allowed = allowed or [range(step * 2, units + 1, step)] * groups
        made = (
            WidthGroup(f"g{i}", max(widths), 1, min(widths), slots=(), layers=(), widths=tuple(sorted(widths)))
            for i, widths in enumerate(allowed)
        )
        return WidthSpace(tuple(made), network=None)  # type: ignore[arg-type]

    @staticmethod
    def budget(space: Any, share: float, latency: Any = None, **settings: Any) -> Budget:
        """At most ``share`` of the full network's time, as predicted."""
        settings.setdefault("quantile", 0.5)
        latency = latency or Staircase()
        full = latency.evaluate(np.asarray([space.full().widths]))[0]
        return Budget([Limit(latency, full * share, **settings)])

    @staticmethod
    def score(choices: np.ndarray) -> np.ndarray:
        """Wider is better with diminishing returns, and later groups matter more."""
        rows = np.asarray(choices, dtype=np.float64)
        weights = np.linspace(0.5, 2.0, rows.shape[1])
        return (weights * np.exp(-rows / 12.0)).sum(axis=1)


@pytest.fixture(scope="session")
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def rough() -> Iterator[tuple[Any, WidthSpace, Budget]]:
    """(model, space, budget) on the simulated device, predicted a tenth too fast: what is measured decides."""
    import torch
    from torch import nn

    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device
    from hwsearch.graph.onnx_build import OnnxTemplate
    from hwsearch.latency.measure import measure
    from hwsearch.reparam.fold import fold

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    ).eval()  # fmt: skip
    example = torch.zeros(1, 1, 8, 8)
    space = WidthSpace.from_model(model, example, quantum=8, verify=False)
    template = OnnxTemplate(space, fold(model, example, require=False), example)
    with open_session(Device.load("simulated")) as session:

        def timed(choice: Any) -> float:
            return measure(template.slice(choice), session, reference_ms=1.0).measured_ms

        full, smallest = timed(space.full()), timed(space.smallest())

        class Line:
            """A straight line through the MACs, a tenth too fast."""

            def evaluate(self, choices: np.ndarray) -> np.ndarray:
                macs = space.macs_array(choices) / space.macs(space.full())
                return np.asarray(0.9 * (smallest + (full - smallest) * macs))

        limit = Limit(Line(), (full + smallest) / 2, 0.5, name="simulated", measure=timed)
        yield model, space, Budget([limit])
