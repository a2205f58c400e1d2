"""``BranchSpace``: the blocks of a network as a grid of layers and branches, and what each branch costs.

A row is a block, a column a branch that some block has. The identity is not searched: where a block has one it stays,
as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hwsearch.errors import InputError
from hwsearch.reparam.branches import BRANCHES, Branch
from hwsearch.reparam.foreign import blocks_of, record_calls
from hwsearch.reparam.odbb import ODBB

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
#: Milliseconds of a folded network.
Price = Callable[[nn.Module], float]

#: Kinds of branches that are as free as a convolution of the host's size.
WHOLE = ("kxk", "1x1-kxk")
#: What a budget of branches may count.
KINDS = ("branches", "macs", "activation_bytes", "ms")


@dataclass(frozen=True)
class BranchSpace:
    """Which branches there are to choose from.

    Attributes:
        layers: names of the blocks, in order (L).
        branches: names of the columns (N).
        legal: (L, N) whether the block has that branch.
        skips: (L,) whether the block has an identity, which always runs.
        whole: (L, N) the branches that can be any kernel of their layer's size; in a layer that has none, all of it.
    """

    layers: tuple[str, ...]
    branches: tuple[str, ...]
    legal: Mask
    skips: Mask
    whole: Mask

    @classmethod
    def of(cls, model: nn.Module) -> BranchSpace:
        """The space of all ODBB blocks of a network.

        Raises:
            InputError: it has none, or a block has nothing to choose from.
        """
        blocks = dict(blocks_of(model))
        if not blocks:
            raise InputError(f"{type(model).__name__} has no ODBB block: make some with hwsearch.reparametrize")
        names = {name for block in blocks.values() for name in _searched(block)}
        columns = sorted(names, key=lambda name: (BRANCHES.index(name.partition("#")[0]), name))
        legal = np.array([[column in block.names for column in columns] for block in blocks.values()], dtype=np.bool_)
        for layer, row in zip(blocks, legal, strict=True):
            if not row.any():
                raise InputError(f"block {layer!r} has no branch but the identity: nothing to search")
        skips = np.array(["identity" in block.kinds for block in blocks.values()], dtype=np.bool_)
        whole = legal & np.array([column.partition("#")[0] in WHOLE for column in columns])
        whole[~whole.any(axis=1)] = legal[~whole.any(axis=1)]
        return cls(tuple(blocks), tuple(columns), legal, skips, whole)

    def blocks(self, model: nn.Module) -> list[ODBB]:
        """The blocks of a network of this space, in the space's order."""
        found = [model.get_submodule(name) for name in self.layers]
        return [block for block in found if isinstance(block, ODBB)]

    def block_mask(self, block: ODBB, row: Mask) -> list[bool]:
        """A row of the grid as the block's own mask; the identity runs."""
        chosen = dict(zip(self.branches, row.tolist(), strict=True))
        return [chosen.get(name, True) for name in block.names]

    def apply(self, model: nn.Module, mask: Mask, gate: Tensor | None = None, shares: Floats | None = None) -> None:
        """Let each block run its row of ``mask`` (L, N), each branch times its ``gate`` (L, N) where one is given, and
        all of a block (its identity too) times its entry of ``shares`` (L,)."""
        for number, block in enumerate(self.blocks(model)):
            gates = None
            if gate is not None:
                one = gate.new_ones(())
                columns = {name: gate[number, column] for column, name in enumerate(self.branches)}
                gates = torch.stack([columns.get(name, one) for name in block.names])
                gates = gates if shares is None else gates * float(shares[number])
            block.activate(self.block_mask(block, mask[number]), gates)

    def shares(self, model: nn.Module, mask: Mask) -> Floats:
        """(L,) what keeps the spread of a block's output whatever number of branches runs: 1 / sqrt(n).

        A branch ends in a batch norm, so a sum of n has about n times the variance of one. 1 where a batch norm follows
        the sum, or a branch has none that could take the share over (see ``absorb``).
        """
        counts = [sum(self.block_mask(block, mask[number])) for number, block in enumerate(self.blocks(model))]
        able = [_absorbs(block) for block in self.blocks(model)]
        return np.array([n**-0.5 if can else 1.0 for n, can in zip(counts, able, strict=True)])

    def absorb(self, model: nn.Module, shares: Floats) -> None:
        """Multiply what every branch puts out by its block's share, in its last batch norm: the block then computes
        without shares what it did with them."""
        with torch.no_grad():
            for share, block in zip(shares.tolist(), self.blocks(model), strict=True):
                for branch in block.branches.values() if share != 1 else ():
                    norm = branch.last_norm()  # type: ignore[operator]
                    norm.weight.mul_(share)
                    norm.bias.mul_(share)

    def costs(self, model: nn.Module, example_input: Tensor, kind: str) -> Floats:
        """(L, N) what every branch adds to one training step per example: 1, MACs or bytes of activations.

        Raises:
            InputError: ``kind`` is not additive or unknown.
        """
        if kind not in KINDS[:3]:
            raise InputError(f"a branch has no {kind!r} of its own: give one of {', '.join(KINDS[:3])}")
        if kind == "branches":
            return self.legal.astype(np.float64)
        was_training = [(module, module.training) for module in model.modules()]
        calls = record_calls(model.eval(), self.layers, example_input)
        for module, mode in was_training:
            module.training = mode
        grid = np.zeros(self.legal.shape)
        for number, (layer, block) in enumerate(zip(self.layers, self.blocks(model), strict=True)):
            height, width = calls[layer].args[0].shape[2:]
            for column, name in enumerate(self.branches):
                if self.legal[number, column]:
                    branch = block.branches[name]
                    assert isinstance(branch, Branch)  # an ODBB holds nothing else
                    cost = branch.cost(int(height), int(width))
                    grid[number, column] = cost.macs if kind == "macs" else cost.activation_bytes
        return grid


@dataclass(frozen=True)
class FoldedMs:
    """Milliseconds of the folded network, by the taps that each layer keeps.

    Layer l with its whole kernel and every smaller one that some of its branches fold into was priced with all other
    layers whole; the sum of differences stands for any combination, and the search prices its result as a whole.

    Attributes:
        whole_ms: all kernels whole.
        shapes: per layer, the branches (by column) inside each kernel, and the milliseconds against the whole one.
    """

    whole_ms: float
    shapes: tuple[tuple[tuple[tuple[bool, ...], float], ...], ...]

    @classmethod
    def of(cls, space: BranchSpace, model: nn.Module, price: Price) -> FoldedMs:
        """Ask ``price`` for every layer's smaller kernels, one at a time; it gets the model, masks set."""
        whole = space.legal.copy()
        space.apply(model, whole)
        whole_ms = price(model)
        layers = []
        for number, block in enumerate(space.blocks(model)):
            found: dict[tuple[int, int], list[int]] = {}
            for column in np.flatnonzero(space.legal[number]):
                mask = whole.copy()
                mask[number] = False
                mask[number, column] = True
                block.activate(space.block_mask(block, mask[number]))
                found.setdefault(block.folded_shape().kernel, []).append(int(column))
            options = []
            for kernel in found:
                inside = [c for other, columns in found.items() if _within(other, kernel) for c in columns]
                row = np.zeros(len(space.branches), dtype=np.bool_)
                row[inside] = True
                mask = whole.copy()
                mask[number] = row
                space.apply(model, mask)
                ms = whole_ms if kernel == block.host.kernel else price(model)
                options.append((tuple(bool(value) for value in row), ms - whole_ms))
            space.apply(model, whole)
            layers.append(tuple(sorted(options, key=lambda option: option[1])))
        return cls(whole_ms, tuple(layers))

    def added_ms(self, layer: int, row: Mask) -> float:
        """Milliseconds of one layer's row against its whole kernel: of the cheapest kernel that holds it; 0 if none."""
        fits = [ms for inside, ms in self.shapes[layer] if not (row & ~np.array(inside)).any()]
        return min(fits, default=0.0)

    def of_mask(self, mask: Mask) -> float:
        """Milliseconds of the folded network."""
        return self.whole_ms + sum(self.added_ms(number, row) for number, row in enumerate(mask))


def _absorbs(block: ODBB) -> bool:
    norms = [branch.last_norm() for branch in block.branches.values() if isinstance(branch, Branch)]
    bare = isinstance(block.post_norm, nn.Identity)
    return bare and all(isinstance(norm, _BatchNorm) and norm.affine for norm in norms)


def _within(small: tuple[int, int], large: tuple[int, int]) -> bool:
    return small[0] <= large[0] and small[1] <= large[1]


def _searched(block: ODBB) -> list[str]:
    return [name for name, kind in zip(block.names, block.kinds, strict=True) if kind != "identity"]
