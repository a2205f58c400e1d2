"""Which networks a campaign times, and in which order: random small ones, and random widths of the user's own models.

A plan is a function of its seed and templates: ``plan.network(index)`` is the same network in every process, so a
campaign that was killed goes on where it stopped. The plan has no end; the campaign's time limit is its end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hwsearch.errors import InputError
from hwsearch.latency import random_networks, random_quantised

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice

#: Goes into every plan's key: raise it when the same seed would give other networks.
PLAN_VERSION = 3

_JITTER = 0.3


class NetworkTemplate(Protocol):
    """What a plan needs of a model to draw from it; ``hwsearch.graph.onnx_build.OnnxTemplate`` is one."""

    @property
    def space(self) -> Any:
        """The width space."""

    def slice(self, choice: WidthChoice) -> bytes:
        """The network of these widths as ONNX."""


@dataclass(frozen=True)
class PlannedNetwork:
    """A network to time: its place in the plan, identity, family and ONNX bytes."""

    index: int
    id: str
    source: str
    onnx: bytes


@dataclass(frozen=True)
class SamplingPlan:
    """An endless, seeded list of networks.

    With templates, every other network is one of theirs, in turn: first the full widths, then the smallest, then widths
    spread over the space's whole range of sizes (independent uniform widths would nearly all have the same total).

    Args:
        seed: decides the random networks and widths.
        templates: models whose width spaces matter to the user.
        precision: of the device; on an ``int8`` one the networks are 8-bit ones.

    Example:
        >>> plan = SamplingPlan(seed=1)
        >>> plan.network(3).id == SamplingPlan(seed=1).network(3).id != plan.network(4).id
        True
    """

    seed: int = 0
    templates: tuple[NetworkTemplate, ...] = ()
    precision: str = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"seed is {self.seed!r}; use a whole number from 0 up")
        if self.precision == "int8":
            from hwsearch.latency.quantising import QuantisedTemplate

            object.__setattr__(self, "templates", tuple(QuantisedTemplate(t) for t in self.templates))
        object.__setattr__(self, "_digests", tuple(template_digest(t) for t in self.templates))

    @property
    def key(self) -> str:
        """Identity of the plan: equal keys mean the same networks at the same places."""
        precision = "" if self.precision == "float32" else f"|{self.precision}"
        text = f"{PLAN_VERSION}|{self.seed}{precision}|{'|'.join(self._digests)}"  # type: ignore[attr-defined]
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def network(self, index: int, candidate: int = 0) -> PlannedNetwork:
        """The network at a place of the plan (0 and up), or another candidate for it; milliseconds to make."""
        rng = np.random.default_rng([self.seed, index, PLAN_VERSION, *([candidate] if candidate else [])])
        if self.templates and index % 2:
            turn, which = divmod(index // 2, len(self.templates))
            template = self.templates[which]
            source = f"space:{self._digests[which][:8]}"  # type: ignore[attr-defined]
            # Other candidates are drawn anew: the full and the smallest network come but once.
            onnx = template.slice(spread_choice(template.space, turn + 4 if candidate and turn < 2 else turn, rng))
        else:
            networks = random_quantised if self.precision == "int8" else random_networks
            family = networks.random_family(rng)
            source, onnx = f"random:{family}", networks.random_network(family, rng)
        return PlannedNetwork(index, hashlib.sha256(onnx).hexdigest()[:16], source, onnx)


def template_digest(template: NetworkTemplate) -> str:
    """Identity of a template: its full network and the widths it may take."""
    digest = hashlib.sha256(template.slice(template.space.full()))
    for group in template.space.groups:
        digest.update(repr((group.name, group.widths)).encode())
    return digest.hexdigest()


def spread_choice(space: Any, turn: int, rng: np.random.Generator) -> WidthChoice:
    """The ``turn``-th choice of a space-filling draw: full, smallest, then around a uniformly drawn size.

    Args:
        space: a ``WidthSpace``.
        turn: how many were drawn before.
        rng: decides the rest.
    """
    from hwsearch.graph.widths import WidthChoice

    if turn == 0:
        return space.full()  # type: ignore[no-any-return]
    if turn == 1:
        return space.smallest()  # type: ignore[no-any-return]
    if turn % 4 == 3:
        return space.sample(rng)  # type: ignore[no-any-return]
    size, jitter = rng.random(), _JITTER * rng.random()
    places = np.clip(size + jitter * rng.uniform(-1, 1, len(space.groups)), 0, 1)
    picked = [_pick(group.widths, place) for group, place in zip(space.groups, places, strict=True)]
    return WidthChoice(tuple(picked))


def _pick(widths: Sequence[int], place: float) -> int:
    """The allowed width nearest to a place between the smallest (0) and the largest (1)."""
    target = widths[0] + place * (widths[-1] - widths[0])
    return int(min(widths, key=lambda width: (abs(width - target), width)))
