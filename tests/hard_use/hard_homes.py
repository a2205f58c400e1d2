"""What a home of hard use holds beside its table: a model folder and a finished run, made without a search."""

from __future__ import annotations

import json
from pathlib import Path

MODEL = "hwsearch.models.vgg:vgg_small"


def model_folder(folder: Path) -> None:
    """A reference model as ``save_model`` writes it, narrow: its factory may be built unasked."""
    from hwsearch.graph.model_folder import save_model
    from hwsearch.models.vgg import vgg_small

    save_model(folder, vgg_small(width=0.25), factory=MODEL, input_shape=(1, 1, 16, 16), factory_kwargs={"width": 0.25})


def finished_run(folder: Path) -> None:
    """The files of a run that a report looks at."""
    folder.mkdir(parents=True)
    limit = {
        "name": "simulated",
        "max_ms": 1.0,
        "predicted_ms": 0.9,
        "low_ms": 0.8,
        "high_ms": 1.1,
        "measured_ms": 0.95,
    }
    found = {"widths": [8, 16], "loss": 0.4, "macs": 100_000, "parameters": 2000}
    rows = [
        {"name": name, "predicted_ms": ms, "measured_ms": ms, "budget_ms": 1.0, "macs": 1e5, "metric": 0.8,
         "widths": [8, 16], "kernels": [{"node": "conv", "family": "conv", "ms": ms}]}
        for name, ms in (("full", 1.8), ("uniform", 0.99), ("found", 0.95))
    ]  # fmt: skip
    files = {
        "config.json": {
            "schema": "hwsearch.run",
            "version": 1,
            "settings": {"device": {"name": "simulated"}, "model": {"factory": MODEL}, "run": {"seed": 0}},
        },
        "result.json": {
            "schema": "hwsearch.search_result", "version": 1, "method": "cafenet", "seed": 0, "metric": 0.8,
            "groups": ["0", "3"], "limits": [limit], "extra": {}, **found,
            "candidates": [{"widths": [8, 16], "loss": 0.4, "ms": [0.9]}, {"widths": [4, 8], "loss": 0.9, "ms": [0.5]}],
        },
        "summary.json": {
            "schema": "hwsearch.summary", "version": 1, "device": "simulated", "groups": ["0", "3"],
            "metric_name": "accuracy", "rows": rows, "status": "pass", "statuses": {"simulated": "pass"},
        },
        "space.json": {"unit": "ms", "groups": [{"name": "0", "units": 8, "widths": [4, 8], "cost": {"full": 1.0}}]},
        "explain.json": {
            "schema": "hwsearch.explanation", "version": 1, "reasons": ["It computes."],
            "layers": [{"name": "0", "share": 0.7, "bound": "compute", "compute_ms": 0.5}],
            "stairs": [{"group": "0", "width": 8, "widths": [4, 8], "ms": [0.5, 0.9], "down": 4, "up": 8}],
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    events = [{"event": "step", "stage": "winner", "step": step, "loss": 1 / step} for step in range(1, 6)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def table(home: Path) -> None:
    """The table and the predictor of the simulated device: few networks and small trees, nobody relies on them."""
    from hwsearch.device.spec import Device
    from hwsearch.latency.predictor import LatencyPredictor
    from hwsearch.latency.profile import profile

    device = Device.load("simulated")
    assert device.home == home.resolve()
    measured = profile(device, minutes=60, networks=16)
    LatencyPredictor(rounds=3, tune=False, folds=2).fit(measured).save(device.table_folder / "predictor")
