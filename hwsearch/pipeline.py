"""The main path as one resumable job: prepare, search, compare, deploy, verify, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.cell_run import about_found, found_factory, keep_packed, mgas_search
from hwsearch.comparison import NetworkRow, compare, with_verdict, write_summary
from hwsearch.config import RunConfig
from hwsearch.console import Console
from hwsearch.delivery import FOUND, Delivered, choose
from hwsearch.kernel_times import time_kernels
from hwsearch.preparation import Prepared, prepare

if TYPE_CHECKING:
    from hwsearch.deploy.verdict import Verdict
    from hwsearch.search.result import SearchResult
    from hwsearch.search.searcher import Searcher
    from hwsearch.train.loop import TrainConfig


@dataclass(frozen=True)
class Outcome:
    """What a run ends with; ``verdicts`` are in the order of its devices, and of the ``delivered`` network."""

    folder: Path
    rows: tuple[NetworkRow, ...]
    delivered: Delivered
    metric_name: str
    verdicts: tuple[Verdict, ...]
    report: Path

    @property
    def exit_code(self) -> int:
        """0 where the network keeps every budget."""
        return max(verdict.exit_code for verdict in self.verdicts)


def run(config: RunConfig, console: Console) -> Outcome:
    """The whole path. Raises what its stages raise; a missed budget is in the verdict, not an error."""
    with prepare(config, console) as ready:
        return finish(ready)


def finish(ready: Prepared, tuning: TrainConfig | None = None) -> Outcome:
    """All of the path that follows the preparation; ``tuning``: see ``compare``."""
    from hwsearch.report import report

    result = search(ready)
    ready = about_found(ready, result)
    compared = compare(ready, result, tuning)
    delivered = choose(ready, result, compared)
    if delivered.name != FOUND:
        ready.console.say(f"  {delivered.why}")
        _keep(ready, delivered)
    rows = compared.rows
    verdicts = tuple(_deployed(ready, delivered, at) for at in range(len(ready.targets)))
    for at, (target, verdict) in enumerate(zip(ready.targets, verdicts, strict=True)):
        # of another precision the bundle is not what rows compare
        if ready.config.deploy.precision in (None, target.device.precision):
            rows = tuple(with_verdict(row, verdict, at) if row.name == delivered.name else row for row in rows)
    shown = replace(compared, rows=rows)
    write_summary(ready, shown, verdicts, delivered=delivered.name, why=delivered.why)
    time_kernels(ready, delivered.result, next(row.measured_ms for row in rows if row.name == delivered.name))
    _explain(ready, delivered.result)
    page = report(ready.run.path, ready.run.path / "report.html")
    return Outcome(ready.run.path, rows, delivered, compared.metric_name, verdicts, Path(page))


def _deployed(ready: Prepared, delivered: Delivered, at: int) -> Verdict:
    """Device number ``at`` gets its bundle of the delivered network, and says whether it keeps its budget there."""
    from hwsearch.deploy.bundle import deploy
    from hwsearch.deploy.verify import verify
    from hwsearch.estimation import pricer

    config, target, result = ready.config, ready.targets[at], delivered.result
    limit = result.limits[at]
    what = "the found network" if delivered.name == FOUND else "uniform scaling"
    ready.console.step(f"Deploying and verifying {what} on {target.device.name}")
    assert result.model is not None
    precision = config.deploy.precision or target.device.precision
    eight = precision == "int8"
    predictor = target.latency.predictor if target.device.precision == precision else None
    folder = config.bundle_of(target.device.name)
    deploy(
        result.model,
        ready.example,
        target.device,
        folder,
        budget_ms=target.limit.max_ms,
        predicted_ms=limit.predicted_ms * limit.correction,
        measured_ms=limit.measured_ms,
        name=config.run.name,
        precision=precision,
        # which layers are in 8 bits is known in the end only
        price=pricer(target.device, target.session, predictor, target.reference_ms) if eight else None,
        task=config.data.load(config.run.seed)[0] if eight else None,
        int8=config.deploy.int8(),
        tell=ready.console.say,
    )
    verdict = verify(folder, target.device, session=target.session)
    verdict.save(folder / "verdict.json")
    ready.run.event("verified", device=target.device.name, status=verdict.status, measured_ms=verdict.measured_ms)
    return verdict


def _explain(ready: Prepared, result: SearchResult) -> None:
    """Why the delivered network takes its time, for the report."""
    from hwsearch.latency.explain import explain_choice
    from hwsearch.report.explain_section import write_explanation

    first = ready.first
    with ready.console.bar("stairs of the network") as bar:
        found = explain_choice(first.latency, result.choice, first.template.slice(result.choice), told=bar)
    write_explanation(ready.run.path, found)


def search(ready: Prepared) -> SearchResult:
    """The search itself; its result and the found network are in the run folder when it returns."""
    from hwsearch.train.cluster import current

    config = ready.config
    wanted = " and ".join(f"{target.limit.max_ms:.4g} ms on {target.device.name}" for target in ready.targets)
    ready.console.step(f"Searching with {config.search.method} under {wanted}")
    if current() is not None and config.search.method not in ("cafenet", "repnas"):
        ready.console.say(f"  {config.search.method} has no candidates to hand out: the cluster is not used")
    task, _ = config.data.load(config.run.seed)
    searcher = _searcher(ready)
    with _stages(ready.console) as progress:
        result = searcher.search(task, None, progress=progress)
    _keep(ready, Delivered(FOUND, result))
    keep_packed(ready, result)
    return result


def _keep(ready: Prepared, delivered: Delivered) -> None:
    """The network as the run folder's ``model``."""
    from hwsearch.graph.model_folder import save_model
    from hwsearch.reparam.fold import fold
    from hwsearch.search.winner import folds_before_slicing

    config, result = ready.config, delivered.result
    assert result.model is not None
    # Branches are not what the factory builds: what is kept of them is their fold.
    branched = config.search.method == "repnas" and delivered.name == FOUND
    factory, kwargs = found_factory(ready, result)
    save_model(
        ready.run.model,
        fold(result.model, ready.example, minimal=False) if branched else result.model,
        folded=branched or folds_before_slicing(ready.module, ready.space),  # masks leave it folded
        factory=factory,
        input_shape=config.model.input_shape,
        factory_kwargs=kwargs,
        widths=dict(zip(result.groups, result.choice.widths, strict=True)),
    )


def _searcher(ready: Prepared) -> Searcher:
    """The search method that the config names."""
    config = ready.config
    if config.search.method == "conetv2":
        from hwsearch.search.conetv2 import ConetV2

        return ConetV2(
            ready.space, ready.budget, config.conetv2(), model=ready.module, seed=config.run.seed, folder=ready.run
        )
    if config.search.method == "pas":
        from hwsearch.search.pas import PaS

        return PaS(ready.space, ready.budget, config.pas(), model=ready.module, seed=config.run.seed, folder=ready.run)
    if config.search.method == "mgas":
        return mgas_search(ready)
    from hwsearch.search.cafenet import CafeNet

    cafenet = CafeNet(
        ready.space,
        ready.budget,
        config.cafenet(),
        model=ready.module,
        seed=config.run.seed,
        folder=ready.run,
        say=ready.console.say,
    )
    if config.search.method == "repnas":
        from hwsearch.search.repnas_search import RepNASSearch

        widths = cafenet if config.search.has_budget and config.branches.widths == "cafenet" else None
        return RepNASSearch(
            ready.space,
            ready.budget,
            config.repnas(),
            widths=widths,
            uniform=config.search.has_budget,
            model=ready.module,
            seed=config.run.seed,
            folder=ready.run,
        )
    return cafenet


@contextmanager
def _stages(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Progress of a search, whose callback names its stage before a colon: a bar for each stage in turn."""
    open_bar: list[Any] = ["", None, None]

    def close() -> None:
        if open_bar[1] is not None:
            open_bar[1].__exit__(None, None, None)

    def report(done: int, total: int, text: str) -> None:
        title, _, words = text.partition(": ")
        if title != open_bar[0]:
            close()
            bar = console.bar(title)
            open_bar[:] = [title, bar, bar.__enter__()]
        open_bar[2](done, total, words)

    try:
        yield report
    finally:
        close()
