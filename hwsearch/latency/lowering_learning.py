"""Learning a ``LoweringTemplate``: the runtime itself lowers random choices, and rules are fitted to what it did.

Nothing of a runtime is known here. Each round lowers random choices, to see whether the template foretells them, and
choices about which the template and other trees that fit the same examples disagree (query by committee), to learn most
from the fewest. It ends when some rounds in a row were right and so is a last, fresh sample (or the limit on
lowered choices is reached); that sample gives the residual error.

Random choices are drawn over the *classes* of widths: a rule that needs six groups to be multiples of four would never
show among uniform widths. All classes occur among narrow widths, and narrow networks lower fast, so most are narrow.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hwsearch.graph.kernel import Kernel
from hwsearch.graph.widths import WidthChoice
from hwsearch.latency.lowering_template import (
    Check,
    Ints,
    LoweringTemplate,
    Quantity,
    Rule,
    Slot,
    Split,
    decide,
    network_key,
    same_kernels,
    walk,
)
from hwsearch.latency.rules import Atoms, fit_rule, fit_variants

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.latency.lowering import Lowering

#: (choices lowered, most that may be, what is going on)
Progress = Callable[[int, int, str], None]
SlotName: TypeAlias = tuple[tuple[str, ...], str, int]

#: Choices lowered at most, by default.
MOST = 1536
_FIRST, _ROUND, _DISPUTED, _RIGHT_ROUNDS, _LAST = 128, 32, 48, 3, 128
#: Trees beside the template's own that new choices decide between, and how many choices are looked through for them.
_COMMITTEE, _POOL = 2, 1536
#: Widths up to here are in every class of the wider ones.
_NARROW = 80


def learn(lowering: Lowering, *, seed: int = 0, most: int = MOST, progress: Progress | None = None) -> LoweringTemplate:
    """The template of a lowering's width space on its device.

    Args:
        lowering: asks the runtime.
        seed: of the random choices; equal seeds give equal templates.
        most: choices that may be lowered.
        progress: told as learning goes on.

    Raises:
        DeviceJobError: the runtime rejects a candidate; its widths are named.
    """
    space = lowering.template.space
    learner = _Learner(lowering, space, np.random.default_rng([seed, len(space.groups)]), progress, most)
    return learner.run()


class _Learner:
    """What was lowered so far, and what follows from it."""

    def __init__(
        self, lowering: Lowering, space: WidthSpace, rng: np.random.Generator, progress: Progress | None, most: int
    ) -> None:
        self.lowering, self.space, self.rng, self.most = lowering, space, rng, most
        self.progress = progress or (lambda done, most, message: None)
        self.quantities = channel_quantities(space)
        self.rows: list[tuple[int, ...]] = []
        self.seen: list[dict[SlotName, Kernel]] = []
        self.known: set[tuple[int, ...]] = set()
        self.rivals: list[tuple[Rule, ...]] = []
        self.size = math.prod(len(group.widths) for group in space.groups)
        self.widths = [np.asarray(group.widths, dtype=np.int64) for group in space.groups]
        self.narrow = [_narrow_classes(group.widths) for group in space.groups]
        session = lowering.session
        groups = tuple((group.name, group.widths) for group in space.groups)
        self.template = LoweringTemplate(
            session.device.name, session.fingerprint, network_key(space), groups, self.quantities, (), Check(0, 0, 0, 0)
        )

    def run(self) -> LoweringTemplate:
        self.ask([self.space.full().widths, self.space.smallest().widths, *self.draw(_FIRST)])
        self.fit()
        while True:
            self.rounds()
            check, wrong = self.last_check()
            new = [row for row in wrong if row not in self.known]
            if not new or len(self.known) + _LAST >= self.most:
                return replace(self.template, check=check)
            self.ask(new)
            self.fit()

    def rounds(self) -> None:
        """Lower and learn until some rounds in a row were right."""
        right = 0
        while right < _RIGHT_ROUNDS and len(self.known) < min(self.most, self.size):
            fresh, disputed = self.draw(_ROUND), self.disputed()
            if not fresh:
                break
            wrong = self.wrong(fresh, self.ask(fresh))
            hard = self.wrong(disputed, self.ask(disputed))
            words = f"{len(wrong)} of {len(fresh)} new choices foretold wrong, {len(hard)} of {len(disputed)} hard ones"
            self.progress(len(self.known), self.most, words)
            right = 0 if wrong or 8 * len(hard) > len(disputed) else right + 1
            if wrong or hard:
                self.fit()

    def last_check(self) -> tuple[Check, list[tuple[int, ...]]]:
        """The template against the networks themselves, on choices that nothing was learnt from; and the wrong ones.

        Where every choice of the space was lowered no fresh one is left: then those are checked.
        """
        fresh = self.draw(_LAST) or [self.rows[i] for i in self.rng.permutation(len(self.rows))[:_LAST]]
        real = self.lowering.kernels([WidthChoice(row) for row in fresh])
        shares = [same_kernels(a, b) / len(b) for a, b in zip(self.template.lower(fresh), real, strict=True)]
        wrong = [row for row, share in zip(fresh, shares, strict=True) if share > 0]
        words = f"{len(wrong)} of {len(fresh)} foretold wrong in the last check"
        self.progress(len(self.known), self.most, words)
        asked = len(self.known.union(fresh))
        return Check(len(fresh), len(wrong), round(max(shares, default=0.0), 6), asked), wrong

    # ------------------------------------------------------------------ choices

    def draw(self, count: int) -> list[tuple[int, ...]]:
        """Up to ``count`` new choices, of several kinds in turn."""
        found: list[tuple[int, ...]] = []
        taken = set(self.known)
        for attempt in range(4 * count):
            row = self._random(attempt % 6)
            if row not in taken:
                taken.add(row)
                found.append(row)
                if len(found) == count:
                    break
        return found

    def _random(self, kind: int) -> tuple[int, ...]:
        rng = self.rng
        if kind < 2:  # uniform
            return tuple(int(rng.choice(widths)) for widths in self.widths)
        # Mostly round widths, with a share of groups (none up to all) at any class.
        share = rng.choice([0.0, 0.1, 0.25, 0.5, 1.0])
        row = []
        for few, every in self.narrow:
            found = few if kind == 5 else every  # where small widths matter
            widths, powers, top = found.widths, found.powers, found.top
            level = rng.choice(found.levels) if rng.random() < share else top - rng.integers(2)
            options = widths[powers == level] if (powers == level).any() else widths[powers == top]
            if rng.random() < 0.5:  # the roundest widths are few: take those at least as round
                options = widths[powers >= min(level, top)]
            row.append(int(rng.choice(options)))
        return tuple(row)

    def disputed(self) -> list[tuple[int, ...]]:
        """Choices about which the committee disagrees, each about a slot that few of the others are about."""
        pool = self.draw(_POOL)
        counts = self.template.counts(pool) if pool else np.zeros((0, len(self.quantities)), dtype=np.int64)
        disagree = np.zeros((len(pool), len(self.rivals)), dtype=bool)
        for index, (own, *others) in enumerate(self.rivals):
            told = decide(own, counts, len(pool))
            for other in others:
                disagree[:, index] |= decide(other, counts, len(pool)) != told
        left = disagree.copy()
        chosen: list[tuple[int, ...]] = []
        while len(chosen) < _DISPUTED and left.any():
            about = left.sum(axis=0)
            slot = int(np.argmin(np.where(about > 0, about, len(pool) + 1)))
            at = int(np.argmax(left[:, slot]))
            chosen.append(pool[at])
            # Twice about a slot is enough for a round.
            enough = disagree[[pool.index(row) for row in chosen]].sum(axis=0) >= 2
            left[at] = False
            left[:, enough] = False
        return chosen

    # ------------------------------------------------------------------ asking and fitting

    def ask(self, rows: Sequence[tuple[int, ...]]) -> list[tuple[Kernel, ...]]:
        """Lower choices and remember what came."""
        if not rows:
            return []
        kernels = self.lowering.lower([WidthChoice(row) for row in rows])
        self.rows += rows
        self.known.update(rows)
        self.seen += [dict(zip(slot_names(network), network, strict=True)) for network in kernels]
        self.progress(len(self.known), self.most, "lowering")
        return kernels

    def wrong(self, rows: Sequence[tuple[int, ...]], real: Sequence[tuple[Kernel, ...]]) -> list[tuple[int, ...]]:
        """The choices whose kernels are not what the template says."""
        told = self.template.lower(rows)
        return [row for row, one, two in zip(rows, told, real, strict=True) if same_kernels(one, two)]

    def fit(self) -> None:
        """Fit every slot to everything seen."""
        rows = np.asarray(self.rows, dtype=np.int64)
        counts = np.stack([q.of(rows) for q in self.quantities], axis=1)
        atoms = Atoms.of(counts, [len(q.terms) for q in self.quantities])
        slots, self.rivals = [], []
        known: dict[object, tuple[Rule, ...]] = {}
        usual = usual_questions(self.template.slots)
        for name in slot_order(self.seen):
            column = [network.get(name) for network in self.seen]
            variants, labels, own = fit_variants(column, counts)
            key = labels.tobytes(), own  # an addition and its activation come and go together
            if key not in known:
                rule = fit_rule(labels, atoms, own, usual)
                others = range(_COMMITTEE if isinstance(rule, Split) else 0)
                known[key] = (rule, *(fit_rule(labels, atoms, own, rng=self.rng) for _ in others))
            slots.append(Slot(*name, variants, known[key][0]))
            self.rivals.append(known[key])
        self.template = replace(self.template, slots=tuple(slots))


def usual_questions(slots: Iterable[Slot]) -> Counter[tuple[int, int]]:
    """How many of some slots ask for each (block, small)."""
    found: Counter[tuple[int, int]] = Counter()
    for slot in slots:
        found.update({(rule.block, rule.small) for rule in walk(slot.rule) if isinstance(rule, Split)})
    return found


@dataclass(frozen=True, eq=False)
class _Classes:
    """Some widths of a group, how often two divides each (``powers``), which such ``levels`` there are, and the ``top``
    one."""

    widths: Ints
    powers: Ints
    levels: Ints
    top: int

    @classmethod
    def of(cls, widths: Ints) -> _Classes:
        powers = _powers(widths)
        return cls(widths, powers, np.unique(powers), int(powers.max(initial=0)))


@functools.cache
def _narrow_classes(widths: tuple[int, ...]) -> tuple[_Classes, _Classes]:
    """The narrow ones of a group's widths, at least two: the narrowest third of them, and all."""
    found = np.asarray(widths, dtype=np.int64)
    narrow = found[: max(2, int((found <= _NARROW).sum()))]
    return _Classes.of(narrow[: max(1, -(-len(narrow) // 3))]), _Classes.of(narrow)


def _powers(widths: Ints, most: int = 5) -> Ints:
    """How often two divides each width, at most ``most`` times."""
    return np.asarray(sum((widths % 2**power == 0).astype(np.int64) for power in range(1, most + 1)))


def channel_quantities(space: WidthSpace) -> tuple[Quantity, ...]:
    """Every channel count of the space: the width of each group, and each axis of a parameter that groups lie on."""
    axes: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for index, group in enumerate(space.groups):
        for slot in group.slots:
            axes.setdefault((slot.parameter, slot.axis), []).append((index, slot.elements_per_unit))
    found = {Quantity(0, ((index, 1),)): None for index in range(len(space.groups))}
    for (parameter, axis), terms in axes.items():
        merged: Counter[int] = Counter()
        for index, factor in terms:
            merged[index] += factor
        full = space.network.shapes[parameter][axis]
        fixed = full - sum(factor * space.groups[index].units for index, factor in merged.items())
        found[Quantity(fixed, tuple(sorted(merged.items())))] = None
    return tuple(sorted(found, key=lambda q: (len(q.terms), q.terms, q.constant)))


def slot_names(kernels: Iterable[Kernel]) -> list[SlotName]:
    """A name for each kernel of a network that is the same for other widths: source, operation, and a running number.

    A reorder whose tensor the runtime does not tell is named after its neighbour on the blocked side: the maker of what
    it unpacks, or the reader of what it packs.
    """
    kernels = list(kernels)
    sources = [() if k.family == "reorder" and _made_up(k) else k.source[:1] for k in kernels]
    for index, kernel in enumerate(kernels):
        if kernel.family == "reorder" and _made_up(kernel):
            step = 1 if kernel.layout_out != "nchw" else -1
            at = index + step
            while 0 <= at < len(kernels) and kernels[at].family == "reorder":
                at += step
            sources[index] = kernels[at].source[:1] if 0 <= at < len(kernels) else ()
    numbers: Counter[Any] = Counter()
    names = []
    for kernel, source in zip(kernels, sources, strict=True):
        names.append((source, kernel.op, numbers[source, kernel.op]))
        numbers[source, kernel.op] += 1
    return names


def _made_up(kernel: Kernel) -> bool:
    return not kernel.source or kernel.source[0].startswith(kernel.op)


def slot_order(networks: Sequence[dict[SlotName, Kernel]]) -> list[SlotName]:
    """All slots in one order that agrees with the networks' own orders as far as these agree with each other."""
    names = list(dict.fromkeys(name for network in networks for name in network))
    index = {name: i for i, name in enumerate(names)}
    place = np.full((len(networks), len(names)), np.nan)
    for row, network in enumerate(networks):
        own = [index[name] for name in network]
        place[row, own] = (np.arange(len(own)) + 0.5) / len(own)
    before = np.zeros((len(names), len(names)), dtype=bool)
    for places in place:
        before |= places[:, None] < places[None, :]
    before &= ~before.T  # seen in both orders: free
    mean = np.nanmean(place, axis=0)
    order, left = [], np.ones(len(names), dtype=bool)
    waits_for = before.sum(axis=0)  # how many of those left come before it
    while left.any():
        free = left & (waits_for == 0)
        at = int(np.argmin(np.where(free if free.any() else left, mean, np.inf)))
        order.append(names[at])
        left[at] = False
        waits_for -= before[at]
    return order
