"""A crew of workers by a pretended Ray: who does what, who is left out, and what becomes of a dead worker's item.

The real Ray is in ``tests/search/test_cluster_search.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from hwsearch.errors import InputError
from hwsearch.train import cluster, processes
from hwsearch.train.cluster import Cluster, Crew


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


@dataclass
class PretendedRay:
    """Runs everything in this process, when it is asked for. ``fate(worker, call)`` may raise instead of a call."""

    processors: int = 2
    fate: Callable[[int, int], None] = lambda worker, call: None
    deaf: int = 0  #: so many times nobody is ready
    killed: list[Any] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __post_init__(self) -> None:
        self.hired = self.asked = 0
        self.calls: list[tuple[int, str]] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.processors)}

    def put(self, value: Any) -> Any:
        if isinstance(value, Unsendable):
            raise TypeError("cannot pickle 'socket' object")
        return value

    def remote(self, **settings: Any) -> Callable[[type], Any]:
        self.settings = settings

        def make(kind: type) -> Any:
            def start(*arguments: Any) -> Any:
                self.hired += 1
                return PretendedActor(self, self.hired, kind(*arguments))

            return SimpleNamespace(remote=start)

        return make

    def wait(self, refs: list[Any], num_returns: int, timeout: float | None) -> tuple[list[Any], list[Any]]:
        assert num_returns == 1
        if timeout == 0 and self.deaf:
            self.deaf -= 1
            return [], refs
        self.asked += 1
        chosen = self.asked % len(refs)
        return [refs[chosen]], refs[:chosen] + refs[chosen + 1 :]

    def get(self, ref: Any) -> Any:
        return ref.call()

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.number)


@dataclass(eq=False)
class Reference:
    call: Callable[[], Any]


class PretendedActor:
    def __init__(self, ray: PretendedRay, number: int, held: Any) -> None:
        self.ray, self.number, self.held, self.made = ray, number, held, 0
        self.proof = SimpleNamespace(remote=lambda: self._later("proof"))
        self.work = SimpleNamespace(remote=lambda *arguments: self._later("work", *arguments))

    def _later(self, method: str, *arguments: Any) -> Reference:
        def call() -> Any:
            self.made += 1
            self.ray.calls.append((self.number, method))
            self.ray.fate(self.number, self.made)
            return getattr(self.held, method)(*arguments)

        return Reference(call)


class Squares:
    """The work: squares of numbers; ``proofs`` are given one after another, the first here."""

    def __init__(self, *proofs: Any) -> None:
        self.proofs = list(proofs)

    def proof(self) -> Any:
        return self.proofs.pop(0) if self.proofs else 1.0

    def square(self, number: int) -> int:
        if number == 13:
            raise ValueError("13 has no square here")
        return number * number


class Unsendable(Squares):
    pass


def crew(ray: PretendedRay, work: Squares | None = None) -> tuple[Crew, list[str]]:
    said: list[str] = []
    return Cluster(ray, said.append).crew(work or Squares()), said


def test_items_go_to_workers_and_come_back_in_order() -> None:
    ray = PretendedRay(processors=3)
    workers, said = crew(ray)
    told: list[tuple[int, int]] = []
    assert workers("square", range(8), lambda item, result: told.append((item, result))) == [n * n for n in range(8)]
    assert sorted(told) == [(n, n * n) for n in range(8)]
    assert ray.hired == 3
    assert ray.settings == {"num_cpus": 1, "max_restarts": 0}
    assert len({number for number, method in ray.calls if method == "work"}) > 1
    assert (workers.lost, workers.done_there + workers.done_here, said) == (0, 8, [])
    assert workers("square", [5]) == [25]
    assert ray.hired == 3
    workers.close()
    assert sorted(ray.killed) == [1, 2, 3]


def test_nobody_waits_for_workers_that_are_not_there_yet() -> None:
    ray = PretendedRay(deaf=2)
    workers, _ = crew(ray)
    assert workers("square", range(5)) == [0, 1, 4, 9, 16]
    assert workers.done_here >= 2
    nobody, _ = crew(PretendedRay(processors=0))
    assert nobody("square", range(3)) == [0, 1, 4]
    assert nobody.done_here == 3


def test_what_a_dead_worker_had_in_hand_is_done_by_another() -> None:
    def second_dies(worker: int, call: int) -> None:
        if worker == 2 and call == 2:
            raise RayError("The actor died unexpectedly\n  its process ended by SIGKILL")

    ray = PretendedRay(fate=second_dies)
    workers, said = crew(ray)
    assert workers("square", range(9)) == [n * n for n in range(9)]
    assert workers.lost == 1
    assert ray.hired == 3  # one in its place
    assert said == ["a worker was lost (its process ended by SIGKILL)"]


def test_where_all_workers_die_the_work_is_done_here() -> None:
    def dies(worker: int, call: int) -> None:
        raise RayError("gone")

    ray = PretendedRay(fate=dies)
    workers, _ = crew(ray)
    for _ in range(5):
        assert workers("square", range(6)) == [n * n for n in range(6)]
    assert workers.lost == ray.hired == 6  # three times as many as there is room for, and no more
    assert workers.done_here == 30


def test_a_worker_that_computes_otherwise_is_left_out() -> None:
    ray = PretendedRay()
    workers, said = crew(ray, Squares([1.0], [1.0 + 2**-52], [1.0]))
    assert workers("square", range(6)) == [n * n for n in range(6)]
    assert len(ray.killed) == 1
    assert said == [f"a worker computes [{1.0 + 2**-52}], this machine [1.0]: it is left out"]
    assert {number for number, method in ray.calls if method == "work"}.isdisjoint(ray.killed)


def test_an_error_of_the_work_itself_comes_as_it_is() -> None:
    def wrapped(worker: int, call: int) -> None:
        if call > 1:
            raise RayTaskError("ValueError in another process")

    workers, _ = crew(PretendedRay(fate=wrapped))
    with pytest.raises(ValueError, match="13 has no square here"):
        workers("square", [1, 13])
    assert workers.lost == 0


def test_work_that_cannot_be_sent_is_refused() -> None:
    workers, _ = crew(PretendedRay(), Unsendable())
    with pytest.raises(InputError, match=r"cannot be sent to other processes \(cannot pickle 'socket' object\)"):
        workers("square", [1])


def test_no_address_no_cluster() -> None:
    with cluster.joined(None) as joined:
        assert joined is None
        assert cluster.current() is None


def test_ray_must_be_installed_and_torchrun_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'hwsearch\[ray\]'"), cluster.joined("auto"):
        pass
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(InputError, match="either torchrun or a Ray cluster"), cluster.joined("auto"):
        pass


def test_a_connection_is_made_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def init(**settings: Any) -> None:
        if settings["address"] == "nowhere:1":
            raise ConnectionError("Could not find any\nrunning Ray instance")
        made.append(settings)

    ray = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: made.append("shutdown"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    with cluster.joined("local") as joined:
        assert cluster.current() is joined is not None
    assert cluster.current() is None
    asked = {"address": "local", "log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    assert made == [asked, "shutdown"]
    message = r"'nowhere:1' \(Could not find any running Ray instance\)"
    with pytest.raises(InputError, match=message), cluster.joined("nowhere:1"):
        pass
