"""``budgets`` of a config: a family of networks, one a budget, from one trained parent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from hwsearch.config_types import Ms, Percent
from hwsearch.errors import InputError

Budgets = Annotated[
    tuple[Percent | Ms, ...],
    Field(description='a list of shares of the full network\'s measured ms, or of ms, such as ["60%", "40%"]'),
]


def check_budgets(budgets: Sequence[str | float], method: str, *, alone: bool) -> None:
    """Two or more different budgets of a method that starts from a trained network.

    Args:
        alone: whether no other budget is given.

    Raises:
        InputError: anything else.
    """
    if method != "pas":
        raise InputError(f'search.budgets is for method = "pas", not {method}: give one budget')
    if not alone:
        raise InputError("search has budgets and a budget as well: give one of the two")
    names = [label_of(budget) for budget in budgets]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"search.budgets is {list(budgets)}: give two or more different budgets, or budget for one")
    for budget in budgets:
        if isinstance(budget, str) and not 0 < float(budget.rstrip("% \t")) <= 100:
            raise InputError(f"search.budgets has {budget!r}: give shares above 0% and up to 100%")


def label_of(budget: str | float) -> str:
    """The name of a member's folder.

    Example:
        >>> label_of("60%"), label_of("12.5 %"), label_of(3.0)
        ('budget-60', 'budget-12.5', 'budget-3ms')
    """
    if isinstance(budget, str):
        return f"budget-{float(budget.rstrip('% ').strip()):g}"
    return f"budget-{budget:g}ms"


def ms_of(budget: str | float, full_ms: float) -> float:
    """A budget in milliseconds, of a full network that was measured at ``full_ms``.

    Example:
        >>> ms_of("60%", 4.0), ms_of(3.0, 4.0)
        (2.4, 3.0)
    """
    return full_ms * float(budget.rstrip("% \t")) / 100 if isinstance(budget, str) else budget
