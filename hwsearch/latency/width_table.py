"""``WidthTable``: a predictor expanded exactly over a width space, so that a candidate costs a few look-ups.

Every slot of a ``LoweringTemplate`` is a table over the few positions that decide its kernel (``width_program.py``).
Tables over the same positions are added up into one, small ones go into larger ones, and neighbours are joined while
the result stays small enough for a cache. An entry holds (milliseconds, megabytes of weights) as one complex number, so
one look-up and one addition serve both; the network's own terms (weights beyond the caches, overhead) follow once a
candidate. Entries are priced by the predictor when they are first asked for (or all at once, by ``expand``), and are
float64: against pricing the same kernels one by one only the order of a sum differs.

*Kernel terms* count the kernels that the candidates' networks have, not the look-ups, which are fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwsearch.errors import InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.graph.widths import WidthChoice
from hwsearch.latency.features import weight_mb
from hwsearch.latency.lowering_template import Ints, LoweringTemplate, slot_kernels
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.latency.width_program import Member, Program, SumIndex, WidthIndex

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace

Floats: TypeAlias = NDArray[np.float64]
Pairs: TypeAlias = NDArray[np.complex128]

#: Candidates at a time: their columns stay in a core's cache.
CHUNK = 8192
#: Tables are joined up to so many entries (of 16 bytes) each.
_JOINED = 8192
#: Entries of a width table in all; a space that needs more is priced kernel by kernel.
MOST_ENTRIES = 1 << 23
#: Entries priced at a time by ``expand``.
_EXPAND = 1 << 15


@dataclass(frozen=True)
class Price:
    """What one kernel adds to a network.

    Attributes:
        ms: milliseconds, its weights at hand.
        mb: megabytes of weights.
        marks: whether it is unlike any profiled kernel (0 or 1), and its novelty, see ``interval.py``.
    """

    ms: float
    mb: float
    marks: tuple[float, float]


GUESSED, NOVEL = range(2)


class Prices:
    """The price of each kernel, asked of the predictor once."""

    def __init__(self, predictor: LatencyPredictor) -> None:
        self.predictor = predictor
        self._known: dict[Kernel, Price] = {}

    def of(self, kernels: Sequence[Kernel]) -> list[Price]:
        """The price of each kernel."""
        new = list(dict.fromkeys(k for k in kernels if k not in self._known))
        if new:
            times, weights = self.predictor.predict(new).tolist(), weight_mb(new).tolist()
            novelty = self.predictor.profiled_.novelty(new).tolist()
            for kernel, ms, mb, new_to in zip(new, times, weights, novelty, strict=True):
                doubt = self.predictor.model_.doubt(kernel)
                self._known[kernel] = Price(ms, mb, (float(doubt is not None), new_to))
        return [self._known[k] for k in kernels]


class Factor:
    """A table over some positions: the sum of its members' prices."""

    def __init__(self, members: list[Member], indices: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        self.members, self.indices, self.sizes = members, indices, sizes
        self.entries = int(np.prod(sizes, dtype=np.int64))
        self.table: Pairs = np.full(self.entries, complex(np.nan, 0.0))
        #: The same sum with each price times each of its marks; None while that is 0 everywhere.
        self.marked: list[Pairs | None] = [None, None]


class WidthTable:
    """Predicted milliseconds of every choice of a width space, by look-up.

    Args:
        space: the widths; the template must cover it.
        template: its lowering on the predictor's device.
        predictor: fitted.
        prices: known prices to share.

    Raises:
        InputError: the template is of another space, or the tables would be too large (see ``fits``).

    Example:
        >>> table = WidthTable(space, template, predictor)              # doctest: +SKIP
        >>> table.evaluate(space.choice_array([space.full()]))          # doctest: +SKIP
        array([3.02])
    """

    def __init__(
        self,
        space: WidthSpace,
        template: LoweringTemplate,
        predictor: LatencyPredictor,
        prices: Prices | None = None,
    ) -> None:
        if not template.covers(space):
            raise InputError("the lowering template is of another width space; learn one for this space")
        program = Program.of(template, space)
        if program is None or not _fits(program):
            raise InputError("a width table of this space would be too large; use a quantum, so that widths are fewer")
        self.space, self.template, self.predictor = space, template, predictor
        self.prices = prices or Prices(predictor)
        self._program = program
        self.factors = _factors(program)
        self._lookups = [_lookup(widths) for widths in program.widths]

    @classmethod
    def fits(cls, space: WidthSpace, template: LoweringTemplate) -> bool:
        """Whether the tables of a space are small enough to be held."""
        program = Program.of(template, space)
        return program is not None and _fits(program)

    # ------------------------------------------------------------------ asking

    def evaluate(self, choices: ArrayLike) -> Floats:
        """Milliseconds (N,) of choices, an int array (N, groups).

        Raises:
            InputError: a choice that is not one of the space's.
        """
        rows, overhead_ms = self._rows(choices), self.predictor.overhead_ms
        result = np.empty(len(rows))
        for part in _chunks(len(rows)):
            total = self._with_context(self._sums(rows[part]))
            result[part] = self.predictor.stretched(total + overhead_ms)
        return result

    def coverage(self, choices: ArrayLike) -> Floats:
        """Share of each choice's milliseconds that comes from kernels like profiled ones, (N,)."""
        return 1 - self._mean(choices, GUESSED)

    def novelty(self, choices: ArrayLike) -> Floats:
        """How unlike the profiled networks each choice is, in octaves, (N,): a mean over its kernels' milliseconds."""
        return self._mean(choices, NOVEL)

    def interval(self, choices: ArrayLike, level: float = 0.9) -> tuple[Floats, Floats]:
        """(low_ms, high_ms), each (N,): what ``measured_ms`` lies between with probability ``level``."""
        return self.predictor.interval(self.evaluate(choices), self.coverage(choices), level, self.novelty(choices))

    def _mean(self, choices: ArrayLike, mark: int) -> Floats:
        """The mean of a mark over each choice's milliseconds, (N,)."""
        rows = self._rows(choices)
        result = np.zeros(len(rows))
        for part in _chunks(len(rows)):
            sums, marked = self._sums(rows[part]), np.zeros(len(rows[part]), dtype=np.complex128)
            tables = [(factor, table) for factor in self.factors if (table := factor.marked[mark]) is not None]
            positions = self._positions(rows[part]) if tables else []
            for factor, table in tables:
                marked += table[_flat(factor, positions, len(marked))]
            if tables:
                result[part] = self._with_context(marked, sums) / self._with_context(sums)
        return result

    def kernel_ms(self, choices: ArrayLike) -> Floats:
        """Milliseconds of each slot's kernel, (N, slots), alone, weights at hand; 0 where there is no such kernel.

        The slots are ``template.slots``. Not by look-up: for a closer look at few choices.
        """
        rows = self._rows(choices)
        self._positions(rows)
        counts = self.template.counts(rows)
        columns = []
        for slot in self.template.slots:
            column = np.zeros(len(rows))
            found = slot_kernels(slot, counts, len(rows))
            present = [i for i, kernel in enumerate(found) if kernel is not None]
            column[present] = [price.ms for price in self.prices.of([k for k in found if k is not None])]
            columns.append(column)
        return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))

    def kernel_terms(self, choices: ArrayLike) -> int:
        """Kernels of all these choices' networks together."""
        rows = self._rows(choices)
        counts = self.template.counts(rows)
        return sum(sum(k is not None for k in slot_kernels(slot, counts, len(rows))) for slot in self.template.slots)

    @property
    def program(self) -> Program:
        """What says which widths, and sums of widths, each of the ``factors`` is a table over."""
        return self._program

    @property
    def entries(self) -> int:
        """Entries of all tables."""
        return sum(factor.entries for factor in self.factors)

    def expand(self) -> int:
        """Price every entry that is not priced yet; returns how many there were. Seconds to a minute."""
        count = 0
        for factor in self.factors:
            missing = np.flatnonzero(np.isnan(factor.table.real))
            count += len(missing)
            for start in range(0, len(missing), _EXPAND):
                self._price(factor, missing[start : start + _EXPAND])
        return count

    # ------------------------------------------------------------------ look-ups

    def _with_context(self, part: Pairs, whole: Pairs | None = None) -> Floats:
        """Milliseconds of kernels with their share of what the network's weights cost beyond the caches."""
        total_mb = np.maximum((part if whole is None else whole).imag, 1e-12)
        context = self.predictor.context_ms(total_mb)
        return np.asarray(part.real + part.imag / total_mb * context)

    def _rows(self, choices: ArrayLike) -> Ints:
        return np.asarray(choices, dtype=np.int64).reshape(-1, len(self.space.groups))

    def _sums(self, rows: Ints) -> Pairs:
        """(milliseconds + i megabytes) of all kernels, (N,), for a chunk of widths."""
        positions = self._positions(rows)
        total = self._add_up(positions, len(rows))
        if np.isnan(total.sum().real):  # an entry that nobody asked for yet
            new = np.flatnonzero(np.isnan(total.real))
            some = [position[new] for position in positions]
            for factor in self.factors:
                flat = np.unique(_flat(factor, some, len(new)))
                self._price(factor, flat[np.isnan(factor.table[flat].real)])
            total[new] = self._add_up(some, len(new))
        return total

    def _add_up(self, positions: list[Ints], count: int) -> Pairs:
        total, taken = np.zeros(count, dtype=np.complex128), np.empty(count, dtype=np.complex128)
        for factor in self.factors:
            # "clip" is the fast mode: no index is out of bounds here.
            np.take(factor.table, _flat(factor, positions, count), out=taken, mode="clip")
            total += taken
        return total

    def _positions(self, rows: Ints) -> list[Ints]:
        """The value of each of the program's indices for some widths, (N,) each.

        Raises:
            InputError: a width that the space does not allow.
        """
        columns = np.ascontiguousarray(rows.T)
        places: list[Ints] = []
        for lookup, widths, column in zip(self._lookups, self._program.widths, columns, strict=True):
            place = np.take(lookup, column, mode="clip")
            if len(place) and int(place.max()) == len(widths):
                bad = int(np.argmax(place))
                self.space.validate(WidthChoice(tuple(rows[bad].tolist())))
                raise InputError(f"widths {rows[bad].tolist()} are none of the space's")
            places.append(place)
        found: list[Ints] = []
        for index in self._program.indices:
            if isinstance(index, WidthIndex):
                found.append(places[index.group])
            elif isinstance(index, SumIndex):
                total = np.zeros(len(rows), dtype=np.int64)
                for group, steps in index.steps.items():
                    total += np.take(steps, places[group], mode="clip")
                found.append(total)
            elif index.before is None:
                found.append(np.take(index.table[0], found[index.on], mode="clip"))
            else:
                flat = found[index.before] * index.table.shape[1]
                flat += found[index.on]
                found.append(np.take(index.table.ravel(), flat, mode="clip"))
        return found

    # ------------------------------------------------------------------ pricing

    def _price(self, factor: Factor, flat: Ints) -> None:
        """Fill entries of a factor."""
        if not len(flat):
            return
        places = dict(zip(factor.indices, np.unravel_index(flat, factor.sizes), strict=True)) if factor.sizes else {}
        total = np.zeros(len(flat), dtype=np.complex128)
        marked = np.zeros((len(factor.marked), len(flat)), dtype=np.complex128)
        for member in factor.members:
            sizes = self._program.sizes(member.indices)
            own = np.zeros(len(flat), dtype=np.int64)
            if sizes:
                own = np.ravel_multi_index([places[i] for i in member.indices], sizes)
            distinct, inverse = np.unique(own, return_inverse=True)
            price, marks = self._member(member, distinct, sizes)
            total += price[inverse]
            marked += (price * marks)[:, inverse]
        factor.table[flat] = total
        for mark, values in enumerate(marked):
            if values.any() and factor.marked[mark] is None:
                factor.marked[mark] = np.zeros(factor.entries, dtype=np.complex128)
            if (table := factor.marked[mark]) is not None:
                table[flat] = values

    def _member(self, member: Member, flat: Ints, sizes: tuple[int, ...]) -> tuple[Pairs, Floats]:
        """(prices (K,), marks (2, K)) of one slot's kernel; 0 where there is none."""
        places = list(np.unravel_index(flat, sizes)) if sizes else []
        state = places.pop(0) if len(places) > len(member.axes) else np.zeros(len(flat), dtype=np.int64)
        price, marks = np.zeros(len(flat), dtype=np.complex128), np.zeros((2, len(flat)))
        for number in np.unique(state):
            rows = np.flatnonzero(state == number)
            positions = {axis: place[rows] for axis, place in zip(member.axes, places, strict=True)}
            counts = self._program.counts(member, positions)
            found = slot_kernels(member.slot, counts, len(rows), member.rules[int(number)])
            present = np.array([kernel is not None for kernel in found], dtype=bool)
            if present.any():
                rows = rows[present]
                prices = self.prices.of([k for k in found if k is not None])
                price[rows] = [complex(p.ms, p.mb) for p in prices]
                marks[:, rows] = np.array([p.marks for p in prices]).T
        return price, marks


def _chunks(count: int) -> list[slice]:
    """Runs of at most ``CHUNK`` candidates."""
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def _lookup(widths: Ints) -> Ints:
    """Width to position; the size for what is not allowed, and at both ends, where what lies beyond is clipped to."""
    table = np.full(int(widths[-1]) + 2, len(widths), dtype=np.int64)
    table[widths] = np.arange(len(widths))
    return table


def _flat(factor: Factor, positions: list[Ints], count: int) -> Ints:
    """Entry of a factor for each candidate, (N,)."""
    if not factor.indices:
        return np.zeros(count, dtype=np.int64)
    flat = positions[factor.indices[0]]
    for index, size in zip(factor.indices[1:], factor.sizes[1:], strict=True):
        flat = flat * size
        flat += positions[index]
    return flat


def _fits(program: Program) -> bool:
    sizes = {frozenset(m.indices): float(np.prod(program.sizes(m.indices), dtype=float)) for m in program.members}
    return sum(sizes.values()) <= MOST_ENTRIES


def _factors(program: Program) -> list[Factor]:
    """Members with the same positions together, those of fewer positions within them, and small tables joined."""
    sets: dict[frozenset[int], list[Member]] = {}
    for member in sorted(program.members, key=lambda m: -len(set(m.indices))):
        own = frozenset(member.indices)
        wider = [other for other in sets if own <= other]
        # The smallest of the tables that it fits into.
        home = min(wider, key=lambda s: (_size(program, s), sorted(s)), default=own)
        sets.setdefault(home, []).append(member)
    while (pair := _best_pair(program, list(sets))) is not None:
        joined = sets.pop(pair[0]) + sets.pop(pair[1])
        sets.setdefault(pair[0] | pair[1], []).extend(joined)
    ordered = sorted(sets.items(), key=lambda item: sorted(item[0]))
    return [Factor(members, tuple(sorted(s)), program.sizes(sorted(s))) for s, members in ordered]


def _size(program: Program, indices: frozenset[int]) -> int:
    return int(np.prod(program.sizes(indices), dtype=np.int64))


def _best_pair(program: Program, sets: list[frozenset[int]]) -> tuple[frozenset[int], frozenset[int]] | None:
    """The two tables whose union is smallest, if it is small enough."""
    best, least = None, _JOINED + 1
    for at, one in enumerate(sets):
        for other in sets[:at]:
            size = _size(program, one | other)
            if size < least:
                best, least = (one, other), size
    return best


__all__ = ["CHUNK", "Factor", "Price", "Prices", "WidthTable"]
