"""A family: networks along the front of quality and milliseconds, searched from one trained parent.

    runs/<name>/
      state/parent/         the full network's training, which is done once
      budget-60/            a run folder for each budget: result.json, model/, bundle/, report.html
      summary.json          every network of the family
      report.html           the front

Every member is a run of its own that resumes as any run does, so a family that was stopped goes on where it was, and
one that is asked for more budgets makes only those.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.comparison import NetworkRow
from hwsearch.config import RunConfig
from hwsearch.config_family import label_of, ms_of
from hwsearch.console import Console
from hwsearch.errors import InputError
from hwsearch.pipeline import Outcome, finish
from hwsearch.preparation import SPACE, Prepared, prepare
from hwsearch.search.journal import write_atomic

if TYPE_CHECKING:
    from torch import nn

    from hwsearch.train.loop import TrainConfig

SCHEMA, VERSION = "hwsearch.family", 1


@dataclass(frozen=True)
class Family:
    """What a run of several budgets ends with: an outcome a budget, in the order of the config."""

    folder: Path
    members: tuple[Outcome, ...]
    report: Path

    @property
    def rows(self) -> tuple[NetworkRow, ...]:
        """The full network, then of every budget uniform scaling and the found network, named by their folders."""
        full = next(row for row in self.members[0].rows if row.name == "full")
        named = [
            replace(row, name=f"{row.name} {member.folder.name}")
            for member in self.members
            for row in member.rows
            if row.name != "full"
        ]
        return (full, *named)

    @property
    def metric_name(self) -> str:
        """What the rows' metric is."""
        return self.members[0].metric_name

    @property
    def exit_code(self) -> int:
        """0 where every network keeps its budget."""
        return max(member.exit_code for member in self.members)


def run_family(config: RunConfig, console: Console) -> Family:
    """Train the parent once, then search, compare, deploy and verify a network for every budget of the config.

    Uniform scaling starts from the same parent and is fine-tuned for the steps of a member's search and fine-tuning
    together, so that what is compared has been trained alike.

    Raises:
        InputError: the config has no list of budgets.
        InfeasibleBudgetError: the smallest budget cannot be kept; nothing was trained.
    """
    from hwsearch.report import report

    budgets = config.search.budgets
    if budgets is None:
        raise InputError("search.budgets is missing: give a list of budgets, or run the config as it is")
    with prepare(config, console) as ready:
        parent, tuning = _parent(ready)
        members = []
        for budget in budgets:
            console.step(f"Family member {label_of(budget)}")
            members.append(_member(ready, budget, parent, tuning))
        _write_summary(ready, members)
        page = report(ready.run.path, ready.run.path / "report.html")
    return Family(config.run_folder, tuple(members), Path(page))


def _parent(ready: Prepared) -> tuple[nn.Module, TrainConfig]:
    """The full network, trained where it brings no weights; and how what is scaled of it is fine-tuned."""
    from hwsearch.train.loop import train

    config = ready.config
    search = config.pas()
    model = copy.deepcopy(ready.module)
    task, _ = config.data.load(config.run.seed)
    if search.warmup is not None:
        ready.console.step("Training the parent")
        with ready.console.bar("parent") as bar:
            train(model, task, search.warmup, folder=ready.run.state / "parent", progress=bar)
    assert search.winner is not None
    steps = [training.total_steps(len(task.train)) for training in (search.training, search.winner)]
    return model.eval(), replace(search.winner, steps=sum(steps))


def _member(ready: Prepared, budget: str | float, parent: nn.Module, tuning: TrainConfig) -> Outcome:
    """One network of the family, in a run folder of its own."""
    from hwsearch.search.run_folder import open_run

    config, label = ready.config, label_of(budget)
    one: dict[str, Any] = {"budget": budget} if isinstance(budget, str) else {"budget_ms": budget}
    output = config.deploy.output
    own = replace(
        config,
        run=replace(config.run, folder=str(ready.run.path), name=label),
        search=replace(config.search, budgets=None, **one),
        masks=replace(config.masks, warmup=False),
        deploy=replace(config.deploy, output=output and str(Path(output) / label)),
    )
    target = ready.first
    limit = replace(target.limit, max_ms=ms_of(budget, target.full_ms))
    with open_run(own.run_folder, own.identity()) as run:
        write_atomic(run.path / SPACE, (ready.run.path / SPACE).read_text(encoding="utf-8"))
        member = replace(ready, config=own, run=run, module=parent, targets=(replace(target, limit=limit),))
        return finish(member, tuning)


def _write_summary(ready: Prepared, members: list[Outcome]) -> None:
    """``summary.json`` of the family: what its report shows."""
    task, _ = ready.config.data.load(ready.config.run.seed)
    left_out = ("kernels", "devices")  # each member's own summary has them
    listed = [
        {
            "folder": member.folder.name,
            "status": member.verdicts[0].status,
            "delivered": member.delivered.name,
            "rows": [{key: v for key, v in asdict(row).items() if key not in left_out} for row in member.rows],
        }
        for member in members
    ]
    summary = {
        "schema": SCHEMA,
        "version": VERSION,
        "device": ready.first.device.name,
        "model": ready.config.model.factory,
        "metric_name": task.metric_name,
        "higher_is_better": task.higher_is_better,
        "members": listed,
    }
    write_atomic(ready.run.path / "summary.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")
