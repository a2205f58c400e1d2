#!/usr/bin/env python
"""Compares the extraction of width groups with Torch-Pruning's, network by network, and times it on ResNet-50.

    python tools/bench_dependencies.py run --output build        every network; resumes where it stopped
    python tools/bench_dependencies.py speed --output build      ResNet-50, one process
    python tools/bench_dependencies.py table --output build      both as Markdown

Networks: the small architectures of ``tests/graph`` and, where they are installed, those of torchvision and timm.
Torch-Pruning is needed beside them (``pip install --no-deps torch-pruning timm torchvision``). Random weights, batch 1.

Both libraries bring every group that they find to half its width, on their own. A network counts as done when the
result runs with the output shape of the original, and, where no operation mixes over channels, when its output equals
the original's with the dropped channels silenced (relative difference below 1e-3, float32). Torch-Pruning is told which
layers make the output, as its manual asks; nothing else is tuned for either.

``finer``: those of our groups whose parameter axes all lie in one of Torch-Pruning's groups.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import platform
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "graph"))

import architectures
import installed_zoo

from hwsearch.errors import HwsearchError
from hwsearch.graph.capture import capture, first_line
from hwsearch.graph.dependencies import extract
from hwsearch.graph.growth import grow
from hwsearch.graph.surgery import first_tensor, kill_units, randomise, shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace

TOLERANCE = 1e-3
CLOSE = 1e-5  # above it, in float32, both libraries are judged in float64
FIELDS = ("network", "extent", "ours", "groups", "neutral", "frozen_by_check", "left", "shrunk", "grown", "theirs",
          "their_groups", "their_left", "their_shrunk", "finer", "coarser")  # fmt: skip
Slots = frozenset[tuple[str, int]]


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Factory and input shape of every network."""
    own = {f"own:{name}": (make, architectures.IMAGE) for name, make in architectures.ARCHITECTURES.items()}
    installed = {name: (make, installed_zoo.image(name)) for name, make in installed_zoo.factories().items()}
    return {**own, **installed}


def compare(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], limit_s: int) -> dict[str, Any]:
    """One row: what both libraries make of one network."""
    torch.manual_seed(0)
    model = make().eval()
    randomise(model)
    example = torch.randn(shape)
    row: dict[str, Any] = {"network": name, "extent": shape[-1]}
    slots: list[Slots] = []
    outputs: set[str] = set()
    neutral = False
    try:
        with at_most(limit_s), torch.no_grad():
            found, slots, outputs, neutral = our_side(model, example)
            if not all(float(found[key]) <= CLOSE for key in ("shrunk", "grown") if found[key] != "refused"):
                # Random weights can amplify rounding: what is a difference of the function stays one in float64.
                model, example = model.double(), example.double()
                found, slots, outputs, neutral = our_side(model, example)
                found["grown"] = f"{found['grown']} in float64"
        row |= found
    except (HwsearchError, TimeoutError) as error:
        row["ours"] = first_line(error)
    try:
        with at_most(limit_s):
            found, theirs = their_side(model, example, outputs, neutral)
        row |= found
    except Exception as error:  # whatever another library raises is a failure of that row
        row["theirs"] = f"{type(error).__name__}: {first_line(error)}"[:160]
        theirs = []
    if theirs and slots:
        row["finer"] = sum(any(ours <= group for group in theirs) for ours in slots)
        row["coarser"] = len(slots) - row["finer"]
    return row


def our_side(model: nn.Module, example: Tensor) -> tuple[dict[str, Any], list[Slots], set[str], bool]:
    """Our row, our groups' weight axes, the modules that make the output, and whether every group is neutral."""
    plain = WidthSpace.from_model(model, example, verify=False)
    space = WidthSpace.from_model(model, example)
    half = WidthChoice(tuple(max(1, group.units // 2) for group in space.groups))
    small = shrink(model, space, half)
    capture(small, example)  # it exports
    rng = np.random.default_rng(0)
    pairs = list(zip(space.groups, half.widths, strict=True))
    choice = WidthChoice(tuple(width if group.neutral else group.units for group, width in pairs))
    keep = {group.name: rng.permutation(group.units)[: choice.widths[i]] for i, group in enumerate(space.groups)}
    dropped = {group.name: np.setdiff1d(np.arange(group.units), keep[group.name]) for group in space.groups}
    shrunk = difference(kill_units(model, space, dropped)(example), shrink(model, space, choice, keep)(example))
    widths = {g.name: g.units + 1 + g.units // 4 if g.neutral else 2 * g.units for g in space.groups}
    try:
        grown = difference(model(example), grow(model, space, widths, check=False)(example))
    except (RuntimeError, ValueError) as error:  # its Python code fixes a size; ``check=True`` says so in one line
        print(f"not grown: {first_line(error)}", file=sys.stderr)
        grown = float("inf")
    row = {
        "groups": len(space.groups), "neutral": sum(group.neutral for group in space.groups),
        "frozen_by_check": len(plain.groups) - len(space.groups), "shrunk": f"{shrunk:.1e}",
        "grown": f"{grown:.1e}" if grown < float("inf") else "refused",
        "left": f"{space.parameters(half) / space.network.parameters:.3f}",
        "ours": "differs" if shrunk >= TOLERANCE else "ok" if grown < TOLERANCE else "shrinks only",
    }  # fmt: skip
    slots = [
        frozenset((slot.parameter, slot.axis) for slot in group.slots if slot.parameter.endswith("weight"))
        for group in space.groups
    ]
    outputs = {
        item.parameter.rpartition(".")[0]
        for item in extract(space.network).frozen
        if item.axis == 0 and "network's output" in item.reason
    }
    return row, slots, outputs, all(group.neutral for group in plain.groups)


def their_side(
    model: nn.Module, example: Tensor, outputs: set[str], neutral: bool
) -> tuple[dict[str, Any], list[Slots]]:
    """Torch-Pruning's row and its groups' weight axes."""
    import torch_pruning as tp

    wanted = first_tensor(model(example)).shape
    whole = copy.deepcopy(model)
    names = {module: name for name, module in whole.named_modules()}
    ignored = [module for module, name in names.items() if name in outputs]
    graph = tp.DependencyGraph().build_dependency(whole, example)
    groups = [_slots(group, graph, names) for group in graph.get_all_groups(ignored_layers=ignored)]
    small = copy.deepcopy(model)
    pruner = tp.pruner.BasePruner(
        small, example, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=[module for name, module in small.named_modules() if name in outputs],
    )  # fmt: skip
    pruner.step()
    row: dict[str, Any] = {"their_groups": len(groups)}
    before, after = (sum(p.numel() for p in net.parameters()) for net in (model, small))
    row["their_left"] = f"{after / before:.3f}"
    got = first_tensor(small(example))
    if got.shape != wanted:
        return {**row, "theirs": f"output of shape {tuple(got.shape)}"}, groups
    if after == before:
        return {**row, "theirs": "nothing pruned"}, groups
    if not neutral:
        return {**row, "theirs": "ok", "their_shrunk": "shape only"}, groups
    change = difference(_silenced(model, example, pruner.pruning_history())(example), got)
    return {**row, "their_shrunk": f"{change:.1e}", "theirs": "ok" if change < TOLERANCE else "differs"}, groups


def _slots(group: Any, graph: Any, names: dict[nn.Module, str]) -> Slots:
    """The weight axes that a group of Torch-Pruning cuts."""
    found = set()
    for dependency, _ in group:
        module, reads = dependency.target.module, graph.is_in_channel_pruning_fn(dependency.handler)
        if isinstance(module, nn.Parameter):
            found.add((graph._param_to_name[module], dependency.target.pruning_dim))
        elif module in names and isinstance(getattr(module, "weight", None), Tensor):
            both = reads and not graph.is_out_channel_pruning_fn(dependency.handler)
            axis = int(both) ^ isinstance(module, nn.modules.conv._ConvTransposeNd)
            found.add((f"{names[module]}.weight", axis if module.weight.dim() > 1 else 0))
    return frozenset(found)


def _silenced(model: nn.Module, example: Tensor, history: Any) -> nn.Module:
    """A copy of ``model`` that reads only what the pruned network still reads.

    Which inputs those are is read off a second copy whose every weight holds its own input index: it is pruned by the
    same history.
    """
    import torch_pruning as tp

    marked, silent = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for module in marked.modules():
            axis = _reading(module)
            if axis is not None:
                index = torch.arange(module.weight.shape[axis], dtype=torch.float32)
                module.weight.copy_(_along(index, axis, module.weight).expand_as(module.weight))
    tp.DependencyGraph().build_dependency(marked, example).load_pruning_history(history)
    with torch.no_grad():
        for (_, module), (_, other) in zip(marked.named_modules(), silent.named_modules(), strict=True):
            axis = _reading(other)
            if axis is not None:
                mask = torch.zeros(other.weight.shape[axis])
                mask[module.weight.movedim(axis, 0).flatten(1)[:, 0].long()] = 1.0
                other.weight.mul_(_along(mask, axis, other.weight))
    return silent


def _along(values: Tensor, axis: int, like: Tensor) -> Tensor:
    return values.view([-1 if place == axis else 1 for place in range(like.dim())])


def _reading(module: nn.Module) -> int | None:
    """The axis over which a module's weight reads channels, or None."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 0 if module.groups == 1 else None
    if isinstance(module, nn.modules.conv._ConvNd):
        return None if module.groups == module.in_channels > 1 else 1
    return 1 if isinstance(module, nn.Linear) else None


def difference(wanted: Any, got: Any) -> float:
    """Largest difference of the first output, relative to its largest value."""
    a, b = first_tensor(wanted), first_tensor(got)
    return float((a - b).abs().max() / (a.abs().max() or 1.0))


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise ``TimeoutError`` inside when it takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def speed(repeats: int) -> dict[str, Any]:
    """CPU seconds of one process for ResNet-50 at 224x224, in turn: the export alone, ours with it, Torch-Pruning's."""
    import torch_pruning as tp

    vision = installed_zoo.package("torchvision")
    model, example = vision.resnet50(weights=None).eval(), torch.randn(1, 3, 224, 224)
    seconds: dict[str, list[float]] = {"export": [], "ours": [], "theirs": []}
    for turn in range(repeats + 1):  # the first one warms up
        for name, act in (
            ("export", lambda: torch.export.export(model, (example,))),
            ("ours", lambda: WidthSpace.from_model(model, example, verify=False)),
            ("theirs", lambda: list(tp.DependencyGraph().build_dependency(model, example).get_all_groups())),
        ):
            start = time.process_time()
            act()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {
        "repeats": repeats, "seconds": seconds, "torch": torch.__version__,
        "torch-pruning": version("torch-pruning"), "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows written so far."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_table(folder: Path) -> str:
    """The rows and the timing as Markdown."""
    rows = read_rows(folder / "dependencies.csv")
    lines = ["| networks | n | ours | Torch-Pruning | our groups finer or equal |", "|---|---|---|---|---|"]
    for source in ("own", "torchvision", "timm", ""):
        chosen = [row for row in rows if row["network"].startswith(source + ":" if source else "")]
        if chosen:
            ours, theirs = (sum(row[key] == "ok" for row in chosen) for key in ("ours", "theirs"))
            finer, coarser = (sum(int(row[key] or 0) for row in chosen) for key in ("finer", "coarser"))
            share = f"{finer} of {finer + coarser}"
            lines.append(f"| {source or 'all'} | {len(chosen)} | {ours} | {theirs} | {share} |")
    lines += ["", "| network | groups | left at half width | shrunk | grown | Torch-Pruning | its groups | left |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        ours = row["groups"] if row["ours"] == "ok" else row["ours"]
        lines.append(
            f"| {row['network']} | {ours} | {row['left']} | {row['shrunk']} | {row['grown']} | {row['theirs']} "
            f"| {row['their_groups']} | {row['their_left']} |"
        )
    timing = folder / "dependencies.json"
    if timing.is_file():
        found = json.loads(timing.read_text())
        middle = {name: statistics.median(times) for name, times in found["seconds"].items()}
        spread = {name: max(times) - min(times) for name, times in found["seconds"].items()}
        beyond = middle["ours"] - middle["export"]
        lines += [
            "",
            f"ResNet-50 at 224x224, CPU seconds in one process, median of {found['repeats']} (range): torch.export "
            f"{middle['export']:.2f} ({spread['export']:.2f}); groups with their export {middle['ours']:.2f} "
            f"({spread['ours']:.2f}), so {beyond:.2f} beyond it, {beyond / middle['export']:.2f} of it; "
            f"Torch-Pruning's graph and groups {middle['theirs']:.2f} ({spread['theirs']:.2f}). "
            f"torch {found['torch']}, torch-pruning {found['torch-pruning']}, {found['threads']} thread.",
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "speed", "table"))
    parser.add_argument("--output", type=Path, default=Path("build"), help="folder of the results")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=int, default=100, help="seconds a network and library")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "dependencies.csv"
    if arguments.verb == "speed":
        (arguments.output / "dependencies.json").write_text(json.dumps(speed(arguments.repeats), indent=2) + "\n")
    elif arguments.verb == "run":
        done = {row["network"] for row in read_rows(path)} if path.is_file() else set()
        for name, (make, shape) in networks().items():
            if name not in done and arguments.only in name:
                row = compare(name, make, shape, arguments.limit)
                new = not path.is_file()
                with open(path, "a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print(name, row, flush=True)
    if arguments.verb == "table":
        print(write_table(arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
