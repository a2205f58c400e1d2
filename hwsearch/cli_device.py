"""The verbs of ``hwsearch device``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hwsearch.cli_shared import Input, Json, show_facts, show_result
from hwsearch.console import Console

device_app = typer.Typer(help="Devices: what there is, what they are, how noisy they are.", no_args_is_help=True)


@device_app.command("list")
def device_list(as_json: Json = False) -> None:
    """List the known devices. Example: hwsearch device list"""
    from hwsearch.device.spec import Device

    devices = [Device.load(name) for name in Device.names()]
    rows = [
        [
            d.name,
            d.ssh.host if d.ssh else "here",
            d.runtime,
            str(d.threads),
            d.precision,
            "yes" if (d.table_folder / "manifest.json").exists() else "no",
        ]
        for d in devices
    ]
    show_result(
        as_json,
        [{**d.to_dict(), "profiled": row[-1] == "yes"} for d, row in zip(devices, rows, strict=True)],
        lambda console: console.table(
            "Devices", ["name", "where", "runtime", "threads", "precision", "profiled"], rows
        ),
    )


@device_app.command("show")
def device_show(name: str, as_json: Json = False) -> None:
    """Show a device's settings and what was found about it. Example: hwsearch device show simulated"""
    from hwsearch.device.check import FILE, DeviceCheck
    from hwsearch.device.spec import Device

    device = Device.load(name)
    facts = device.to_dict()
    if (device.table_folder / FILE).exists():
        facts["check"] = DeviceCheck.load(device.table_folder).to_dict()
    show_result(as_json, facts, lambda console: show_facts(console, f"Device {device.name}", facts))


@device_app.command("check")
def device_check(
    name: str,
    seconds: Annotated[float, typer.Option(help="How long the canary is timed alone.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Measure noise floor and reference speed; exit 1 when too noisy. Example: hwsearch device check simulated"""
    from hwsearch.device.check import check_device

    talk = Console(json=as_json)
    check = check_device(name, seconds=seconds, message=talk.say)
    show_result(
        as_json, check.to_dict(), lambda console: show_facts(console, f"Device {check.device}", check.to_dict())
    )
    if not check.ok:
        raise typer.Exit(1)


@device_app.command("revalidate")
def device_revalidate(
    name: str,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="A model that was profiled too.")] = None,
    input: Input = None,
    networks: Annotated[int, typer.Option(help="How many networks to time again.")] = 24,
    accept: Annotated[
        bool, typer.Option("--accept", help="If it holds, let the predictor be used with the runtime version of now.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time a sample again: does the predictor hold? Exit 1 if not. Example: hwsearch device revalidate simulated"""
    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device
    from hwsearch.latency.revalidate import accept as accept_version
    from hwsearch.latency.revalidate import revalidate
    from hwsearch.latency.table import LatencyTable
    from hwsearch.model_argument import templates_of
    from hwsearch.preparation import PREDICTOR

    talk = Console(json=as_json)
    target = Device.load(name)
    table = LatencyTable.load(target.table_folder)
    with open_session(target, message=talk.say) as session:
        templates = templates_of(model or [], input)
        outcome = revalidate(table, session, networks=networks, templates=templates, tell=talk.say)
        now = session.fingerprint
    facts = outcome.to_dict()
    if accept and outcome.holds:
        facts["accepted"] = accept_version(target.table_folder / PREDICTOR, outcome, now)

    def show(console: Console) -> None:
        rows = [[f.family, f"{f.ratio:.3f}", str(f.networks)] for f in outcome.families]
        console.table(f"{name} now against its table", ["kernel family", "time ratio", "networks"], rows)
        for line in (*outcome.differences, *outcome.messages, *([facts["accepted"]] if "accepted" in facts else [])):
            console.show(f"  {line}")
        console.show(f"verdict: {outcome.verdict}")

    show_result(as_json, facts, show)
    if not outcome.holds:
        raise typer.Exit(1)


@device_app.command("add")
def device_add(
    name: Annotated[str, typer.Argument(help="The new device's name; also the name of its table's folder.")],
    runtime: Annotated[str, typer.Option(help="onnxruntime, openvino, tensorrt or simulated.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="Threads that one inference may use.")] = 1,
    precision: Annotated[str, typer.Option(help="float32 or int8: what campaigns and searches time.")] = "float32",
    host: Annotated[str | None, typer.Option(help="A board: user@board, or an alias of ~/.ssh/config.")] = None,
    port: Annotated[int | None, typer.Option(help="Of the board's SSH server.")] = None,
    identity: Annotated[str | None, typer.Option(help="A private key on this machine.")] = None,
    python: Annotated[str | None, typer.Option(help="The board's Python that has numpy and the runtime.")] = None,
    folder: Annotated[str | None, typer.Option(help="Where the board keeps what is sent to it.")] = None,
    ssh_option: Annotated[list[str] | None, typer.Option(help="Name=value for ssh -o, such as ProxyJump=gate.")] = None,
    as_json: Json = False,
) -> None:
    """Write devices/NAME.toml after probing the device, on this machine or on a board.

    Example: hwsearch device add rpi5 --host pi@rpi5 --python "~/venv/bin/python" --threads 4
    """
    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device
    from hwsearch.device.ssh_settings import SshSettings

    options = {"spinning": 0} if runtime == "onnxruntime" else {}
    given = {
        "host": host, "port": port, "identity": identity, "python": python, "folder": folder,
        "ssh_options": tuple(ssh_option) if ssh_option else None,
    }  # fmt: skip
    way: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    device = Device(
        name=name,
        runtime=runtime,
        threads=threads,
        precision=precision,
        transport="ssh" if way else "local",
        options=options,
        ssh=SshSettings(**({"host": ""} | way)) if way else None,
    )
    talk = Console(json=as_json)
    with open_session(device, message=talk.say) as session:
        fingerprint, machine = session.fingerprint, session.machine
    if machine is not None and threads > machine.usable:
        talk.say(f"{threads} threads on {machine.usable:g} usable cores wait for each other: ask for fewer")
    path = device.save()
    facts = {"path": str(path), **device.to_dict(), "fingerprint": fingerprint.to_dict()}
    if machine is not None:
        facts["machine"] = machine.to_dict()
    show_result(as_json, facts, lambda console: show_facts(console, f"Added {path}", facts))
