"""The command line inside this process: what a verb says, how it ends, and agents that are shared between calls."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import typer.main


@dataclass(frozen=True)
class Answer:
    """What a call said and how it ended; ``crash`` is the traceback of an exception that nobody caught."""

    code: int
    out: str
    err: str
    crash: str = ""

    @property
    def lines(self) -> list[str]:
        """The lines that say what is wrong: the command's own, or those of its parser of arguments."""
        return [line for line in self.err.splitlines() if line.startswith(("hwsearch: error: ", "Error: "))]


def call(*arguments: str) -> Answer:
    """``hwsearch ...`` as its entry point runs it."""
    from hwsearch.cli import main

    out, err, code, crash, before = io.StringIO(), io.StringIO(), 0, "", sys.argv
    sys.argv = ["hwsearch", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        crash = traceback.format_exc()
    finally:
        sys.argv = before
    return Answer(code, out.getvalue(), err.getvalue(), crash)


def told(verb: str, arguments: Sequence[str]) -> Answer:
    """The answer of a verb such as ``device show``."""
    return call(*verb.split(), *arguments)


@contextlib.contextmanager
def shared_agents() -> Any:
    """Sessions take an idle agent over from each other: a process a call would take longer than all the rest.

    An agent that was left in the middle of a job is ended as ever. Timings are simulated, so they do not differ.
    """
    from hwsearch.device.transport import AgentProcess, LocalTransport

    idle: list[AgentProcess] = []
    busy: set[int] = set()
    start, send, receive, close = (
        LocalTransport.start,
        AgentProcess.send,
        AgentProcess.receive,
        AgentProcess.close,
    )

    def started(self: LocalTransport, timeout_s: float) -> AgentProcess:
        while idle:
            agent = idle.pop()
            if agent.alive:
                return agent
            close(agent)
        return start(self, timeout_s)

    def sent(self: AgentProcess, message: dict[str, Any]) -> None:
        busy.add(id(self))
        send(self, message)

    def received(self: AgentProcess, timeout_s: float) -> dict[str, Any]:
        event = receive(self, timeout_s)
        if event.get("event") in ("done", "error"):
            busy.discard(id(self))
        return event

    def closed(self: AgentProcess) -> None:
        if self._ready and self.alive and id(self) not in busy and len(idle) < 2 and self not in idle:
            idle.append(self)
        else:
            busy.discard(id(self))
            close(self)

    with pytest.MonkeyPatch.context() as patch:
        # typer makes its parser anew for each call, which takes longer than most of what is called here
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        patch.setattr(LocalTransport, "start", started)
        patch.setattr(AgentProcess, "send", sent)
        patch.setattr(AgentProcess, "receive", received)
        patch.setattr(AgentProcess, "close", closed)
        try:
            yield
        finally:
            for agent in idle:
                close(agent)
