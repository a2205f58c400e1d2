"""The list of small architectures, each with its number of width groups; every one takes ``IMAGE``."""

from __future__ import annotations

from collections.abc import Callable

import arch_attention as attention
import arch_classic as classic
import arch_dense as dense
import arch_mobile as mobile
from torch import nn

IMAGE = (1, 3, 32, 32)

Factory = Callable[[], nn.Module]


def _factories() -> dict[str, Factory]:
    found: dict[str, Factory] = {}
    for module in (classic, mobile, dense, attention):
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "") == module.__name__ and not isinstance(value, type)
            if callable(value) and own and not name.startswith("_"):
                found[name] = value
    return found


ARCHITECTURES = _factories()
