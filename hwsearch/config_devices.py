"""Budgets in a config: of the first device in ``[search]``, of every further one in its own ``[[devices]]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ConfigDict

from hwsearch.config_types import Ms, Percent, Quantile, Text
from hwsearch.errors import InputError

#: What a network measured once may take when it is measured again.
_SAME = 1.05


def check_budget(where: str, budget: str | None, budget_ms: float | None) -> None:
    """Exactly one of the two, and a share that can be meant.

    Raises:
        InputError: ``where`` begins the message.
    """
    if (budget is None) == (budget_ms is None):
        raise InputError(f'{where} needs either budget, such as "50%", or budget_ms, such as 3.0: give one of the two')
    if budget is not None and not 0 < share_of(budget) <= 100:
        raise InputError(f"{where}.budget is {budget!r}: give a share above 0% and up to 100%")


def share_of(budget: str) -> float:
    """``"50%"`` as 50.0."""
    return float(budget.rstrip("% \t"))


def allowed_ms(budget: str | None, budget_ms: float | None, full_ms: float) -> float:
    """The budget in milliseconds, of a full network that was measured at ``full_ms``.

    Without any (``repnas`` alone) full widths are kept, with room for two measurements that differ.

    Example:
        >>> allowed_ms("50%", None, 4.0), allowed_ms(None, 3.0, 4.0)
        (2.0, 3.0)
    """
    if budget_ms is not None:
        return budget_ms
    return full_ms * share_of(budget) / 100 if budget is not None else full_ms * _SAME


@dataclass(frozen=True)
class FurtherDevice:
    """``[[devices]]``: one more device and its budget, which the one network that is found keeps as well."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: Text
    budget: Percent | None = None
    budget_ms: Ms | None = None
    quantile: Quantile | None = None

    def __post_init__(self) -> None:
        check_budget(f"the device {self.name!r} of [[devices]]", self.budget, self.budget_ms)

    def max_ms(self, full_ms: float) -> float:
        """The budget in milliseconds, of a full network that was measured at ``full_ms`` there."""
        return allowed_ms(self.budget, self.budget_ms, full_ms)


def check_devices(first: str, further: Sequence[FurtherDevice], *, has_budget: bool) -> None:
    """Every device once, and a budget on each.

    Raises:
        InputError: a device is named twice, or the first has no budget.
    """
    names = [first, *(device.name for device in further)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"the device {name!r} is named {names.count(name)} times: give each device one budget")
    if further and not has_budget:
        raise InputError(f"[[devices]] have budgets, but search has none for {first!r}: give budget or budget_ms")
