"""Campaigns on several devices: a worker for each, and never two timings on one machine.

Where a worker runs: on the machine of a Ray cluster that offers the device (the resource ``device-NAME``), else here; a
board over SSH is reached from there. In which order: the devices of one machine one after another, machines at the same
time. Boards begin when the machines are done, and those behind one host go one after another: building and choosing
their networks is work on a machine, which would disturb what is timed on it. Beyond this order every timing holds the
timing lock of the machine (or board) that it runs on, so campaigns that know nothing of each other wait as well.

A worker is a process: one that ends, or cannot go on, costs its own device; the same command goes on where it was.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.console import Console
from hwsearch.errors import HwsearchError, InputError, SchemaError
from hwsearch.search.journal import write_atomic

if TYPE_CHECKING:
    from hwsearch.device.spec import Device
    from hwsearch.train.cluster import Cluster

#: What a machine of a cluster sends home; the manifest is written last. Journals stay where they were made.
FILES = ("device.json", "networks.csv", "kernels.csv", "manifest.json")
#: A Ray worker that dies is started again so often; its campaign goes on from its journal.
_TRIES = 3

Say = Callable[[str], None]


@dataclass(frozen=True)
class Campaign:
    """How devices are profiled, the same for all: see ``hwsearch.profile``. Models as on the command line."""

    minutes: float = 5.0
    target: float | None = None
    models: tuple[str, ...] = ()
    input: str | None = None
    seed: int = 0
    resume: bool = True


@dataclass(frozen=True)
class Profiled:
    """What became of one device: its table, or the error and the exit status that it stands for."""

    device: str
    folder: str
    networks: int = 0
    kernels: int = 0
    noise_floor: float = 0.0
    error: str = ""
    status: int = 0

    def facts(self) -> dict[str, Any]:
        """What is shown: no empty error, and of a failure no numbers."""
        plain = asdict(self)
        left_out = ("networks", "kernels", "noise_floor") if self.error else ("error", "status")
        return {name: value for name, value in plain.items() if name not in left_out}


def profile_one(device: Device, campaign: Campaign, talk: Console) -> Profiled:
    """One campaign, in this process.

    Raises:
        HwsearchError: see ``hwsearch.profile``.
    """
    from hwsearch.device.session import open_session
    from hwsearch.model_argument import templates_of
    from hwsearch.preparation import ensure_checked, profile_device

    templates = templates_of(list(campaign.models), campaign.input)
    with open_session(device, message=talk.say) as session:
        ensure_checked(device, session, talk)
        table = profile_device(
            device, session, talk, minutes=campaign.minutes, templates=templates, seed=campaign.seed,
            resume=campaign.resume, target=campaign.target,
        )  # fmt: skip
    kernels = sum(len(network.kernels) for network in table.networks)
    return Profiled(device.name, str(device.table_folder), len(table.networks), kernels, table.noise_floor)


def profile_all(
    devices: Sequence[Device], campaign: Campaign, say: Say, cluster: Cluster | None = None
) -> list[Profiled]:
    """Several campaigns, a worker each; what became of every device, in their order.

    Raises:
        InputError: a device is named twice.
    """
    names = [device.name for device in devices]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"the device {name!r} is named {names.count(name)} times: name it once")
    offered = {} if cluster is None else _offered(cluster)
    results: dict[str, Profiled] = {}

    def work(device: Device) -> Profiled:
        tell: Say = lambda text: say(f"[{device.name}] {text}")  # noqa: E731
        try:
            if cluster is not None and device.name in offered:
                return _on_cluster(cluster, device, campaign, offered[device.name], tell)
            return _in_process(device, campaign, tell)
        except HwsearchError as error:
            return Profiled(device.name, str(device.table_folder), error=str(error), status=error.exit_code)

    here = socket.gethostname()
    for boards in (False, True):
        lines: dict[str, list[Device]] = {}
        for device in devices:
            if (device.ssh is not None) == boards:
                place = device.ssh.host if device.ssh is not None else offered.get(device.name, here)
                lines.setdefault(place, []).append(device)
        _side_by_side(list(lines.values()), work, results)
    return [results[name] for name in names]


def answer(request: dict[str, Any], talk: Console) -> dict[str, Any]:
    """What a worker does: ``{device, home, campaign}`` in plain values, ``{found}`` or ``{error, status}`` out."""
    from hwsearch.device.spec import Device

    device = replace(Device.from_dict(request["device"]), home=Path(request["home"]))
    settings = request["campaign"]
    campaign = Campaign(**settings | {"models": tuple(settings["models"])})
    try:
        return {"found": asdict(profile_one(device, campaign, talk))}
    except HwsearchError as error:
        return {"error": str(error), "status": error.exit_code}


def _request(device: Device, home: Path, campaign: Campaign) -> dict[str, Any]:
    return {"device": device.to_dict(), "home": str(home), "campaign": asdict(campaign)}


def _side_by_side(
    lines: Sequence[Sequence[Device]], work: Callable[[Device], Profiled], results: dict[str, Profiled]
) -> None:
    """Work off several lines of devices at the same time, each in its order."""
    failures: list[BaseException] = []

    def walk(line: Sequence[Device]) -> None:
        try:
            for device in line:
                results[device.name] = work(device)
        except BaseException as error:  # told in the thread that waits
            failures.append(error)

    # daemons: an interrupt ends this process, and the workers with it
    threads = [threading.Thread(target=walk, args=(line,), daemon=True) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _in_process(device: Device, campaign: Campaign, tell: Say) -> Profiled:
    """A worker on this machine. It ends when its standard input does, so also when this process is killed."""
    command = [sys.executable, "-P", "-m", "hwsearch.campaign_worker"]
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        errors="replace", env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    ) as worker:  # fmt: skip
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stderr is not None
        worker.stdin.write(json.dumps(_request(device, device.home, campaign)) + "\n")
        worker.stdin.flush()
        last = ""
        for line in worker.stderr:  # its words; the answer is one line, which waits in the pipe
            last = line.strip() or last
            tell(line.rstrip())
        text = worker.stdout.read()
    try:
        found = json.loads(text)
    except ValueError:
        raise InputError(
            f"the worker of {device.name} ended with status {worker.returncode} ({last[:200]}): give the same command "
            "again, it goes on where it was"
        ) from None
    return _profiled(device, found)


def _profiled(device: Device, found: dict[str, Any]) -> Profiled:
    if "error" in found:
        return Profiled(device.name, str(device.table_folder), error=str(found["error"]), status=int(found["status"]))
    return replace(Profiled(**found["found"]), folder=str(device.table_folder))


def _offered(cluster: Cluster) -> dict[str, str]:
    """Devices that machines of the cluster offer: the name of the machine by that of the device."""
    found: dict[str, str] = {}
    for node in cluster.ray.nodes():
        for resource in node["Resources"] if node["Alive"] else ():
            if resource.startswith("device-"):
                found.setdefault(resource.removeprefix("device-"), str(node["NodeManagerHostname"]))
    return found


def _on_cluster(cluster: Cluster, device: Device, campaign: Campaign, machine: str, tell: Say) -> Profiled:
    """A Ray worker on the machine that offers the device; its table is brought home.

    Raises:
        SchemaError: what came is no table.
    """
    ray = cluster.ray
    tell(f"profiling on {machine}")
    resource = f"device-{device.name}"
    task = ray.remote(num_cpus=0, resources={resource: 1}, max_retries=_TRIES)(_there)
    try:
        found, files = ray.get(task.remote(_request(device, device.home, campaign), socket.gethostname()))
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[-200:]
        return Profiled(
            device.name, str(device.table_folder), status=2,
            error=f"the worker on {machine} was lost ({reason}): the same command goes on where it was",
        )  # fmt: skip
    for name in FILES:  # none but these
        if name in files:
            write_atomic(device.table_folder / name, files[name])
    outcome = _profiled(device, found)
    if not outcome.error:
        from hwsearch.latency.table import LatencyTable

        if LatencyTable.load(device.table_folder).device != device.name:
            raise SchemaError(f"{machine} sent the table of another device than {device.name}: name devices alike")
        tell(f"{outcome.networks} networks, {outcome.kernels} kernel instances in the table")
    return outcome


def _there(request: dict[str, Any], asked_from: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Runs in the Ray worker. On the machine that asked, its own home is used."""
    home = Path(request["home"])
    if socket.gethostname() != asked_from or not home.is_dir():
        home = Path(os.environ.get("HWSEARCH_HOME") or Path.home() / ".cache" / "hwsearch" / "home").expanduser()
    found = answer(request | {"home": str(home)}, Console(json=True))
    folder = home / "latency_tables" / str(request["device"]["name"])
    return found, {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
