#!/usr/bin/env python
"""One network for two devices against the network of each device alone: what each takes on both, and how good it is.

    python tools/bench_devices.py --config examples/quickstart_quick.toml --device x86-ort-1t --device x86-ort-2t
    python tools/bench_devices.py --config examples/simulated.toml --device simulated --device other --budget 60%

Three runs of the config, which differ in their devices only: the first device, the second, and both under both budgets
(a share of the full network's time on each). Their bundles are then timed in turn on both devices, by the code that
every measurement takes. A run that is there already is not done again: the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ending import leave

from hwsearch.config import RunConfig
from hwsearch.config_devices import FurtherDevice
from hwsearch.console import Console
from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.latency.measure import measure_many
from hwsearch.pipeline import run
from hwsearch.preparation import ensure_checked


@dataclass(frozen=True)
class Found:
    """What one of the three runs ended with."""

    name: str
    folder: Path
    widths: tuple[int, ...]
    metric: float
    budgets: dict[str, float]

    @property
    def network(self) -> bytes:
        """The deployed network."""
        return (self.folder / "bundle" / "model.onnx").read_bytes()


def variants(config: RunConfig, devices: list[str], budget: str) -> dict[str, RunConfig]:
    """The three runs by name."""
    found = {}
    for name, chosen in ((devices[0], devices[:1]), (devices[1], devices[1:]), ("both", devices)):
        first, *further = chosen
        found[name] = dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, name=f"{config.run.name}-{Path(name).stem}"),
            device=dataclasses.replace(config.device, name=first),
            devices=tuple(FurtherDevice(other, budget=budget) for other in further),
            search=dataclasses.replace(config.search, budget=budget, budget_ms=None),
        )
    return found


def done(name: str, config: RunConfig, console: Console) -> Found:
    """The run's result; it is run where that is not there."""
    summary = config.run_folder / "summary.json"
    if not summary.exists():
        run(config, console)
    data = json.loads(summary.read_text(encoding="utf-8"))
    row = next(row for row in data["rows"] if row["name"] == "found")
    budgets = {time["device"]: time["budget_ms"] for time in row["devices"]}
    return Found(name, config.run_folder, tuple(row["widths"]), row["metric"], budgets)


def table(found: list[Found], devices: list[str], console: Console) -> str:
    """Every network on every device, timed in turn, against that device's budget in the run of both."""
    budgets = found[-1].budgets
    columns: list[list[str]] = []
    for name in devices:
        device = Device.load(name)
        with open_session(device, message=console.say) as session:
            reference_ms = ensure_checked(device, session, console)
            timed = measure_many(
                [(one.name, one.network) for one in found], session, reference_ms=reference_ms, allow_unfolded=True
            )
        columns.append([f"{t.measured_ms:.4f} ({100 * t.measured_ms / budgets[name]:.1f} %)" for t in timed])
    heads = [f"ms on {name} (of {budgets[name]:.4f})" for name in devices]
    lines = ["| searched for | " + " | ".join(heads) + " | widths | metric |", "|---" * (len(devices) + 3) + "|"]
    for at, one in enumerate(found):
        cells = [column[at] for column in columns]
        lines.append(f"| {one.name} | {' | '.join(cells)} | {'-'.join(map(str, one.widths))} | {one.metric:.4f} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime"))
    return "\n".join([*lines, "", f"{platform.machine()}, {versions}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("examples/quickstart_quick.toml"))
    parser.add_argument("--device", action="append", required=True, help="twice")
    parser.add_argument("--budget", default="50%", help="of the full network's time on each device")
    options = parser.parse_args()
    if len(options.device) != 2:
        parser.error("give --device twice")
    console = Console()
    configs = variants(RunConfig.load(options.config), options.device, options.budget)
    found = [done(name, config, console) for name, config in configs.items()]
    print(table(found, options.device, console))
    return 0


if __name__ == "__main__":
    leave(main)
