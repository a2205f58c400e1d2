"""``open_session(device)``: the host's side of a device. Everything that asks a device goes through here.

Example:
    >>> with open_session("simulated") as session:  # doctest: +SKIP
    ...     for timing in session.time([("a", onnx_bytes)], reference_ms=None, settings=PROFILE):
    ...         print(timing.network, timing.measured_ms)

A network on which the runtime crashes twice costs that one job: the agent is started again and the others go on.
Timings on this machine hold the machine-wide timing lock for as long as the iterator of :meth:`DeviceSession.time` is
being read; on a board the agent holds the board's. A board that is gone for a while (its link, a reboot) costs what its
agent was at and had not told yet, which is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from hwsearch import errors
from hwsearch.device.agent import runtime_of
from hwsearch.device.canary import canary_bytes
from hwsearch.device.folders import living_folder
from hwsearch.device.lock import timing_lock
from hwsearch.device.machine import Machine
from hwsearch.device.runtime_onnxruntime import scratch
from hwsearch.device.spec import Device, Fingerprint
from hwsearch.device.stopwatch import PROFILE, CanaryReference, StopwatchSettings, Timing
from hwsearch.device.transport import FILES, KILLED, LINK, AgentGone, AgentProcess, LocalTransport, Transport
from hwsearch.errors import DeviceJobError, HwsearchError, InternalError
from hwsearch.graph.kernel import Kernel

ErrorHandler = Callable[[str, HwsearchError], None]

#: A batch is cut into jobs of at most so many bytes of networks: they lie in memory as files.
_JOB_BYTES = 128 << 20
_JOB_NETWORKS = 64

#: A busy machine takes its time to start a process.
_START_S = 60.0

#: How often what goes wrong for no reason that is known is done again.
_TRIES = 3


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
        self._agent: AgentProcess | None = None
        self._number, self._at = 0, ""
        self._busy = False
        self._fingerprint: Fingerprint | None = None
        self._machine: Machine | None = None
        self._folder, self._alive = living_folder("hwsearch-session", scratch())
        self._canary = canary_bytes() if canary is None else canary
        self._transport = self._way()

    def _way(self) -> Transport:
        if self.device.ssh is None:
            return LocalTransport()
        from hwsearch.device.ssh import SshTransport

        return SshTransport(self.device, self._folder, message=self._message)

    def __enter__(self) -> DeviceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the agent and removes its files; the session cannot be used again."""
        self.restart()
        if self._alive >= 0:
            self._transport.close()
            os.close(self._alive)
            self._alive = -1
        shutil.rmtree(self._folder, ignore_errors=True)

    def restart(self) -> None:
        """Ends the agent; the next job starts a new one (its memory lies elsewhere, so its times scatter anew)."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    @property
    def agent_pid(self) -> int | None:
        """The agent's process, where it runs, while it does."""
        return None if self._agent is None else self._agent.pid

    @property
    def fingerprint(self) -> Fingerprint:
        """What the device is, as it says itself."""
        if self._fingerprint is None:
            answer = self._single("probe", lambda _: {})
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
                items = list(zip(labels[start : start + count], networks[start : start + count], strict=True))
                with contextlib.closing(self._batch("optimise", folder, items, {}, fail)) as events:
                    for event in events:
                        results[start + event["index"]] = Path(event["optimised"]).read_bytes()
        return [results[index] for index in range(len(networks))]

    def lower(self, networks: Sequence[bytes], names: Sequence[str] | None = None) -> list[tuple[Kernel, ...]]:
        """Each network's kernels, from the runtime's own optimised graph.

        Raises:
            DeviceJobError: as :meth:`optimise`.
        """
        return [self.parse(optimised) for optimised in self.optimise(networks, names)]

    def parse(self, optimised: bytes) -> tuple[Kernel, ...]:
        """The kernels of one network as :meth:`optimise` gave it; asks nothing of the device."""
        return tuple(self._runtime.parse(optimised))

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
        with self.alone():
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
        numbered: dict[str, Any] = {f"array_{number}": value for number, value in enumerate(inputs.values())}
        packed = io.BytesIO()
        np.savez(packed, **numbered)
        files = {"0.onnx": network, "inputs.npz": packed.getvalue()}
        for _ in range(_TRIES):
            with self._job_folder() as folder:

                def request(agent: AgentProcess, folder: Path = folder) -> dict[str, Any]:
                    at, arrays = self._transport.place(folder, files)
                    own = self._transport.job_folder(folder, agent)
                    return {"network": at, "inputs": arrays, "names": list(inputs), "folder": own}

                answer = self._single("run", request)
                found = self._collect([answer["outputs"]], folder)
                if not found:
                    continue  # the board was rebooted since
                with np.load(found[answer["outputs"]], allow_pickle=False) as stored:
                    return {name: stored[f"array_{number}"] for number, name in enumerate(answer["names"])}
        raise DeviceJobError(f"device {self.device.name}: job run: its outputs are gone whenever they are fetched")

    def calibrate_canary(self, seconds: float = 3.0) -> CanaryReference:
        """Times the canary alone for some seconds; its median is a device's reference speed."""
        return self.calibrate(seconds)[0]

    def calibrate(self, seconds: float) -> tuple[CanaryReference, float | None, float | None]:
        """As :meth:`calibrate_canary`, with what else went on: cores that others kept busy, cores the hypervisor took.

        The two are None where the system does not tell.
        """
        with self.alone():
            answer = self._single("calibrate", lambda _: {"canary": self._placed_canary(), "seconds": seconds})
        return CanaryReference(**answer["reference"]), answer["busy"], answer["stolen"]

    def alone(self, message: Callable[[str], None] | None = None) -> contextlib.AbstractContextManager[None]:
        """Holds this machine for timings on it; on a board each job does so itself, there."""
        if self.device.simulated or self._transport.remote:
            return contextlib.nullcontext()
        return timing_lock(message or self._message)

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

        request = {"reference_ms": reference_ms, "settings": asdict(settings), "nodes": nodes}
        with contextlib.closing(self._batch("time", folder, networks, request, fail)) as events:
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
        networks: Sequence[tuple[str, bytes]],
        request: dict[str, Any],
        fail: ErrorHandler,
    ) -> Generator[dict[str, Any], None, None]:
        """Events of a job over several networks; after a crash the rest goes on in a new agent.

        What a board has written is brought here when its job is over: copying files beside a timing would disturb it.

        Yields:
            one event per network that worked, ``index`` counted in ``networks``.
        """
        left = list(range(len(networks)))
        suspects: set[int] = set()
        unexplained = 0
        while left:
            sent, written = list(left), list[dict[str, Any]]()  # the agent counts within what it was sent
            trouble: AgentGone | HwsearchError | None = None
            try:
                with contextlib.closing(self._attempt(job, folder, [networks[n] for n in sent], request)) as events:
                    for event in events:
                        index = sent[event["index"]]
                        left.remove(index)
                        if event["event"] == "failed":
                            fail(networks[index][0], self._error(event, networks[index][0]))
                        elif self._transport.remote and "optimised" in event:
                            written.append(event | {"index": index})
                        else:
                            yield event | {"index": index}
                if left:
                    raise InternalError(f"the agent ended the job {job} without a word on {len(left)} networks")
            except (AgentGone, HwsearchError) as error:
                trouble = error
            asked = isinstance(trouble, AgentGone) and trouble.kind not in (LINK, FILES)
            blamed = self._blamed(folder, sent, left) if asked else None
            for event in self._fetched(folder, written):
                if event["optimised"] is None:
                    left.append(event["index"])
                else:
                    yield event
            left.sort()
            if trouble is None:
                continue
            if not isinstance(trouble, AgentGone):
                raise trouble
            self._transport.recover(trouble)
            if trouble.kind == LINK:
                continue  # no network's fault; how long it may go on is the transport's to say
            if blamed is not None and trouble.kind == KILLED and blamed not in suspects:
                suspects.add(blamed)  # by the network, or by somebody: the second time it was the network
                continue
            if blamed is not None and trouble.kind != FILES:
                left.remove(blamed)
                fail(networks[blamed][0], DeviceJobError(f"network {networks[blamed][0]!r}: {trouble}"))
                continue
            # it ended at the canary or between two networks: killed from outside, or it does not work at all
            unexplained = 0 if len(left) < len(sent) else unexplained + 1
            if unexplained > 1:
                raise DeviceJobError(f"device {self.device.name}: job {job}: {trouble}, at no network") from None

    def _attempt(
        self, job: str, folder: Path, networks: Sequence[tuple[str, bytes]], request: dict[str, Any]
    ) -> Generator[dict[str, Any], None, None]:
        """Events of one agent at work on several networks."""
        agent = self._started()
        # named by what is in them: a folder may see several attempts
        files = {f"{hashlib.sha256(network).hexdigest()[:24]}.onnx": network for _, network in networks}
        paths = dict(zip(files.values(), self._transport.place(folder, files), strict=True))
        items = [{"name": name, "path": paths[network]} for name, network in networks]
        (folder / "current").unlink(missing_ok=True)
        self._at = self._transport.job_folder(folder, agent)
        own = {"networks": items, "canary": self._placed_canary(), "folder": self._at}
        with contextlib.closing(self._events(job, request | own)) as events:
            yield from (event for event in events if "index" in event)

    def _placed_canary(self) -> str:
        return self._transport.place(self._folder, {"canary": self._canary})[0]

    def _blamed(self, folder: Path, sent: list[int], left: list[int]) -> int | None:
        """The network that the agent was at when it ended, or None when it was at none, or cannot be asked."""
        path = f"{self._at}/current"
        try:
            index = int(self._transport.collect([path], folder)[path].read_text(encoding="ascii"))
        except (AgentGone, KeyError, OSError, ValueError):
            return None
        return sent[index] if 0 <= index < len(sent) and sent[index] in left else None

    def _fetched(self, folder: Path, written: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The events with their files here; None for a file that is gone."""
        found = self._collect([event["optimised"] for event in written], folder)
        for event in written:
            path = found.get(event["optimised"])
            yield event | {"optimised": None if path is None else str(path)}

    def _collect(self, paths: Sequence[str], folder: Path) -> dict[str, Path]:
        """Files of the agent on this machine, however often the link breaks meanwhile."""
        failures = 0
        while paths:
            try:
                return self._transport.collect(paths, folder)
            except AgentGone as gone:
                self._transport.recover(gone)
                failures += gone.kind != LINK
                if failures >= _TRIES:
                    raise DeviceJobError(f"device {self.device.name}: its files cannot be fetched: {gone}") from None
        return {}

    def _single(self, job: str, request: Callable[[AgentProcess], dict[str, Any]]) -> dict[str, Any]:
        """The last answer of a job that has one; such jobs can be done again."""
        failures = 0
        while True:
            try:
                return list(self._events(job, request(self._started())))[-1]
            except AgentGone as gone:
                self._transport.recover(gone)
                failures += gone.kind != LINK
                if gone.kind not in (LINK, KILLED, FILES) or failures > 1:
                    raise DeviceJobError(f"device {self.device.name}: job {job}: {gone}") from None

    def _started(self) -> AgentProcess:
        """The agent, started if need be."""
        if self._agent is not None and not self._agent.alive and not self._busy:
            self.restart()  # killed while it had nothing to do
        if self._agent is None:
            self._agent = self._transport.start(max(self._timeout_s, _START_S))
        return self._agent

    def _events(self, job: str, request: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Answers until the job is done; an abandoned job ends the agent, which would go on with it."""
        if self._busy:
            raise InternalError("a job was asked for while another one's iterator is still open")
        self._number += 1
        self._busy, finished = True, False
        agent = self._started()
        try:
            agent.send({"id": self._number, "job": job, "device": self.device.where_it_is().to_dict(), **request})
            while not finished:
                event = agent.receive(self._timeout_s)
                if event["id"] != self._number:
                    raise InternalError(f"the agent answered job {event['id']} instead of {self._number}")
                finished = event["event"] in ("done", "error")
                if event["event"] == "waiting":
                    self._message(f"device {self.device.name}: {event['message']}")
                elif event["event"] == "error":
                    if event["kind"] == "FilesGone":
                        finished = False  # its own modules may be among them
                        raise AgentGone(event["message"], FILES)
                    raise self._error(event, None)
                elif event["event"] != "alive":
                    self._transport.progress()
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
        elif kind is errors.DeviceUnavailableError:
            text = f"device {self.device.name}: {text}"
        error = kind(text)
        return error if isinstance(error, HwsearchError) else DeviceJobError(text)

    @contextlib.contextmanager
    def _job_folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self._folder, prefix="job-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


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
