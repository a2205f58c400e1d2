"""Checks that the methods' settings share: each names the field, the value, and what to give.

All take a settings object and names of its fields, and raise ``InputError``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hwsearch.errors import InputError


def at_least(config: Any, low: int, *names: str) -> None:
    """Numbers of ``low`` or more; infinity and nan are none.

    Example:
        >>> at_least(config, 1, "measured", "rounds")               # doctest: +SKIP
    """
    for name in names:
        if not low <= getattr(config, name) < float("inf"):
            raise InputError(f"{name} is {getattr(config, name)}; give {low} or more")


def above_0(config: Any, *names: str) -> None:
    """Finite numbers above 0."""
    for name in names:
        if not 0 < getattr(config, name) < float("inf"):
            raise InputError(f"{name} is {getattr(config, name)}; give a number above 0")


def up_to(config: Any, most: int, *names: str) -> None:
    """Numbers from 0 to ``most``."""
    for name in names:
        if not 0 <= getattr(config, name) <= most:
            raise InputError(f"{name} is {getattr(config, name)}; give a number from 0 to {most}")


def below_1(config: Any, *names: str) -> None:
    """Numbers from 0 to below 1, as momenta are."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}; give 0 or more and below 1")


def shares(config: Any, *names: str) -> None:
    """Shares above 0 and up to 1."""
    for name in names:
        if not 0 < getattr(config, name) <= 1:
            raise InputError(f"{name} is {getattr(config, name)}; give a share above 0 and up to 1")


def one_of(config: Any, **allowed: Collection[str]) -> None:
    """Names out of few."""
    for name, names in allowed.items():
        if getattr(config, name) not in names:
            raise InputError(f"{name} is {getattr(config, name)!r}; give one of {', '.join(names)}")


def number_or_all(config: Any, name: str) -> None:
    """Two examples or more, or None for all."""
    value = getattr(config, name)
    if value is not None and value < 2:
        raise InputError(f"{name} is {value}; give 2 or more, or leave it out for all")


def floor_and_aim(config: Any) -> None:
    """``floor`` and ``aim``, shares of the budget: what is used at least, and what is steered at."""
    if not 0 < config.floor <= config.aim <= 1 or config.floor == 1:
        raise InputError(f"floor is {config.floor} and aim {config.aim}; give 0 < floor <= aim <= 1, floor below 1")
