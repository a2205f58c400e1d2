"""``open_session(device)``: the host's side of a device. Everything that asks a device goes through here.

Example:
    >>> with open_session("simulated") as session:  # doctest: +SKIP
    ...     for timing in session.time([("a", onnx_bytes)], reference_ms=None, settings=PROFILE):
    ...         print(timing.network, timing.measured_ms)

A network on which the runtime crashes costs that one job: the agent is started again and the others go on. Timings on a
real device hold the machine-wide timing lock for as long as the iterator of :meth:`DeviceSession.time` is being read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from hwsearch import errors
from hwsearch.device.agent import runtime_of
from hwsearch.device.canary import canary_bytes
from hwsearch.device.lock import timing_lock
from hwsearch.device.machine import Machine
from hwsearch.device.runtime_onnxruntime import scratch
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.device.stopwatch import PROFILE, CanaryReference, StopwatchSettings, Timing
from hwsearch.device.transport import AgentGone, LocalTransport
from hwsearch.errors import DeviceJobError, HwsearchError, InternalError
from hwsearch.graph.kernel import Kernel

ErrorHandler = Callable[[str, HwsearchError], None]

#: A batch is cut into jobs of at most so many bytes of networks: they lie in memory as files.
_JOB_BYTES = 128 << 20
_JOB_NETWORKS = 64

#: A busy machine takes its time to start a process.
_START_S = 60.0


def open_session(
    device: Device | str,
    *,
    message: Callable[[str], None] | None = None,
    timeout_s: float = 180.0,
    canary: bytes | None = None,
) -> DeviceSession:
    """A session on a device; a context manager that ends the agent.

    Args:
        device: the device or its name.
        message: told in one line when the session has to wait for the machine; a logged warning by default.
        timeout_s: an agent that says nothing for so long is stopped, and its job has failed.
        canary: the canary as ONNX, where the package that writes it is not there (a board).
    """
    return DeviceSession(
        Device.load(device) if isinstance(device, str) else device, message=message, timeout_s=timeout_s, canary=canary
    )


class DeviceSession:
    """Jobs on one device. Not for use from several threads at once."""

    def __init__(
        self,
        device: Device,
        *,
        message: Callable[[str], None] | None = None,
        timeout_s: float = 180.0,
        canary: bytes | None = None,
    ) -> None:
        self.device = device
        self._message, self._timeout_s = message or logging.getLogger("hwsearch").warning, timeout_s
        self._runtime = runtime_of(device)
        self._agent: LocalTransport | None = None
        self._number = 0
        self._busy = False
        self._fingerprint: Fingerprint | None = None
        self._machine: Machine | None = None
        self._folder, self._alive = _folder()
        self._canary = self._folder / "canary"
        self._canary.write_bytes(canary_bytes() if canary is None else canary)

    def __enter__(self) -> DeviceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the agent and removes its files; the session cannot be used again."""
        self.restart()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def restart(self) -> None:
        """Ends the agent; the next job starts a new one (its memory lies elsewhere, so its times scatter anew)."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    @property
    def agent_pid(self) -> int | None:
        """The agent's process while one runs."""
        return None if self._agent is None else self._agent.pid

    @property
    def fingerprint(self) -> Fingerprint:
        """What the device is, as it says itself."""
        if self._fingerprint is None:
            answer = self._single("probe", {})
            self._fingerprint = Fingerprint.from_dict(answer["fingerprint"])
            self._machine = Machine(**answer["machine"]) if answer.get("machine") else None
        return self._fingerprint

    @property
    def machine(self) -> Machine | None:
        """The device's cores, quota and turbo; None for a simulated one."""
        return self._machine if self.fingerprint else None

    def optimise(self, networks: Sequence[bytes], names: Sequence[str] | None = None) -> list[bytes]:
        """Each network as the runtime would really run it, in the runtime's own form.

        Raises:
            DeviceJobError: the runtime rejects or crashes on a network; names it and the reason.
        """
        labels = (
            list(names) if names is not None else [f"{index + 1} of {len(networks)}" for index in range(len(networks))]
        )
        results: dict[int, bytes] = {}

        def fail(name: str, error: HwsearchError) -> None:
            raise error

        for start, count in _jobs(networks):
            with self._job_folder() as folder:
                paths = _write(folder, networks[start : start + count])
                part = labels[start : start + count]
                with contextlib.closing(self._batch("optimise", folder, part, {}, fail, paths)) as events:
                    for event in events:
                        results[start + event["index"]] = Path(event["path"]).read_bytes()
        return [results[index] for index in range(len(networks))]

    def lower(self, networks: Sequence[bytes], names: Sequence[str] | None = None) -> list[tuple[Kernel, ...]]:
        """Each network's kernels, from the runtime's own optimised graph.

        Raises:
            DeviceJobError: as :meth:`optimise`.
        """
        return [self._runtime.parse(optimised) for optimised in self.optimise(networks, names)]

    def time(
        self,
        networks: Sequence[tuple[str, bytes]],
        *,
        reference_ms: float | None,
        settings: StopwatchSettings = PROFILE,
        nodes: bool = False,
        on_error: ErrorHandler | None = None,
    ) -> Iterator[Timing]:
        """Times networks, interleaved in random order; yields each timing as soon as it is final (any order).

        Args:
            networks: (name, ONNX bytes); names should differ.
            reference_ms: the canary's median of `device check`; None makes each number one of its own moment only.
            settings: how carefully: ``PROFILE`` or ``MEASURE``.
            nodes: also profile: fills ``Timing.node_shares`` and ``Timing.kernels``, one entry each per kernel.
            on_error: told (name, error) of each network that has no timing, and the others go on; without it the error
                is raised. The error is a DeviceJobError (rejected, crashed, silent) or a NoisyDeviceError.

        Raises:
            DeviceJobError, NoisyDeviceError: see ``on_error``.
        """
        lock = contextlib.nullcontext() if self.device.simulated else timing_lock(self._message)
        with lock:
            data = [network for _, network in networks]
            for start, count in _jobs(data):
                with self._job_folder() as folder:
                    yield from self._time_job(
                        folder, networks[start : start + count], reference_ms, settings, nodes, on_error
                    )

    def run(self, network: bytes, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The network's outputs on the device, by name.

        Raises:
            DeviceJobError: the runtime rejects or crashes on the network or its inputs.
        """
        with self._job_folder() as folder:
            (path,) = _write(folder, [network])
            arrays = folder / "inputs.npz"
            numbered: dict[str, Any] = {f"array_{number}": value for number, value in enumerate(inputs.values())}
            np.savez(arrays, **numbered)
            request = {"network": path, "inputs": str(arrays), "names": list(inputs), "folder": str(folder)}
            answer = self._single("run", request)
            with np.load(answer["outputs"], allow_pickle=False) as stored:
                return {name: stored[f"array_{number}"] for number, name in enumerate(answer["names"])}

    def calibrate_canary(self, seconds: float = 3.0) -> CanaryReference:
        """Times the canary alone for some seconds; its median is a device's reference speed."""
        return self.calibrate(seconds)[0]

    def calibrate(self, seconds: float) -> tuple[CanaryReference, float | None, float | None]:
        """As :meth:`calibrate_canary`, with what else went on: cores that others kept busy, cores the hypervisor took.

        The two are None where the system does not tell.
        """
        lock = contextlib.nullcontext() if self.device.simulated else timing_lock(self._message)
        with lock:
            answer = self._single("calibrate", {"canary": str(self._canary), "seconds": seconds})
        return CanaryReference(**answer["reference"]), answer["busy"], answer["stolen"]

    # ------------------------------------------------------------------ jobs

    def _time_job(
        self,
        folder: Path,
        networks: Sequence[tuple[str, bytes]],
        reference_ms: float | None,
        settings: StopwatchSettings,
        nodes: bool,
        on_error: ErrorHandler | None,
    ) -> Iterator[Timing]:
        def fail(name: str, error: HwsearchError) -> None:
            if on_error is None:
                raise error
            on_error(name, error)

        paths = _write(folder, [network for _, network in networks])
        names = [name for name, _ in networks]
        items = [{"name": name, "path": path} for name, path in zip(names, paths, strict=True)]
        request = {
            "canary": str(self._canary),
            "reference_ms": reference_ms,
            "settings": asdict(settings),
            "nodes": nodes,
        }
        with contextlib.closing(self._batch("time", folder, names, request, fail, items)) as events:
            for event in events:
                # the agent knows no kernels: they are parsed here, from the file of the profiled session
                found = {key: value for key, value in event["timing"].items() if key not in ("node_shares", "kernels")}
                timing = Timing(**found)
                if nodes:
                    try:
                        timing = self._with_nodes(timing, event)
                    except DeviceJobError as error:
                        fail(timing.network, error)
                        continue
                yield timing

    def _with_nodes(self, timing: Timing, event: dict[str, Any]) -> Timing:
        path = Path(event["optimised"])
        kernels = self._runtime.parse(path.read_bytes())
        path.unlink()
        shares = event["shares"]
        if [kernel.op for kernel in kernels] != [op for op, _ in shares]:
            raise DeviceJobError(
                f"network {timing.network!r}: the profiler saw {len(shares)} nodes, the optimised graph has "
                f"{len(kernels)} others; time it without nodes"
            )
        keyed = tuple((kernel.node, float(share)) for kernel, (_, share) in zip(kernels, shares, strict=True))
        return replace(timing, node_shares=keyed, kernels=kernels)

    def _batch(
        self,
        job: str,
        folder: Path,
        names: Sequence[str],
        request: dict[str, Any],
        fail: ErrorHandler,
        items: Sequence[Any],
    ) -> Generator[dict[str, Any], None, None]:
        """Events of a job over several networks; after a crash the rest goes on in a new agent.

        Yields:
            one event per network that worked, ``index`` counted in ``items``.
        """
        left = list(range(len(items)))
        unexplained = 0
        while left:
            sent = list(left)  # the agent counts within what it was sent
            request = request | {"networks": [items[index] for index in sent], "folder": str(folder)}
            (folder / "current").unlink(missing_ok=True)
            try:
                with contextlib.closing(self._events(job, request)) as events:
                    for event in events:
                        if "index" not in event:
                            continue
                        index = sent[event["index"]]
                        left.remove(index)
                        if event["event"] == "failed":
                            fail(names[index], self._error(event, names[index]))
                        else:
                            yield event | {"index": index}
                if left:
                    raise InternalError(f"the agent ended the job {job} without a word on {len(left)} networks")
            except AgentGone as gone:
                blamed = _blamed(folder, sent, left)
                if blamed is not None:
                    left.remove(blamed)
                    fail(names[blamed], DeviceJobError(f"network {names[blamed]!r}: {gone}"))
                    continue
                # it ended at the canary or between two networks: killed from outside, or it does not work at all
                unexplained = 0 if len(left) < len(sent) else unexplained + 1
                if unexplained > 1:
                    raise DeviceJobError(f"device {self.device.name}: job {job}: {gone}, at no network") from None

    def _single(self, job: str, request: dict[str, Any]) -> dict[str, Any]:
        """The last answer of a job that has one."""
        try:
            answers = list(self._events(job, request))
        except AgentGone as gone:
            raise DeviceJobError(f"device {self.device.name}: job {job}: {gone}") from None
        return answers[-1]

    def _events(self, job: str, request: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Answers until the job is done; an abandoned job ends the agent, which would go on with it."""
        if self._busy:
            raise InternalError("a job was asked for while another one's iterator is still open")
        self._number += 1
        self._busy, finished = True, False
        try:
            if self._agent is not None and not self._agent.alive:
                self.restart()  # killed while it had nothing to do
            if self._agent is None:
                self._agent = LocalTransport()
                self._agent.receive(max(self._timeout_s, _START_S))  # "ready"
            self._agent.send({"id": self._number, "job": job, "device": self.device.to_dict(), **request})
            while not finished:
                event = self._agent.receive(self._timeout_s)
                if event["id"] != self._number:
                    raise InternalError(f"the agent answered job {event['id']} instead of {self._number}")
                finished = event["event"] in ("done", "error")
                if event["event"] == "error":
                    raise self._error(event, None)
                if event["event"] != "alive":
                    yield event
        finally:
            self._busy = False
            if not finished:
                self.restart()

    def _error(self, event: dict[str, Any], network: str | None) -> HwsearchError:
        if event["kind"] == "InternalError":
            raise InternalError(event["message"])
        kind = getattr(errors, event["kind"], DeviceJobError)
        text = event["message"]
        if network is not None and repr(network) not in text:
            text = f"network {network!r}: {text}"
        error = kind(text)
        return error if isinstance(error, HwsearchError) else DeviceJobError(text)

    @contextlib.contextmanager
    def _job_folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self._folder, prefix="job-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _folder() -> tuple[Path, int]:
    """A folder for this session's files, and the lock in it that says that the session lives.

    It may lie in memory, so what a killed session left there is removed by the next one: nobody holds its lock.
    """
    import fcntl

    root = Path(scratch() or tempfile.gettempdir())
    for old in root.glob("hwsearch-session-*"):
        with contextlib.suppress(OSError):
            if old.stat().st_uid != os.getuid() or time.time() - old.stat().st_mtime < 60:
                continue
            lock = os.open(old / "alive", os.O_RDONLY | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(lock)
    folder = Path(tempfile.mkdtemp(dir=root, prefix="hwsearch-session-"))
    alive = os.open(folder / "alive", os.O_RDONLY | os.O_CREAT)
    fcntl.flock(alive, fcntl.LOCK_EX)
    return folder, alive


def _write(folder: Path, networks: Sequence[bytes]) -> list[str]:
    paths = []
    for index, network in enumerate(networks):
        path = folder / f"{index}.onnx"
        path.write_bytes(network)
        paths.append(str(path))
    return paths


def _jobs(networks: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """(start, count) of jobs that keep within the limits."""
    start = 0
    while start < len(networks):
        count, size = 0, 0
        while start + count < len(networks) and count < _JOB_NETWORKS:
            size += len(networks[start + count])
            if count and size > _JOB_BYTES:
                break
            count += 1
        yield start, count
        start += count


def _blamed(folder: Path, sent: list[int], left: list[int]) -> int | None:
    """The network that the agent was at when it ended, or None when it was at none."""
    try:
        index = int((folder / "current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return sent[index] if 0 <= index < len(sent) and sent[index] in left else None
