"""Deploying: a network as a bundle that carries its proof (``bundle``), and judging it on a device (``verify``)."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """``hwsearch.deploy`` is this package and a public function at once.

    Importing any module in here makes Python bind the package to ``hwsearch.deploy``; called, it must still deploy.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from hwsearch.deploy.bundle import deploy

        return deploy(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
