"""From examples to rules: which forms a slot's kernel takes, and a decision tree that tells when it takes which.

The questions that a tree may ask are about classes of channel counts, because runtimes decide by these: is a count a
multiple of 2, 4, 8 ..., is it below some size, or either (a convolution runs blocked on whole quarters of a block, and
on inputs of less than a block). Which counts, which multiples and which sizes is found from the examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from hwsearch.graph.kernel import Kernel
from hwsearch.latency.lowering_template import ABSENT, NUMBERS, Extent, Ints, Rule, Split, Variant, answer

#: Powers of two that may divide a count, and that it may be rounded up to.
_POWERS = (2, 4, 8, 16, 32, 64)
#: No runtime is known to choose its code by a threshold on channels above this.
_LARGEST = 66
#: Nor one by "a multiple, or below so many channels" for more channels than the largest block.
_MIXED = 34
#: A question counts as good as the best one within this share of its gain; then the simpler one is asked.
_AS_GOOD = 0.97
#: The same for the other trees that new choices are to decide between.
_AS_LIKELY = 0.85


@dataclass(frozen=True)
class Atoms:
    """Questions and their answers.

    Attributes:
        questions: (quantity, block, small), see ``Split``; the plainer ones first.
        answers: (N, A) float32, 1 for yes.
    """

    questions: tuple[tuple[int, int, int], ...]
    answers: NDArray[np.float32]

    @classmethod
    def of(cls, counts: Ints, terms: Sequence[int]) -> Atoms:
        """All questions that the examples' quantities (N, Q) answer differently.

        Args:
            counts: values of the quantities.
            terms: groups in each quantity, (Q,).
        """
        questions = [(q, *question) for q in range(counts.shape[1]) for question in _questions(np.unique(counts[:, q]))]
        questions.sort(key=lambda item: (terms[item[0]], item[2] > 0, -_twos(item[2]), item[2], item[1], item[0]))
        answers = np.empty((len(counts), len(questions)), dtype=np.float32)
        for index, (q, block, small) in enumerate(questions):
            answers[:, index] = answer(block, small, counts[:, q])
        return cls(tuple(questions), answers)


def _questions(values: Ints) -> list[tuple[int, int]]:
    """(block, small) of the different questions about a quantity that takes these values (ascending)."""
    pairs = zip(values[:-1].tolist(), values[1:].tolist(), strict=True)
    # Any bound between two values that occur asks the same: then the roundest one is meant.
    sizes = [_roundest(before + 1, size) for before, size in pairs if size <= _LARGEST]
    found: dict[bytes, tuple[int, int]] = {}
    for small in (0, *sizes):
        for block in (0, *_POWERS):
            outcome = answer(block, small, values)
            if 0 < outcome.sum() < len(values) and not (small > _MIXED and block):
                found.setdefault(outcome.tobytes(), (block, small))
    return list(found.values())


def _twos(value: int) -> int:
    return (value & -value).bit_length()


def _roundest(low: int, high: int) -> int:
    """The number in [low, high] that two divides most often."""
    return max(range(low, high + 1), key=lambda v: (_twos(v), -v))


def fit_rule(
    labels: Ints,
    atoms: Atoms,
    own: frozenset[int],
    usual: Mapping[tuple[int, int], int] | None = None,
    rng: np.random.Generator | None = None,
) -> Rule:
    """A decision tree that gives every example its label.

    Args:
        labels: the examples' variants, (N,).
        atoms: questions and the examples' answers.
        own: quantities that the slot computes on: questions about them are preferred among equally good ones.
        usual: how many slots ask for a (block, small): a runtime asks the same of every node, so such questions are
            preferred, too.
        rng: draw among good questions instead: another tree that the examples do not speak against.
    """
    classes, coded = np.unique(labels, return_inverse=True)
    if len(classes) == 1:
        return int(classes[0])
    onehot = np.zeros((len(labels), len(classes)), dtype=np.float32)
    onehot[np.arange(len(labels)), coded.reshape(-1)] = 1
    usual = usual or {}
    preference = np.array([2 * usual.get((block, small), 0) + (q in own) for q, block, small in atoms.questions])

    def grow(rows: Ints) -> Rule:
        total = onehot[rows].sum(axis=0)
        if (total > 0).sum() == 1:
            return int(classes[int(np.argmax(total))])
        yes = atoms.answers[rows].T @ onehot[rows]
        gain = _entropy(total[None]) - _entropy(yes) - _entropy(total - yes)
        gain[(yes.sum(axis=1) == 0) | (yes.sum(axis=1) == len(rows))] = -np.inf
        best = float(gain.max(initial=-np.inf))
        if not np.isfinite(best):  # equal widths in all that is asked: the majority
            return int(classes[int(np.argmax(total))])
        if rng is None:
            good = np.flatnonzero(gain >= min(best * _AS_GOOD, best - 1e-6))
            at = int(good[np.argmax(preference[good])])
        else:
            at = int(rng.choice(np.flatnonzero(gain >= min(best * _AS_LIKELY, best - 1e-6))))
        said = atoms.answers[rows, at] > 0
        one, other = grow(rows[said]), grow(rows[~said])
        return one if one == other else Split(*atoms.questions[at], one, other)

    return grow(np.arange(len(labels)))


def _entropy(counts: NDArray[np.float32]) -> NDArray[np.float64]:
    """Entropy (nats) of each row of class counts, times its total."""
    numbers = counts.astype(np.float64)
    total = numbers.sum(axis=1)
    logs = np.log(np.where(numbers > 0, numbers, 1))
    return np.asarray(total * np.log(np.where(total > 0, total, 1)) - (numbers * logs).sum(axis=1))


_FIXED = tuple(f.name for f in fields(Kernel) if f.compare and f.name not in NUMBERS)


def fit_variants(column: Sequence[Kernel | None], counts: Ints) -> tuple[tuple[Variant, ...], Ints, frozenset[int]]:
    """The forms of one slot's kernel.

    Args:
        column: the slot's kernel in each of N networks, None where there is none.
        counts: the networks' quantities, (N, Q).

    Returns:
        The variants, the variant of each network (N,), and the quantities that the variants compute on.
    """
    labels = np.full(len(column), ABSENT, dtype=np.int64)
    present = [(i, kernel) for i, kernel in enumerate(column) if kernel is not None]
    numbers = np.array([[getattr(kernel, name) for name in NUMBERS] for _, kernel in present], dtype=np.int64)
    rows = np.array([i for i, _ in present], dtype=np.int64)
    values = counts[rows]
    varying = [f for f in range(len(NUMBERS)) if (numbers[:, f] != numbers[0, f]).any()]
    texts: dict[tuple[object, ...], int] = {}
    kind = np.array([texts.setdefault(_texts(kernel), len(texts)) for _, kernel in present])
    usual = {f: _usual(numbers[:, f], values) for f in varying}
    forms = np.stack([kind, *(_forms(numbers[:, f], values, kind, usual[f]) for f in varying)], axis=1)
    distinct, label = np.unique(forms, axis=0, return_inverse=True)
    label = label.reshape(-1)
    variants = []
    for index in range(len(distinct)):
        first = present[int(np.flatnonzero(label == index)[0])][1]
        extents = []
        for f, code in zip(varying, distinct[index, 1:].tolist(), strict=True):
            if code >= 0:
                quantity, power = divmod(code, len(_POWERS) + 1)
                extents.append(Extent(NUMBERS[f], quantity, 2**power))
        fixed = {name: getattr(first, name) for name in (*_FIXED, *NUMBERS)}
        variants.append(Variant(Kernel(**fixed, source=first.source), tuple(extents)))
    labels[rows] = label
    return tuple(variants), labels, frozenset(e.quantity for v in variants for e in v.extents)


def _texts(kernel: Kernel) -> tuple[object, ...]:
    return tuple(getattr(kernel, name) for name in _FIXED)


def _rounded(values: Ints) -> Ints:
    """Quantities (N, Q), as they are and rounded up to each power: (N, Q, P)."""
    return np.stack([values, *(-(-values // p) * p for p in _POWERS)], axis=2)


def _usual(numbers: Ints, values: Ints) -> int:
    """The quantity that explains a field most often, under whichever rounding; the first of equally good ones."""
    return int(np.argmax((_rounded(values) == numbers[:, None, None]).any(axis=2).sum(axis=0)))


def _forms(numbers: Ints, values: Ints, kind: Ints, usual: int) -> Ints:
    """What each example's value of a field is: ``quantity * 7 + log2(block)``, or ``-1 - constant``; (N,).

    One form a kind of kernel where one explains it (the slot's usual quantity first, then a constant, then any other
    quantity), else as few as possible.
    """
    result = np.empty(len(numbers), dtype=np.int64)
    width = len(_POWERS) + 1
    for k in np.unique(kind):
        left = np.flatnonzero(kind == k)
        while len(left):
            hits = _rounded(values[left]) == numbers[left][:, None, None]
            score = hits.sum(axis=0).astype(np.float64)  # (Q, P)
            score[usual] += 0.5
            at = int(np.argmax(score))
            constant, common = np.unique(numbers[left], return_counts=True)
            most = int(common.argmax())
            if common[most] > score.ravel()[at]:
                covered = numbers[left] == constant[most]
                result[left[covered]] = -1 - constant[most]
            else:
                quantity, power = divmod(at, width)
                covered = hits[:, quantity, power]
                if not covered.any():  # no quantity gives it: the values themselves
                    result[left] = -1 - numbers[left]
                    break
                result[left[covered]] = at
            left = left[~covered]
    return result
