"""``search_config``: a search that is described by options of the command line instead of a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from hwsearch.config import RunConfig
from hwsearch.config_data import named_data
from hwsearch.errors import InputError


def search_config(
    *, method: str, model: str | None, shape: str | None, data: str, budgets: Sequence[str], folder: Path | None
) -> RunConfig:
    """The config of a search that is described by options instead of a file.

    Args:
        budgets: ``DEVICE:MS``, one for each device.
        folder: the run folder; by default ``runs/<method>-<device>``.

    Raises:
        InputError: an option is missing or wrong; the message names it.

    Example:
        >>> search_config(method="cafenet", model="hwsearch.models.vgg:vgg_small", shape="1x1x28x28",
        ...               data="synthetic", budgets=["simulated:0.2"], folder=None).run_folder.as_posix()
        'runs/cafenet-simulated'
    """
    for name, value in (("--model", model), ("--input", shape), ("--budget", budgets)):
        if not value:
            raise InputError(f"search needs {name}, or a config file: see hwsearch search --help")
    (device, max_ms), *further = [_limit(budget) for budget in budgets]
    path = folder if folder is not None else Path("runs") / f"{method}-{Path(device).stem}"
    return RunConfig.from_dict(
        {
            "run": {"name": path.name, "folder": str(path.parent)},
            "device": {"name": device},
            "devices": [{"name": name, "budget_ms": ms} for name, ms in further],
            "model": {"factory": model, "input": shape},
            "data": named_data(data),
            "search": {"method": method, "budget_ms": max_ms},
        },
        source="search options",
    )


def _limit(budget: str) -> tuple[str, float]:
    """``DEVICE:MS`` in its parts."""
    device, _, ms = budget.rpartition(":")
    try:
        max_ms = float(ms)
    except ValueError:
        max_ms = math.nan
    if not device or not math.isfinite(max_ms) or max_ms <= 0:
        raise InputError(f"--budget is {budget!r}: give DEVICE:MS with milliseconds above 0, such as x86-ort-1t:3.0")
    return device, max_ms
