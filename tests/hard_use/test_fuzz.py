"""Whatever is done to a good file, its reader gives a value or one clear line: no other exception, no other ending."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hard_case import PREDICTOR, TABLE
from hard_homes import MODEL
from mutating import Mutation, bytewise, cellwise, jsonwise, linewise, tomlwise

from hwsearch.errors import HwsearchError

#: Changes of each file in the suite, and in the long tests.
FEW, MANY = 15, 600


@dataclass(frozen=True)
class Target:
    """A file and who reads it; ``sign`` makes checksums agree again, so that the change is seen at all."""

    name: str
    file: str
    read: Callable[[Path], object]
    mutations: tuple[Mutation, ...]
    sign: Callable[[Path], object] | None = None
    few: int = FEW


def _read_device(home: Path) -> object:
    from hwsearch.device.runtime_simulated import probe
    from hwsearch.device.spec import Device

    return probe(Device.load("simulated"))


def _read_check(home: Path) -> object:
    from hwsearch.device.check import DeviceCheck

    check = DeviceCheck.load(home / TABLE)
    return max(check.noise_floor, check.raw_noise_floor) / check.reference_ms, check.ok


def _read_config(home: Path) -> object:
    from hwsearch.config import RunConfig

    config = RunConfig.load(home / "good.toml")
    return config.run_folder, config.identity()


def _read_table(home: Path) -> object:
    from hwsearch.latency.table import LatencyTable
    from hwsearch.latency.training import Rows

    return Rows.of(LatencyTable.load(home / TABLE).networks).profiler_ms()


def _read_predictor(home: Path) -> object:
    from hwsearch.graph.kernel import Kernel
    from hwsearch.latency.predictor import LatencyPredictor

    predictor = LatencyPredictor.load(home / PREDICTOR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel = Kernel("conv", "Conv", in_channels=8, out_channels=8, in_height=8, in_width=8, kernel_height=3)
        return predictor.network([kernel])


def _read_bundle(home: Path) -> object:
    from hwsearch.deploy.reader import read_bundle

    return read_bundle(home / "bundle")


def _read_model(home: Path) -> object:
    from hwsearch.graph.model_folder import load_model

    return load_model(home / "model")


def _read_result(home: Path) -> object:
    from hwsearch.search.result import SearchResult

    return SearchResult.load(home / "runs/done/result.json").to_json()


def _read_verdict(home: Path) -> object:
    from hwsearch.deploy.verdict import Verdict

    return Verdict.load(home / "bundle/verdict.json").to_dict()


def _read_report(home: Path) -> object:
    from hwsearch.report import report

    return report(home / "runs/done", home / "report.html")


def _read_settings(home: Path) -> object:
    from hwsearch.search.run_folder import open_run

    settings = {"device": {"name": "simulated"}, "model": {"factory": MODEL}, "run": {"seed": 0}}
    with open_run(home / "runs/done", settings) as run:
        return run.events()


def _read_losses(home: Path) -> object:
    import numpy as np

    from hwsearch.search.scores import Scores

    scores = Scores(lambda choices: np.zeros(len(choices)), 4, home / "losses.jsonl", {"seed": 0})
    return scores(np.array([[4, 8]]))


def _read_checkpoint(home: Path) -> object:
    from hwsearch.train import checkpoint

    return checkpoint.load(home / "checkpoint.safetensors", identity={"seed": 0})


def _read_journal(home: Path) -> object:
    from hwsearch.latency.journal import Journal

    with Journal(home / TABLE / "journal.sqlite") as journal:
        journal.meta.all("seed ")
        return journal.done("x"), journal.failed("x"), journal.chosen("x"), journal.measurements()


def _sign_table(home: Path) -> None:
    manifest = json.loads((home / TABLE / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (home / TABLE / name).read_bytes()
        manifest["files"][name] = {"rows": data.count(b"\n") - 1, "sha256": hashlib.sha256(data).hexdigest()}
    (home / TABLE / "manifest.json").write_text(json.dumps(manifest))


def _sign_bundle(home: Path) -> None:
    manifest = json.loads((home / "bundle/manifest.json").read_text())
    for name in manifest["files"]:
        data = (home / "bundle" / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (home / "bundle/manifest.json").write_text(json.dumps(manifest))


def _sign_trees(home: Path) -> None:
    manifest = json.loads((home / PREDICTOR / "manifest.json").read_text())
    for name in manifest["model"]["files"]:
        manifest["model"]["files"][name] = hashlib.sha256((home / PREDICTOR / name).read_bytes()).hexdigest()
    (home / PREDICTOR / "manifest.json").write_text(json.dumps(manifest))


def _sign_weights(home: Path) -> None:
    description = json.loads((home / "model/model.json").read_text())
    data = (home / "model/weights.safetensors").read_bytes()
    description["weights_sha256"] = hashlib.sha256(data).hexdigest()
    (home / "model/model.json").write_text(json.dumps(description))


_JSON, _BYTES = (jsonwise, jsonwise, jsonwise, bytewise), (bytewise,)
TARGETS: tuple[Target, ...] = (
    Target("device file", "devices/simulated.toml", _read_device, (tomlwise, tomlwise, bytewise)),
    Target("device check", f"{TABLE}/device.json", _read_check, _JSON),
    Target("config", "good.toml", _read_config, (tomlwise, tomlwise, bytewise)),
    Target("table's manifest", f"{TABLE}/manifest.json", _read_table, _JSON),
    Target("table's networks", f"{TABLE}/networks.csv", _read_table, (cellwise, bytewise), _sign_table),
    Target("table's kernels", f"{TABLE}/kernels.csv", _read_table, (cellwise, bytewise), _sign_table),
    Target("predictor's manifest", f"{PREDICTOR}/manifest.json", _read_predictor, _JSON),
    Target("predictor's trees", "*.ubj", _read_predictor, _BYTES, _sign_trees),
    Target("bundle's manifest", "bundle/manifest.json", _read_bundle, _JSON),
    Target("bundle's model", "bundle/model.onnx", _read_bundle, _BYTES, _sign_bundle),
    Target("bundle's arrays", "bundle/output_0.npy", _read_bundle, _BYTES, _sign_bundle),
    Target("model's description", "model/model.json", _read_model, _JSON),
    Target("model's weights", "model/weights.safetensors", _read_model, _BYTES, _sign_weights),
    Target("search result", "runs/done/result.json", _read_result, _JSON),
    Target("verdict", "bundle/verdict.json", _read_verdict, _JSON),
    *(
        Target(f"report of {name}", f"runs/done/{name}", _read_report, mutations, few=4)
        for name, mutations in (
            ("result.json", _JSON), ("summary.json", _JSON), ("space.json", _JSON), ("explain.json", _JSON),
            ("config.json", _JSON), ("events.jsonl", (linewise, bytewise)),
        )
    ),
    Target("run's settings", "runs/done/config.json", _read_settings, _JSON),
    Target("search's journal", "losses.jsonl", _read_losses, (linewise, linewise, bytewise)),
    Target("checkpoint", "checkpoint.safetensors", _read_checkpoint, _BYTES),
    Target("campaign's journal", f"{TABLE}/journal.sqlite", _read_journal, _BYTES),
)  # fmt: skip


@pytest.fixture
def more(home: Path) -> Path:
    """The home with what only a search leaves: a verdict, a journal of losses, a checkpoint."""
    import numpy as np
    import torch

    from hwsearch.deploy.verdict import Numerics, Verdict
    from hwsearch.search.scores import Scores
    from hwsearch.train import checkpoint

    numerics = Numerics(True, 0.0, 0.0, 1e-4, 1)
    Verdict("pass", (), ("a note",), "net", "simulated", numerics, 5.0, measured_ms=1.0).save(
        home / "bundle/verdict.json"
    )
    Scores(lambda choices: np.ones(len(choices)), 4, home / "losses.jsonl", {"seed": 0})(np.array([[8, 16], [4, 4]]))
    tensors = {"weight": torch.ones(2, 3)}
    checkpoint.save(
        home / "checkpoint.safetensors", tensors, step=3, identity={"seed": 0}, notes={"history": [[1, 2.0]]}
    )
    return home


def fuzz(target: Target, home: Path, count: int) -> tuple[int, int]:
    """(changes that were refused, changes that were read)."""
    path = min((home / PREDICTOR).glob("*.ubj")) if target.file == "*.ubj" else home / target.file
    beside = path.parent.glob("*.json") if target.sign else ()
    kept = {file: file.read_bytes() for file in (path, *beside)}
    target.read(home)  # the good one
    refused = 0
    for seed in range(count):
        rng = Random(f"{target.name} {seed}")
        for file, data in kept.items():
            file.write_bytes(data)
        path.write_bytes(rng.choice(target.mutations)(rng, kept[path]))
        if target.sign is not None and rng.random() < 0.8:
            target.sign(home)
        for wal in home.rglob("journal.sqlite-*"):
            wal.unlink()
        try:
            target.read(home)
        except HwsearchError as error:
            if not str(error).strip():
                raise AssertionError(f"{target.name}, seed {seed}: nothing is said") from error
            refused += 1
        except Exception as error:
            raise AssertionError(f"{target.name}, seed {seed}: {type(error).__name__}: {error}") from error
    return refused, count - refused


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_changed_file_is_read_or_refused(target: Target, more: Path) -> None:
    refused, read = fuzz(target, more, target.few)
    assert refused + read == target.few


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_many_changed_files_are_read_or_refused(target: Target, more: Path) -> None:
    refused, read = fuzz(target, more, MANY)
    assert refused > MANY // 50 or "report" in target.name, (refused, read)


def _network(home: Path, data: bytes) -> Any:
    from hwsearch.device.simulated_graph import optimised_graph, read_graph
    from hwsearch.latency.memory import peak_memory
    from hwsearch.latency.unfolded import find_unfolded
    from hwsearch.model_argument import load_model_argument

    (home / "bad.onnx").write_bytes(data)
    network = load_model_argument("bad.onnx").onnx
    assert network is not None
    find_unfolded(network)
    return read_graph(optimised_graph(network, block=8)), peak_memory(network)


@pytest.mark.long
def test_many_changed_networks_are_read_or_refused(home: Path) -> None:
    data = (home / "net.onnx").read_bytes()
    refused = 0
    for seed in range(3000):
        try:
            _network(home, bytewise(Random(seed), data))
        except HwsearchError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert 150 < refused < 3000
