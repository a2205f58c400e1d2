"""Randomness as a pure function of (seed, stream, step): a resumed run draws what an unbroken one would have drawn.

No generator is ever carried from step to step: there is no random state to save, lose or restore.
"""

from __future__ import annotations

import zlib

import numpy as np

from hwsearch.errors import InputError


def generator(seed: int, stream: str, *indices: int) -> np.random.Generator:
    """A fresh generator for one purpose (``stream``) at one place (``indices``, such as the step).

    Streams of different names are independent: drawing more in one never shifts another.

    Raises:
        InputError: the seed is negative.

    Example:
        >>> bool(generator(0, "widths", 7).random() == generator(0, "widths", 7).random())
        True
    """
    if seed < 0:
        raise InputError(f"seed is {seed}; use an integer of 0 or more")
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), *indices])


def torch_seed(seed: int, stream: str, *indices: int) -> int:
    """A 63-bit seed for ``torch.manual_seed`` (dropout and the like), derived in the same way."""
    return int(generator(seed, stream, *indices).integers(2**63 - 1))
