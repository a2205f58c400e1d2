"""``WeightNet``: a network whose single weights carry masks, and the plain network with zeros that is left.

Two kinds of gates, one a layer:

* ``WeightGate``: m = 1[|W| > t] with a learnt threshold t, through the long-tailed surrogate, so that weights that are
  off still hear what they would do. Commits come from a moving average of |W| - t.
* ``BlockGate``: the two largest of every four consecutive input weights, for TensorRT's sparse tensor cores. Which two
  is decided in the end, by a moving average of |W|.

Reference: MGAS (arXiv 2310.15074), weight granularity; the step is that of DST (Liu et al., ICLR 2020). Ours: commits
from moving averages, and a smallest share that every layer keeps, where DST puts a threshold back to 0.
"""

from __future__ import annotations

import copy
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hwsearch.errors import InputError
from hwsearch.graph.surgery import named_tensors
from hwsearch.search.gates import MOMENTUM, step

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
#: The layers that sparse tensor cores know.
_BLOCKED = (nn.Conv2d, nn.Linear)


class WeightGate(nn.Module):
    """A mask over one layer's weights.

    Args:
        weight: the layer's, of any shape; the gate begins with everything on.
        least: weights that stay on at least, the largest.

    The parameter ``threshold`` (1,) begins at 0. Buffers, shaped like the weight: ``alive``, ``average`` of |W| - t.

    Example:
        >>> gate = WeightGate(torch.tensor([[0.5, -0.1], [0.02, -0.7]]))
        >>> with torch.no_grad():
        ...     _ = gate.threshold.fill_(0.2)
        >>> gate.mask(torch.tensor([[0.5, -0.1], [0.02, -0.7]])).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    alive: Tensor
    average: Tensor

    def __init__(self, weight: Tensor, least: int = 1) -> None:
        super().__init__()
        if not 1 <= least <= weight.numel():
            raise InputError(f"a layer of {weight.numel()} weights cannot keep {least} of them")
        self.least = least
        self.threshold = nn.Parameter(torch.zeros(1, device=weight.device))
        self.register_buffer("alive", torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("average", weight.detach().abs().float())

    def mask(self, weight: Tensor) -> Tensor:
        """The mask of this moment, with the surrogate's gradient; off where a weight was committed as off."""
        margin = weight.abs() - self.threshold
        mask = step(margin) * self.alive
        if int(mask.detach().sum()) < self.least:
            kept = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            size = margin.detach().reshape(-1).masked_fill(~self.alive.reshape(-1), -torch.inf)
            kept[torch.sort(size, descending=True, stable=True).indices[: self.least]] = True
            mask = mask + (kept.view(weight.shape) & (mask.detach() == 0)).to(mask.dtype)
        return mask

    @torch.no_grad()
    def observe(self, weight: Tensor) -> None:
        """Move the average by the present weights and threshold."""
        self.average.mul_(MOMENTUM).add_((weight.abs() - self.threshold).float(), alpha=1 - MOMENTUM)


class BlockGate(nn.Module):
    """A 2:4 mask over one layer's weights.

    Args:
        weight: of a dense convolution (O, I, ...) or a linear layer (O, I), I a multiple of 4.

    Buffers, shaped like the weight: ``alive`` (all on until the end), ``average`` of |W|.
    """

    alive: Tensor
    average: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("alive", torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("average", weight.detach().abs().float())

    def mask(self, weight: Tensor) -> Tensor:
        """The two largest of every four, with the surrogate's gradient around the middle between second and third."""
        size = weight.abs()
        ranked = torch.sort(_blocks(size.detach()), dim=-1, descending=True, stable=True).values
        middle = ranked[..., 1:3].mean(-1, keepdim=True).expand_as(ranked)
        soft = step(size - _unblocked(middle, weight))
        return two_of_four(size.detach()).to(weight.dtype) + (soft - soft.detach())

    @torch.no_grad()
    def observe(self, weight: Tensor) -> None:
        """Move the average by the present weights."""
        self.average.mul_(MOMENTUM).add_(weight.abs().float(), alpha=1 - MOMENTUM)


class WeightNet(nn.Module):
    """A copy of ``model`` with a gate on the weights of its layers.

    Args:
        model: the network; never changed.
        pattern: ``free``: every convolution and linear layer; ``2:4``: dense 2-D convolutions and linear layers whose
            inputs are a multiple of 4, others stay as they are.
        least: the share of its weights that a layer keeps at least (``free``).

    Raises:
        InputError: no layer can be gated.
    """

    frozen: Tensor

    def __init__(self, model: nn.Module, pattern: str = "free", least: float = 0.05) -> None:
        super().__init__()
        self.model, self.pattern = copy.deepcopy(model), pattern
        tensors = named_tensors(self.model)
        found = {id(tensor): name for name, tensor in tensors.items()}
        owners = {found[id(m.weight)]: m for m in self.model.modules() if isinstance(m, _LAYERS)}
        if pattern == "2:4":
            owners = {name: module for name, module in owners.items() if blockable(module)}
        if not owners:
            raise InputError(
                f"no layer of {type(model).__name__} can have a {pattern} mask on its weights"
                + (": that takes dense 2-D convolutions or linear layers, inputs a multiple of 4" * (pattern == "2:4"))
            )
        self.names = tuple(owners)
        self.gates = nn.ModuleList(
            BlockGate(tensors[n]) if pattern == "2:4" else WeightGate(tensors[n], math.ceil(least * tensors[n].numel()))
            for n in self.names
        )
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))

    def gate(self, index: int) -> WeightGate | BlockGate:
        """The gate of layer number ``index`` (of ``names``)."""
        return cast("WeightGate | BlockGate", self.gates[index])

    def weights(self) -> list[Tensor]:
        """The gated weights, masks not applied, in the order of ``names``."""
        tensors = named_tensors(self.model)
        return [tensors[name] for name in self.names]

    def masks(self) -> list[Tensor]:
        """One mask per layer; what was committed once masks are frozen."""
        pairs = list(zip(range(len(self.names)), self.weights(), strict=True))
        if bool(self.frozen):
            return [self.gate(index).alive.to(weight.dtype) for index, weight in pairs]
        return [self.gate(index).mask(weight) for index, weight in pairs]

    def forward(self, x: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """The masked network's output; ``masks`` are ``self.masks()`` where the caller needs them as well."""
        masks = self.masks() if masks is None else masks
        products = {n: w * m for n, w, m in zip(self.names, self.weights(), masks, strict=True)}
        return functional_call(self.model, products, (x,))  # type: ignore[no-any-return]

    def observe(self) -> None:
        """Move the gates' moving averages."""
        for index, weight in enumerate(self.weights()):
            self.gate(index).observe(weight)

    @torch.no_grad()
    def freeze(self) -> None:
        """Masks are what is committed, from here on; of blocks the two of the largest averages."""
        if self.pattern == "2:4":
            for index in range(len(self.names)):
                self.gate(index).alive.copy_(two_of_four(self.gate(index).average))
        self.frozen.fill_(True)

    @torch.no_grad()
    def baked(self) -> nn.Module:
        """The plain network with zeros where masks are off, in evaluation mode, sharing nothing with this one."""
        model = copy.deepcopy(self.model)
        tensors = named_tensors(model)
        for name, mask in zip(self.names, self.masks(), strict=True):
            # a product would leave negative zeros
            tensors[name].masked_fill_(mask.detach() == 0, 0.0)
        for parameter in model.parameters():
            parameter.grad = None
        return model.eval()


def two_of_four(size: Tensor) -> Tensor:
    """Of every four consecutive inputs (axis 1) the two largest: a boolean tensor of exactly two a block; equal sizes
    in order.

    Example:
        >>> two_of_four(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).tolist()
        [[False, True, True, False]]
    """
    blocks = _blocks(size)
    order = torch.sort(blocks, dim=-1, descending=True, stable=True).indices[..., :2]
    return _unblocked(torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order, True), size)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive inputs (axis 1) of a weight are not zero."""
    return weight.shape[1] % 4 == 0 and bool((_blocks(weight != 0).sum(-1) <= 2).all())


def blockable(module: nn.Module) -> bool:
    """Whether 2:4 blocks fit a layer."""
    if not isinstance(module, _BLOCKED) or module.weight.shape[1] % 4:
        return False
    return not isinstance(module, nn.Conv2d) or module.groups == 1


def _blocks(weight: Tensor) -> Tensor:
    """(O, I, ...) as (..., 4): four consecutive inputs in the last axis."""
    last = weight.movedim(1, -1)
    return last.reshape(*last.shape[:-1], -1, 4)


def _unblocked(blocks: Tensor, like: Tensor) -> Tensor:
    """The other way round."""
    return blocks.reshape(*like.movedim(1, -1).shape).movedim(-1, 1)
