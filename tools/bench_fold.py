#!/usr/bin/env python
"""Times re-parameterised networks unfolded and folded, on one device, and proves that both compute the same.

    python tools/bench_fold.py --device x86-ort-1t                          the three networks at 1x3x224x224
    python tools/bench_fold.py --device simulated --only repvgg_small --json
    python tools/bench_fold.py --device x86-ort-1t --also timm:fastvit_t8   any model, where timm is installed

Networks: RepVGG-A0, ResNet-18 of DBB blocks (bn_pad as in the paper, and pad_first) and MobileOne-S0, with random
weights and random batch norm statistics (times do not depend on them). Unfolded and folded are exported alike and timed
in turn by ``hwsearch.latency.measure``, which takes the machine-wide timing lock. "nodes" are the kernels that the
runtime really runs; "error" is the folded network in torch against the unfolded one, relative to the largest output.
The result goes to the standard output; --csv appends it to a file.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from ending import leave
from torch import Tensor, nn

from hwsearch.device.check import DeviceCheck
from hwsearch.device.lock import background_lock
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.errors import InputError
from hwsearch.graph.onnx_build import export_onnx
from hwsearch.latency.measure import measure_many
from hwsearch.models import load_factory, resnet18
from hwsearch.models.mobileone import mobileone_s0, mobileone_small
from hwsearch.models.repvgg import repvgg_a0, repvgg_small
from hwsearch.reparam.fold import fold
from hwsearch.reparam.rewrite import reparametrize
from hwsearch.reparam.statistics import randomise


@dataclass(frozen=True)
class Row:
    """One network: milliseconds unfolded and folded, spreads, kernels that run, and the error of the fold."""

    network: str
    unfolded_ms: float
    folded_ms: float
    ratio: float
    unfolded_spread: float
    folded_spread: float
    unfolded_raw_p50_ms: float
    folded_raw_p50_ms: float
    unfolded_nodes: int
    folded_nodes: int
    error: float
    verdict: str


def dbb_resnet18(border: str) -> nn.Module:
    """ResNet-18 whose convolutions larger than 1x1 are DBB blocks."""
    model = resnet18()
    reparametrize(model, "dbb", border=border, keep=False)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "repvgg_a0": (repvgg_a0, (1, 3, 224, 224)),
    "dbb_resnet18": (partial(dbb_resnet18, "bn_pad"), (1, 3, 224, 224)),
    "dbb_resnet18_pad_first": (partial(dbb_resnet18, "pad_first"), (1, 3, 224, 224)),
    "mobileone_s0": (mobileone_s0, (1, 3, 224, 224)),
}
#: For trying the tool out.
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "repvgg_small": (repvgg_small, (1, 1, 28, 28)),
    "mobileone_small": (mobileone_small, (1, 1, 28, 28)),
}


def build(factory: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[bytes, bytes, float]:
    """ONNX bytes unfolded and folded, and the relative error of the fold on one input."""
    with background_lock():
        torch.manual_seed(0)
        model = factory().eval()
        example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        randomise(model, example, torch.Generator().manual_seed(1))
        folded = fold(model, example)
        with torch.no_grad():
            expected: Tensor = model(example)
            error = float((folded(example) - expected).abs().max() / expected.abs().max())
        return export_onnx(model, example), export_onnx(folded, example), error


def bench(name: str, factory: Callable[[], nn.Module], shape: tuple[int, ...], session: DeviceSession) -> Row:
    """Build, time and compare one network."""
    unfolded, folded, error = build(factory, shape)
    check = None if session.device.simulated else DeviceCheck.load(session.device.table_folder)
    before, after = measure_many(
        [("unfolded", unfolded), ("folded", folded)],
        session,
        reference_ms=check.reference_ms if check else None,
        noise_floor=check.noise_floor if check else None,
        allow_unfolded=True,
    )
    nodes = [len(kernels) for kernels in session.lower([unfolded, folded])]
    return Row(
        network=name,
        unfolded_ms=before.measured_ms,
        folded_ms=after.measured_ms,
        ratio=before.measured_ms / after.measured_ms,
        unfolded_spread=before.spread,
        folded_spread=after.spread,
        unfolded_raw_p50_ms=before.raw_p50_ms,
        folded_raw_p50_ms=after.raw_p50_ms,
        unfolded_nodes=nodes[0],
        folded_nodes=nodes[1],
        error=error,
        verdict="steady" if before.verdict == after.verdict == "steady" else "noisy",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="x86-ort-1t", help="name of a device, or simulated")
    parser.add_argument("--only", nargs="+", choices=[*NETWORKS, *SMALL], help="networks; all large ones by default")
    parser.add_argument("--also", nargs="+", default=[], help="more models at 1x3x224x224, such as timm:fastvit_t8")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: {**NETWORKS, **SMALL}[name] for name in arguments.only or NETWORKS}
    chosen |= {name: (partial(load_factory, name), (1, 3, 224, 224)) for name in arguments.also}
    rows = []
    with open_session(Device.load(arguments.device)) as session:
        for name, (factory, shape) in chosen.items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows.append(bench(name, factory, shape, session))
            if arguments.csv:
                append(arguments.csv, arguments.device, rows[-1])
    about = {
        "device": arguments.device,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime")},
    }
    if arguments.json:
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))
        return 0
    print(f"{about['device']} ({about['machine']}), {about['versions']}")
    print("| network | unfolded ms | folded ms | ratio | nodes | spread | error |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.network} | {row.unfolded_ms:.4g} | {row.folded_ms:.4g} | {row.ratio:.2f} | "
            f"{row.unfolded_nodes} → {row.folded_nodes} | {max(row.unfolded_spread, row.folded_spread):.1%} | "
            f"{row.error:.1g} |"
        )
    return 0


def append(path: Path, device: str, row: Row) -> None:
    """Add one row to a CSV file, with a header where the file is new."""
    values = {"device": device, **asdict(row)}
    try:
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(values))
            if new:
                writer.writeheader()
            writer.writerow(values)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose a writable path") from error


if __name__ == "__main__":
    leave(main)
