"""How the host reaches an agent: here a subprocess on this machine, spoken to in JSON lines.

The transport knows nothing of jobs. It starts the agent, sends a line, receives one within a time, and says how the
agent ended.
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
from pathlib import Path
from typing import Any

from hwsearch.errors import InternalError


class AgentGone(Exception):
    """The agent ended or fell silent; the message says how. Never leaves this package."""


class LocalTransport:
    """An agent as a subprocess of this one. It ends when this process does, however that ends."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parent.parent.parent)
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        # numpy's own threads would spin beside the runtime's
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        # a file, not a pipe: a native library that prints a lot must not fill it up and stop
        self._errors = tempfile.TemporaryFile(mode="w+b")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "hwsearch.device.agent",
            ],  # -P: a "random.py" in the current folder is not ours
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        """The agent's process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def _listen(self) -> None:
        assert self._process.stdout is not None  # asked for above
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

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
            raise AgentGone(self.ending()) from None

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            AgentGone: the agent ended, or said nothing for ``timeout_s`` (it is killed then).
        """
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise AgentGone(f"the agent said nothing for {timeout_s:g} s and was stopped") from None
        if line is None:
            raise AgentGone(self.ending())
        try:
            answer = json.loads(line)
        except ValueError:
            raise InternalError(f"the agent answered {line[:200]!r}, which is not JSON") from None
        return dict(answer)

    def ending(self) -> str:
        """How the agent ended, in one line, with the last thing it said on its standard error."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code < 0:
            with contextlib.suppress(ValueError):
                text = f"the agent was killed by {signal.Signals(-code).name}"
                return text + self._last_words()
        return f"the agent ended with status {code}" + self._last_words()

    def _last_words(self) -> str:
        try:
            self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, self._errors.tell() - 4000))
            lines = self._errors.read().decode(errors="replace").split("\n")
        except ValueError:  # closed
            return ""
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" ({last[:200]})" if last else ""

    def close(self) -> None:
        """Ends the agent; harmless when it has ended."""
        with contextlib.suppress(OSError, ValueError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            with contextlib.suppress(OSError, ValueError):
                self._process.stdout.close()
        self._errors.close()
