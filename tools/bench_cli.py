#!/usr/bin/env python
"""How long hwsearch itself takes to start and to answer, process by process, as a person at a terminal waits for it.

    python tools/bench_cli.py --device x86-ort-1t          a device with a predictor (hwsearch profile, hwsearch fit)
    python tools/bench_cli.py --device simulated --quick   to try it out: a small network, a device made on the spot

Four commands in turn: an interpreter that does nothing (part of every other line), ``import hwsearch``, ``hwsearch
--help``, and ``hwsearch estimate`` of a ResNet-50 at 1x3x224x224 as an ONNX file, which asks the runtime for the graph
that it would execute and prices every kernel of it. The network is built and exported once, folded, with random
weights, and not timed. Each command is started once before it counts, so files are in the system's cache. The tool
holds the machine-wide timing lock; ``--busy`` does without, for orientation beside other work. The result is a table
on the standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from ending import leave

from hwsearch.device.lock import background_lock, timing_lock
from hwsearch.device.machine import instruction_sets, processor
from hwsearch.device.spec import Device
from hwsearch.errors import InputError

SHAPE = (1, 3, 224, 224)
PREDICTOR = "predictor"


@dataclass(frozen=True)
class Row:
    """One command: wall-clock seconds of whole processes, and what was aimed at."""

    command: str
    n: int
    median_s: float
    fastest_s: float
    slowest_s: float
    aim_s: float | None


def write_resnet50(path: Path) -> None:
    """ResNet-50 (He et al., 2016; the stride in the 3x3), folded, with random weights, as an ONNX file."""
    import torch
    from torch import Tensor, nn

    from hwsearch.graph.onnx_build import export_onnx
    from hwsearch.reparam.fold import fold

    def conv(inside: int, outside: int, size: int, stride: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outside))

    class Bottleneck(nn.Module):
        def __init__(self, inside: int, middle: int, stride: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                conv(inside, middle, 1), nn.ReLU(), conv(middle, middle, 3, stride), nn.ReLU(),
                conv(middle, 4 * middle, 1),
            )  # fmt: skip
            same = stride == 1 and inside == 4 * middle
            self.shortcut = nn.Identity() if same else conv(inside, 4 * middle, 1, stride)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layers(x) + self.shortcut(x))

    torch.manual_seed(0)
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for index, (blocks, middle) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, middle, 2 if index > 0 and block == 0 else 1))
            channels = 4 * middle
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    example = torch.zeros(SHAPE)
    path.write_bytes(export_onnx(fold(nn.Sequential(*layers).eval(), example), example))


def write_small(path: Path) -> None:
    """A network that is exported in a second, for trying the tool out."""
    import torch

    from hwsearch.graph.onnx_build import export_onnx
    from hwsearch.models.resnet import resnet_small
    from hwsearch.reparam.fold import fold

    example = torch.zeros(1, 1, 28, 28)
    path.write_bytes(export_onnx(fold(resnet_small().eval(), example), example))


def hwsearch(*words: str) -> list[str]:
    """The command as a shell would find it; as a module where no script is installed beside the interpreter."""
    script = Path(sys.executable).with_name("hwsearch")
    return [str(script), *words] if script.exists() else [sys.executable, "-m", "hwsearch", *words]


def seconds(command: Sequence[str], environment: dict[str, str]) -> float:
    """Wall-clock seconds of a process from its start to its end.

    Raises:
        InputError: it fails; its last line is told.
    """
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    spent = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise InputError(f"{' '.join(command[:3])} ... ended with {done.returncode}: {last}")
    return spent


def bench(commands: dict[str, tuple[list[str], float | None]], environment: dict[str, str], rounds: int) -> list[Row]:
    """Every command once for nothing, then all of them in turn, ``rounds`` times."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, (command, _) in commands.items():
            spent = seconds(command, environment)
            if number:
                times[name].append(spent)
    return [
        Row(name, len(found), statistics.median(found), min(found), max(found), commands[name][1])
        for name, found in times.items()
    ]


def made_for_trying(device: Device, home: Path, environment: dict[str, str]) -> None:
    """A table and a predictor of a simulated device, in a home of its own."""
    (home / "devices").mkdir(parents=True, exist_ok=True)
    (home / "devices" / f"{device.name}.toml").write_text('runtime = "simulated"\n', encoding="utf-8")
    seconds(hwsearch("profile", "--device", device.name, "--minutes", "0.1"), environment)
    seconds(hwsearch("fit", "--device", device.name), environment)


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = ["| command | n | median s | fastest to slowest | aim |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.command} | {row.n} | {row.median_s:.3f} | {row.fastest_s:.3f} to {row.slowest_s:.3f} | "
        f"{'' if row.aim_s is None else f'below {row.aim_s:g}'} |"
        for row in rows
    ]
    return "\n".join(lines)


def machine() -> str:
    """Where, and with what."""
    name, flags = processor()
    packages = ("hwsearch", "onnx", "onnxruntime", "numpy", "scikit-learn", "typer")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{name} ({instruction_sets(flags)}), {os.cpu_count()} cores, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="x86-ort-1t", help="a device with a predictor; a simulated one needs none")
    parser.add_argument("--rounds", type=int, default=9, help="how often each command is started and counted")
    parser.add_argument("--network", type=Path, help="keep the ONNX file here, and use it where it is there")
    parser.add_argument("--quick", action="store_true", help="a small network in the place of ResNet-50")
    parser.add_argument("--busy", action="store_true", help="do not wait for a quiet machine")
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    asked = parser.parse_args()
    rows = run(asked)
    if asked.json:
        print(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}))
    else:
        print(f"{machine()}\n\n{markdown(rows)}")
    return 0


def run(asked: argparse.Namespace) -> list[Row]:
    """Makes what is missing, then times all commands."""
    if asked.rounds < 1:
        raise InputError(f"--rounds is {asked.rounds}: give 1 or more")
    device = Device.load(asked.device)
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if not (device.table_folder / PREDICTOR / "manifest.json").exists():
            if not device.simulated:
                raise InputError(
                    f"{device.name} has no predictor: run hwsearch profile --device {device.name}, then hwsearch fit "
                    f"--device {device.name}"
                )
            environment["HWSEARCH_HOME"] = str(Path(folder) / "home")
            made_for_trying(device, Path(folder) / "home", environment)
        name = "a small network" if asked.quick else "ResNet-50"
        network: Path = asked.network or Path(folder) / "network.onnx"
        if not network.exists():
            with background_lock():
                (write_small if asked.quick else write_resnet50)(network)
        commands: dict[str, tuple[list[str], float | None]] = {
            "python -c pass": ([sys.executable, "-c", "pass"], None),
            "import hwsearch": ([sys.executable, "-c", "import hwsearch"], 0.2),
            "hwsearch --help": (hwsearch("--help"), 0.5),
            f"hwsearch estimate of {name} as ONNX": (
                hwsearch("estimate", str(network), "--device", device.name), 4.0,
            ),
        }  # fmt: skip
        with contextlib.nullcontext() if asked.busy else timing_lock():
            return bench(commands, environment, asked.rounds)


if __name__ == "__main__":
    leave(main)
