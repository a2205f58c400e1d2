"""``SshTransport``: agents on a board, over the system's own ``ssh``, with all that ``~/.ssh/config`` says.

One connection is shared by everything (ControlMaster): the agent's channel, and short *errands* that bring files
(:mod:`hwsearch.device.courier`; not ``scp``, which neither says why a write failed nor puts a file in place whole).
The agent's own modules and the networks lie on the board under their SHA-256, so only what is not there yet travels.

A connection that cannot be made at first is told at once. One that worked and is lost (a dropped link, a reboot) is
tried again, at growing intervals, until the board's patience is over; what jobs had finished is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hwsearch.device import courier
from hwsearch.device.payload import payload
from hwsearch.device.spec import Device
from hwsearch.device.ssh_messages import advice, denied, no_room
from hwsearch.device.ssh_settings import SshSettings
from hwsearch.device.transport import ENDED, KILLED, LINK, AgentGone, AgentProcess, killed_by, last_words
from hwsearch.errors import DeviceUnavailableError, InputError, InternalError

#: The oldest Python that the agent runs on.
OLDEST_PYTHON = (3, 10)
#: Networks that a board keeps, at most; the job of the moment comes on top.
KEEP_BYTES = 256 << 20
#: No transfer takes longer; a dead link is noticed far earlier, by ssh itself.
_ERRAND_S = 600.0
#: Ours: never ask, share the connection, notice a dead link in half a minute, and nothing that an alias may add for
#: people (a terminal, forwarded ports, a command of its own).
_OPTIONS = (
    "BatchMode=yes", "ControlMaster=auto", "ControlPersist=30", "ConnectTimeout=15", "ServerAliveInterval=10",
    "ServerAliveCountMax=3", "RequestTTY=no", "RemoteCommand=none", "ForwardAgent=no", "ForwardX11=no",
    "ClearAllForwardings=yes", "PermitLocalCommand=no", "LogLevel=ERROR",
)  # fmt: skip
#: Longer than this and the socket's path does not fit into the system's limit, with what ssh appends to it.
_SOCKET_CHARACTERS = 80
_RUN = "import sys;exec(compile(sys.stdin.buffer.read(int(sys.argv[1])),'courier','exec'))"


class SshTransport:
    """The way to one board; see :class:`hwsearch.device.transport.Transport` for its methods.

    Args:
        device: one whose ``transport`` is ``"ssh"``.
        folder: of this host, for the shared connection's socket.
        message: told in one line when the board is gone and another try is made.
        sleep: for tests.
    """

    remote = True

    def __init__(
        self,
        device: Device,
        folder: Path,
        *,
        message: Callable[[str], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if device.ssh is None:
            raise InputError(f"device {device.name}: transport is {device.transport!r}, not 'ssh'")
        self.settings: SshSettings = device.ssh
        self._device, self._message = device, message or logging.getLogger("hwsearch").warning
        self._runtime = device.runtime
        self._own = None if len(str(folder)) <= _SOCKET_CHARACTERS else Path(tempfile.mkdtemp(prefix="hws-"))
        self._socket = (self._own or folder) / "ssh"
        self._token = f"hwsearch-{secrets.token_hex(8)}"
        self._patience = _Patience(self.settings.patience_s, sleep)
        self._contacted = False
        self._agent_pid = 0
        #: What is known to be on the board: the agent's folder, and files by SHA-256.
        self._tree = ""
        self._placed: dict[str, str] = {}

    # ------------------------------------------------------------------ what a session asks for

    def start(self, timeout_s: float) -> AgentProcess:
        """Brings the agent's modules up to date and starts it."""
        known = bool(self._tree)
        if not known:
            self._prepare()
        try:
            agent = self._agent(timeout_s)
        except AgentGone as gone:
            self._forget()
            if not known or gone.kind != ENDED:
                raise
            self._prepare()  # the folder may have been removed since
            agent = self._agent(timeout_s)
        self._agent_pid = agent.pid
        self._patience.back()
        return agent

    def place(self, folder: Path, files: Mapping[str, bytes]) -> list[str]:
        """Sends those files that the board does not have; there they are known by what is in them."""
        by_hash = {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        unknown = {sha: data for sha, data in by_hash.items() if sha not in self._placed}
        if unknown:
            self._placed.update(self._put(unknown))
        return [self._placed[hashlib.sha256(data).hexdigest()] for data in files.values()]

    def job_folder(self, folder: Path, agent: AgentProcess) -> str:
        """A folder of the same name in the agent's own."""
        return f"{agent.folder}/{folder.name}"

    def collect(self, paths: Sequence[str], folder: Path) -> dict[str, Path]:
        """Brings files here, all in one errand."""
        found: dict[str, Path] = {}
        if not paths:
            return found
        with self._errand("get", paths=list(paths)) as errand:
            sizes = errand.answer()["sizes"]
            for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
                if size is not None:
                    found[path] = folder / f"collected-{number}"
                    found[path].write_bytes(errand.take(size))
        return found

    def recover(self, gone: AgentGone) -> None:
        """Waits before the next try; see :class:`hwsearch.device.transport.Transport`."""
        self._forget()
        if gone.kind != LINK:
            return
        wait_s = None if not self._contacted or denied(str(gone)) else self._patience.next()
        if wait_s is None:
            raise self._unavailable(advice(self.settings.host, str(gone))) from None
        self._message(f"device {self._device.name}: {gone}: trying again in {wait_s:g} s")
        self._patience.sleep(wait_s)

    def progress(self) -> None:
        """A job gave a result: whatever was lost before is over."""
        self._patience.progress()

    def close(self) -> None:
        """Ends the shared connection."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                [*self._ssh()[:-2], "-O", "exit", "--", self.settings.host],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False,
            )  # fmt: skip
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)

    # ------------------------------------------------------------------ how

    def _forget(self) -> None:
        """After a loss nothing is taken for granted: the board may have been rebooted or emptied."""
        self._tree, self._placed = "", {}

    def _ssh(self) -> list[str]:
        """The command that runs another one on the board."""
        settings = self.settings
        words = ["ssh", "-T", "-x", "-a", "-S", str(self._socket)]
        for option in (*settings.ssh_options, *_OPTIONS):  # the first one given counts
            words += ["-o", option]
        if settings.port is not None:
            words += ["-p", str(settings.port)]
        if settings.identity is not None:
            words += ["-i", os.path.expanduser(settings.identity)]
        return [*words, "--", settings.host]

    def _agent(self, timeout_s: float) -> AgentProcess:
        # "exit": the shell stays, so that a signal's number comes back; ssh itself would call it a lost connection
        script = (
            f"cd {shlex.quote(self._tree)} && OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 {self.settings.python} -m"
            f" hwsearch.device.agent --board {self._token}; exit $?"
        )
        command = [*self._ssh(), f"sh -c {shlex.quote(script)}"]
        agent = AgentProcess(command, explain=self._ended, leave_s=5.0)
        agent.ready(timeout_s)
        return agent

    def _prepare(self) -> None:
        """Looks at the board, ends the agent of a broken link, and brings the agent's modules."""
        settings = self.settings
        stop = [self._agent_pid, self._token] if self._agent_pid else None
        with self._errand("hello", stop=stop) as errand:
            facts = errand.answer()
        version = tuple(facts["python"])
        if version < OLDEST_PYTHON:
            raise self._unavailable(
                f"{settings.python} of {settings.host} is Python {'.'.join(map(str, version))}: install"
                f' {".".join(map(str, OLDEST_PYTHON))} or newer there and name it as python = "..."'
            )
        if not facts["numpy"]:
            raise self._unavailable(
                f"{facts['program']} of {settings.host} has no numpy: run `ssh {settings.host}"
                f" {settings.python} -m pip install numpy {self._runtime}` (better in a virtual environment that you"
                ' name as python = "...")'
            )
        self._contacted = True
        needed = payload(self._runtime)
        names = {name: hashlib.sha256(text).hexdigest() for name, text in needed.files.items()}
        files = {names[name]: text for name, text in needed.files.items()}
        tree = {"name": needed.name, "files": names}
        self._put(files, tree)
        self._tree = f"{facts['folder']}/{needed.name}"

    def _put(self, files: Mapping[str, bytes], tree: dict[str, Any] | None = None) -> dict[str, str]:
        """Files by SHA-256 onto the board; their paths there."""
        sizes = [[sha, len(data)] for sha, data in files.items()]
        data = list(files.values())
        for _ in range(2):
            with self._errand("put", files=sizes, tree=tree, keep_bytes=KEEP_BYTES) as errand:
                for number in errand.answer()["missing"]:
                    errand.send(data[number])
                done = errand.answer()
            if "paths" in done:
                return dict(zip(files, done["paths"], strict=True))
        raise self._unavailable(no_room(self.settings.host, "the disk is full", self.settings.folder, None))

    @contextmanager
    def _errand(self, op: str, **request: Any) -> Iterator[_Errand]:
        """One request to the courier on the board.

        Raises:
            AgentGone: the link is gone.
            DeviceUnavailableError: the board has no Python, or cannot read or write a file.
        """
        source = Path(courier.__file__).read_bytes()
        flags = "" if op == "hello" else "-S -E "  # it starts faster; hello looks at what is installed
        script = f"{self.settings.python} {flags}-c {shlex.quote(_RUN)} {len(source)}; exit $?"
        command = [*self._ssh(), f"sh -c {shlex.quote(script)}"]
        try:
            errand = _Errand(command, self._refused, self._ended)
        except FileNotFoundError:
            raise self._unavailable("there is no `ssh` here: install the OpenSSH client") from None
        with errand:
            errand.send(source)
            errand.send(json.dumps({"op": op, "folder": self.settings.folder, **request}).encode() + b"\n")
            yield errand

    def _refused(self, answer: dict[str, Any]) -> Exception:
        """What the courier could not do."""
        if not answer["errno"]:  # a file arrived damaged, or not whole
            return AgentGone(f"the connection to {self.settings.host} is unreliable ({answer['error']})", LINK)
        return self._unavailable(no_room(self.settings.host, answer["error"], answer["path"], answer["free"]))

    def _ended(self, code: int, words: str) -> AgentGone | DeviceUnavailableError:
        """What an exit status of ``ssh`` means."""
        said = f" ({words})" if words else ""
        if code == 255 or code < 0:
            return AgentGone(f"no connection to {self.settings.host}{said or ' (it broke)'}", LINK)
        if code in (126, 127):
            return self._unavailable(
                f"{self.settings.host} has no {self.settings.python!r}{said}: install Python there, or name its path as"
                ' python = "..."'
            )
        if code > 128:
            # a shell says the same once more, some of them with the whole command
            name = signal.strsignal(code - 128) or "?"
            said = "" if words.startswith(name) or self._token in words else said
            return AgentGone(killed_by(code - 128) + said, KILLED)
        return AgentGone(f"the agent ended with status {code}{said}", ENDED)

    def _unavailable(self, text: str) -> DeviceUnavailableError:
        return DeviceUnavailableError(f"device {self._device.name}: {text}")


class _Errand:
    """The courier at work: a process that reads bytes and answers in lines, then is gone."""

    def __init__(
        self,
        command: Sequence[str],
        refused: Callable[[dict[str, Any]], Exception],
        ended: Callable[[int, str], Exception],
    ) -> None:
        self._refused, self._ended = refused, ended
        self._errors = tempfile.TemporaryFile(mode="w+b")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=1 << 16
        )
        self._begun = self._broken = False
        self._watchdog = threading.Timer(_ERRAND_S, self._process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()

    def __enter__(self) -> _Errand:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        with contextlib.suppress(OSError):
            self._input.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()
        self._errors.close()

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def send(self, data: bytes) -> None:
        """Bytes to the courier; when it has ended, its answer says why."""
        if not self._broken:
            try:
                self._input.write(data)
            except OSError:
                self._broken = True

    def answer(self) -> dict[str, Any]:
        """The next line; before the first one, what a login script prints is dropped.

        Raises:
            Exception: what the courier, or the way to it, failed at.
        """
        with contextlib.suppress(OSError):
            self._input.flush()
        while not self._begun:
            line = self._output.readline()
            if not line:
                raise self._end()
            self._begun = line.strip() == courier.MARK.encode()
        line = self._output.readline()
        if not line.endswith(b"\n"):
            raise self._end()
        try:
            found = json.loads(line)
        except ValueError:
            raise InternalError(f"the courier answered {line[:200]!r}, which is not JSON") from None
        if "error" in found:
            raise self._refused(found)
        return dict(found)

    def take(self, size: int) -> bytes:
        """So many raw bytes."""
        data = self._output.read(size)
        if len(data) < size:
            raise self._end()
        return data

    def _end(self) -> Exception:
        """Why there is nothing more to read."""
        with contextlib.suppress(OSError):
            self._input.close()
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code == 0:  # cut off in the middle of an answer
            code = 255
        return self._ended(code, last_words(self._errors))


@dataclass
class _Patience:
    """How long, and how often, a board that was there may be away."""

    limit_s: float
    sleep: Callable[[float], None]
    waited_s: float = 0.0
    next_s: float = 0.5
    losses: int = 0

    #: Losses without one result between them: then it is no bad luck, but what the job does to the board.
    MOST_LOSSES = 6

    def next(self) -> float | None:
        """Seconds until the next try, or None when it is over."""
        self.losses += self.waited_s == 0
        wait_s = min(self.next_s, self.limit_s - self.waited_s)
        if wait_s <= 0 or self.losses > self.MOST_LOSSES:
            return None
        self.waited_s += wait_s
        self.next_s = min(2 * self.next_s, 15.0)
        return wait_s

    def back(self) -> None:
        """The board is there again."""
        self.waited_s, self.next_s = 0.0, 0.5

    def progress(self) -> None:
        """A job gave a result."""
        self.losses = 0
