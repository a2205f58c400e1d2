"""The branches of a re-parameterised block: linear paths that train beside each other and fold into one kernel.

Each branch runs on the block's input and knows what it is as a ``ConvMap``. A branch with a batch norm *before* its KxK
part has a border: the KxK part must see, where it is padded, what its first part makes of a padded input. Two ways give
one folding formula: pad the input first (any padding mode; padded pixels enter the statistics), or run the first part
on the bare input and pad its output by what it makes of zero (DBB's; the border uses running statistics in training).

Reference: Ding et al., Diverse Branch Block, CVPR 2021; Hu et al., OREPA, CVPR 2022 (depth-wise separable branch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hwsearch.errors import InputError
from hwsearch.reparam.algebra import (
    ConvMap,
    ConvShape,
    Pair,
    add,
    compose_depthwise,
    compose_pointwise,
    why_no_identity,
)

#: Makes the batch norm of a branch from its number of channels; ``None`` as a norm is ``nn.Identity``.
NormMaker = Callable[[int], nn.Module]

#: How the border of a branch with an inner batch norm is made, see the head of this module.
BORDERS = ("pad_first", "bn_pad")


@dataclass(frozen=True, slots=True)
class BranchCost:
    """What one training step of a branch costs per example: multiply-adds forward, parameters, bytes of activations.

    ``activation_bytes`` are the float32 tensors that a branch's own layers put out, which the backward pass needs.
    """

    macs: int
    parameters: int
    activation_bytes: int


class Source:
    """A block's input, bare and padded; it is padded at most once for all branches."""

    def __init__(self, x: Tensor, host: ConvShape) -> None:
        self.x, self.host = x, host
        self._padded: Tensor | None = None

    @property
    def padded(self) -> Tensor:
        """The input with the host's padding around it."""
        if self._padded is None:
            self._padded = pad(self.x, self.host)
        return self._padded

    def window(self, shape: ConvShape) -> Tensor:
        """What a convolution of this shape reads, padded or cropped as it says; its paddings are at most the host's."""
        cut = []
        for axis in range(2):
            low, high = (ours - theirs for ours, theirs in zip(self.host.padding[axis], shape.padding[axis],
                                                               strict=True))  # fmt: skip
            cut.append(slice(low, self.padded.shape[2 + axis] - high))
        return self.padded[:, :, cut[0], cut[1]]


def pad(x: Tensor, shape: ConvShape) -> Tensor:
    """``x`` with the padding of a convolution of this shape."""
    (top, bottom), (left, right) = shape.padding
    if not (top or bottom or left or right):
        return x
    return functional.pad(x, (left, right, top, bottom), "constant" if shape.mode == "zeros" else shape.mode)


class Branch(nn.Module):
    """Base: a linear path from a block's input to its output.

    ``kind`` is its name among ``BRANCHES``; ``host`` the shape of the convolution it stands beside.
    """

    def __init__(self, kind: str, host: ConvShape) -> None:
        super().__init__()
        self.kind, self.host = kind, host

    def run(self, source: Source) -> Tensor:
        """The branch's output (N, O, H', W')."""
        raise NotImplementedError

    def conv_map(self) -> ConvMap:
        """What it computes in eval mode, in float64; differentiable."""
        raise NotImplementedError

    def window(self) -> ConvShape:
        """The part of the host's taps that it can reach, whatever its numbers are."""
        return window_of(self.kind, self.host)

    def last_norm(self) -> nn.Module:
        """The norm behind all else, or ``nn.Identity``."""
        norm = self.norm
        if not isinstance(norm, nn.Module):
            raise InputError(f"branch {self.kind!r} has no module named norm")
        return norm

    def ends(self) -> tuple[str, str] | None:
        """Weights whose axis 1 holds the block's inputs and whose axis 0 its outputs; None where there are not both."""
        return None

    def resize(self, host: ConvShape) -> None:
        """Stand beside a host of other channels; the branch's own parameters have them already."""
        self.host = host
        if isinstance(shape := getattr(self, "shape", None), ConvShape):
            self.shape = _with_channels_of(host, shape)

    def forward(self, x: Tensor) -> Tensor:
        """The branch alone on a bare input (N, C, H, W)."""
        return self.run(Source(x, self.host))

    def cost(self, height: int, width: int) -> BranchCost:
        """Training cost on one input of this size, counted from the branch's own layers."""
        out = self.host.output_size(height, width)
        macs = activations = 0
        for layer, (rows, columns) in self._layers(out):
            values = layer.out_channels * rows * columns
            macs += values * (layer.in_channels // layer.groups) * layer.kernel_size[0] * layer.kernel_size[1]
            activations += values * (2 if not isinstance(self.last_norm(), nn.Identity) else 1)
        if not activations:
            activations = self.host.out_channels * out[0] * out[1]
        return BranchCost(macs, sum(p.numel() for p in self.parameters()), 4 * activations)

    def _layers(self, out: Pair) -> list[tuple[nn.Conv2d, Pair]]:
        """Convolutions with the size of their outputs; those before the window work on padded inputs."""
        window = tuple(
            (o - 1) * s + d * (k - 1) + 1
            for o, s, d, k in zip(out, self.host.stride, self.host.dilation, self.host.kernel, strict=True)
        )
        return [
            (module, (window[0], window[1]) if name == "pointwise" else out)
            for name, module in self.named_children()
            if isinstance(module, nn.Conv2d)
        ]


class ConvBranch(Branch):
    """A convolution whose taps are some of the host's, then a norm: kxk, 1x1, 1xk, kx1, dilated."""

    def __init__(self, kind: str, host: ConvShape, norm: NormMaker, *, bias: bool = False, **factory: Any) -> None:
        super().__init__(kind, host)
        self.shape = window_of(kind, host)
        # Zero padding is free inside a convolution; all else reads the input that is padded once for the block.
        self.pads_itself = self.shape.is_plain and self.shape.mode == "zeros"
        own = self.shape if self.pads_itself else replace(self.shape, padding=((0, 0), (0, 0)))
        self.conv = own.layer(bias, **factory)
        self.norm = norm(host.out_channels)

    def ends(self) -> tuple[str, str]:
        return "conv.weight", "conv.weight"

    def run(self, source: Source) -> Tensor:
        out: Tensor = self.norm(self.conv(source.x if self.pads_itself else source.window(self.shape)))
        return out

    def conv_map(self) -> ConvMap:
        return ConvMap.of(self.conv, self.shape).then_norm(self.norm)


class IdentityBranch(Branch):
    """x, or its batch norm."""

    like: Tensor

    def __init__(self, kind: str, host: ConvShape, norm: NormMaker, **factory: Any) -> None:
        super().__init__(kind, host)
        if reason := why_no_identity(host):
            raise InputError(f"an identity branch is not possible: {reason}")
        self.norm = norm(host.out_channels)
        self.register_buffer("like", torch.zeros((), **factory), persistent=False)  # where this branch lives

    def run(self, source: Source) -> Tensor:
        out: Tensor = self.norm(source.x)
        return out

    def conv_map(self) -> ConvMap:
        return ConvMap.identity(self.like, self.host).then_norm(self.norm)


class SequenceBranch(Branch):
    """1x1 convolution, norm, KxK convolution (1x1-kxk) or mean over the window (1x1-avg), norm.

    The 1x1 part has stride 1 and the host's groups; it is left out of 1x1-avg where the host is depth-wise. It starts
    as the identity where the channels allow, so that the branch starts like its second part alone.
    """

    like: Tensor

    def __init__(
        self, kind: str, host: ConvShape, norm: NormMaker, *, middle: int, border: str = "pad_first", **factory: Any
    ) -> None:
        super().__init__(kind, host)
        if border not in BORDERS:
            raise InputError(f"border is {border!r}: give one of {', '.join(BORDERS)}")
        self.border, self.averages = border, kind == "1x1-avg"
        middle = host.out_channels if self.averages else middle
        self.bare = self.averages and host.depthwise and host.in_channels == host.out_channels
        inner = replace(host, padding=((0, 0), (0, 0)), in_channels=middle)
        self.pointwise: nn.Module = nn.Identity()
        self.inner_norm: nn.Module = nn.Identity()
        if not self.bare:
            first = ConvShape(host.in_channels, middle, (1, 1), groups=host.groups)
            self.pointwise = first.layer(False, **factory)
            self.after_reset()
            self.inner_norm = norm(middle)
        if self.averages:
            self.register_buffer("like", torch.zeros((), **factory), persistent=False)
        else:
            self.conv = inner.layer(False, **factory)
        self.norm = norm(host.out_channels)

    def after_reset(self) -> None:
        """The 1x1 part is the identity again, where the channels allow."""
        if isinstance(self.pointwise, nn.Conv2d):
            _start_as_identity(self.pointwise)

    def ends(self) -> tuple[str, str] | None:
        if self.bare:
            return None
        return "pointwise.weight", "pointwise.weight" if self.averages else "conv.weight"

    def resize(self, host: ConvShape) -> None:
        self.host = host
        for conv in (self.pointwise, getattr(self, "conv", None)):
            if isinstance(conv, nn.Conv2d):  # its groups do not follow from its shape where it has two inputs a group
                conv.groups, conv.in_channels = host.groups, conv.weight.shape[1] * host.groups

    def run(self, source: Source) -> Tensor:
        inside = self.bare or self.border == "pad_first"
        y = self.inner_norm(self.pointwise(source.padded if inside else source.x))
        if not inside:
            y = self._with_border(y)
        if not self.averages:
            y = self.conv(y)
        elif self.host.dilation == (1, 1):
            y = functional.avg_pool2d(y, self.host.kernel, self.host.stride)
        else:
            channels, (height, width) = y.shape[1], self.host.kernel
            mean = torch.full((channels, 1, height, width), 1.0 / (height * width), dtype=y.dtype, device=y.device)
            y = functional.conv2d(y, mean, None, self.host.stride, 0, self.host.dilation, channels)
        out: Tensor = self.norm(y)
        return out

    def conv_map(self) -> ConvMap:
        if self.averages:
            channels = self.host.out_channels
            second = ConvMap.average(self.like, replace(self.host, in_channels=channels))
        else:
            second = ConvMap.of(self.conv, replace(self.host, in_channels=self.conv.in_channels))
        second = second.then_norm(self.norm)
        if not isinstance(self.pointwise, nn.Conv2d):
            return second
        return compose_pointwise(ConvMap.of(self.pointwise).then_norm(self.inner_norm), second)

    def _with_border(self, y: Tensor) -> Tensor:
        """``y`` padded as if the input had been: by what zero becomes, or by the mode's own values of ``y``."""
        if self.host.mode != "zeros" or not isinstance(self.pointwise, nn.Conv2d):
            return pad(y, self.host)
        with torch.no_grad():  # the border follows the running statistics; no gradient, as in DBB
            value = ConvMap.of(self.pointwise).then_norm(self.inner_norm).bias.to(y.dtype).view(1, -1, 1, 1)
        return pad(y - value, self.host) + value  # plain Sub, Pad, Add in an exported graph


class SeparableBranch(Branch):
    """Depth-wise KxK convolution with ``times`` outputs a channel, then a 1x1 convolution and a norm (dw-pw)."""

    def __init__(self, kind: str, host: ConvShape, norm: NormMaker, *, times: int = 1, **factory: Any) -> None:
        super().__init__(kind, host)
        middle = host.in_channels * times
        self.shape = replace(host, out_channels=middle, groups=host.in_channels)
        self.pads_itself = self.shape.is_plain and self.shape.mode == "zeros"
        own = self.shape if self.pads_itself else replace(self.shape, padding=((0, 0), (0, 0)))
        self.depthwise = own.layer(False, **factory)
        self.last = ConvShape(middle, host.out_channels, (1, 1), groups=host.groups).layer(False, **factory)
        self.norm = norm(host.out_channels)

    def run(self, source: Source) -> Tensor:
        y = self.depthwise(source.x if self.pads_itself else source.window(self.shape))
        out: Tensor = self.norm(self.last(y))
        return out

    def resize(self, host: ConvShape) -> None:
        self.host = host
        times = self.depthwise.out_channels // self.depthwise.in_channels
        self.shape = replace(
            self.shape, in_channels=host.in_channels, out_channels=host.in_channels * times, groups=host.in_channels
        )

    def conv_map(self) -> ConvMap:
        return compose_depthwise(ConvMap.of(self.depthwise, self.shape), ConvMap.of(self.last)).then_norm(self.norm)


def _with_channels_of(host: ConvShape, shape: ConvShape) -> ConvShape:
    return replace(shape, in_channels=host.in_channels, out_channels=host.out_channels, groups=host.groups)


#: All kinds of branches, in the order in which a block holds them.
BRANCHES = ("kxk", "1x1", "1xk", "kx1", "1x1-kxk", "1x1-avg", "dw-pw", "dilated", "identity")


def why_not(kind: str, host: ConvShape) -> str:
    """Why a convolution of this shape cannot have, or has no use for, a branch of this kind; "" when it can.

    Raises:
        InputError: there is no such kind.
    """
    if kind not in BRANCHES:
        raise InputError(f"there is no branch {kind!r}: give some of {', '.join(BRANCHES)}")
    if kind == "identity":
        return why_no_identity(host)
    rows, columns = host.kernel
    if kind in ("1x1", "1x1-avg", "dw-pw") and rows * columns == 1:
        return "its kernel is 1x1 already"
    if kind == "dw-pw" and host.groups == host.in_channels:
        return "it is depth-wise already"
    if kind in ("1xk", "kx1") and min(rows, columns) == 1:
        return f"its kernel is {rows}x{columns} already"
    if kind == "dilated" and max(rows, columns) < 5:
        return f"its kernel of {rows}x{columns} has no room for a dilated one"
    return ""


def window_of(kind: str, host: ConvShape) -> ConvShape:
    """The taps of the host that a branch of one convolution has."""
    rows, columns = host.kernel
    middle = ((rows - 1) // 2, (columns - 1) // 2)
    if kind == "identity":
        return host.window((host.padding[0][0] // host.dilation[0], host.padding[1][0] // host.dilation[1]), (1, 1))
    if kind == "1x1":
        return host.window(middle, (1, 1))
    if kind == "1xk":
        return host.window((middle[0], 0), (1, columns))
    if kind == "kx1":
        return host.window((0, middle[1]), (rows, 1))
    if kind == "dilated":
        sizes = tuple((size + 1) // 2 if size >= 5 else size for size in host.kernel)
        spacing = tuple(2 if size >= 5 else 1 for size in host.kernel)
        return host.window((0, 0), (sizes[0], sizes[1]), (spacing[0], spacing[1]))
    return host


def make_branch(
    kind: str, host: ConvShape, norm: NormMaker, *, middle: int, border: str, times: int = 1, **factory: Any
) -> Branch:
    """A new branch.

    Args:
        middle: channels between the two convolutions of 1x1-kxk.
        times: outputs a channel of the depth-wise part of dw-pw.
        factory: device and dtype.
    Raises:
        InputError: the host cannot have it (the message says why).
    """
    if reason := why_not(kind, host):
        raise InputError(f"a convolution of {host.kernel[0]}x{host.kernel[1]} has no branch {kind!r}: {reason}")
    if kind == "identity":
        return IdentityBranch(kind, host, norm, **factory)
    if kind in ("1x1-kxk", "1x1-avg"):
        return SequenceBranch(kind, host, norm, middle=middle, border=border, **factory)
    if kind == "dw-pw":
        return SeparableBranch(kind, host, norm, times=times, **factory)
    return ConvBranch(kind, host, norm, **factory)


def total(parts: list[tuple[str, ConvMap]], host: ConvShape) -> ConvMap:
    """The sum of named maps in the host's kernel."""
    return add([part.embedded(host, name) for name, part in parts])


def _start_as_identity(conv: nn.Conv2d) -> None:
    if conv.in_channels == conv.out_channels:
        per_group = conv.in_channels // conv.groups
        with torch.no_grad():
            out = torch.arange(conv.out_channels)
            conv.weight.zero_()
            conv.weight[out, out % per_group, 0, 0] = 1.0
