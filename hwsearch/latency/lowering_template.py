"""``LoweringTemplate``: the kernels of every choice of a width space, as a function of its widths.

A runtime's decisions (blocked layout or not, reorders, fused tails, padded channels) depend on the *classes* of a few
channel counts: how often two divides them, and whether they are small. A template has one *slot* per node that the
runtime was ever seen to make, with a decision tree over such classes of channel counts (of single groups, and of sums
of groups at a concatenation) whose leaves say which kernel the slot holds, if any. A kernel's dimensions are channel
counts, or channel counts rounded up to a block. ``lowering_learning.py`` learns all of it by asking the runtime.

A combination of classes that was never lowered gets the leaf that its answers lead to. How often that is wrong is known
from choices that were lowered only to see (``check``): a ``NetworkLatency`` takes it off the coverage, and above a few
in a hundred it uses no template but lowers each choice.

Example:
    >>> template = learn(lowering)                                          # doctest: +SKIP
    >>> template.kernels(space.smallest()) == lowering.kernels([space.smallest()])[0]       # doctest: +SKIP
    True
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwsearch.device.spec import Fingerprint
from hwsearch.errors import InputError, SchemaError
from hwsearch.graph.kernel import Kernel
from hwsearch.latency.predictor import BINDING
from hwsearch.latency.table import read_manifest, write_atomic

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace

SCHEMA = "hwsearch.lowering-template"
VERSION = 1
#: Folder of the templates, beside a device's table.
FOLDER = "templates"
_REMEDY = "delete it: it is made again where the device is at hand"

Ints: TypeAlias = NDArray[np.int64]

#: What a runtime's code path depends on, and what it computes on.
NUMBERS = tuple(f.name for f in fields(Kernel) if f.compare and f.type in ("int", int))
TEXTS = tuple(f.name for f in fields(Kernel) if f.compare and f.name not in (*NUMBERS, "fused"))


@dataclass(frozen=True)
class Quantity:
    """A channel count: ``constant + sum of factor * width`` over (group index, factor) ``terms``."""

    constant: int
    terms: tuple[tuple[int, int], ...]

    def of(self, rows: Ints) -> Ints:
        """The count (N,) for widths (N, G)."""
        total = np.full(len(rows), self.constant, dtype=np.int64)
        for group, factor in self.terms:
            total += factor * rows[:, group]
        return total


@dataclass(frozen=True)
class Extent:
    """One integer field of a kernel: a quantity (by index), rounded up to a multiple of ``block``."""

    field: str
    quantity: int
    block: int = 1

    def of(self, counts: Ints) -> Ints:
        """The field's values for values of the quantity."""
        return counts if self.block == 1 else -(-counts // self.block) * self.block


@dataclass(frozen=True)
class Variant:
    """One form that a slot's kernel takes: ``kernel`` holds what is fixed, ``extents`` the rest."""

    kernel: Kernel
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class Split:
    """An inner node of a slot's rule: is a count below ``small``, or a multiple of ``block`` (0: never)?"""

    quantity: int
    block: int
    small: int
    yes: Rule
    no: Rule

    def test(self, counts: Ints) -> NDArray[np.bool_]:
        """The outcome for values of the quantity."""
        return answer(self.block, self.small, counts)


def answer(block: int, small: int, counts: Ints) -> NDArray[np.bool_]:
    """Which counts are below ``small``, or multiples of ``block`` (0: none)."""
    below = counts < small
    return np.asarray(below | (counts % block == 0) if block else below)


#: A rule is a split, or the index of a slot's variant (-1: the runtime makes no such node).
Rule: TypeAlias = "Split | int"
ABSENT = -1


@dataclass(frozen=True)
class Slot:
    """A node that the runtime makes for some choices or for all; ``number`` tells equal names of one graph apart."""

    source: tuple[str, ...]
    op: str
    number: int
    variants: tuple[Variant, ...]
    rule: Rule


@dataclass(frozen=True)
class Check:
    """How a template did on fresh random choices that it was not learnt from.

    Attributes:
        choices: how many were lowered for real.
        wrong: choices of which any kernel differed.
        worst: largest share of a choice's kernels that differed.
        asked: choices that were lowered in all, for learning and checking.
    """

    choices: int
    wrong: int
    worst: float
    asked: int

    @property
    def error(self) -> float:
        """Share of the choices that were wrong."""
        return self.wrong / max(self.choices, 1)


@dataclass(frozen=True)
class LoweringTemplate:
    """Kernels of a width space's choices on one device.

    Attributes:
        device: name of the device that was asked.
        fingerprint: what it was.
        network: identity of the network, see ``network_key``.
        groups: (name, allowed widths) of each group of the space.
        quantities: channel counts that decide something.
        slots: in an order of execution.
        check: the residual error.
    """

    device: str
    fingerprint: Fingerprint
    network: str
    groups: tuple[tuple[str, tuple[int, ...]], ...]
    quantities: tuple[Quantity, ...]
    slots: tuple[Slot, ...]
    check: Check

    @property
    def key(self) -> str:
        """Name of the template's file: network, groups and widths, and the device's runtime."""
        return _key(self.network, self.groups, self.fingerprint)

    def counts(self, rows: ArrayLike) -> Ints:
        """Every quantity (N, Q) for widths (N, G)."""
        array = np.asarray(rows, dtype=np.int64).reshape(-1, len(self.groups))
        found = [quantity.of(array) for quantity in self.quantities]
        return np.stack(found, axis=1) if found else np.zeros((len(array), 0), dtype=np.int64)

    def kernels(self, choice: WidthChoice) -> tuple[Kernel, ...]:
        """The kernels that a choice becomes, in an order of execution."""
        return self.lower([choice.widths])[0]

    def lower(self, rows: ArrayLike) -> list[tuple[Kernel, ...]]:
        """The kernels of each of some widths (N, G)."""
        counts = self.counts(rows)
        columns = [slot_kernels(slot, counts, len(counts)) for slot in self.slots]
        found: list[tuple[Kernel, ...]] = []
        for row in zip(*columns, strict=True):
            present = (kernel for kernel in row if kernel is not None)
            found.append(tuple(replace(k, node=f"{i:03d}_{k.op}") for i, k in enumerate(present)))
        return found

    def covers(self, space: WidthSpace) -> bool:
        """Whether every choice of a space is one of the template's: same network and groups, no further widths."""
        return self.foreign(space) is None

    def foreign(self, space: WidthSpace) -> str | None:
        """Why a space is not the template's, or None: what it has, and what the space has."""
        own, other = dict(self.groups), {group.name: group.widths for group in space.groups}
        if self.network != network_key(space):
            return f"network {self.network} instead of {network_key(space)}"
        if list(own) != list(other):
            return f"{len(own)} groups ({', '.join(own)}) instead of {len(other)} ({', '.join(other)})"
        for name, widths in other.items():
            if further := sorted(set(widths) - set(own[name])):
                return f"widths {own[name][0]} to {own[name][-1]} of group {name}, without {further[0]}"
        return None

    # ------------------------------------------------------------------ files

    def save(self, folder: str | Path) -> Path:
        """Write ``<key>.json`` into a folder.

        Raises:
            InputError: the folder cannot be written.
        """
        path = Path(folder) / f"{self.key}.json"
        document = {
            "schema": SCHEMA,
            "version": VERSION,
            "device": self.device,
            "fingerprint": self.fingerprint.to_dict(),
            "network": self.network,
            "groups": [[name, list(widths)] for name, widths in self.groups],
            "quantities": [[q.constant, [list(term) for term in q.terms]] for q in self.quantities],
            "slots": [_slot_document(slot) for slot in self.slots],
            "check": asdict(self.check),
        }
        text = json.dumps(document, sort_keys=True, separators=(",", ":")).replace('{"number"', '\n{"number"')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, (text + "\n").encode())
        except OSError as error:
            raise InputError(f"cannot write the template to {path}: {error}; choose another folder") from None
        return path

    @classmethod
    def load(
        cls, path: str | Path, space: WidthSpace | None = None, fingerprint: Fingerprint | None = None
    ) -> LoweringTemplate:
        """Read a template.

        Args:
            path: the file that ``save`` wrote.
            space: refuse a template of another network, or of fewer widths; None takes any.
            fingerprint: refuse a template of another runtime, CPU, precision ...; None takes any.

        Raises:
            InputError: there is none, or it is for another space or device: both are named.
            SchemaError: damaged, or of another schema or version.
        """
        path = Path(path)
        document = read_manifest(path, SCHEMA, VERSION, "lowering template", _REMEDY)
        try:
            template = cls(
                device=str(document["device"]),
                fingerprint=Fingerprint.from_dict(document["fingerprint"]),
                network=str(document["network"]),
                groups=tuple((str(name), tuple(map(int, widths))) for name, widths in document["groups"]),
                quantities=tuple(
                    Quantity(int(constant), tuple((int(g), int(f)) for g, f in terms))
                    for constant, terms in document["quantities"]
                ),
                slots=tuple(map(_read_slot, document["slots"])),
                check=Check(**document["check"]),
            )
            template._validate()
        except SchemaError as error:
            raise SchemaError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise SchemaError(f"{path}: damaged ({type(error).__name__}: {error}); {_REMEDY}") from None
        if space is not None and (reason := template.foreign(space)) is not None:
            raise InputError(f"{path}: a template of another space: it has {reason}; learn one for this space")
        if fingerprint is not None and (different := differences(template.fingerprint, fingerprint)):
            raise InputError(f"{path}: a template of another device: it has {different}; learn it again")
        return template

    def _validate(self) -> None:
        """Refuse indices that point nowhere.

        Raises:
            SchemaError: naming what is wrong.
        """
        for quantity in self.quantities:
            if any(not 0 <= group < len(self.groups) for group, _ in quantity.terms):
                raise SchemaError(f"a quantity of a group that is not there; {_REMEDY}")
        for slot in self.slots:
            used = [e.quantity for v in slot.variants for e in v.extents]
            for rule in walk(slot.rule):
                if isinstance(rule, Split):
                    used.append(rule.quantity)
                elif not ABSENT <= rule < len(slot.variants):
                    raise SchemaError(f"slot {'.'.join(slot.source)} has no variant {rule}; {_REMEDY}")
            if any(not 0 <= index < len(self.quantities) for index in used):
                raise SchemaError(f"slot {'.'.join(slot.source)} asks for a quantity that is not there; {_REMEDY}")
            if any(e.field not in NUMBERS or e.block < 1 for v in slot.variants for e in v.extents):
                raise SchemaError(f"slot {'.'.join(slot.source)} has an extent that no kernel has; {_REMEDY}")


def network_key(space: WidthSpace) -> str:
    """Sixteen hexadecimal digits that tell networks of different layers, shapes or couplings apart; weights are free.

    Needs the space alone, neither an export nor the device.
    """
    network = space.network
    described = [repr(group.name) + str(group.units) for group in space.groups]
    if network is not None:
        described.append(repr((network.input_shape, network.output_shape, network.layers)))
        graph = getattr(getattr(network, "program", None), "graph", None)
        # Operations and their constant arguments: a stride or an activation is no part of any shape.
        nodes = getattr(graph, "nodes", ())
        described += [f"{node.name}|{node.op}|{node.target}|{node.args}|{node.kwargs}" for node in nodes]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def differences(made_for: Fingerprint, now: Fingerprint) -> str:
    """What binds a template to its device and differs, in words; empty where nothing does."""
    pairs = [(name, getattr(made_for, name), getattr(now, name)) for name in BINDING]
    return "; ".join(f"{name} {theirs!r} instead of {mine!r}" for name, theirs, mine in pairs if theirs != mine)


def stored_path(folder: Path, space: WidthSpace, fingerprint: Fingerprint) -> Path:
    """Where the template of a space on a device lies below the folder of the device's table."""
    groups = tuple((group.name, group.widths) for group in space.groups)
    return folder / FOLDER / f"{_key(network_key(space), groups, fingerprint)}.json"


def _key(network: str, groups: object, fingerprint: Fingerprint) -> str:
    bound = [(name, getattr(fingerprint, name)) for name in BINDING]
    return hashlib.sha256(repr((VERSION, network, groups, bound)).encode()).hexdigest()[:16]


def walk(rule: Rule) -> Iterator[Rule]:
    """Every node of a rule."""
    yield rule
    if isinstance(rule, Split):
        yield from walk(rule.yes)
        yield from walk(rule.no)


def decide(rule: Rule, counts: Mapping[int, Ints] | Ints, size: int) -> Ints:
    """The variant (N,) that a rule gives.

    Args:
        rule: of a slot.
        counts: the quantities that it asks for, (N,) each by index, or all as columns (N, Q).
        size: N.
    """
    result = np.empty(size, dtype=np.int64)

    def go(part: Rule, rows: Ints) -> None:
        if not isinstance(part, Split):
            result[rows] = part
            return
        column = counts[:, part.quantity] if isinstance(counts, np.ndarray) else counts[part.quantity]
        outcome = part.test(column[rows])
        go(part.yes, rows[outcome])
        go(part.no, rows[~outcome])

    go(rule, np.arange(size))
    return result


def slot_kernels(
    slot: Slot, counts: Mapping[int, Ints] | Ints, size: int, rule: Rule | None = None
) -> list[Kernel | None]:
    """The slot's kernel for each of ``size`` sets of quantities (see ``decide``); equal ones are one object."""
    chosen = decide(slot.rule if rule is None else rule, counts, size)
    result = np.full(size, None, dtype=object)
    for index, variant in enumerate(slot.variants):
        own = np.flatnonzero(chosen == index)
        if not len(own):
            continue
        columns = []
        for extent in variant.extents:
            column = counts[:, extent.quantity] if isinstance(counts, np.ndarray) else counts[extent.quantity]
            columns.append(extent.of(column[own]))
        if not columns:
            result[own] = variant.kernel
            continue
        distinct, inverse = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
        names = [extent.field for extent in variant.extents]
        made = np.empty(len(distinct), dtype=object)
        made[:] = [replace(variant.kernel, **dict(zip(names, row, strict=True))) for row in distinct.tolist()]
        result[own] = made[inverse.reshape(-1)]
    return list(result)


def _slot_document(slot: Slot) -> dict[str, Any]:
    variants = []
    for variant in slot.variants:
        fixed = {name: getattr(variant.kernel, name) for name in (*TEXTS, *NUMBERS, "fused")}
        variants.append({"kernel": fixed, "extents": [[e.field, e.quantity, e.block] for e in variant.extents]})
    return {"source": list(slot.source), "op": slot.op, "number": slot.number, "variants": variants,
            "rule": _rule_document(slot.rule)}  # fmt: skip


def _rule_document(rule: Rule) -> Any:
    if not isinstance(rule, Split):
        return rule
    return [rule.quantity, rule.block, rule.small, _rule_document(rule.yes), _rule_document(rule.no)]


def _read_slot(document: Mapping[str, Any]) -> Slot:
    source = tuple(map(str, document["source"]))
    variants = []
    for variant in document["variants"]:
        values = dict(variant["kernel"])
        values = {name: str(values[name]) for name in TEXTS} | {name: int(values[name]) for name in NUMBERS} | {
            "fused": tuple(map(str, values["fused"]))
        }  # fmt: skip
        extents = tuple(Extent(str(name), int(quantity), int(block)) for name, quantity, block in variant["extents"])
        variants.append(Variant(Kernel(**values, source=source), extents))
    rule = _read_rule(document["rule"])
    return Slot(source, str(document["op"]), int(document["number"]), tuple(variants), rule)


def _read_rule(document: Any) -> Rule:
    if isinstance(document, list):
        quantity, block, small, yes, no = document
        if int(block) < 0:
            raise SchemaError(f"a rule asks for multiples of {block}; {_REMEDY}")
        return Split(int(quantity), int(block), int(small), _read_rule(yes), _read_rule(no))
    return int(document)


def same_kernels(one: Sequence[Kernel], other: Sequence[Kernel]) -> int:
    """Number of kernels that do not match (the longer list counts); order does not matter."""
    from collections import Counter

    left, right = Counter(one), Counter(other)
    return max((left - right).total(), (right - left).total())
