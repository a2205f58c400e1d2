"""``Bench``: loaded networks and the clock of this machine, for runtimes that compute where the agent is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Bench:
    """Loaded networks and the clock to time them by.

    Args:
        load: network bytes to what has ``run``, ``profile`` and ``close``.
        canary: the network that is timed beside every other one.
    """

    clock = staticmethod(time.perf_counter_ns)

    def __init__(self, load: Callable[[bytes], Any], canary: bytes) -> None:
        self._load = load
        self.canary = self.open("canary", canary)

    def open(self, name: str, network: bytes) -> Any:
        """Loads a network; its input is fixed random numbers, its buffers are allocated once."""
        return self._load(network)

    def begin(self, network: bytes, seed: int) -> None:
        """Nothing to set: this clock is the machine's."""
