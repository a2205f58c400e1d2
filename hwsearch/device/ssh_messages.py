"""What to do about a board that cannot be reached or used: ssh's and the board's own words, with a remedy."""

from __future__ import annotations

import re


def denied(words: str) -> bool:
    """Whether trying again is pointless, and unwise: the host's key is not the one that is known.

    Example:
        >>> denied("no connection to pi (Host key verification failed.)")
        True
    """
    return "Host key verification failed" in words or "REMOTE HOST IDENTIFICATION" in words


def advice(host: str, words: str) -> str:
    """One line on a connection that is not there.

    Args:
        host: as the device's file names it.
        words: what happened, with ssh's own last line.

    Example:
        >>> advice("pi@rpi5", "no connection to pi@rpi5 (pi@rpi5: Permission denied (publickey).)")
        'no connection to pi@rpi5 (pi@rpi5: Permission denied (publickey).): put your key there with `ssh-copy-id pi@rpi5`; passwords are never asked for'
    """  # noqa: E501
    remedies = (
        (r"Permission denied", f"put your key there with `ssh-copy-id {host}`; passwords are never asked for"),
        (
            r"Host key verification failed|REMOTE HOST IDENTIFICATION",
            f"connect once by hand with `ssh {host}` and compare the key that it shows with the board's",
        ),
        (r"Could not resolve", "check the name, or give its address or an alias of ~/.ssh/config"),
        (r"refused", "is its SSH server running, and on that port?"),
        (r"timed out|No route|unreachable|not responding", "is it switched on, and in this network?"),
        (r"no such identity|identity file", "check the path of identity"),
    )
    found = next((remedy for pattern, remedy in remedies if re.search(pattern, words, re.I)), "")
    return f"{words}: {found or f'try `ssh {host}` by hand'}"


def no_room(host: str, reason: str, path: str, free_bytes: int | None) -> str:
    """One line on a file that the board cannot write.

    Example:
        >>> no_room("pi", "No space left on device", "/home/pi/.cache", 0)
        'pi cannot write /home/pi/.cache (No space left on device, 0 MB free): make room there, or set folder = "..." to another disk; what was finished is kept'
    """  # noqa: E501
    free = "" if free_bytes is None else f", {free_bytes >> 20} MB free"
    return (
        f'{host} cannot write {path} ({reason}{free}): make room there, or set folder = "..." to another disk; what'
        " was finished is kept"
    )
