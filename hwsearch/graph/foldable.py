"""Blocks that fold: a module of several branches that is one layer at run time, seen by a width space as that layer.

A block says how (``FoldingBlock``); nothing here knows what its branches are. A width of the network is then a width of
all branches at once, channels that only lie between two layers of one branch are none (the folded layer has none
there), and MACs, parameters and exported files are those of the folded network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hwsearch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hwsearch.graph.capture import Network
    from hwsearch.graph.groups import WidthGroup
    from hwsearch.graph.widths import WidthProduct

#: A parameter of a folded layer and its axis, and the block's own parameter and axis of the same channels; local names.
AxisPair = tuple[tuple[str, int], tuple[str, int]]


@runtime_checkable
class FoldingBlock(Protocol):
    """What a block must offer so that widths can be searched on the unfolded network."""

    def fold(self, minimal: bool = True) -> nn.Module:
        """The layer that it is at run time; with ``minimal`` False always of the same kernel."""

    def folded_axes(self) -> tuple[AxisPair, ...]:
        """The axes of the folded layer's parameters, and where the same channels are in the block."""

    def sizes_changed(self) -> None:
        """Called after the shapes of parameters inside were changed."""


def folding_blocks(model: nn.Module) -> dict[str, FoldingBlock]:
    """The outermost blocks of a model by name, those that are folded already left out."""
    found: dict[str, FoldingBlock] = {}
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(module, FoldingBlock) and module.folded_axes():
            found[name] = module
    return found


def folded_network(model: nn.Module, example_input: Tensor, blocks: Iterable[str]) -> Network:
    """The captured network with these blocks folded, batch norms elsewhere left as they are.

    Raises:
        UnsupportedModelError: the model is itself a block, or cannot be captured.
    """
    from hwsearch.graph.capture import capture

    small = copy.deepcopy(model).eval()
    for name in blocks:
        parent, _, local = name.rpartition(".")
        if not name:
            raise UnsupportedModelError(f"{type(model).__name__} is a single block: put it into a module")
        block = small.get_submodule(name)
        assert isinstance(block, FoldingBlock)
        setattr(small.get_submodule(parent), local, block.fold(minimal=False))
    return capture(small, example_input)


def without_inner(groups: Sequence[WidthGroup], blocks: dict[str, FoldingBlock]) -> tuple[list[WidthGroup], list[str]]:
    """The groups that the folded network has too, and the parameter axes of the others, which lie inside one block."""
    seen = {(_join(name, own), axis) for name, block in blocks.items() for _, (own, axis) in block.folded_axes()}
    kept, inner = [], []
    for group in groups:
        names = {_block_of(slot.parameter, blocks) for slot in group.slots}
        if None in names or len(names) > 1 or any((slot.parameter, slot.axis) in seen for slot in group.slots):
            kept.append(group)
        else:
            inner += [f"{slot.parameter} axis {slot.axis}" for slot in group.slots]
    return kept, inner


def with_folded(
    groups: Iterable[WidthGroup], network: Network, blocks: dict[str, FoldingBlock]
) -> tuple[WidthGroup, ...]:
    """The groups with a slot for every axis of the folded layers as well, named after these."""
    from hwsearch.graph.groups import Slot, touched_layers

    twins: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for name, block in blocks.items():
        for (folded, folded_axis), (own, axis) in block.folded_axes():
            twins.setdefault((_join(name, own), axis), []).append((_join(name, folded), folded_axis))
    found, names = [], set()
    for group in groups:
        more = [
            Slot(name, axis, slot.positions, slot.reads)
            for slot in group.slots
            for name, axis in twins.get((slot.parameter, slot.axis), ())
            if name in network.shapes
        ]
        slots = (*group.slots, *more)
        touched = {slot.parameter for slot in slots}
        name = _block_of(group.name + ".", blocks) or group.name
        stem, number = name, 1
        while name in names:
            number += 1
            name = f"{stem}#{number}"
        names.add(name)
        layers = touched_layers(network, touched)
        found.append(replace(group, name=name, slots=slots, layers=layers))
    return tuple(found)


def moved_products(
    products: Sequence[WidthProduct], before: Network, after: Network, renamed: dict[str, str]
) -> tuple[WidthProduct, ...]:
    """Products of activations by their layers in the folded network, which has the same ones in the same order.

    Raises:
        UnsupportedModelError: it has not.
    """
    rows = [index for index, layer in enumerate(before.layers) if layer.weight is None]
    targets = [index for index, layer in enumerate(after.layers) if layer.weight is None]
    if products and len(rows) != len(targets):
        raise UnsupportedModelError("folding changes the products of activations of this network: fold it first")
    place = dict(zip(rows, targets, strict=False))
    return tuple(
        replace(
            product,
            layer=place[product.layer],
            axes=tuple(
                (size, tuple((renamed.get(name, name), count) for name, count in terms)) for size, terms in product.axes
            ),
        )
        for product in products
    )


def _block_of(parameter: str, blocks: Iterable[str]) -> str | None:
    return next((name for name in blocks if parameter.startswith(f"{name}.")), None)


def _join(block: str, local: str) -> str:
    return f"{block}.{local}" if block else local
