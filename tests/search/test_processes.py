"""Two processes under torchrun (gloo): the same widths in each, and the result of one process for the same batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hwsearch.errors import InputError
from hwsearch.search.budget import Budget, Limit, MegaMacs
from hwsearch.search.cafenet import CafeNet, CafeNetConfig
from hwsearch.search.evolution import EvolutionSettings
from hwsearch.search.scoring import ScoringConfig
from hwsearch.train import processes
from hwsearch.train.loop import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))

from small_cafenet import small_model, small_space, small_task

REPOSITORY = Path(__file__).resolve().parents[2]


def search(folder: Path) -> dict[str, object]:
    """A whole small search: super-network, evolution, finalists, winner."""
    model, task = small_model(), small_task()
    space = small_space(model)
    training = TrainConfig(steps=6, batch_size=16, learning_rate=0.05, checkpoint_s=0)
    config = CafeNetConfig(
        training=training, winner=training, bins="none", finalists=2, finalist_share=0.5,
        scoring=ScoringConfig(calibration_images=32, images=None, batch_size=16),
        evolution=EvolutionSettings(population=4, generations=3),
    )  # fmt: skip
    half = space.macs(space.full()) / 2e6
    budget = Budget([Limit(MegaMacs(space), half)])
    result = CafeNet(space, budget, config, model=model, folder=folder).search(task, None)
    assert result.model is not None
    return {
        "candidates": [[list(c.choice.widths), c.loss] for c in result.candidates],
        "widths": list(result.choice.widths),
        "metric": result.metric,
        "weights": [float(p.detach().double().sum()) for p in result.model.parameters()],
        "statistics": [float(b.double().sum()) for b in result.model.buffers()],
    }


_SCRIPT = """
import importlib.util, json, sys
from pathlib import Path
from hwsearch.train import processes
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("joint", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["joint"] = module
spec.loader.exec_module(module)
with processes.joined() as rank:
    found = module.search(Path(sys.argv[2]))
    Path(sys.argv[3] + f"-{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    script = tmp_path / "joint.py"
    script.write_text(_SCRIPT)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631",
        str(script), __file__, str(tmp_path / "run"), str(tmp_path / "found"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    alone = search(tmp_path / "alone")
    assert first["widths"] == alone["widths"]
    assert {tuple(widths) for widths, _ in first["candidates"]} == {tuple(w) for w, _ in alone["candidates"]}  # type: ignore[union-attr]
    losses = {tuple(widths): loss for widths, loss in alone["candidates"]}  # type: ignore[union-attr]
    for widths, loss in first["candidates"]:
        assert loss == pytest.approx(losses[tuple(widths)], rel=2e-3)
    np.testing.assert_allclose(first["weights"], alone["weights"], rtol=2e-3, atol=2e-3)  # type: ignore[arg-type]
    np.testing.assert_allclose(first["statistics"], alone["statistics"], rtol=2e-3, atol=2e-3)  # type: ignore[arg-type]
    # Only the first process wrote the run; the same search goes on from it and finds the same.
    assert (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run").glob("**/*rank*"))


def test_alone_nothing_is_shared() -> None:
    assert (processes.count(), processes.rank()) == (1, 0)
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.gathered([1]) == [1]
    assert processes.mean(2.5) == 2.5
    with processes.joined() as rank:
        assert rank == 0


def test_a_batch_that_cannot_be_split_equally_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    assert processes.share(np.arange(6)).tolist() == [3, 4, 5]
    with pytest.raises(InputError, match="cannot be split over 2"):
        processes.share(np.arange(5))
