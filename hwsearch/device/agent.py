"""The process beside the runtime: ``python -m hwsearch.device.agent``.

One JSON object a line: requests on standard input, answers on standard output; networks and arrays travel as files. A
local device runs this as a subprocess, so that a runtime that crashes on a network takes one job with it and no more.
On a board it is started over ssh, as ``--board TOKEN``: then it makes a folder for its files, and takes the board's
timing lock itself, because the host is another machine. Standard library, numpy and the device's own runtime; no torch.

A request is ``{"id", "job", "device", ...}``; each answer carries the id and an ``event``; ``done`` or ``error`` ends a
job, ``alive`` says only that work goes on, ``waiting`` why it does not yet, ``ready {pid, folder}`` that the agent has
started. ``{"job": "leave"}`` has no answer: the agent removes its folder and ends.

    probe      {}                                                   -> done {fingerprint, machine}
    optimise   {networks: [{name, path}], folder}                   -> optimised {index, optimised: path} ..., done
    time       {networks: [{name, path}], canary, reference_ms,     -> timing {index, timing, ops, optimised} or
                settings, nodes, folder}                               failed {index, kind, message} ..., done
    calibrate  {canary, seconds}                                    -> done {reference, busy, stolen}
    run        {network: path, inputs: path of .npz, names,         -> done {outputs: path of .npz, names}
                folder}

Before a network is touched its index is written to ``folder/current``: after a crash the host knows whom to blame.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hwsearch.device.lock import timing_lock
from hwsearch.device.machine import look
from hwsearch.device.spec import FOREIGN, RUNTIMES, Device
from hwsearch.device.stopwatch import Stopwatch, StopwatchSettings, Timing
from hwsearch.errors import DeviceJobError, DeviceUnavailableError, HwsearchError

HEARTBEAT_S = 2.0
JOBS = ("probe", "optimise", "time", "calibrate", "run")
#: With less room for files than this a runtime's refusal says nothing about the network.
ROOM_BYTES = 4 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Answer = Callable[..., None]


def runtime_of(device: Device) -> ModuleType:
    """The module ``runtime_<name>``, or somebody else's ``hwsearch_runtime_<name>``; all offer the same names."""
    own = device.runtime in RUNTIMES
    return import_module(f"hwsearch.device.runtime_{device.runtime}" if own else f"{FOREIGN}{device.runtime}")


class Jobs:
    """What the agent can do: one method a job. ``answer(event, **fields)`` writes one line to the host.

    Args:
        board: whether the host is another machine, so that this one's timing lock is for the agent to take.
    """

    def __init__(self, answer: Answer, *, board: bool = False) -> None:
        self.answer, self.board = answer, board
        self._benches: dict[tuple[str, str], Any] = {}

    def probe(self, device: Device, request: dict[str, Any]) -> None:
        """Tells the fingerprint, and what of the machine decides how steadily it can be timed."""
        machine = None if device.simulated else look().to_dict()
        self.answer("done", fingerprint=runtime_of(device).probe(device).to_dict(), machine=machine)

    def optimise(self, device: Device, request: dict[str, Any]) -> None:
        """Writes each network's optimised graph into the job's folder."""
        runtime, current = runtime_of(device), _Current(request["folder"])
        for index, network in enumerate(request["networks"]):
            current(index)
            data = Path(network["path"]).read_bytes()
            try:
                optimised = runtime.optimise(device, data)
            except HwsearchError as error:
                _refuse_full_disk(request["folder"])
                self.answer("failed", index=index, kind=type(error).__name__, message=str(error))
                continue
            target = Path(request["folder"]) / f"{index}.optimised"
            target.write_bytes(optimised)
            self.answer("optimised", index=index, optimised=str(target))
        self.answer("done")

    def time(self, device: Device, request: dict[str, Any]) -> None:
        """Times networks; each timing is told as soon as it is final."""
        with self._alone(device):
            bench = self._bench(device, request["canary"])
            _TimeJob(bench, runtime_of(device).INTERLEAVES, request, self.answer).work()
        self.answer("done")

    def calibrate(self, device: Device, request: dict[str, Any]) -> None:
        """Times the canary alone, and tells who else used the machine meanwhile."""
        with self._alone(device):
            bench = self._bench(device, request["canary"])
            bench.begin(Path(request["canary"]).read_bytes(), 0)
            heart = _Heart(self.answer)
            stopwatch = Stopwatch(bench.canary, bench.clock, StopwatchSettings(), None, lambda _: heart.beat())
            before = _cpu_seconds()
            reference = stopwatch.calibrate(request["seconds"])
            after = _cpu_seconds()
        busy = stolen = None
        if runtime_of(device).INTERLEAVES and before and after and after[0] > before[0]:
            elapsed = after[0] - before[0]
            busy = max(0.0, (after[1] - before[1]) - (after[3] - before[3])) / elapsed
            stolen = (after[2] - before[2]) / elapsed
        self.answer("done", reference=asdict(reference), busy=busy, stolen=stolen)

    def run(self, device: Device, request: dict[str, Any]) -> None:
        """Computes a network's outputs."""
        _Current(request["folder"])(0)
        # arrays go by number, names beside them: np.savez keeps a name such as "file" for itself
        with np.load(request["inputs"], allow_pickle=False) as stored:
            inputs = {name: stored[f"array_{number}"] for number, name in enumerate(request["names"])}
        outputs = runtime_of(device).run(device, Path(request["network"]).read_bytes(), inputs)
        target = Path(request["folder"]) / "outputs.npz"
        np.savez(target, **{f"array_{number}": value for number, value in enumerate(outputs.values())})
        self.answer("done", outputs=str(target), names=list(outputs))

    @contextlib.contextmanager
    def _alone(self, device: Device) -> Iterator[None]:
        """Holds the board for a timing; while another one goes on there, the host is told why nothing happens."""
        if not self.board or device.simulated:
            yield
            return
        acquired = threading.Event()

        def pulse() -> None:
            while not acquired.wait(HEARTBEAT_S):
                self.answer("alive")

        with contextlib.ExitStack() as stack:
            beating = threading.Thread(target=pulse, daemon=True)
            beating.start()
            try:
                stack.enter_context(timing_lock(lambda text: self.answer("waiting", message=text)))
            finally:
                acquired.set()
                beating.join()
            yield

    def _bench(self, device: Device, canary: str) -> Any:
        """The device's bench; kept between jobs, so that the canary is the same session throughout."""
        data = Path(canary).read_bytes()
        key = (json.dumps(device.to_dict(), sort_keys=True), hashlib.sha256(data).hexdigest())
        if key not in self._benches:
            self._benches.clear()
            self._benches[key] = runtime_of(device).open_bench(device, data)
        return self._benches[key]


class _TimeJob:
    """One request to time networks on a bench."""

    def __init__(self, bench: Any, interleaves: bool, request: dict[str, Any], answer: Answer) -> None:
        self.bench, self.interleaves, self.request, self.answer = bench, interleaves, request, answer
        self.networks: list[dict[str, str]] = request["networks"]
        self.settings = StopwatchSettings(**request["settings"])
        self._current, self._heart = _Current(request["folder"]), _Heart(answer)
        self._loaded: dict[int, Any] = {}

    def work(self) -> None:
        """Tells one event for each network."""
        for index, outcome in self._outcomes():
            try:
                if not isinstance(outcome, Timing):
                    raise outcome
                timing, fields = self._with_shares(index, outcome) if self.request["nodes"] else (outcome, {})
            except HwsearchError as error:
                _refuse_full_disk(self.request["folder"])
                self.answer("failed", index=index, kind=type(error).__name__, message=str(error))
            else:
                self.answer("timing", index=index, timing=asdict(timing), **fields)

    def _outcomes(self) -> Iterator[tuple[int, Timing | HwsearchError]]:
        """All outcomes; a runtime that does not interleave gets a fresh stopwatch for each network."""
        items = [(network["name"], partial(self._load, index)) for index, network in enumerate(self.networks)]
        if self.interleaves:
            yield from self._stopwatch().time(items, self._release)
            return
        for index, item in enumerate(items):
            self.bench.begin(Path(self.networks[index]["path"]).read_bytes(), self.settings.seed)
            for _, outcome in self._stopwatch(index).time([item]):
                yield index, outcome
            self._release(index)

    def _stopwatch(self, first: int = 0) -> Stopwatch:
        """A stopwatch whose first network is number ``first`` of the request."""

        def touch(index: int) -> None:
            self._current(index + first if index >= 0 else index)
            self._heart.beat()

        return Stopwatch(self.bench.canary, self.bench.clock, self.settings, self.request["reference_ms"], touch)

    def _load(self, index: int) -> Any:
        self._current(index)
        network = self.networks[index]
        self._loaded[index] = self.bench.open(network["name"], Path(network["path"]).read_bytes())
        return self._loaded[index]

    def _release(self, index: int) -> None:
        if index in self._loaded:
            self._loaded.pop(index).close()

    def _with_shares(self, index: int, timing: Timing) -> tuple[Timing, dict[str, Any]]:
        """The timing with the profiling's cost, and what the host needs to join shares and kernels."""
        self._current(index)
        start = self.bench.clock()
        shares, optimised = self._loaded[index].profile(self.settings.profile_runs, timing.raw_p50_ms)
        timing = replace(timing, seconds=timing.seconds + (self.bench.clock() - start) / 1e9)
        target = Path(self.request["folder"]) / f"{index}.optimised"
        target.write_bytes(optimised)
        return timing, {"shares": shares, "optimised": str(target)}


class _Current:
    """Writes the index of the network at work to ``folder/current`` (some microseconds, outside of timed runs)."""

    def __init__(self, folder: str) -> None:
        self._file = os.open(Path(folder) / "current", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def __call__(self, index: int) -> None:
        os.pwrite(self._file, b"%6d\n" % index, 0)

    def __del__(self) -> None:
        os.close(self._file)


class _Heart:
    """Tells the host now and then that work goes on, so that only a silent agent is taken for a dead one."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._last = answer, time.monotonic()

    def beat(self) -> None:
        if time.monotonic() - self._last > HEARTBEAT_S:
            self._last = time.monotonic()
            self._answer("alive")


def _cpu_seconds() -> tuple[float, float, float, float] | None:
    """(now, busy seconds of all cores, seconds stolen by the hypervisor, seconds of this process); None off Linux."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in words[1:]]
    except (OSError, ValueError):
        return None
    user, nice, system, _, _, interrupt, soft, stolen = ticks[:8]
    return time.monotonic(), user + nice + system + interrupt + soft, stolen, sum(os.times()[:2])


class _Board:
    """The agent's own folder on a board: a folder in it for the job of the moment, and nothing else."""

    def __init__(self) -> None:
        from hwsearch.device.folders import living_folder

        self.folder, self._alive = living_folder("hwsearch-agent")

    def begin(self, request: dict[str, Any]) -> None:
        """Makes the job's folder. The host has what it wanted of earlier ones."""
        if "folder" not in request:
            return
        for old in self.folder.glob("job-*"):
            shutil.rmtree(old, ignore_errors=True)
        os.makedirs(request["folder"])

    def leave(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _refuse_full_disk(folder: str) -> None:
    """Where a runtime has no room for its files, it may have refused a network for that reason alone.

    Raises:
        OSError: there is no room.
    """
    if shutil.disk_usage(folder).free < ROOM_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)


def _no_room(error: OSError) -> str:
    """A file that could not be written, and what to do."""
    reason = "the disk is full" if error.errno in _FULL else str(error.strerror or error)
    return f"the device cannot write {error.filename or 'its files'} ({reason}): make room there, then go on"


def serve(board: _Board | None = None) -> None:
    """Answers requests until standard input ends; leaves at once when the host is gone, even in the middle of a job."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a native library prints must not get between the lines
    requests: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            if board is not None and line == '{"job": "leave"}\n':
                board.leave()
                break
            requests.put(line)
        os._exit(0)  # the host is done with us, or dead

    threading.Thread(target=listen, daemon=True).start()
    number = -1

    def answer(event: str, **fields: Any) -> None:
        try:
            channel.write(json.dumps({"id": number, "event": event, **fields}) + "\n")
        except BrokenPipeError:
            os._exit(0)

    answer("ready", pid=os.getpid(), folder="" if board is None else str(board.folder))
    jobs = Jobs(answer, board=board is not None)
    while (line := requests.get()) is not None:
        request = json.loads(line)
        number = request["id"]
        try:
            if board is not None:
                board.begin(request)
            if request["job"] not in JOBS:
                raise DeviceJobError(f"the agent knows no job {request['job']!r}; it is older than the host")
            getattr(jobs, request["job"])(Device.from_dict(request["device"]), request)
        except HwsearchError as error:
            answer("error", kind=type(error).__name__, message=str(error))
        except (FileNotFoundError, ImportError) as error:
            # of hwsearch's own modules too: somebody cleaned up the folder that a board's agent runs from
            if isinstance(error, FileNotFoundError) or (error.name or "").startswith("hwsearch"):
                answer("error", kind="FilesGone", message=f"files are gone from the device ({error})")
                continue
            message = f"the device lacks a package: {error}; install it there, for {sys.executable}"
            answer("error", kind=DeviceUnavailableError.__name__, message=message)
        except MemoryError:
            answer("error", kind=DeviceJobError.__name__, message="the device has not enough memory for this network")
        except OSError as error:
            answer("error", kind=DeviceUnavailableError.__name__, message=_no_room(error))
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer("error", kind="InternalError", message=f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    serve(_Board() if "--board" in sys.argv else None)
