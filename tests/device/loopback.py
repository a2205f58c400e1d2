"""A board to test against: a real SSH server on the loopback, as the current user, with a key of its own for each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hwsearch.device.spec import Device
from hwsearch.device.ssh_settings import SshSettings

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/usr/libexec")


def needed() -> str:
    """Why no board can be had here, or nothing."""
    for name, found in (("sshd", SSHD), ("ssh", shutil.which("ssh")), ("ssh-keygen", shutil.which("ssh-keygen"))):
        if found is None:
            return f"{name} is not installed (Debian: apt install openssh-server)"
    if os.getuid() == 0:
        with contextlib.suppress(OSError):
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        if not os.path.isdir("/run/sshd"):
            return "sshd of root wants /run/sshd, which cannot be made"
    return ""


@dataclass
class Board:
    """A machine at 127.0.0.1 whose files lie in one folder."""

    home: Path
    port: int
    server: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def cache(self) -> Path:
        """What its TOML file calls ``folder``."""
        return self.home / "cache"

    def start(self) -> None:
        """Switches it on."""
        log = (self.home / "sshd.log").open("ab")
        self.server = subprocess.Popen(
            [str(SSHD), "-D", "-e", "-f", str(self.home / "sshd_config")],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        log.close()
        for _ in range(400):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            if self.server.poll() is not None:
                break
            time.sleep(0.02)
        pytest.skip(f"sshd does not start here: {(self.home / 'sshd.log').read_text().splitlines()[-1:]}")

    def stop(self) -> None:
        """Pulls the plug: the server and every connection are gone at once."""
        assert self.server is not None
        self.drop()
        self.server.kill()
        self.server.wait()

    def drop(self) -> None:
        """Breaks every connection, but goes on listening."""
        assert self.server is not None
        for process in _below(self.server.pid):
            with contextlib.suppress(OSError):
                if "sshd" in Path(f"/proc/{process}/stat").read_text().split(")")[0]:
                    os.kill(process, signal.SIGKILL)

    def python(self, script: str) -> str:
        """The path of an interpreter of its own: a shell script that ends with running Python on "$@"."""
        path = self.home / f"python-{abs(hash(script))}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    def settings(self, **changes: object) -> SshSettings:
        """How it is reached."""
        options = (
            f"UserKnownHostsFile={self.home / 'known_hosts'}", "StrictHostKeyChecking=yes", "IdentitiesOnly=yes",
        )  # fmt: skip
        known: dict[str, object] = {
            "host": "127.0.0.1", "port": self.port, "identity": str(self.home / "key"), "ssh_options": options,
            "python": sys.executable, "folder": str(self.cache), "patience_s": 20.0,
        }  # fmt: skip
        return SshSettings(**(known | changes))  # type: ignore[arg-type]

    def device(self, *, ssh: SshSettings | None = None, **options: float | str) -> Device:
        """A simulated device on it."""
        return Device(
            "board", "simulated", transport="ssh", ssh=ssh or self.settings(), options=options, home=self.home / "here"
        )


def made(home: Path) -> Board:
    """A board that is switched on; stop it in the end."""
    reason = needed()
    if reason:
        pytest.skip(reason)
    for name in ("key", "host_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(home / name)], check=True, timeout=60
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {(home / 'host_key.pub').read_text()}")
    shutil.copy(home / "key.pub", home / "authorized_keys")
    (home / "authorized_keys").chmod(0o600)
    (home / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home / 'host_key'}\nPidFile none\nStrictModes no\n"
        f"AuthorizedKeysFile {home / 'authorized_keys'}\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "PubkeyAuthentication yes\nPermitRootLogin yes\nUsePAM no\nMaxStartups 100\nMaxSessions 100\n"
    )
    board = Board(home, port)
    board.start()
    return board


def _below(process: int) -> list[int]:
    """All processes that a process started, and those that these did."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], [process]
    while waiting:
        more = children.get(waiting.pop(), [])
        found += more
        waiting += more
    return found
