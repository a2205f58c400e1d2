"""A run of MGAS: its searcher, and what follows a search of cells on the network that was found.

The found operations make another network than the super-network, with width groups of its own. From the search on a run
is about that one: at full width, uniformly scaled, and as found.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hwsearch.preparation import SPACE, Prepared
from hwsearch.search.journal import write_atomic

if TYPE_CHECKING:
    from hwsearch.search.mgas import MGAS
    from hwsearch.search.mgas_cost import DeviceCost
    from hwsearch.search.mgas_widths import MgasWidths
    from hwsearch.search.result import SearchResult

#: Builds what a search of cells found, from the genotype.
FACTORY = "hwsearch.models.cells:cell_network"
#: In the run folder: the found network as it takes the fewest bytes.
PACKED = "model.packed"


def mgas_search(ready: Prepared) -> MGAS | MgasWidths:
    """The search that the config names: of a super-network of cells, or of the filters of any other network."""
    from hwsearch.models.cells import CellNetwork
    from hwsearch.search.mgas import MGAS
    from hwsearch.search.mgas_widths import MgasWidths

    if not isinstance(ready.module, CellNetwork):
        return MgasWidths(
            ready.space, ready.budget, ready.config.mgas_widths(), model=ready.module, seed=ready.config.run.seed,
            folder=ready.run,
        )  # fmt: skip
    return MGAS(
        ready.space, ready.budget, ready.config.mgas(), cost=_cost(ready), model=ready.module,
        seed=ready.config.run.seed, folder=ready.run,
    )  # fmt: skip


def found_factory(ready: Prepared, result: SearchResult) -> tuple[str, dict[str, Any]]:
    """(factory, its arguments) of the network at full width whose widths a search chose."""
    if "genotype" not in result.extra:
        return ready.config.model.factory, ready.config.model.kwargs
    return FACTORY, dict(result.extra["genotype"])


def about_found(ready: Prepared, result: SearchResult) -> Prepared:
    """The same run, from here on about the found network and its widths."""
    if "genotype" not in result.extra:
        return ready
    from hwsearch.graph.space_table import SpaceTable
    from hwsearch.models.cells import CellNetwork, Genotype

    network = CellNetwork(Genotype.from_dict(result.extra["genotype"]))
    narrowed = _cost(ready).narrowed(network, ready.budget, ready.config.mgas().quantum)
    latency = narrowed.budget.limits[0].latency
    shown = SpaceTable.of(narrowed.space, latency.evaluate)
    write_atomic(ready.run.path / SPACE, json.dumps(shown.to_dict(), indent=1, sort_keys=True) + "\n")
    target = replace(
        ready.first, template=narrowed.template, latency=latency, limit=replace(ready.first.limit, latency=latency)
    )
    return replace(ready, module=network, space=narrowed.space, targets=(target,))


def keep_packed(ready: Prepared, result: SearchResult) -> None:
    """Where single weights were searched: the found network's ONNX file, zeros packed away, in the run folder."""
    if not ready.config.weights.asked:
        return
    from hwsearch.graph.onnx_export import export_onnx
    from hwsearch.graph.onnx_packed import pack
    from hwsearch.reparam.fold import fold

    assert result.model is not None
    file = pack(export_onnx(fold(result.model, ready.example, require=False), ready.example))
    write_atomic(ready.run.path / PACKED, file)


def _cost(ready: Prepared) -> DeviceCost:
    from hwsearch.search.mgas_cost import DeviceCost

    first = ready.first
    return DeviceCost(
        first.latency.predictor, first.session, ready.config.model.input_shape,
        measure=lambda onnx: first.measure(onnx).measured_ms,
    )  # fmt: skip
