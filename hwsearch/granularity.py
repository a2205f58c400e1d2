"""What ``mgas`` searches: operations and filters of a super-network of cells, or the filters of any other network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwsearch.config_cells import CellSettings
from hwsearch.config_filters import FilterSettings
from hwsearch.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from hwsearch.config import RunConfig


def searches_cells(config: RunConfig, module: nn.Module) -> bool:
    """Whether a run searches a super-network of cells; ``mgas`` searches the filters of any other network."""
    from hwsearch.models.cells import CellNetwork

    return config.search.method == "mgas" and isinstance(module, CellNetwork)


def check_granularity(config: RunConfig, module: nn.Module) -> None:
    """Refuse settings of ``mgas`` that are for another kind of network than the model.

    Raises:
        InputError: what is meant for cells with an ordinary network, or the other way round.
    """
    if config.search.method != "mgas":
        return
    cells, factory = searches_cells(config, module), config.model.factory
    if cells and config.devices:
        raise InputError("cells are searched for one device: leave [[devices]] out, or use another method")
    if cells and config.filters != FilterSettings():
        raise InputError(f"[filters] is for ordinary networks, and {factory} is one of cells: use [cells]")
    if not cells and config.cells != CellSettings():
        raise InputError(
            f"[cells] is for a super-network of cells, and {factory} is none: use [filters], which searches its "
            "filters, or a model such as hwsearch.models.cells:cells_small"
        )
    if not cells:
        from hwsearch.search.mgas_filters import check_gateable

        check_gateable(module)
