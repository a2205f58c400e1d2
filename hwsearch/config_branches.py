"""``[branches]`` of a config: which blocks a network trains with, and how their branches are searched."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field

from hwsearch.config_types import Below1, Positive, Switch, Text
from hwsearch.errors import InputError

if TYPE_CHECKING:
    from hwsearch.search.repnas_search import RepNASSearchConfig
    from hwsearch.train.loop import TrainConfig

_KINDS = Field(description='a block such as "odbb" or "dbb", or a list of branches such as ["kxk", "1x1"]')
#: Why a callback of the user's own has nothing to steer where a search does not restart.
ONE_RUN = "without a restart the branches are trained within their search, whose steps are the method's"
_LAYERS = Field(description='a pattern of layer names such as "stages.*", or a list of them')


@dataclass(frozen=True)
class BranchSettings:
    """``[branches]``, for ``method = "repnas"``: see ``RepNASConfig`` and ``BlockConfig``.

    ``budget`` says what a network's branches may cost together in training, ``limit`` how much: a share of what all of
    them cost up to 1, else a number. ``widths`` says what chooses the widths where ``[search]`` has a budget. What
    blocks are made of (``kinds``, ``layers``, ``border``, ``post_norm``) is for a network without blocks.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kinds: Annotated[Text | tuple[Text, ...], _KINDS] | None = None
    layers: Annotated[Text | tuple[Text, ...], _LAYERS] | None = None
    border: Literal["pad_first", "bn_pad"] | None = None
    post_norm: Switch | None = None
    budget: Literal["branches", "macs", "activation_bytes"] | None = None
    limit: Positive | None = None
    warmup: Below1 | None = None
    search: Below1 | None = None
    restart: Switch | None = None
    whole: Switch | None = None
    published: Switch = False
    widths: Literal["cafenet", "uniform"] = "cafenet"

    @property
    def restarts(self) -> bool:
        """Whether the branches that were found are trained by themselves, after the search."""
        return not self.published if self.restart is None else self.restart

    def config(self, training: TrainConfig, start: str | None) -> RepNASSearchConfig:
        """The search of branches that these settings stand for.

        Raises:
            InputError: values that do not go together, or an unknown branch.
        """
        from hwsearch.reparam.branches import BRANCHES
        from hwsearch.reparam.odbb import branch_kinds
        from hwsearch.search.repnas import RepNASConfig
        from hwsearch.search.repnas_sampler import BranchBudget
        from hwsearch.search.repnas_search import BlockConfig, RepNASSearchConfig

        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            for kind in branch_kinds(given.get("kinds", "odbb")):
                if kind not in BRANCHES:
                    raise InputError(f"there is no branch {kind!r}: give some of {', '.join(BRANCHES)}")
            budget = BranchBudget(
                **{new: given[old] for new, old in (("kind", "budget"), ("limit", "limit")) if old in given}
            )
            make = RepNASConfig.published if self.published else RepNASConfig
            search = {name: given[name] for name in ("warmup", "search", "restart", "whole") if name in given}
            blocks: dict[str, Any] = {name: given[name] for name in ("layers", "border", "post_norm") if name in given}
            if "kinds" in given:
                blocks["branches"] = given["kinds"]
            return RepNASSearchConfig(
                make(budget=budget, training=training, **search),
                BlockConfig(start="model" if start == "model" else "scratch", **blocks),
            )
        except InputError as error:
            raise InputError(f"[branches]: {error}") from error
