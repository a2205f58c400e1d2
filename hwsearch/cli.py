"""The command line. One function a verb, each a few lines: parse, call, print.

Results go to standard output (one JSON object under ``--json``), everything else to standard error. Exit status:
0 done, 1 the answer is no, 2 bad input, 3 a bug of hwsearch. No verb imports torch, onnxruntime or xgboost before it
needs them.
"""

from __future__ import annotations

import io
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hwsearch.cli_device import device_app
from hwsearch.cli_shared import (
    Allow,
    DeviceName,
    Input,
    Json,
    Model,
    Ray,
    Unfolded,
    on_cluster,
    show_facts,
    show_result,
)
from hwsearch.console import Console, plain_text
from hwsearch.errors import HwsearchError, InputError

app = typer.Typer(
    help="Finds the fastest accurate network for your device: measured milliseconds, not FLOPs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(device_app, name="device")


def main() -> None:
    """Entry point of the ``hwsearch`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name from elsewhere may hold what this terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    try:
        # Out of standalone mode a verb's Exit comes back as a value.
        code = app(standalone_mode=False)
    except HwsearchError as error:
        _fail(str(error), error.exit_code)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command goes on where it was", 130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        where = f" ({str(error.filename)[:200]})" if error.filename else ""
        _fail(f"the system refused: {error.strerror or error}{where}; mend that, then give the same command again", 2)
    except Exception as error:
        # typer's own complaints about arguments know how to show themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(2)
        if isinstance(error, MemoryError) or "not enough memory" in str(error) or "allocate memory" in str(error):
            _fail("this machine has not enough memory for that: take a smaller model, input or batch", 2)
        _crashed(error)
    sys.exit(code if isinstance(code, int) else 0)


@app.command()
def profile(
    device: Annotated[
        list[str], typer.Option("--device", "-d", help="A device, or the path of its TOML file; repeated for several.")
    ],
    minutes: Annotated[float, typer.Option(help="Device time to spend in all, earlier runs counted in.")] = 5.0,
    target: Annotated[float | None, typer.Option(help="Stop early at this mean error held out, in per cent.")] = None,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="Cover this model's widths too.")] = None,
    input: Input = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampled networks.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with an earlier campaign, or start again.")] = True,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Measure networks into latency_tables/NAME/. Example: hwsearch profile --device simulated --minutes 0.2"""
    from hwsearch.campaigns import Campaign, profile_all, profile_one
    from hwsearch.device.spec import Device

    talk = Console(json=as_json)
    share = None if target is None else target / 100
    campaign = Campaign(minutes, share, tuple(model or ()), input, seed, resume)
    known = [Device.load(name) for name in device]
    if len(known) == 1 and ray is None:
        facts = profile_one(known[0], campaign, talk).facts()
        show_result(as_json, facts, lambda console: show_facts(console, f"Profiled {known[0].name}", facts))
        return
    with on_cluster(ray, talk) as cluster:
        found = profile_all(known, campaign, talk.say, cluster)

    def show(console: Console) -> None:
        for one in found:
            show_facts(console, f"{'Not profiled:' if one.error else 'Profiled'} {one.device}", one.facts())

    show_result(as_json, {"devices": [one.facts() for one in found]}, show)
    if status := max(one.status for one in found):
        raise typer.Exit(status)


@app.command()
def fit(
    device: DeviceName,
    source: Annotated[
        list[str] | None,
        typer.Option("--from", help="A device with a predictor: time few networks on the new one, transfer the rest."),
    ] = None,
    networks: Annotated[int, typer.Option(help="With --from: how many networks to time on the new device.")] = 20,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="With --from: a model to draw from.")] = None,
    input: Input = None,
    as_json: Json = False,
) -> None:
    """Fit the latency predictor to a device's table. Example: hwsearch fit --device simulated"""
    from hwsearch.device.spec import Device
    from hwsearch.latency.table import LatencyTable
    from hwsearch.preparation import fit_table, transfer_to

    talk = Console(json=as_json)
    target = Device.load(device)
    if source:
        from hwsearch.model_argument import templates_of

        others = [Device.load(name) for name in source]
        templates = templates_of(model or [], input)
        facts = transfer_to(target, others, talk, networks=networks, templates=templates)
        show_result(as_json, facts, lambda console: show_facts(console, f"Transferred to {target.name}", facts))
        return
    _, card = fit_table(target, LatencyTable.load(target.table_folder), talk)
    show_result(as_json, card.to_dict(), lambda console: console.show(card.to_markdown()))


@app.command()
def estimate(
    model: Model,
    device: DeviceName,
    input: Input = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Per layer: bound, stair edges, and why the network is not faster.")
    ] = False,
    allow_unfolded: Unfolded = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Predict a model's milliseconds from its kernels, folded first.

    Example: hwsearch estimate hwsearch.models.resnet:resnet_small --device simulated --input 1x1x28x28 --explain
    """
    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device
    from hwsearch.estimation import estimate as run_estimate
    from hwsearch.preparation import predictor_of

    talk = Console(json=as_json)
    target = Device.load(device)
    argument = _argument(model, input, allow)
    with open_session(target, message=talk.say) as session:
        predictor = predictor_of(target, session.fingerprint)
        with talk.bar("stairs") as bar:
            found = run_estimate(
                argument,
                target,
                session,
                predictor,
                why=explain,
                told=bar,
                allow_unfolded=allow_unfolded,
                tell=talk.say,
            )
    show_result(as_json, found.to_dict(), found.show)


@app.command()
def measure(
    model: Model,
    device: DeviceName,
    input: Input = None,
    allow_unfolded: Unfolded = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Measure a model's milliseconds on a device, folded first.

    Example: hwsearch measure hwsearch.models.resnet:resnet_small --device simulated --input 1x1x28x28
    """
    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device
    from hwsearch.estimation import network_of
    from hwsearch.latency.measure import measure as run_measure
    from hwsearch.preparation import ensure_checked

    talk = Console(json=as_json)
    target = Device.load(device)
    onnx = network_of(_argument(model, input, allow), target, allow_unfolded=allow_unfolded, tell=talk.say)
    with open_session(target, message=talk.say) as session:
        found = run_measure(
            onnx, session, reference_ms=ensure_checked(target, session, talk), allow_unfolded=allow_unfolded
        )
    facts = {"model": model, "device": target.name, **asdict(found)}
    show_result(as_json, facts, lambda console: show_facts(console, f"{model} on {target.name}", facts))


@app.command()
def space(
    model: Annotated[str | None, typer.Argument(help="package.module:factory, timm:name, or a model folder.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Take model, quantum, minimum and [[groups]] of this file.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", "-d", help="Price by its predictor; else MACs.")] = None,
    input: Input = None,
    quantum: Annotated[int, typer.Option(help="Step of the widths, in channels.")] = 1,
    minimum: Annotated[float | None, typer.Option(help="Narrowest width: a share up to 1, or channels.")] = None,
    freeze: Annotated[list[str] | None, typer.Option(help="Layers whose groups keep their width: a pattern.")] = None,
    slots: Annotated[bool, typer.Option("--slots", help="List the parameter axes of each group too.")] = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Show a model's width groups, before any work: their widths, what they cost, and what is frozen and why.

    Example: hwsearch space hwsearch.models.resnet:resnet_small --input 1x1x28x28 --freeze "stem.*"
    """
    from hwsearch.space_view import space_of, table_of

    talk = Console(json=as_json)
    found, template = space_of(model, config, input, quantum, minimum, freeze or [], allow)
    shown = table_of(found, template, device, talk)
    show_result(as_json, shown.to_dict(), lambda console: console.show(shown.text(slots=slots)))


@app.command()
def search(
    config: Annotated[Path | None, typer.Argument(help="A TOML file; or describe the search by the options.")] = None,
    method: Annotated[str, typer.Option(help="The search method.")] = "cafenet",
    model: Annotated[str | None, typer.Option("--model", "-m", help="package.module:factory or timm:name.")] = None,
    input: Input = None,
    data: Annotated[
        str, typer.Option(help="fashion-mnist, synthetic, a folder, an .npz file, or module:function of your data.")
    ] = "fashion-mnist",
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="DEVICE:MS, such as x86-ort-1t:3.0; once for each device."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on in this run folder.")] = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Search only: profile and fit where needed, then search.

    Example: hwsearch search examples/simulated.toml
    """
    from hwsearch.config import RunConfig
    from hwsearch.config_options import search_config
    from hwsearch.pipeline import search as run_search
    from hwsearch.preparation import prepare

    if config is not None:
        settings = RunConfig.load(config)
    else:
        settings = search_config(
            method=method, model=model, shape=input, data=data, budgets=budget or [], folder=resume
        )
    if settings.search.budgets is not None:
        raise InputError("search.budgets asks for a family of networks: use hwsearch run, or give one budget")
    talk = Console(json=as_json)
    with on_cluster(ray, talk), prepare(settings, talk) as ready:
        result = run_search(ready)
    rows = [[name, str(width)] for name, width in zip(result.groups, result.choice.widths, strict=True)]

    def show(console: Console) -> None:
        console.table("Found widths", ["group", "width"], rows)
        for limit in result.limits:
            measured = "not measured" if limit.measured_ms is None else f"measured {limit.measured_ms:.4g} ms"
            console.show(
                f"{limit.name}: predicted {limit.predicted_ms:.4g} ms, {measured}, budget {limit.max_ms:.4g} ms"
            )

    show_result(as_json, {"folder": str(settings.run_folder), **result.to_dict()}, show)


@app.command()
def fold(
    model: Model,
    input: Input = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the folded network as ONNX.")] = None,
    prove_it: Annotated[bool, typer.Option("--verify", help="Prove the fold on random statistics.")] = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Fold batch normalisation.

    Example: hwsearch fold hwsearch.models.resnet:resnet_small --input 1x1x28x28 --verify
    """
    from hwsearch.model_argument import fold_model

    facts = fold_model(_argument(model, input, allow), output, prove_it=prove_it)
    show_result(as_json, facts, lambda console: show_facts(console, f"Folded {model}", facts))


@app.command()
def deploy(
    model: Model,
    device: DeviceName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")],
    input: Input = None,
    budget_ms: Annotated[float | None, typer.Option(help="Milliseconds that the network must keep.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or int8; by default the device's.")] = None,
    data: Annotated[
        str | None, typer.Option(help="For int8: whose held-out images calibrate; by default the run's own data.")
    ] = None,
    keep_fp32: Annotated[
        str | None, typer.Option(help="For int8: layers in float32: how many, their names joined by commas, or auto.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="For --keep-fp32 auto: how much of the metric may be lost; 0.005 by default.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Write the measured milliseconds into it too.")] = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Write a bundle that proves itself on the device.

    Example: hwsearch deploy hwsearch.models.resnet:resnet_small --device simulated --input 1x1x28x28 --output bundle
    """
    from hwsearch.deployment import DeployOptions, deploy_model
    from hwsearch.device.spec import Device

    options = DeployOptions(budget_ms, precision, data, keep_fp32, tolerance, measure)
    talk = Console(json=as_json)
    bundle = deploy_model(_argument(model, input, allow), Device.load(device), output, options, talk)
    facts = {
        "bundle": str(output), "name": bundle.name, "precision": bundle.precision, "predicted_ms": bundle.predicted_ms,
        "measured_ms": bundle.measured_ms, "quantisation": bundle.report,
    }  # fmt: skip

    def show(console: Console) -> None:
        if bundle.report is not None:
            from hwsearch.deploy.quantised_report import markdown

            console.show(markdown(bundle.report))
        console.show(f"bundle written to {output}")

    show_result(as_json, facts, show)


@app.command()
def verify(bundle: Path, device: DeviceName, as_json: Json = False) -> None:
    """Check a bundle's numerics and milliseconds on a device; exit 1 when broken.

    Example: hwsearch verify runs/simulated/bundle --device simulated
    """
    from hwsearch.deploy.verify import verify as run_verify
    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device
    from hwsearch.preparation import ensure_checked

    talk = Console(json=as_json)
    target = Device.load(device)
    with open_session(target, message=talk.say) as session:
        ensure_checked(target, session, talk)
        verdict = run_verify(bundle, target, session=session)
    show_result(
        as_json, verdict.to_dict(), lambda console: show_facts(console, f"Verdict: {verdict.status}", verdict.to_dict())
    )
    if verdict.exit_code:
        raise typer.Exit(verdict.exit_code)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder, a bundle or a device's table folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file.")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML file. Example: hwsearch report runs/simulated --output report.html"""
    from hwsearch.report import report as write_report

    path = write_report(folder, output)
    show_result(as_json, {"report": str(path)}, lambda console: console.show(f"report written to {path}"))


@app.command()
def run(config: Annotated[Path, typer.Argument(help="A TOML file.")], ray: Ray = None, as_json: Json = False) -> None:
    """The whole path, from profile to report. Example: hwsearch run examples/simulated.toml"""
    from hwsearch.comparison import comparison_table
    from hwsearch.config import RunConfig
    from hwsearch.family import Family, run_family
    from hwsearch.pipeline import Outcome
    from hwsearch.pipeline import run as run_path

    settings, talk = RunConfig.load(config), Console(json=as_json)
    ended: Outcome | Family
    delivered: str | dict[str, str]
    with on_cluster(ray, talk):
        if settings.search.budgets is not None:
            ended = run_family(settings, talk)
            verdicts = {member.folder.name: member.verdicts[0] for member in ended.members}
            reasons = [f"{m.folder.name}: {m.delivered.why}" for m in ended.members if m.delivered.why]
            delivered = {member.folder.name: member.delivered.name for member in ended.members}
        else:
            ended = run_path(settings, talk)
            names = (settings.device.name, *(further.name for further in settings.devices))
            verdicts = dict(zip(names, ended.verdicts, strict=True))
            reasons, delivered = [ended.delivered.why] if ended.delivered.why else [], ended.delivered.name
    columns, rows = comparison_table(ended.rows, ended.metric_name)

    def show(console: Console) -> None:
        console.table(f"{ended.folder}", columns, rows)
        for why in reasons:
            console.show(why)
        for name, verdict in verdicts.items():
            console.show(f"verdict of {name}: {verdict.status}")
            for reason in (*verdict.reasons, *verdict.notes):
                console.show(f"  {reason}")
        console.show(f"report: {ended.report}")

    facts = {
        "folder": str(ended.folder),
        "report": str(ended.report),
        "rows": [asdict(row) for row in ended.rows],
        "delivered": delivered,
        "verdict": next(iter(verdicts.values())).to_dict(),
        "verdicts": {name: verdict.to_dict() for name, verdict in verdicts.items()},
    }
    show_result(as_json, facts, show)
    if ended.exit_code:
        raise typer.Exit(ended.exit_code)


def _argument(model: str, shape: str | None, allow: str | None) -> Any:
    from hwsearch.model_argument import load_model_argument, parse_inputs

    return load_model_argument(model, parse_inputs(shape) if shape else None, allow_factory=allow)


def _crashed(error: Exception) -> None:
    """A bug of ours. Its traceback helps whoever mends it: it goes to a file, or on with ``HWSEARCH_DEBUG`` set."""
    import os
    import tempfile
    import traceback

    if os.environ.get("HWSEARCH_DEBUG"):
        raise error
    told = traceback.format_exc()
    try:
        with tempfile.NamedTemporaryFile("w", prefix="hwsearch-bug-", suffix=".txt", delete=False) as file:
            file.write(told.encode(errors="backslashreplace").decode())
        where = file.name
    except OSError:
        sys.stderr.write(told)
        where = "the lines above"
    _fail(f"this is a bug in hwsearch ({type(error).__name__}: {error}); please report it, with {where}", 3)


def _fail(message: str, code: int) -> None:
    """One line on standard error, whatever the message was made of."""
    line = plain_text(" ".join(message.split()))
    sys.stderr.write(f"hwsearch: error: {line if len(line) <= 1000 else line[:997] + '...'}\n")
    sys.exit(code)
