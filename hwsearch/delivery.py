"""What a run delivers: the found network, or uniform scaling where that is plainly the better of the two.

A search is judged by scores of shared weights or of short trainings, and can end on widths that, once trained, are
worse than uniform scaling of the same network. Both are trained and measured for the comparison anyway, so a run
hands out the one that does better on held-out training images (never on test images).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hwsearch.search.result import LimitOutcome, SearchResult

if TYPE_CHECKING:
    from hwsearch.comparison import Compared, NetworkRow
    from hwsearch.preparation import Prepared

#: Share of a budget that uniform scaling may take when measured: the verification's reading is another one.
_MOST = 0.985
FOUND, UNIFORM = "found", "uniform"


@dataclass(frozen=True)
class Delivered:
    """What goes to the devices.

    Attributes:
        name: the row of the comparison.
        result: the search's result, or one that stands for uniform scaling: its widths, its network, its milliseconds.
        why: a sentence for people, where it is not the found network.
    """

    name: str
    result: SearchResult
    why: str = ""


def choose(ready: Prepared, result: SearchResult, compared: Compared) -> Delivered:
    """The found network, unless uniform scaling keeps every budget and scores better on held-out images.

    Where an accuracy floor was set, single weights were searched (uniform scaling keeps no size budget), or the config
    says ``deliver = "found"``, it is the found network always.
    """
    rows = {row.name: row for row in compared.rows}
    uniform, found = rows.get(UNIFORM), rows[FOUND]
    held = Delivered(FOUND, result)
    config = ready.config
    always = config.search.floor is not None or config.weights.asked or config.deploy.deliver == FOUND
    if uniform is None or always:
        return held
    better = uniform.held_out > found.held_out if compared.higher_is_better else uniform.held_out < found.held_out
    if not better or not _keeps(uniform):
        return held
    limits = tuple(
        LimitOutcome(limit.name, limit.max_ms, time.predicted_ms, time.low_ms, time.high_ms, time.measured_ms)
        for limit, time in zip(result.limits, uniform.devices, strict=True)
    )
    model = compared.networks[UNIFORM]
    choice = compared.choices[UNIFORM]
    why = (
        f"uniform scaling is delivered: its {compared.metric_name} on held-out images is {uniform.held_out:.4f}, "
        f'that of the found network {found.held_out:.4f} ([deploy] deliver = "found" keeps to what is found)'
    )
    scaled = replace(
        result, choice=choice, limits=limits, metric=uniform.held_out, macs=uniform.macs,
        parameters=uniform.parameters, model=model,
    )  # fmt: skip
    return Delivered(UNIFORM, scaled, why)


def _keeps(row: NetworkRow) -> bool:
    return all(time.measured_ms <= _MOST * time.budget_ms for time in row.devices)
