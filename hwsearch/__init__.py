"""hwsearch finds the fastest accurate network for your device, measured in milliseconds.

The names below are loaded on first use, so ``import hwsearch`` costs nothing and works on a board without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "Device": "hwsearch.device.spec",
    "check_device": "hwsearch.device.check",
    "profile": "hwsearch.latency.profile",
    "LatencyTable": "hwsearch.latency.table",
    "LatencyPredictor": "hwsearch.latency.predictor",
    "NetworkLatency": "hwsearch.latency.network",
    "P90Latency": "hwsearch.latency.tail",
    "WidthTable": "hwsearch.latency.width_table",
    "transfer_device": "hwsearch.latency.transfer",
    "ArchitectureTransfer": "hwsearch.latency.transfer_architectures",
    "measure": "hwsearch.latency.measure",
    "capture": "hwsearch.graph.capture",
    "WidthSpace": "hwsearch.graph.widths",
    "WidthChoice": "hwsearch.graph.widths",
    "shrink": "hwsearch.graph.surgery",
    "grow": "hwsearch.graph.growth",
    "GroupRule": "hwsearch.graph.control",
    "bounded": "hwsearch.graph.control",
    "SpaceTable": "hwsearch.graph.space_table",
    "fold": "hwsearch.reparam.fold",
    "reparametrize": "hwsearch.reparam.rewrite",
    "ODBB": "hwsearch.reparam.odbb",
    "unfold_bn": "hwsearch.reparam.unfold",
    "Budget": "hwsearch.search.budget",
    "Limit": "hwsearch.search.budget",
    "CafeNet": "hwsearch.search.cafenet",
    "ConetV2": "hwsearch.search.conetv2",
    "MGAS": "hwsearch.search.mgas",
    "MgasConfig": "hwsearch.search.mgas_config",
    "MgasWidths": "hwsearch.search.mgas_widths",
    "FilterConfig": "hwsearch.search.mgas_widths_config",
    "WeightConfig": "hwsearch.search.mgas_weights_config",
    "PaS": "hwsearch.search.pas",
    "PasConfig": "hwsearch.search.pas_config",
    "RepNAS": "hwsearch.search.repnas",
    "RepNASSearch": "hwsearch.search.repnas_search",
    "deploy": "hwsearch.deploy.bundle",
    "Int8Settings": "hwsearch.deploy.quantise",
    "verify": "hwsearch.deploy.verify",
    "report": "hwsearch.report",
    "HwsearchError": "hwsearch.errors",
}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    """Loads a public name from its module on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hwsearch' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
