"""A search and campaigns on a real Ray cluster of two workers, one killed half-way: nothing is lost or changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hwsearch.campaigns import FILES, Campaign, profile_all
from hwsearch.device.spec import Device
from hwsearch.search.budget import Budget, Limit, MegaMacs
from hwsearch.search.cafenet import CafeNet, CafeNetConfig
from hwsearch.search.evolution import EvolutionSettings
from hwsearch.search.scoring import ScoringConfig
from hwsearch.train import cluster
from hwsearch.train.data import Batch
from hwsearch.train.loop import TrainConfig
from hwsearch.train.task import Classification

sys.path.insert(0, str(Path(__file__).parent))

from small_cafenet import small_model, small_space, small_task

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'hwsearch[ray]'")

pytestmark = pytest.mark.long

#: Judging a choice takes four batches, and a worker's proof two choices: it dies in the middle of its first item.
PROOF, BATCHES = 8, 4


@dataclass(frozen=True)
class Deadly(Classification):
    """Once, in a process other than ``home``, ends it as ``kill -9`` does; or its whole pretended machine."""

    mark: str = ""
    home: int = 0
    machine: bool = False

    def tally(self, output: Tensor, batch: Batch) -> Tensor:
        seen = self.__dict__["seen"] = self.__dict__.get("seen", 0) + 1
        if os.getpid() == self.home:
            joined = cluster.current()
            for crew in joined._crews if joined is not None else []:
                if crew._proving and not crew.done_there:
                    # or this process had judged everything before a worker, or the next one, has started
                    ray.wait(list(crew._proving), timeout=120)
        elif seen == PROOF + BATCHES // 2:
            with contextlib.suppress(FileExistsError):  # of two that come here together one dies
                Path(self.mark).touch(exist_ok=False)
                if self.machine:  # its raylet; without it a worker lives on for a moment, and may finish its item
                    os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().tally(output, batch)


def search(folder: Path, mark: Path, *, machine: bool = False) -> dict[str, Any]:
    """A whole small search: super-network, evolution, finalists, winner; everything that it gives, bit for bit."""
    model, data = small_model(), small_task()
    space = small_space(model, quantum=1)
    task = Deadly(data.train, data.valid, mark=str(mark), home=os.getpid(), machine=machine)
    training = TrainConfig(steps=6, batch_size=16, learning_rate=0.05, checkpoint_s=0)
    config = CafeNetConfig(
        training=training, winner=training, bins="none", finalists=3, finalist_share=0.5,
        scoring=ScoringConfig(calibration_images=32, images=None, batch_size=16),
        evolution=EvolutionSettings(population=8, generations=4),
    )  # fmt: skip
    budget = Budget([Limit(MegaMacs(space), space.macs(space.full()) / 2e6)])
    result = CafeNet(space, budget, config, model=model, folder=folder).search(task, None)
    assert result.model is not None
    bits = hashlib.sha256()
    for value in result.model.state_dict().values():
        bits.update(value.detach().contiguous().numpy().tobytes())
    return {"weights": bits.hexdigest(), "result": result.to_dict(), "losses": lines(folder / "state/losses.jsonl")}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("alone")
    found = search(folder / "run", folder / "never")
    assert not (folder / "never").exists()
    # workers cannot import this file: what it defines is sent along
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return found


@pytest.fixture
def two_machines() -> Iterator[None]:
    """Two pretended machines (a raylet each) of a processor each, and a head that only keeps the books."""
    from ray.cluster_utils import Cluster

    books = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        books.add_node(num_cpus=1)
    ray.init(address=books.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    books.shutdown()


@pytest.fixture
def two_workers(alone: dict[str, Any]) -> Iterator[Any]:
    """A cluster of two workers on this machine, which also offers two devices."""
    ray.init(
        address="local", num_cpus=2, resources={"device-one": 1, "device-two": 1}, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    yield ray
    ray.shutdown()


def test_a_search_on_a_cluster_is_the_search_of_one_process(
    alone: dict[str, Any], two_workers: Any, tmp_path: Path
) -> None:
    said: list[str] = []
    with cluster.joined("auto", said.append) as joined:
        assert joined is not None
        spread = search(tmp_path / "spread", tmp_path / "died")
        (crew,) = joined._crews
    assert (tmp_path / "died").exists(), "no worker was killed"
    assert crew.lost == 1
    assert "a worker was lost" in said[0]
    assert said[1:] == [f"the cluster's workers did {crew.done_there} of {crew.done_there + crew.done_here} candidates"]
    assert crew.done_there > 0
    assert spread == alone


def test_a_machine_that_is_gone_half_way_changes_nothing(
    alone: dict[str, Any], two_machines: None, tmp_path: Path
) -> None:
    said: list[str] = []
    with cluster.joined("auto", said.append) as joined:
        assert joined is not None
        assert joined.processors == 2
        spread = search(tmp_path / "spread", tmp_path / "died", machine=True)
        (crew,) = joined._crews
    assert (tmp_path / "died").exists(), f"no machine was killed: {said}"
    assert crew.lost == 1
    assert crew.done_there > 0
    assert spread == alone


def test_results_stand_alone_on_standard_output(home: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "hwsearch",
        "profile",
        "-d",
        "simulated",
        "--minutes",
        "0.01",
        "--ray",
        "local",
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(done.stdout)["devices"]
    assert one["networks"] > 0


def half_way(device: Device) -> bool:
    """Whether a campaign has written visits and not yet its table. Reading its journal would lock it out."""
    log = device.table_folder / "journal.sqlite-wal"
    return log.exists() and log.stat().st_size > 200_000 and not (device.table_folder / "networks.csv").exists()


def workers_of_campaigns() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::") and b"_there" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_campaigns_on_a_cluster_survive_the_death_of_a_worker(two_workers: Any, tmp_path: Path) -> None:
    campaign = Campaign(minutes=0.12)
    devices = [Device(name, "simulated", home=tmp_path / "home") for name in ("one", "two")]
    (tmp_path / "home").mkdir()
    killed: list[int] = []

    def kill_one() -> None:
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            if half_way(devices[0]) and (there := workers_of_campaigns()):
                os.kill(there[0], signal.SIGKILL)
                killed.append(there[0])
            time.sleep(0.02)

    reaper = threading.Thread(target=kill_one, daemon=True)
    reaper.start()
    said: list[str] = []
    with cluster.joined("auto") as joined:
        found = profile_all(devices, campaign, said.append, joined)
    reaper.join()
    assert killed, "no worker was killed half-way"
    assert [one.error for one in found] == ["", ""]
    assert any(text.startswith("[one] profiling on ") for text in said)
    alone = [replace(device, home=tmp_path / "alone") for device in devices]
    plain = profile_all(alone, campaign, said.append)
    assert [one.networks for one in plain] == [one.networks for one in found]
    for mine, other in zip(devices, alone, strict=True):
        for name in FILES:
            assert (mine.table_folder / name).read_bytes() == (other.table_folder / name).read_bytes(), name
