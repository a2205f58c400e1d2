"""``SuperNet``: one set of full-width weights that runs as any sub-network of a width space, at its own cost.

The user's eager model is copied and its convolutions, linear and batch-norm layers are replaced, name by name, by
elastic ones; any other module that has to change is stretched (``elastic``). A pattern (kept units per group) becomes
one selector per parameter axis through the space's slots; layers then compute on *sliced* weights, so a narrow network
costs what it should. Selections without gaps are views.

Batch-norm statistics belong to a sub-network, not to the super-network: training uses the batch's own, and evaluation
needs ``calibrate`` after every ``activate``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from hwsearch.errors import InputError, InternalError, UnsupportedModelError
from hwsearch.graph.surgery import shrink
from hwsearch.search.elastic import Selector, Stretched, chosen, plainly, stretch
from hwsearch.search.patterns import IntArray, Pattern
from hwsearch.train import processes
from hwsearch.train.batchnorm import recalibrate
from hwsearch.train.data import Batch

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace


class Elastic:
    """What elastic layers share: selectors of weight axis 0 (outputs, features) and axis 1 (inputs)."""

    outputs: Selector = None
    inputs: Selector = None


class ElasticConv2d(Elastic, nn.Conv2d):
    """A convolution at the active widths; its groups follow from the shapes (depth-wise: the chosen channels)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, active inputs, H, W) to (B, active outputs, H', W')."""
        weight = chosen(chosen(self.weight, 0, self.outputs), 1, self.inputs)
        bias = None if self.bias is None else chosen(self.bias, 0, self.outputs)
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        groups = x.shape[1] // weight.shape[1]
        return functional.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)


class ElasticLinear(Elastic, nn.Linear):
    """A linear layer at the active widths."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., active inputs) to (..., active outputs)."""
        weight = chosen(chosen(self.weight, 0, self.outputs), 1, self.inputs)
        return functional.linear(x, weight, None if self.bias is None else chosen(self.bias, 0, self.outputs))


class _ElasticNorm(Elastic, _BatchNorm):
    """Batch statistics in training; in evaluation the averages that ``calibrate`` measured for the active widths."""

    #: Average mean and variance at the active widths, and over how many batches; not in the checkpoint.
    averages: tuple[Tensor, Tensor] | None = None
    batches: int = 0
    calibrating: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, active channels, ...) to the same shape."""
        weight = None if self.weight is None else chosen(self.weight, 0, self.outputs)
        bias = None if self.bias is None else chosen(self.bias, 0, self.outputs)
        if self.training or not self.track_running_stats:
            if processes.count() > 1 and self.training:
                return processes.batch_norm(x, weight, bias, self.eps)[0]
            return functional.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        if self.calibrating and self.averages is None:
            self.averages = (x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]))
        if self.averages is None:
            raise InternalError("an elastic batch-norm layer was evaluated before calibrate() for the active widths")
        if self.calibrating:
            self.batches += 1
        momentum = 1.0 / max(self.batches, 1)
        return functional.batch_norm(x, *self.averages, weight, bias, self.calibrating, momentum, self.eps)


class ElasticBatchNorm1d(_ElasticNorm, nn.BatchNorm1d):
    """Batch normalisation of features or sequences."""


class ElasticBatchNorm2d(_ElasticNorm, nn.BatchNorm2d):
    """Batch normalisation of images."""


_ELASTIC: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: ElasticConv2d,
    nn.Linear: ElasticLinear,
    nn.BatchNorm1d: ElasticBatchNorm1d,
    nn.BatchNorm2d: ElasticBatchNorm2d,
}
_PLAIN = {elastic: plain for plain, elastic in _ELASTIC.items()}
_AXIS_NAMES = {("weight", 0): "outputs", ("weight", 1): "inputs", ("bias", 0): "outputs"}
_STATISTICS = ("running_mean", "running_var")


class SuperNet(nn.Module):
    """A trainable copy of ``model`` that can run at every choice of ``space``.

    Args:
        model: the model that the space was made from; it is copied and not touched.
        space: its width space, or one restricted from it.

    Raises:
        UnsupportedModelError: a batch norm of another kind, or a module that would have to change and cannot.

    Example:
        >>> net = SuperNet(model, space)
        >>> net.activate(leftmost(space.uniform(0.5)))
        >>> net(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, model: nn.Module, space: WidthSpace) -> None:
        super().__init__()
        self.space = space
        self.model = copy.deepcopy(model)
        for name, module in self.model.named_modules():
            if type(module) in _ELASTIC:
                # the class alone is exchanged: parameters, hooks and attributes of the copy stay where they are
                module.__class__ = _ELASTIC[type(module)]
            elif isinstance(module, _BatchNorm):
                raise UnsupportedModelError(
                    f"{name} is a {type(module).__name__}, which a super-network cannot run at other widths; "
                    "use nn.BatchNorm1d or nn.BatchNorm2d itself"
                )
        self._norms = [module for module in self.model.modules() if isinstance(module, _ElasticNorm)]
        self._axes = _axes(self.model, space)
        self._stretched = [module for module in self.model.modules() if isinstance(module, Stretched)]
        self.active: Pattern | None = None
        # Part of the checkpoint, so that a resumed training remembers what an unbroken one would.
        widest = max(len(group.widths) for group in space.groups)
        self.register_buffer("recorded", torch.zeros(2, len(space.groups), widest, dtype=torch.float64))
        self.register_buffer("recent_loss", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """The active sub-network's output; the full network's before the first ``activate``."""
        return self.model(x)  # type: ignore[no-any-return]

    def activate(self, pattern: Pattern | None) -> None:
        """Run as this sub-network from now on (``None``: the full network); batch-norm statistics are forgotten."""
        for axis in self._axes:
            selector = None if pattern is None else axis.selector(pattern.kept)
            for module, name in axis.users:
                setattr(module, name, selector)
        for module in self._stretched:
            module.fit(full=pattern is None)
        for norm in self._norms:
            norm.averages, norm.batches = None, 0
        self.active = pattern

    def record(self, choice: WidthChoice, loss: float) -> None:
        """Remember a training loss under every width of the choice, relative to the losses of the steps before it.

        ``recorded`` holds sums and counts, shape (2, groups, widths): what ``recorded_losses`` takes its means of.
        """
        recorded, recent = self.get_buffer("recorded"), self.get_buffer("recent_loss")
        before = float(recent) or loss
        for group, (member, width) in enumerate(zip(self.space.groups, choice.widths, strict=True)):
            at = member.widths.index(width)
            recorded[0, group, at] += loss / max(before, 1e-9)
            recorded[1, group, at] += 1
        recent.fill_(0.9 * before + 0.1 * loss)

    def recorded_losses(self) -> NDArray[np.float64]:
        """Mean relative training loss (groups, widths) of the steps that had a width; the overall mean where none had.

        The recorded losses that BCNet draws its first candidates by (Su et al., CVPR 2021).
        """
        sums, counts = self.get_buffer("recorded").numpy()
        mean = float(sums.sum() / max(counts.sum(), 1))
        return np.asarray(np.where(counts > 0, sums / np.maximum(counts, 1), mean), dtype=np.float64)

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Measure the active sub-network's batch-norm statistics (plain average over batches); ends in evaluation mode.

        Raises:
            InputError: no batch was given though the model has batch normalisation.
        """
        self.eval()
        for norm in self._norms:
            norm.averages, norm.batches, norm.calibrating = None, 0, True
        count = 0
        try:
            with torch.no_grad():
                for batch in batches:
                    self(batch[0])
                    count += 1
        finally:
            for norm in self._norms:
                norm.calibrating = False
        if self._norms and count == 0:
            raise InputError("batch-norm statistics need at least one batch; give one")

    def plain(self) -> nn.Module:
        """The full network as an ordinary module of the user's own classes, sharing nothing with this one.

        Its running statistics are those of the model that came in: recalibrate before evaluating.
        """
        model = copy.deepcopy(self.model)
        for module in model.modules():
            if isinstance(module, Elastic):
                for name in ("outputs", "inputs", "averages", "batches", "calibrating"):
                    module.__dict__.pop(name, None)
                module.__class__ = _PLAIN[type(module)]  # type: ignore[assignment]
            plainly(module)
        for parameter in model.parameters():
            parameter.grad = None
        return model

    def extract(self, pattern: Pattern, batches: Iterable[Batch]) -> nn.Module:
        """The sub-network as a plain smaller module with its shared weights, recalibrated, in evaluation mode."""
        small = shrink(self.plain(), self.space, pattern.choice, pattern.by_group(self.space)).eval()
        recalibrate(small, batches)
        return small


class _Axis:
    """Parameter axes that all groups cut in the same way (a convolution's outputs, the norm after it ...)."""

    def __init__(self, size: int, parts: tuple[tuple[int, IntArray], ...]) -> None:
        self.size, self.parts = size, parts
        self.users: list[tuple[nn.Module, str]] = []
        places = parts[0][1]
        #: the group whose kept units are the kept positions as they stand, if there is one
        self._group = parts[0][0] if len(parts) == 1 and np.array_equal(places.ravel(), np.arange(size)) else None
        self._direct = self._group is not None and places.shape[1] == 1

    def selector(self, kept: tuple[IntArray, ...]) -> Selector:
        """What is kept of this axis under a pattern; positions that belong to no group always are."""
        if self._direct and self._group is not None:
            return _selector(kept[self._group], self.size)
        mask = np.ones(self.size, dtype=bool)
        for group, positions in self.parts:
            mask[positions] = False
            mask[positions[kept[group]]] = True
        return _selector(np.flatnonzero(mask), self.size)


def _axes(model: nn.Module, space: WidthSpace) -> list[_Axis]:
    """All parameter axes that some group cuts, with the layers that read each; equal ones are found once."""
    parts: dict[tuple[str, int], list[tuple[int, IntArray]]] = {}
    for index, group in enumerate(space.groups):
        for slot in group.slots:
            parts.setdefault((slot.parameter, slot.axis), []).append((index, slot.positions))
    owners = _owners(model, dict(space.network.aliases))
    axes: dict[tuple[object, ...], _Axis] = {}
    for (name, axis), found in parts.items():
        for module, local in owners.get(name, ()):
            if isinstance(module, _ElasticNorm) and local in _STATISTICS:
                continue  # measured at the active widths, never sliced
            user = (
                _AXIS_NAMES[local, axis]
                if isinstance(module, Elastic) and (local, axis) in _AXIS_NAMES
                else stretch(module, name.rpartition(".")[0] or type(module).__name__, local, axis)
            )
            size = int(getattr(module, local).shape[axis])
            key = (size, *((index, positions.tobytes()) for index, positions in found))
            users = axes.setdefault(key, _Axis(size, tuple(found))).users
            if (module, user) not in users:
                users.append((module, user))
    return list(axes.values())


def _owners(model: nn.Module, aliases: dict[str, str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Modules and local names by parameter name; a tied parameter is found under its first name."""
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for local in (*module._parameters, *module._buffers):
            full = f"{path}.{local}" if path else local
            owners.setdefault(aliases.get(full, full), []).append((module, local))
    return owners


def _selector(index: IntArray, size: int) -> Selector:
    if len(index) == size:
        return None
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == len(index):
        return slice(first, last + 1)
    return torch.from_numpy(index)
