"""Somebody else's network, data and training, walked through as a new user would, in a folder of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hwsearch.config import RunConfig
from hwsearch.console import Console
from hwsearch.deployment import _task
from hwsearch.errors import InputError
from hwsearch.graph.widths import WidthSpace
from hwsearch.model_argument import load_model_argument
from hwsearch.preparation import prepare

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own_model"
MODULES = {"net.py": "petal_net", "data.py": "petal_data", "training.py": "petal_training"}
CONFIG = """
[run]
name = "petal"
[device]
name = "simulated"
[profile]
minutes = 0.1
[model]
factory = "petal_net:petal_small"
input = "1x3x32x32"
kwargs = { num_classes = 5 }
weights = "petal.safetensors"
[data]
factory = "petal_data:splits"
kwargs = { count = 120 }
[search]
budget = "75%"
start = "model"
quantum = 4
minimum = 0.25
candidates = 10
population = 5
finalists = 1
score_images = 20
calibration_images = 32
[supernet]
steps = 6
batch_size = 16
[train]
callback = "petal_training:Recipe"
steps = 8
batch_size = 16
learning_rate = 0.005
"""


@pytest.fixture
def project(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example's files in a folder of the user's, under names of the user's, and trained weights."""
    for source, name in MODULES.items():
        shutil.copy(EXAMPLE / source, home / f"{name}.py")
    monkeypatch.syspath_prepend(str(home))
    torch.manual_seed(3)
    model = load_model_argument("petal_net:petal_small", (1, 3, 32, 32)).need_module()
    save_file(model.state_dict(), home / "petal.safetensors")
    torch.save(model.state_dict(), home / "petal.pt")
    torch.save(torch.nn.DataParallel(model).state_dict(), home / "wrapped.pt")
    (home / "petal.toml").write_text(CONFIG)
    yield home
    for name in MODULES.values():
        sys.modules.pop(name, None)


def settings(**sections: Any) -> RunConfig:
    import tomllib

    plain = tomllib.loads(CONFIG)
    return RunConfig.from_dict({name: {**plain[name], **sections.get(name, {})} for name in plain})


def test_the_networks_groups_are_found(project: Path) -> None:
    argument = load_model_argument("petal_net:petal_small", (1, 3, 32, 32))
    space = WidthSpace.from_model(argument.need_module(), argument.example_input)
    names = {group.name for group in space.groups}
    assert {"stem.0", "body.0.near.0", "body.0.far_a.0", "body.0.se.down", "body.3.squeeze.0"} <= names
    assert len(names) == 15


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"factory": "petal_net:petal_large"}}, r"petal_net has no 'petal_large'; it has .*petal_small"),
        ({"model": {"factory": "petal_nett:petal_small"}}, "no Python module 'petal_nett' for the model"),
        ({"model": {"kwargs": {"classes": 5}}}, "petal_small fails: TypeError: .*classes"),
        ({"model": {"input": "1x5x32x32"}}, r"Petal fails on an input of shape \(1, 5, 32, 32\)"),
        ({"model": {"weights": "petal.pt"}}, "is no safetensors file but a pickled one"),
        ({"model": {"weights": "petal.bin"}}, "there are no weights at petal.bin"),
        ({"model": {"kwargs": {"num_classes": 4}}}, "has shape .* for head.fc.bias where the model has"),
        ({"model": {"kwargs": {"num_classes": 3}, "weights": None}}, "has class [34], but the network has 3"),
        ({"data": {"factory": "petal_data:Blobs", "kwargs": {"count": 9, "seed": 1}}}, r"returned Blobs: give \(train"),
        ({"data": {"factory": "petal_data:gone"}}, "petal_data has no 'gone'"),
        ({"data": {"kwargs": {"count": "many"}}}, r"fails: TypeError: .* \(petal_data\.py:\d+\)"),
        ({"train": {"callback": "petal_training:Rezept"}}, "has no 'Rezept'"),
        ({"train": {"callback": "petal_net:Gate"}}, "callback factory petal_net:Gate fails: TypeError"),
        ({"train": {"callback": "petal_net:petal_small"}}, "is a Petal without begin, optimiser"),
    ],
)
def test_every_mistake_is_one_line_before_the_device_is_asked(
    project: Path, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught, prepare(settings(**sections), Console(json=True)):
        pass
    assert "\n" not in str(caught.value)
    assert not (project / "latency_tables").exists()
    assert not (project / "runs").exists()


def test_weights_of_a_wrapper_are_told_as_such(project: Path) -> None:
    state = torch.load(project / "wrapped.pt", weights_only=True)
    save_file(state, project / "wrapped.safetensors")
    with (
        pytest.raises(InputError, match=r"begin with 'module\.', those of a wrapper"),
        prepare(settings(model={"weights": "wrapped.safetensors"}), Console(json=True)),
    ):
        pass


def test_data_that_a_run_folder_names_are_loaded_for_whoever_names_them_too(project: Path) -> None:
    """A run folder can come from a stranger: what it names is not run unasked."""
    folder = project / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"settings": settings().to_dict()}))
    argument = load_model_argument("petal_net:petal_small", (1, 3, 32, 32))
    found = type(argument)(str(folder), argument.input_shape, module=argument.module)
    sys.modules.pop("petal_data", None)
    with pytest.raises(InputError, match="if you trust it, name it: --data petal_data:splits"):
        _task(found, None)
    assert "petal_data" not in sys.modules
    assert len(_task(found, "petal_data:splits").train) == 120, "with the run's own arguments"


@pytest.mark.long
def test_the_whole_path(project: Path) -> None:
    """From the config to a verified bundle, to 8 bits and back from the run folder; standard output is the result."""

    def hwsearch(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hwsearch", *words], capture_output=True, text=True, check=False, timeout=600,
            env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    done = hwsearch("run", "petal.toml", "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    rows = {row["name"]: row for row in outcome["rows"]}
    assert outcome["verdict"]["status"] == "pass"
    assert rows["found"]["measured_ms"] <= rows["found"]["budget_ms"]
    log = [json.loads(line) for line in (project / "recipe.log").read_text().splitlines()]
    assert {entry["step"] for entry in log} == {0}, "steps 0 to 7 of each training, every tenth told"
    assert "Written by hwsearch" in (project / "runs/petal/report.html").read_text()
    kernels = json.loads((project / "runs/petal/kernels.json").read_text())
    assert sum(kernel["measured_ms"] for kernel in kernels["kernels"]) == pytest.approx(kernels["measured_ms"])
    result = (project / "runs/petal/result.json").read_bytes()
    assert hwsearch("run", "petal.toml", "--json").returncode == 0
    assert (project / "runs/petal/result.json").read_bytes() == result

    refused = hwsearch("estimate", "runs/petal", "--device", "simulated")
    assert refused.returncode == 2
    assert "--allow-factory petal_net:petal_small" in refused.stderr
    allowed = ("--allow-factory", "petal_net:petal_small")
    assert hwsearch("estimate", "runs/petal", "--device", "simulated", *allowed).returncode == 0
    eight = ("deploy", "runs/petal", "--device", "simulated", "--precision", "int8", "--output", "eight", *allowed)
    refused = hwsearch(*eight)
    assert refused.returncode == 2
    assert "--data petal_data:splits" in refused.stderr
    done = hwsearch(*eight, "--data", "petal_data:splits")
    assert done.returncode == 0, done.stderr
