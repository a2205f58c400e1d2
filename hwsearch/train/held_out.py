"""``Looks``: at which steps a training is looked at from outside, on held-out examples, and on how many of them.

It is for the eye alone: a curve beside the training loss. Nothing is chosen by it, no bit of the training depends on
it, and it may cost a hundredth of the training at most; a training too short for that is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwsearch.train.data import Examples, Subset

_POINTS, _FEWEST_POINTS = 10, 4
_MOST, _FEWEST = 500, 50  # examples
#: Of a training's work, a step being three forward passes of its batch.
_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Looks:
    """The steps behind which ``examples`` are scored."""

    steps: frozenset[int]
    examples: Examples

    @classmethod
    def of(cls, valid: Examples, steps: int, batch_size: int) -> Looks | None:
        """Ten times, spread evenly, on up to 500 of the held-out examples, as far as a hundredth of the training pays
        for it; None where it does not pay for four times fifty.

        Example:
            >>> looks = Looks.of(valid, steps=4680, batch_size=128)                   # doctest: +SKIP
            >>> len(looks.steps), len(looks.examples)                                 # doctest: +SKIP
            (10, 500)
        """
        paid = int(3 * _SHARE * steps * batch_size)
        count = min(len(valid), _MOST, max(paid // _POINTS, _FEWEST))
        points = min(_POINTS, steps, paid // max(count, 1))
        if points < min(_FEWEST_POINTS, steps) or not points:
            return None
        spread = np.linspace(0, len(valid) - 1, count).astype(np.int64)  # the set may be sorted by class
        return cls(
            frozenset(round(steps * (point + 1) / points) for point in range(points)), Subset(valid, np.unique(spread))
        )
