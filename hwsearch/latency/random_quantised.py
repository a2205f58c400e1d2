"""Random small 8-bit networks to time kernels in: the families of ``random_networks``, quantised without calibration.

Nearly all keep their weights as signed 8 bits with a scale a channel, as tools do by default; some have one scale, or
unsigned weights, which other kernels run. Operators that have no 8-bit form stay float among them, as they do in
networks that people run.
"""

from __future__ import annotations

import numpy as np

from hwsearch.latency import random_networks
from hwsearch.latency.quantising import Scheme, quantise_network

#: Families by name; the order is part of the plan.
FAMILIES = tuple(random_networks.FAMILIES)

_SCHEMES = (Scheme(), Scheme(per_channel=False), Scheme("uint8", per_channel=False))
_SHARES = (0.85, 0.08, 0.07)


def random_family(rng: np.random.Generator) -> str:
    """A family name, the commoner ones more often."""
    return random_networks.random_family(rng)


def random_network(family: str, rng: np.random.Generator) -> bytes:
    """One random 8-bit network of a family as ONNX bytes: float input ``input``, float output ``output``.

    Args:
        family: one of ``FAMILIES``.
        rng: decides everything; the same state gives the same bytes.

    Example:
        >>> len(random_network("vgg", np.random.default_rng(0))) > 1000
        True
    """
    scheme = _SCHEMES[int(rng.choice(len(_SCHEMES), p=_SHARES))]
    seed = int(rng.integers(2**31))
    return quantise_network(random_networks.random_network(family, rng), seed, scheme)
