"""A made-up run folder and table folder with everything that a report can show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GROUPS = ["stem.0", *(f"stages.{s}.{b}.conv{c}" for s in range(3) for b in range(2) for c in (1, 2)), "head.fc"]
FULL = [32, *([32] * 4), *([64] * 4), *([128] * 4), 256]
FAMILIES = {
    "conv": 0.55,
    "pointwise": 0.13,
    "conv_first": 0.07,
    "reorder": 0.06,
    "elementwise": 0.1,
    "global_pool": 0.03,
    "gemm": 0.06,
}


def kernels(total_ms: float, seed: int) -> list[dict[str, Any]]:
    """A network's executed nodes, in order, that sum to ``total_ms``."""
    rng = np.random.default_rng(seed)
    listed = [("conv_first", "stem.0"), ("reorder", "reorder_in")]
    for stage in range(3):
        for block in range(2):
            listed += [("conv", f"stages.{stage}.{block}.conv1"), ("conv", f"stages.{stage}.{block}.conv2")]
            listed += [("elementwise", f"stages.{stage}.{block}.add"), ("pointwise", f"stages.{stage}.{block}.down")]
    listed += [("global_pool", "pool"), ("gemm", "head.fc")]
    weights = np.array([FAMILIES[f] * rng.uniform(0.5, 1.5) for f, _ in listed])
    times = weights / weights.sum() * total_ms
    return [{"node": n, "family": f, "ms": round(float(t), 6)} for (f, n), t in zip(listed, times, strict=True)]


def row(name: str, ms: float, widths: list[int], accuracy: float, seed: int) -> dict[str, Any]:
    share = float(np.mean([w / f for w, f in zip(widths, FULL, strict=True)]))
    return {
        "name": name,
        "predicted_ms": ms * 1.013,
        "low_ms": ms * 0.94,
        "high_ms": ms * 1.09,
        "measured_ms": ms,
        "raw_p50_ms": ms * 1.02,
        "budget_ms": None if name == "full" else 1.5,
        "macs": int(14.2e6 * share**2),
        "parameters": int(310e3 * share**2),
        "accuracy": accuracy,
        "widths": dict(zip(GROUPS, widths, strict=True)),
        "kernels": kernels(ms * 1.013, seed),
    }


def explanation(reason: str = "stem.0: 30 channels run as 32: 28 would save 0.12 ms (8 %)") -> dict[str, Any]:
    """What a run's pipeline leaves in ``explain.json``."""
    layers, stairs = [], []
    for at, (name, units) in enumerate(zip(GROUPS, FULL, strict=True)):
        ms, bound = 0.02 * (at + 1), ("compute", "memory", "overhead")[at % 3]
        parts = {"compute_ms": 0.2 * ms, "memory_ms": 0.2 * ms, "overhead_ms": 0.2 * ms} | {f"{bound}_ms": 0.6 * ms}
        layers.append(
            {"name": name, "ms": ms, "share": ms / 1.5, "bound": bound, **parts, "channels": units - 2,
             "runs_as": units, "group": name, "down": units - 8, "up": None, "saved_ms": 0.01 * at, "kernels": []}
        )  # fmt: skip
        widths = list(range(4, units + 1, 2))
        times = [1.0 + 0.01 * at * math.ceil(width / 8) for width in widths]
        stairs.append(
            {"group": name, "layers": [name], "width": units - 2, "units": units, "down": units - 8, "up": units,
             "saved_ms": 0.01 * at, "edges": widths[2::4], "widths": widths, "ms": times}
        )  # fmt: skip
    return {
        "schema": "hwsearch.explanation", "version": 1, "ms": 1.5, "overhead_ms": 0.02,
        "parts": {"compute_ms": 0.8, "memory_ms": 0.5, "overhead_ms": 0.2}, "layers": layers, "stairs": stairs,
        "reasons": [reason], "note": "",
    }  # fmt: skip


def width_space() -> dict[str, Any]:
    """What a run's preparation leaves in ``space.json``."""
    groups = [
        {"name": name, "units": units, "widths": list(range(8, units + 1, 8)), "step": 8,
         "writes": [f"{name}.weight[0]", f"{name}.bn.bias[0]"], "reads": [f"{after}.weight[1] x4"], "mixed": False,
         "cost": {"smallest": 1.0, "middle": 1.5, "full": 2.0}}
        for name, units, after in zip(GROUPS, FULL, [*GROUPS[1:], "classifier"], strict=True)
    ]  # fmt: skip
    return {
        "schema": "hwsearch.space", "version": 1, "groups": groups, "log10_size": 8.1, "unit": "ms",
        "frozen": {"it is the network's output": ["classifier.weight axis 0"]}, 
        "unknown_operations": ["aten.x at a.py:3"],
    }  # fmt: skip


def write_run(folder: Path, *, status: str = "pass", candidates: int = 400) -> Path:
    """A whole run; ``status`` is that of its verdict."""
    rng = np.random.default_rng(0)
    found_ms = {"pass": 1.447, "conditional": 1.447, "fail": 1.561}[status]
    found = [int(w * s) for w, s in zip(FULL, rng.choice([0.25, 0.5, 0.75, 1.0], len(FULL)), strict=True)]
    scored = []
    for _ in range(candidates):
        ms = float(rng.uniform(0.7, 1.7))
        loss = float(0.62 - 0.16 * math.log(ms + 0.3) + abs(rng.normal(0, 0.02)))
        scored.append({"widths": found, "loss": loss, "ms": [ms]})
    scored.sort(key=lambda c: c["loss"])
    limit = {
        "name": "x86-ort-1t",
        "max_ms": 1.5,
        "predicted_ms": found_ms * 1.013,
        "low_ms": 1.36,
        "high_ms": 1.58,
        "measured_ms": found_ms,
        "correction": 0.99,
    }
    own_loss = min((c["loss"] for c in scored if abs(c["ms"][0] - 1.45) < 0.05), default=0.5)
    result = {
        "schema": "hwsearch.search_result",
        "version": 1,
        "method": "cafenet",
        "seed": 0,
        "groups": GROUPS,
        "widths": found,
        "limits": [limit],
        "loss": own_loss,
        "metric": 0.9031,
        "macs": 6_412_000,
        "parameters": 121_300,
        "candidates": scored,
        "extra": {},
    }
    rows = [
        row("full", 2.913, FULL, 0.9178, 1),
        row("uniform", 1.462, [max(8, w * 5 // 8) for w in FULL], 0.9052, 2),
        row("found", found_ms, found, 0.9113, 3),
    ]
    summary = {
        "schema": "hwsearch.summary",
        "version": 1,
        "model": "resnet_small",
        "device": "x86-ort-1t",
        "rows": rows,
    }
    events = [{"event": "search_started", "time": "2031-01-01T00:00:00Z", "elapsed_s": 0.1}]
    phases = (("super-network", 600, 2.4), ("found", 900, 1.9), ("uniform", 900, 1.95), ("full", 900, 1.85))
    for phase, steps, start in phases:
        for step in range(0, steps + 1, 20):
            loss = 0.28 + start * math.exp(-step / 150) + float(rng.normal(0, 0.02))
            event = {"event": "train", "phase": phase, "step": step, "loss": loss}
            if step % 100 == 0:
                event["metric"] = 0.92 - 0.7 * math.exp(-step / 120)
            events.append(event)
        events.append({"event": "stage", "stage": phase, "seconds": steps * 0.11})
    fingerprint = {
        "cpu": "AMD EPYC",
        "isa": "AVX2",
        "runtime": "onnxruntime",
        "runtime_version": "1.31.1",
        "threads": 1,
        "precision": "float32",
        "system": "Linux",
        "governor": "unknown",
    }
    manifest = {
        "schema": "hwsearch.bundle",
        "version": 1,
        "device": "x86-ort-1t",
        "budget_ms": 1.5,
        "noise_floor": 0.043,
        "reference_ms": 0.634,
        "fingerprint": fingerprint,
        "files": {"model.onnx": {"bytes": 1, "sha256": "ab" * 32}},
    }
    reasons = {
        "pass": [],
        "conditional": ["the raw median of 1.59 ms is above 1.565 ms, the budget and the noise floor of 4.3 %"],
        "fail": ["measured 1.561 ms is above the budget of 1.5 ms by 4.1 %"],
    }[status]
    verdict = {
        "schema": "hwsearch.verdict",
        "version": 1,
        "status": status,
        "reasons": reasons,
        "notes": [],
        "name": "found",
        "device": "x86-ort-1t",
        "budget_ms": 1.5,
        "predicted_ms": found_ms * 1.013,
        "measured_ms": found_ms,
        "raw_p50_ms": 1.59 if status == "conditional" else found_ms * 1.02,
        "raw_p90_ms": found_ms * 1.1,
        "spread": 0.008,
        "rounds": 40,
        "noise_floor": 0.043,
        "exit_code": 0 if status == "pass" else 1,
        "numerics": {"ok": True, "max_abs_error": 2.1e-6, "max_relative_error": 3.4e-7, "allowed": 1e-3, "cases": 3},
    }
    (folder / "bundle").mkdir(parents=True)
    settings = {"device": "x86-ort-1t", "budget_ms": 1.5, "train": {"epochs": 3}}
    config = {"schema": "hwsearch.run", "version": 1, "settings": settings}
    timed = [{**kernel, "measured_ms": kernel["ms"] / 1.013} for kernel in kernels(found_ms * 1.013, 3)]
    times = {"schema": "hwsearch.kernel_times", "version": 1, "device": "x86-ort-1t", "kernels": timed}
    for name, value in (
        ("result.json", result),
        ("summary.json", summary),
        ("config.json", config),
        ("explain.json", explanation()),
        ("space.json", width_space()),
        ("kernels.json", times),
        ("bundle/manifest.json", manifest),
        ("bundle/verdict.json", verdict),
    ):
        (folder / name).write_text(json.dumps(value))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def write_card(table: Path, *, points: bool = False) -> Path:
    """What `hwsearch fit` leaves in a table folder, as far as a report reads it."""
    rng = np.random.default_rng(5)
    logs = sorted(float(e) for e in rng.normal(0, 0.06, 240))

    def errors(mape: float, count: int, coverage: float | None = None) -> dict[str, Any]:
        within = {"within_5": 0.6, "within_10": 0.84, "spearman": 0.991, "coverage": coverage}
        return {"count": count, "mape": mape, "rmspe": mape * 1.4, **within}

    families = {"conv": 0.05, "pointwise": 0.11, "depthwise": 0.17, "reorder": 0.19, "gemm": 0.08, "pool": 0.02}
    card = {
        "device": "x86-ort-1t", "networks": 240, "kernels": 7200, "seconds": 150.0, "noise_floor": 0.043,
        "unseen": errors(0.061, 240, 0.91), "unseen_family": errors(0.094, 240, 0.83),
        "rivals": {"macs_line": errors(0.318, 240)},
        "by_source": {"random:resnet": errors(0.05, 120, 0.92)}, "interval": 0.11,
        "by_family": {family: errors(mape, 500) for family, mape in families.items()},
    }  # fmt: skip
    if points:
        measured = np.exp(rng.uniform(-2, 1.5, len(logs)))
        card["points"] = [
            [float(m), float(m * math.exp(-e)), ("random:resnet", "random:mobile")[i % 2]]
            for i, (m, e) in enumerate(zip(measured, rng.permutation(logs), strict=True))
        ]
        card["bounds"] = [[point[1] * 0.9, point[1] * 1.1] for point in card["points"]]
        card["residuals"] = {
            family: [round(factor * mape, 6) for factor in (-2, -0.5, 0.1, 0.6, 2)] for family, mape in families.items()
        }
    (table / "predictor").mkdir(parents=True)
    (table / "predictor" / "card.json").write_text(json.dumps(card))
    (table / "predictor" / "manifest.json").write_text(json.dumps({"log_errors": logs}))
    return table


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run whose network keeps its budget."""
    return write_run(tmp_path / "quickstart")


@pytest.fixture
def made_card() -> Callable[..., Path]:
    """``write_card``, for tests."""
    return write_card
