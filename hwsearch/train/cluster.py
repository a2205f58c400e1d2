"""A Ray cluster of the user's own: what can be done in parts is done by its workers, with the result of one process.

``joined(address)`` connects this program to the cluster. Inside, a search hands its candidates out to workers; each
holds a copy of the search's work (network, data), sent once. What a part gives depends on its item alone, so neither
the number of workers nor who does what can change a result:

- before it gets anything to do, a worker shows that it computes as this process does, bit for bit; one on another
  processor, or with another torch, is left out, and named;
- what a worker had in hand when it died goes to another one, or is done here when there is none (left).

Ray's processes talk in Ray's own format, which is pickle: whoever reaches a cluster can run code on it, so a cluster
belongs into a network of its owner's. It is never written to, or read from, a file of hwsearch.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from hwsearch.errors import InputError

T = TypeVar("T")

#: Workers that are hired for one crew in all, in times of those that the cluster can hold: some may die.
_HIRES = 3
#: What starts a cluster on this machine, for as long as the program runs.
LOCAL = "local"

Say = Callable[[str], None]


class Work(Protocol):
    """What every worker holds a copy of: the methods that a crew is asked for, and how copies are told to be equal."""

    def proof(self) -> Any:
        """Something small to compute that is equal only where everything is computed alike."""


@contextmanager
def joined(address: str | None, say: Say | None = None) -> Iterator[Cluster | None]:
    """Connect to a Ray cluster; None for an address does nothing at all.

    Args:
        address: ``auto`` (the cluster that this machine belongs to), ``host:port`` of its head, or ``local``: processes
            of this machine. A program that has connected to Ray itself keeps its connection.
        say: told in one line about workers that are left out or lost.

    Raises:
        InputError: Ray is not installed, there is no cluster at the address, or torchrun started several processes.

    Example:
        >>> with joined("auto"):
        ...     CafeNet(space, budget).search(task, None)                                 # doctest: +SKIP
    """
    global _current
    if address is None:
        yield None
        return
    from hwsearch.train import processes

    if processes.count() > 1:
        raise InputError("torchrun's processes share the candidates already: use either torchrun or a Ray cluster")
    ray, ours = _connected(address)
    before = _current
    _current = Cluster(ray, say or (lambda text: None))
    try:
        yield _current
    finally:
        _current.close()
        _current = before
        if ours:
            ray.shutdown()


def current() -> Cluster | None:
    """The cluster that this program has joined."""
    return _current


class Cluster:
    """A joined cluster."""

    def __init__(self, ray: Any, say: Say) -> None:
        self.ray, self.say = ray, say
        self._crews: list[Crew] = []

    @property
    def processors(self) -> int:
        """Processors that the cluster has for work."""
        return int(self.ray.cluster_resources().get("CPU", 0))

    def crew(self, work: Work, threads: int = 1) -> Crew:
        """Workers that hold a copy of ``work``, each with so many processors."""
        crew = Crew(self, work, threads)
        self._crews.append(crew)
        return crew

    def close(self) -> None:
        """Let all workers go, and tell what they did."""
        for crew in self._crews:
            crew.close()
        there, here = (sum(getattr(crew, name) for crew in self._crews) for name in ("done_there", "done_here"))
        if there + here:
            self.say(f"the cluster's workers did {there} of {there + here} candidates")
        self._crews.clear()


class Crew:
    """Workers for one piece of work. They are hired when there is something to do, and replaced where they die.

    Attributes:
        lost: workers that died.
        done_there, done_here: items that workers did, and those that were done in this process for want of one.
    """

    def __init__(self, cluster: Cluster, work: Work, threads: int) -> None:
        self._cluster, self._ray, self._work, self._threads = cluster, cluster.ray, work, threads
        self.lost = self.done_there = self.done_here = 0
        self._hired = self._refused = 0
        self._idle: list[Any] = []
        self._proving: dict[Any, Any] = {}
        self._busy: dict[Any, tuple[Any, int, Any]] = {}
        self._copy: Any = None
        self._proof: Any = None

    def __call__(self, method: str, items: Sequence[T], done: Callable[[T, Any], None] | None = None) -> list[Any]:
        """``work.method(item)`` for each item, in their order; ``done`` hears of each as soon as it is known.

        Raises:
            whatever the method raises here: an item that failed on a worker is done again in this process.
        """
        self._hire(len(items))
        results: dict[int, Any] = {}
        waiting = deque(enumerate(items))

        def finished(index: int, item: T, result: Any) -> None:
            results[index] = result
            if done is not None:
                done(item, result)

        def here(index: int, item: T) -> None:
            self.done_here += 1
            finished(index, item, getattr(self._work, method)(item))

        while len(results) < len(items):
            while waiting and self._idle:
                index, item = waiting.popleft()
                worker = self._idle.pop()
                self._busy[worker.work.remote(method, item)] = worker, index, item
            alone = bool(waiting) and not self._busy
            if alone:  # nobody is there (yet)
                here(*waiting.popleft())
            for ref in self._ready([*self._busy, *self._proving], wait=not alone):
                if ref in self._proving:
                    self._judge(ref)
                    continue
                worker, index, item = self._busy.pop(ref)
                try:
                    result = self._ray.get(ref)
                except self._ray.exceptions.RayTaskError:
                    self._idle.append(worker)
                    here(index, item)  # where the error, should it be one, comes as it is
                except self._ray.exceptions.RayError as error:
                    self._say_lost(error)
                    waiting.appendleft((index, item))
                    self._hire(len(waiting))
                else:
                    self._idle.append(worker)
                    self.done_there += 1
                    finished(index, item, result)
        return [results[index] for index in range(len(items))]

    def close(self) -> None:
        """Let the workers go."""
        for worker in [*self._idle, *self._proving.values(), *(worker for worker, _, _ in self._busy.values())]:
            self._ray.kill(worker)
        self._idle, self._proving, self._busy, self._copy = [], {}, {}, None

    def _ready(self, refs: list[Any], *, wait: bool) -> list[Any]:
        if not refs:
            return []
        return list(self._ray.wait(refs, num_returns=1, timeout=None if wait else 0)[0])

    def _hire(self, wanted: int) -> None:
        """As many workers as there are items, or as the cluster holds; each begins with its proof."""
        most = self._cluster.processors // self._threads - self._refused
        there = len(self._idle) + len(self._proving) + len(self._busy)
        count = min(wanted, most, max(_HIRES * most - self._hired, 0)) - there
        if count <= 0:
            return
        if self._copy is None:
            self._proof = self._work.proof()
            try:
                self._copy = self._ray.put(self._work)
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"the search cannot be sent to other processes ({reason}): leave the cluster out, or make what it "
                    "is made of (the model, the task) fit for pickling"
                ) from error
        remote = self._ray.remote(num_cpus=self._threads, max_restarts=0)(_Worker)
        for _ in range(count):
            worker = remote.remote(self._copy)
            self._proving[worker.proof.remote()] = worker
            self._hired += 1

    def _judge(self, ref: Any) -> None:
        """A worker has shown what it computes: it is taken, or left out."""
        worker = self._proving.pop(ref)
        try:
            found = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._say_lost(error)
            return
        if found == self._proof:
            self._idle.append(worker)
            return
        self._refused += 1
        self._ray.kill(worker)
        self._cluster.say(f"a worker computes {found}, this machine {self._proof}: it is left out")

    def _say_lost(self, error: Exception) -> None:
        self.lost += 1
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        self._cluster.say(f"a worker was lost ({lines[-1][:200] if lines else type(error).__name__})")


class _Worker:
    """What runs in a worker's process."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def proof(self) -> Any:
        """See ``Work``."""
        return self._work.proof()

    def work(self, method: str, item: Any) -> Any:
        """One item."""
        return getattr(self._work, method)(item)


_current: Cluster | None = None


def _connected(address: str) -> tuple[Any, bool]:
    """Ray, and whether this call connected it.

    Raises:
        InputError: it is not installed, or nothing answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise InputError("a cluster needs Ray, which is not installed: pip install 'hwsearch[ray]'") from None
    if ray.is_initialized():
        return ray, False
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        settings["include_dashboard"] = False
    try:
        ray.init(address=address, **settings)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"no Ray cluster answers at {address!r} ({reason}): start one with `ray start --head`, or use local"
        ) from None
    return ray, True
