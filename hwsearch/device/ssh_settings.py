"""``SshSettings``: how a board is reached over SSH, as its TOML file says it. No passwords, and nothing that runs here.

What needs more (a jump host with its own key, a hardware token, another user per network) belongs into
``~/.ssh/config``, which the system's ``ssh`` reads as always; ``host`` may be an alias of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from hwsearch.errors import InputError

#: Options of ssh that a device's file may set. Others can name a program to run on this machine (ProxyCommand,
#: LocalCommand, Match exec, ...), and a file that came with somebody's latency table must not.
ALLOWED_OPTIONS = (
    "AddressFamily", "BindAddress", "BindInterface", "Ciphers", "Compression", "ConnectionAttempts", "ConnectTimeout",
    "HostKeyAlgorithms", "HostKeyAlias", "IdentitiesOnly", "IPQoS", "KexAlgorithms", "MACs", "ProxyJump",
    "PubkeyAcceptedAlgorithms", "RekeyLimit", "ServerAliveCountMax", "ServerAliveInterval", "StrictHostKeyChecking",
    "TCPKeepAlive", "UserKnownHostsFile",
)  # fmt: skip

_HOST = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.@:%\[\]-]{0,254}")
_PATH = re.compile(r"[A-Za-z0-9_./~][A-Za-z0-9_./~+@:-]{0,254}")
_VALUE = re.compile(r"[A-Za-z0-9_.,@:/~+%\[\]^*=-][A-Za-z0-9_.,@:/~+%\[\]^* =-]{0,254}")
_KNOWN = {name.lower(): name for name in ALLOWED_OPTIONS}


@dataclass(frozen=True, slots=True)
class SshSettings:
    """How to reach a board, and what to use there.

    Attributes:
        host: ``user@board``, an address, or an alias of ``~/.ssh/config``.
        port: of its SSH server; None is ssh's own choice.
        identity: path of a private key here; None is ssh's own choice (the agent, the default keys).
        ssh_options: ``"Name=value"`` for ``ssh -o``; names of ``ALLOWED_OPTIONS``.
        python: the interpreter on the board that has numpy and the runtime, such as that of a virtual environment.
        folder: where the board keeps the agent and the networks to time; at most some hundred megabytes.
        patience_s: how long to wait for a board that was there and is gone (a dropped link, a reboot).

    Raises:
        InputError: a value that ssh or a shell could take for something else; the message names the field.

    Example:
        >>> SshSettings("pi@rpi5", python="~/venv/bin/python").folder
        '~/.cache/hwsearch'
    """

    host: str
    port: int | None = None
    identity: str | None = None
    ssh_options: tuple[str, ...] = ()
    python: str = "python3"
    folder: str = "~/.cache/hwsearch"
    patience_s: float = 180.0

    def __post_init__(self) -> None:
        # Values go to ssh and, quoted or not, through a shell on the board: what could be an option or a command there
        # is refused here.
        self._text("host", self.host, _HOST, "user@board, an address, or an alias of ~/.ssh/config")
        self._text("python", self.python, _PATH, "the path of an interpreter on the board, without spaces")
        self._text("folder", self.folder, _PATH, "a folder on the board, without spaces")
        if self.identity is not None and (not isinstance(self.identity, str) or self.identity[:1] in ("", "-")):
            raise InputError(f"identity is {self.identity!r}; use the path of a private key on this machine")
        if self.port is not None and (
            isinstance(self.port, bool) or not isinstance(self.port, int) or not 1 <= self.port <= 65535
        ):
            raise InputError(f"port is {self.port!r}; use a whole number from 1 to 65535")
        seconds = self.patience_s
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise InputError(f"patience_s is {seconds!r}; use a number of seconds from 0")
        object.__setattr__(self, "ssh_options", tuple(self.ssh_options))
        for option in self.ssh_options:
            name, _, value = option.partition("=") if isinstance(option, str) else ("", "", "")
            if name.lower() not in _KNOWN or not _VALUE.fullmatch(value):
                raise InputError(
                    f"ssh_options: {option!r} is refused; a device's file may set {', '.join(ALLOWED_OPTIONS)} as"
                    " 'Name=value', everything else belongs into ~/.ssh/config"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, those that differ from the defaults."""
        found = asdict(self) | {"ssh_options": list(self.ssh_options)}
        defaults = asdict(SshSettings(self.host)) | {"ssh_options": []}
        return {name: value for name, value in found.items() if name == "host" or value != defaults[name]}

    @staticmethod
    def _text(name: str, value: Any, rule: re.Pattern[str], use: str) -> None:
        if not isinstance(value, str) or not rule.fullmatch(value):
            raise InputError(f"{name} is {value!r}; use {use}")
