"""How the host reaches an agent and its files: here on this machine; over SSH in :mod:`hwsearch.device.ssh`.

A transport knows nothing of jobs. It starts agents, brings files to where the agent is and back, and says how an agent
ended. An agent is a process that is spoken to in JSON lines: a subprocess here, or the ``ssh`` that leads to one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hwsearch.errors import InternalError

#: How an agent was lost: it ended by itself, was killed by a signal, fell silent, is out of reach, or lacks its files.
ENDED, KILLED, SILENT, LINK, FILES = "ended", "killed", "silent", "link", "files"


class AgentGone(Exception):
    """The agent ended, fell silent or is out of reach; the message says how. Never leaves this package."""

    def __init__(self, message: str, kind: str = ENDED) -> None:
        super().__init__(message)
        self.kind = kind


class Transport(Protocol):
    """What a session asks of the way to its device. Methods that reach out may raise :class:`AgentGone`."""

    remote: bool

    def start(self, timeout_s: float) -> AgentProcess:
        """A new agent that has said that it is ready."""

    def place(self, folder: Path, files: Mapping[str, bytes]) -> list[str]:
        """Makes files readable for the agent: their paths there, in order. ``folder`` is this host's, for the job."""

    def job_folder(self, folder: Path, agent: AgentProcess) -> str:
        """Where the agent may write in the job whose folder on this host is ``folder``."""

    def collect(self, paths: Sequence[str], folder: Path) -> dict[str, Path]:
        """Files of the agent on this host, by their path there; those that are gone are left out."""

    def recover(self, gone: AgentGone) -> None:
        """Waits until another try makes sense, or raises DeviceUnavailableError when none does any more."""

    def progress(self) -> None:
        """Told that a job gave a result: the device works."""

    def close(self) -> None:
        """Lets go of the device."""


class AgentProcess:
    """A running agent.

    Attributes:
        pid: the agent's process, where it runs; known once it is ready.
        folder: the folder that a remote agent made for itself, there.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        explain: Callable[[int, str], Exception] | None = None,
        leave_s: float = 0.5,
    ) -> None:
        self._explain, self._leave_s = explain or _ended, leave_s
        # a file, not a pipe: a native library that prints a lot must not fill it up and stop
        self._errors = tempfile.TemporaryFile(mode="w+b")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self.pid, self.folder = self._process.pid, ""
        self._ready = False
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the process here still runs."""
        return self._process.poll() is None

    def _listen(self) -> None:
        assert self._process.stdout is not None  # asked for above
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def ready(self, timeout_s: float) -> None:
        """Waits until the agent has started.

        Raises:
            AgentGone: it did not; the process here has ended then.
        """
        end = time.monotonic() + timeout_s
        try:
            while not self._ready:
                event = self.receive(max(0.0, end - time.monotonic()))
                if event.get("event") == "ready":
                    self._ready = True
                    self.pid, self.folder = event.get("pid", self.pid), event.get("folder", "")
        except BaseException:
            self.close()
            raise

    def send(self, message: dict[str, Any]) -> None:
        """Sends one request.

        Raises:
            AgentGone: the agent has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise self.ending() from None

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            AgentGone: the agent ended, or said nothing for ``timeout_s`` (it is killed then).
        """
        while True:
            try:
                line = self._lines.get(timeout=timeout_s)
            except queue.Empty:
                self.close()
                raise AgentGone(f"the agent said nothing for {timeout_s:g} s and was stopped", SILENT) from None
            if line is None:
                raise self.ending()
            try:
                answer = json.loads(line)
            except ValueError:
                answer = None
            if isinstance(answer, dict):
                return answer
            if self._ready:  # before, it is what a login script prints
                raise InternalError(f"the agent answered {line[:200]!r}, which is not JSON")

    def ending(self) -> Exception:
        """How the agent ended, in one line, with the last thing it said on its standard error."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return self._explain(code, last_words(self._errors))

    def close(self) -> None:
        """Ends the agent; harmless when it has ended."""
        with contextlib.suppress(OSError, ValueError):
            if self._process.stdin is not None:
                if self.folder:  # it made one, there
                    self._process.stdin.write('{"job": "leave"}\n')
                self._process.stdin.close()
        try:
            self._process.wait(timeout=self._leave_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            with contextlib.suppress(OSError, ValueError):
                self._process.stdout.close()
        self._errors.close()


class LocalTransport:
    """Agents as subprocesses of this one. They end when this process does, however that ends."""

    remote = False

    def start(self, timeout_s: float) -> AgentProcess:
        """A new agent; see :class:`Transport` for all of these."""
        root = str(Path(__file__).resolve().parent.parent.parent)
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        # numpy's own threads would spin beside the runtime's
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        # -P: a "random.py" in the current folder is not ours
        agent = AgentProcess([sys.executable, "-P", "-m", "hwsearch.device.agent"], environment=environment)
        agent.ready(timeout_s)
        return agent

    def place(self, folder: Path, files: Mapping[str, bytes]) -> list[str]:
        """Writes the files that are not there yet into the folder."""
        for name, data in files.items():
            if not (folder / name).exists():
                (folder / name).write_bytes(data)
        return [str(folder / name) for name in files]

    def job_folder(self, folder: Path, agent: AgentProcess) -> str:
        """The same folder."""
        return str(folder)

    def collect(self, paths: Sequence[str], folder: Path) -> dict[str, Path]:
        """The same files."""
        return {path: Path(path) for path in paths if os.path.exists(path)}

    def recover(self, gone: AgentGone) -> None:
        """Nothing to wait for: what is on this machine is in reach."""

    def progress(self) -> None:
        """Nothing to note."""

    def close(self) -> None:
        """Nothing to let go of."""


def killed_by(number: int) -> str:
    """The end of a process by a signal, in words."""
    with contextlib.suppress(ValueError):
        return f"the agent was killed by {signal.Signals(number).name}"
    return f"the agent was killed by signal {number}"


def last_words(errors: Any) -> str:
    """The last line of a file of error output; of ssh's own remarks only what explains something."""
    try:
        errors.seek(0, os.SEEK_END)
        errors.seek(max(0, errors.tell() - 4000))
        lines = errors.read().decode(errors="replace").split("\n")
    except ValueError:  # closed
        return ""
    dull = ("Shared connection to ", "mux_client_", "Control socket connect")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip() and not line.startswith(dull)), "")


def _ended(code: int, words: str) -> AgentGone:
    said = f" ({words})" if words else ""
    if code < 0:
        return AgentGone(killed_by(-code) + said, KILLED)
    return AgentGone(f"the agent ended with status {code}{said}", ENDED)
