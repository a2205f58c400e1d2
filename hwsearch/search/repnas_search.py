"""``RepNASSearch``: widths first, by any searcher or none, then the branches that the found network trains with.

A branch block costs what its fold costs at any width, so the two choices hang together by the budget alone: widths
decide the milliseconds, branches what training makes of them. The widths may be searched on a plain network, whose
winner's convolutions then become blocks (``reparametrize``), or on a network of blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from hwsearch.errors import InputError
from hwsearch.graph.surgery import example_for, shrink
from hwsearch.reparam.foreign import blocks_of
from hwsearch.reparam.rewrite import reparametrize
from hwsearch.search.baselines import uniform
from hwsearch.search.cafenet import as_task, titled
from hwsearch.search.evolution import Candidate
from hwsearch.search.repnas import RepNAS, RepNASConfig
from hwsearch.search.result import SearchResult
from hwsearch.search.searcher import NetworkSearcher, Searcher, limit_outcomes
from hwsearch.search.settle import measured_once
from hwsearch.search.winner import largest, reset
from hwsearch.train.loop import Progress

if TYPE_CHECKING:
    import os

    from torch import nn

    from hwsearch.graph.widths import WidthSpace
    from hwsearch.search.budget import Budget
    from hwsearch.search.run_folder import RunFolder


@dataclass(frozen=True)
class BlockConfig:
    """What the convolutions of a network without blocks become, see ``hwsearch.reparametrize``.

    Args:
        branches: a block's name or kinds of branches.
        layers: patterns of names of the convolutions that become blocks.
        border, post_norm: see ``ODBB``.
        start: ``scratch`` draws all weights by the seed; ``model`` keeps those that came in (of every group the units
            with the largest weights), and new branches start at zero.
    """

    branches: str | tuple[str, ...] = "odbb"
    layers: str | tuple[str, ...] = "*"
    border: str = "pad_first"
    post_norm: bool = False
    start: str = "scratch"

    def __post_init__(self) -> None:
        if self.start not in ("scratch", "model"):
            raise InputError(f"start is {self.start!r}: give scratch or model")


@dataclass(frozen=True)
class RepNASSearchConfig:
    """The search of branches, whose ``training`` is the winner's, and the blocks that they are searched in."""

    repnas: RepNASConfig = field(default_factory=RepNASConfig)
    blocks: BlockConfig = field(default_factory=BlockConfig)

    def __post_init__(self) -> None:
        if self.repnas.budget.kind == "ms":
            raise InputError(
                "a budget of branches in ms makes kernels smaller than those whose milliseconds the widths were chosen "
                "by: search widths first, then give the winner to hwsearch.RepNAS"
            )


class RepNASSearch(NetworkSearcher[RepNASSearchConfig]):
    """Widths, then branches, as one searcher.

    Args:
        space: the allowed widths.
        budget: what the found network must keep, folded.
        config: see ``RepNASSearchConfig``.
        widths: a searcher of the same space and budget, whose trained winner is only its way to a choice; ``None``:
            no search of widths.
        uniform: without a search, scale all widths uniformly into the budget; else they stay full, and are measured
            where the budget can.
        model: the model that the space was made from, plain or of blocks, by default the very one; never changed.
        seed: of first weights; the training carries its own.
        folder: the run folder, see ``Searcher``; ``widths`` works in the same one.

    Example:
        >>> cafenet = CafeNet(space, budget, folder="runs/first")                              # doctest: +SKIP
        >>> RepNASSearch(space, budget, widths=cafenet, folder="runs/first").search(task, None)  # doctest: +SKIP
    """

    method: ClassVar[str] = "repnas"
    defaults = RepNASSearchConfig

    def __init__(
        self,
        space: WidthSpace,
        budget: Budget,
        config: RepNASSearchConfig | None = None,
        *,
        widths: Searcher | None = None,
        uniform: bool = False,
        model: nn.Module | None = None,
        seed: int = 0,
        folder: str | os.PathLike[str] | RunFolder | None = None,
    ) -> None:
        super().__init__(space, budget, config, model=model, seed=seed, folder=folder)
        self.widths = widths
        self.uniform = uniform and widths is None

    def _settings(self) -> Mapping[str, Any]:
        settings = asdict(self.config)
        del settings["repnas"]["training"]["checkpoint_s"]
        settings["widths"] = self.uniform if self.widths is None else self.widths.identity()
        return settings

    def _search(self, run: RunFolder, train: Any, valid: Any, progress: Progress | None) -> SearchResult:
        task = as_task(train, valid)
        base = self._widths(run, task, progress)
        run.event("widths", widths=base.choice.widths, measured_ms=base.measured_ms)
        model = self.blocks_at(base)
        example = example_for(model, self.space, torch.zeros)
        found = RepNAS(model, self.config.repnas, example_input=example).search(
            task, None, folder=run.state / "branches", progress=titled(progress, "branches")
        )
        run.event("branches", mask=found.mask, used=found.used, limit=found.limit)
        told = json.loads(json.dumps(found.to_dict()))  # lists, as the file has them
        return replace(
            base,
            method=self.method,
            seed=self.seed,
            loss=found.loss,
            metric=found.metric,
            extra={
                "metric_name": task.metric_name,
                "widths_by": self.widths.method if self.widths else "uniform" if self.uniform else "full",
                "widths_metric": base.metric,
                "branches": {name: told[name] for name in ("layers", "branches", "mask", "scores", "sampled")},
                "branch_budget": {name: told[name] for name in ("budget", "used", "limit")},
            },
            model=found.model,
        )

    def _widths(self, run: RunFolder, task: Any, progress: Progress | None) -> SearchResult:
        """The widths as a result: another searcher's, or the full ones as measured."""
        if self.widths is not None:
            self.widths.folder = run
            return self.widths.search(task, None, progress=progress)
        readings = run.state / "readings.jsonl"
        if self.uniform:
            settled = uniform(self.space, self.budget, journal=readings, progress=titled(progress, "measuring"))
        else:
            settled = measured_once(self.budget, Candidate(self.space.full(), 0.0, ()), readings)
        choice = settled.candidate.choice
        return SearchResult(
            method=self.method,
            seed=self.seed,
            groups=tuple(group.name for group in self.space.groups),
            choice=choice,
            limits=limit_outcomes(self.budget, settled.candidate, settled),
            loss=settled.candidate.loss,
            metric=None,
            macs=self.space.macs(choice),
            parameters=self.space.parameters(choice),
            candidates=(settled.candidate,),
        )

    def blocks_at(self, base: SearchResult) -> nn.Module:
        """The network of blocks at the widths of a result, with the weights that the branch search starts from."""
        config, space = self.config.blocks, self.space
        scratch = config.start == "scratch"
        small = shrink(self.model, space, base.choice, None if scratch else largest(self.model, space, base.choice))
        if not dict(blocks_of(small)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                reparametrize(
                    small,
                    config.branches,
                    layers=config.layers,
                    border=config.border,
                    post_norm=config.post_norm,
                    keep=not scratch,
                    example_input=example_for(small, space, torch.zeros),
                )
        if scratch:
            reset(small, self.seed)
        return small


def branch_lines(result: SearchResult) -> Sequence[str]:
    """The searched branches of a result, a line a layer; () where there are none.

    Example:
        >>> branch_lines(SearchResult.load("runs/first/result.json"))                          # doctest: +SKIP
        ('stem.0  kxk, 1x1-kxk', ...)
    """
    told = result.extra.get("branches") or {"layers": (), "mask": ()}
    width = max((len(layer) for layer in told["layers"]), default=0)
    return tuple(
        f"{layer:<{width}}  {', '.join(n for n, on in zip(told['branches'], row, strict=True) if on) or 'identity'}"
        for layer, row in zip(told["layers"], told["mask"], strict=True)
    )
