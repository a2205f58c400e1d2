"""``MaskedNet``: a network whose width groups carry binary masks, learnt by gradient descent beside its weights.

PaS puts a depth-wise 1x1 convolution with 0/1 weights b = 1[w > 0.5] behind every block. Here a group's mask stands
directly before everything that reads the group, which is behind its batch norms and activations whatever the network
looks like: tied layers (residual sums, concatenations, depth-wise convolutions) share one mask, and a masked network
computes what the sliced one does, exactly. A reader with a weight of its own has the mask multiplied into that weight's
input axis (the same product, on far fewer numbers); a block of branches that is folded later has it multiplied into its
input, so that its identity loses the channel as well.

Reference: Li et al., "Pruning-as-Search", IJCAI 2022 (depth-wise binary convolution), and its published code: strict
threshold 0.5, straight-through gradient without clipping.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.surgery import example_for, named_tensors, shrink
from hwsearch.reparam.fold import fold
from hwsearch.search.stairs import stair_edges
from hwsearch.train.batchnorm import recalibrate
from hwsearch.train.data import Batch
from hwsearch.train.seeds import generator

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace
    from hwsearch.search.budget import Budget
    from hwsearch.search.run_folder import RunFolder

THRESHOLD = 0.5
#: Where latent weights begin: the trained network's function, and half a unit above the threshold.
START = 1.0


def binary_mask(latent: Tensor, least: int = 1) -> Tensor:
    """The mask (units,) of latent weights (units,): 1 above the threshold, else 0; its gradient is the latent's own.

    Args:
        latent: real numbers; equal ones are taken in order.
        least: units that stay on at least, those of the largest latents: a group cannot collapse.

    Example:
        >>> binary_mask(torch.tensor([0.9, 0.5, 0.2, 0.6])).tolist()
        [1.0, 0.0, 0.0, 1.0]
        >>> binary_mask(torch.tensor([0.4, 0.1]), least=1).tolist()
        [1.0, 0.0]

    Reference: PaS's published code (``BinaryConv2d``); the guard is ours.
    """
    value = latent.detach()
    on = value > THRESHOLD
    if int(on.sum()) < least:
        on[torch.sort(value, descending=True, stable=True).indices[:least]] = True
    # w - w is exactly 0, so the mask is exactly 0 or 1; (w - stopgrad(w - b)) would be so up to rounding only.
    return on.to(latent.dtype) + (latent - value)


class _Gate:
    """A hook that multiplies the input of a block by the masks of its channels; set anew in every forward pass."""

    def __init__(self) -> None:
        self.vector: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.vector is None:
            return None
        x = inputs[0]
        channels = x.shape[1] if x.dim() > 2 else x.shape[-1]
        vector = self.vector.repeat(channels // len(self.vector))  # of a grouped layer the axis is one group's
        return (x * (vector.view(1, -1, *[1] * (x.dim() - 2)) if x.dim() > 2 else vector), *inputs[1:])


class _Axis:
    """One axis that some groups are read on: which unit of which group stands at each of its positions."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[tuple[int, str, str]] = []  # group, names of the buffers of positions and of their units


class MaskedNet(nn.Module):
    """A copy of ``model`` with a mask for every group of ``space``.

    Args:
        model: the full network, trained or not; never changed. It may have blocks of branches (``ODBB``, RepVGG) where
            the space was made from its folded form, so that an identity ties no widths.
        space: the widths. Its groups that cannot be silenced (``fixed``) keep all their units.
        jitter: latents begin at 1 plus or minus up to this, drawn by ``seed``: equal ones would fall all at once.

    Raises:
        UnsupportedModelError: a layer that reads a group cannot be found in the model.

    Example:
        >>> net = MaskedNet(model, space)                                             # doctest: +SKIP
        >>> net.widths()                                                              # doctest: +SKIP
        (32, 64)
    """

    #: How fast a unit's margin falls under a push of 1 at a rate of 1.
    pace: ClassVar[float] = 1.0

    def __init__(self, model: nn.Module, space: WidthSpace, *, jitter: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.space = space
        self.model = copy.deepcopy(model)
        tensors = named_tensors(self.model)
        like = next((t for t in tensors.values() if t.is_floating_point()), torch.zeros(()))
        rng = generator(seed, "masks")
        self.least = tuple(group.widths[0] for group in space.groups)
        self.fixed = unmaskable(space)
        latents = []
        for index, group in enumerate(space.groups):
            start = torch.as_tensor(START + jitter * (2 * rng.random(group.units) - 1))
            if index in self.fixed:
                start = torch.full_like(start, START)
            latent = nn.Parameter(start.to(like.device, torch.float32), requires_grad=index not in self.fixed)
            latents.append(latent)
        self.latents = nn.ParameterList(latents)
        self._weights: dict[str, list[tuple[int, _Axis]]] = {}
        self._gates: dict[str, _Axis] = {}
        self._find_readers(tensors)

    @property
    def has_blocks(self) -> bool:
        """Whether some blocks are folded before slicing; such a network is sliced only at its end."""
        return bool(self._gates)

    def forward(self, x: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """The masked network's output; ``masks`` are ``self.masks()`` where the caller needs them as well."""
        masks = self.masks() if masks is None else masks
        tensors, replaced = named_tensors(self.model), {}
        for name, axes in self._weights.items():
            weight = tensors[name]
            for axis, read in axes:
                shape = [1] * weight.dim()
                shape[axis] = -1
                weight = weight * self._vector(read, masks).to(weight.dtype).view(shape)
            replaced[name] = weight
        gates = self._hooks()
        try:
            for path, read in self._gates.items():
                gates[path].vector = self._vector(read, masks)
            output: Tensor = functional_call(self.model, replaced, (x,))
        finally:
            for gate in gates.values():
                gate.vector = None  # it belongs to this pass's graph
        return output

    def masks(self) -> list[Tensor]:
        """One mask (units,) per group, with the gradient of its latent weights."""
        return [binary_mask(latent, least) for latent, least in zip(self.latents, self.least, strict=True)]

    def margins(self) -> list[Tensor]:
        """How far every unit (units,) stands above what switches it off."""
        return [latent - THRESHOLD for latent in self.latents]

    def widths(self) -> tuple[int, ...]:
        """How many units of each group are on: any number from the group's smallest width up, allowed or not."""
        return tuple(int(mask.detach().sum()) for mask in self.masks())

    def latent_names(self) -> list[str]:
        """Names of the latent weights that are learnt, among the parameters."""
        return [name for name, p in self.named_parameters() if name.startswith("latents.") and p.requires_grad]

    def largest(self, choice: WidthChoice) -> dict[str, NDArray[np.int64]]:
        """Per group the units (ascending) of the largest latents, as many as the choice says."""
        kept = {}
        for group, latent, width in zip(self.space.groups, self.latents, choice.widths, strict=True):
            order = np.argsort(-latent.detach().cpu().double().numpy(), kind="stable")
            kept[group.name] = np.sort(order[:width]).astype(np.int64)
        return kept

    def flips(self, choice: WidthChoice) -> float:
        """How far the masks stand from a choice: the latent distance to the threshold of every unit it switches,
        summed over the group's mean. 0 where the masks are the choice."""
        total = 0.0
        kept = self.largest(choice)
        for group, margin, mask in zip(self.space.groups, self.margins(), self.masks(), strict=True):
            wanted = torch.zeros(group.units, dtype=torch.bool)
            wanted[torch.from_numpy(kept[group.name])] = True
            away = margin.detach().cpu().abs()
            switched = wanted != mask.detach().cpu().bool()
            total += float(away[switched].sum() / max(float(away.mean()), 1e-12)) / group.units
        return total

    def set_masks(self, kept: Mapping[str, NDArray[np.int64]], *, freeze: bool = False) -> None:
        """Switch on exactly the named units of every group that is named; ``freeze`` ends the learning of all masks."""
        with torch.no_grad():
            for group, latent in zip(self.space.groups, self.latents, strict=True):
                if group.name in kept:
                    latent.zero_()
                    latent[torch.from_numpy(np.asarray(kept[group.name], dtype=np.int64))] = START
                if freeze:
                    latent.requires_grad_(False)

    def plain(self) -> nn.Module:
        """The full network without masks, sharing nothing with this one."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            for key in [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, _Gate)]:
                del module._forward_pre_hooks[key]
        for parameter in model.parameters():
            parameter.grad = None
        return model

    def sliced(
        self,
        choice: WidthChoice,
        kept: Mapping[str, NDArray[np.int64]] | None = None,
        batches: Iterable[Batch] | None = None,
    ) -> nn.Module:
        """The smaller plain network that computes what this one does under the masks of ``choice``, in evaluation mode.

        Blocks of branches are folded at full width first: their identities become taps of a kernel, which any subset of
        outputs and inputs can be cut out of.

        Args:
            kept: units per group; by default those of the largest latents.
            batches: measure batch-norm statistics on them, under the masks; None: the running ones are kept.
        """
        units = dict(self.largest(choice) if kept is None else kept)
        if not self.has_blocks:
            small = shrink(self.plain(), self.space, choice, units, check=False).eval()
            if batches is not None:
                recalibrate(small, batches)
            return small
        masked = self
        if batches is not None or kept is not None:
            masked = copy.deepcopy(self)
            masked.set_masks(units)
        if batches is not None:
            recalibrate(masked, batches)
        return shrink(folded_network(masked.plain(), self.space), self.space, choice, units, check=False).eval()

    def _find_readers(self, tensors: Mapping[str, Tensor]) -> None:
        """Where every group is read: in a weight of that very shape, or in a block in the weight's place."""
        axes: dict[tuple[str, int], _Axis] = {}
        for index, group in enumerate(self.space.groups):
            if index in self.fixed:
                continue
            for number, slot in enumerate(group.slots):
                if not slot.reads:
                    continue
                shape = self.space.network.shapes[slot.parameter]
                key = (slot.parameter, slot.axis)
                if key not in axes:
                    axes[key] = _Axis(shape[slot.axis])
                    self._attach(slot.parameter, slot.axis, axes[key], tensors, shape)
                names = (f"_positions_{index}_{number}", f"_units_{index}_{number}")
                units = np.repeat(np.arange(group.units), slot.elements_per_unit)
                for name, values in zip(names, (slot.positions.ravel(), units), strict=True):
                    device = self.latents[index].device
                    self.register_buffer(name, torch.from_numpy(values.copy()).to(device), persistent=False)
                axes[key].parts.append((index, *names))

    def _attach(
        self, parameter: str, axis: int, read: _Axis, tensors: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> None:
        if parameter in tensors and tuple(tensors[parameter].shape) == tuple(shape):
            self._weights.setdefault(parameter, []).append((axis, read))
            return
        path = parameter.rpartition(".")[0]
        try:
            block = self.model.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{parameter} reads a width group, but the model has neither that weight nor a block {path!r}: "
                "make the width space from this model, or from its folded form"
            ) from error
        if not any(isinstance(hook, _Gate) for hook in block._forward_pre_hooks.values()):
            block.register_forward_pre_hook(_Gate())
        if path in self._gates:
            raise UnsupportedModelError(f"block {path!r} reads a width group on two axes, which no mask can silence")
        self._gates[path] = read

    def _hooks(self) -> dict[str, _Gate]:
        """The gate of every masked block; looked up, so that copies of this network use their own."""
        found = {}
        for path in self._gates:
            hooks = self.model.get_submodule(path)._forward_pre_hooks.values()
            found[path] = next(hook for hook in hooks if isinstance(hook, _Gate))
        return found

    def _vector(self, read: _Axis, masks: Sequence[Tensor]) -> Tensor:
        """The mask (size,) of an axis; positions that belong to no group are always on."""
        vector = masks[0].new_ones(read.size)
        for group, positions, units in read.parts:
            vector = vector.index_copy(0, self.get_buffer(positions), masks[group][self.get_buffer(units)])
        return vector


def folded_network(model: nn.Module, space: WidthSpace) -> nn.Module:
    """The model folded in evaluation mode, followed on an input of the space where its code asks for sizes."""
    return fold(model.eval(), example_for(model, space, torch.ones), require=False)


def unmaskable(space: WidthSpace) -> tuple[int, ...]:
    """Groups that no mask can stand for: those that mix over their channels, so that dropping even a dead one changes
    the function (layer normalisation), and those that no weight reads.

    Raises:
        InputError: all of them are.
    """
    found = tuple(
        index
        for index, group in enumerate(space.groups)
        if not group.neutral or not any(slot.reads for slot in group.slots)
    )
    if len(found) == len(space.groups):
        raise InputError(
            "no width of this network can be searched by masks: every group mixes over its channels or is read by "
            "nothing that could silence it; use another search method"
        )
    return found


def gated_space(space: WidthSpace, budget: Budget, run: RunFolder) -> tuple[WidthSpace, list[str]]:
    """What a search by gates chooses from: widths on stair edges, groups that no mask can stand for at full width.

    Returns:
        The space, and the names of the groups that stay; the run's events tell of both.

    Raises:
        InfeasibleBudgetError: nothing in it keeps the budget.
        InputError: see ``unmaskable``.
    """
    fixed = unmaskable(space)
    stairs = stair_edges(space, budget)
    full = {group.name: (group.units,) for index, group in enumerate(space.groups) if index in fixed}
    found = stairs.space.restrict(full)
    budget.check_reachable(found)
    run.event("stairs", summary=stairs.summary(), fixed=sorted(full))
    return found, sorted(full)
