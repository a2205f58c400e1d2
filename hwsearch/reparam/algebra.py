"""The algebra of folding: what several linear layers do together, as one kernel and one bias in float64.

A ``ConvMap`` is a convolution as a value: weight, bias and placement. Every re-parameterisation is a chain of few
rules: scale by a batch norm, compose, add; and every *where* question has one answer, the alignment lemma (``taps``).

Along one axis output i of a part (k taps, dilation d, padding p) reads positions i*S - p + j*d, output i of the target
(K, D, P) reads i*S - P + t*D. So tap j of the part is tap t = (P - p + j*d) / D of the target: the part folds into the
target exactly when all of these are integers in [0, K-1] and both have outputs of one size. Padded values depend on the
absolute position alone, so it holds for zeros, reflect, replicate and circular padding, every stride, even kernels,
small dilated kernels inside dense large ones, and negative (cropping) paddings.

Reference: Ding et al., Diverse Branch Block, CVPR 2021, transforms I to VI, stated here without special cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hwsearch.errors import InputError

Pair = tuple[int, int]
#: ((top, bottom), (left, right)); negative numbers crop.
Pads = tuple[Pair, Pair]


@dataclass(frozen=True, slots=True)
class ConvShape:
    """Sizes and placement of a 2-d convolution: everything about it but its numbers."""

    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: Pads = ((0, 0), (0, 0))
    groups: int = 1
    mode: str = "zeros"

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ConvShape:
        """The shape of a layer; ``padding="same"`` becomes the numbers it stands for (unequal for even kernels)."""
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        if not isinstance(conv.padding, str):
            top, left = conv.padding
            bottom, right = top, left
        kernel, stride, dilation = (_pair(value) for value in (conv.kernel_size, conv.stride, conv.dilation))
        pads = ((int(top), int(bottom)), (int(left), int(right)))
        return cls(conv.in_channels, conv.out_channels, kernel, stride, dilation, pads, conv.groups, conv.padding_mode)

    @property
    def depthwise(self) -> bool:
        """True when every group has one input channel and there are several."""
        return self.groups == self.in_channels > 1

    @property
    def is_plain(self) -> bool:
        """True when a layer can pad by itself: equal on both sides and not negative."""
        return all(low == high >= 0 for low, high in self.padding)

    def output_size(self, height: int, width: int) -> Pair:
        """(H, W) of the output."""
        sizes = []
        for axis, size in enumerate((height, width)):
            reach = self.dilation[axis] * (self.kernel[axis] - 1)
            sizes.append((size + sum(self.padding[axis]) - reach - 1) // self.stride[axis] + 1)
        return sizes[0], sizes[1]

    def window(self, start: Pair, kernel: Pair, spacing: Pair = (1, 1), **changes: Any) -> ConvShape:
        """The part whose taps are ``start + j * spacing`` (j < kernel) of this one: the lemma read backwards."""
        pads = []
        for axis in range(2):
            last = start[axis] + (kernel[axis] - 1) * spacing[axis]
            low, high = self.padding[axis]
            step = self.dilation[axis]
            pads.append((low - start[axis] * step, high - (self.kernel[axis] - 1 - last) * step))
        steps = [d * s if k > 1 else 1 for d, s, k in zip(self.dilation, spacing, kernel, strict=True)]
        return replace(self, kernel=kernel, dilation=(steps[0], steps[1]), padding=(pads[0], pads[1]), **changes)

    def layer(self, bias: bool, **factory: Any) -> nn.Conv2d:
        """A new ``nn.Conv2d`` of this shape; unequal paddings only where ``padding="same"`` gives them.

        Raises:
            InputError: no torch convolution pads like this.
        """
        padding: Any = (self.padding[0][0], self.padding[1][0])
        if not self.is_plain:
            padding = "same"
        pads = any(value for pair in self.padding for value in pair)
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel, self.stride if padding != "same" else 1, padding,
            self.dilation, self.groups, bias, self.mode if pads else "zeros", **factory,  # type: ignore[arg-type]
        )  # fmt: skip
        if padding == "same" and (ConvShape.of(conv).padding != self.padding or self.stride != (1, 1)):
            raise InputError(f"no convolution layer pads by {self.padding}: give equal paddings of 0 or more")
        return conv


@dataclass(frozen=True, eq=False)
class ConvMap:
    """An affine convolution as a value: ``weight`` (O, C/groups, kh, kw) and ``bias`` (O,), float64."""

    weight: Tensor
    bias: Tensor
    shape: ConvShape

    @classmethod
    def of(cls, conv: nn.Conv2d, shape: ConvShape | None = None) -> ConvMap:
        """What a layer computes; ``shape`` where its padding is done outside of it."""
        weight = conv.weight.double()
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.double()
        return cls(weight, bias, shape or ConvShape.of(conv))

    @classmethod
    def identity(cls, like: Tensor, shape: ConvShape) -> ConvMap:
        """y = x as a 1x1 convolution in groups: input channel o mod (C/groups) of output channel o's group (rule VII).

        Raises:
            InputError: the shape cannot carry x: other channels, a stride, or outputs of another size.
        """
        if reason := why_no_identity(shape):
            raise InputError(f"the identity does not fold: {reason}")
        per_group = shape.in_channels // shape.groups
        weight = like.new_zeros((shape.out_channels, per_group, 1, 1), dtype=torch.float64)
        out = torch.arange(shape.out_channels, device=like.device)
        weight[out, out % per_group, 0, 0] = 1.0
        start = (shape.padding[0][0] // shape.dilation[0], shape.padding[1][0] // shape.dilation[1])
        return cls(weight, weight.new_zeros(shape.out_channels), shape.window(start, (1, 1)))

    @classmethod
    def average(cls, like: Tensor, shape: ConvShape) -> ConvMap:
        """The mean over the window, every channel for itself (rule V, padded positions counted)."""
        per_group = shape.in_channels // shape.groups
        weight = like.new_zeros((shape.out_channels, per_group, *shape.kernel), dtype=torch.float64)
        out = torch.arange(shape.out_channels, device=like.device)
        weight[out, out % per_group] = 1.0 / (shape.kernel[0] * shape.kernel[1])
        return cls(weight, weight.new_zeros(shape.out_channels), shape)

    def then_norm(self, norm: nn.Module) -> ConvMap:
        """This map and then a batch norm (rule I); ``nn.Identity`` changes nothing."""
        if isinstance(norm, nn.Identity):
            return self
        if not isinstance(norm, _BatchNorm):
            raise InputError(f"a {type(norm).__name__} does not fold: use a batch norm or nn.Identity")
        scale, shift = scale_and_shift(norm)
        return replace(self, weight=self.weight * scale.view(-1, 1, 1, 1), bias=self.bias * scale + shift)

    def embedded(self, target: ConvShape, name: str = "branch") -> ConvMap:
        """The same function with the target's kernel (rules VI and VIII).

        Raises:
            InputError: it does not fit; the message names the branch, the axis and the numbers.
        """
        rows, columns = taps(self.shape, target, name)
        weight = self.weight.new_zeros((*self.weight.shape[:2], *target.kernel))
        weight[:, :, rows, columns] = self.weight
        return ConvMap(weight, self.bias, target)


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The affine map of a batch norm in eval mode: ``(a, c)``, float64, each of shape (channels,).

    Raises:
        InputError: it keeps no running statistics, so that it is no fixed map.
    """
    mean, variance, gamma, beta = (
        None if tensor is None else tensor.double()
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    if mean is None or variance is None:
        raise InputError("a batch norm without running statistics depends on its batch: it does not fold")
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale if gamma is None else gamma * scale
    return scale, -mean * scale if beta is None else beta - mean * scale


def taps(part: ConvShape, target: ConvShape, name: str = "branch") -> tuple[slice, slice]:
    """Which taps (rows, columns) of the target the part's taps are: the alignment lemma, see the head of this module.

    Raises:
        InputError: the part cannot be folded into the target; the message names it and the numbers.

    Example:
        >>> target = ConvShape(8, 8, (3, 3), padding=((1, 1), (1, 1)))
        >>> taps(ConvShape(8, 8, (1, 1)), target)
        (slice(1, 2, 1), slice(1, 2, 1))
    """
    for what in ("in_channels", "out_channels", "stride", "groups"):
        ours, theirs = getattr(part, what), getattr(target, what)
        if ours != theirs:
            raise InputError(f"branch {name!r} does not fold: {what} is {ours}, in the target {theirs}")
    if part.mode != target.mode and any(value > 0 for pair in part.padding for value in pair):
        raise InputError(f"branch {name!r} does not fold: it pads with {part.mode}, the target with {target.mode}")
    found = []
    for axis, label in enumerate(("height", "width")):
        k, d, (low, high) = part.kernel[axis], part.dilation[axis], part.padding[axis]
        size, step, (target_low, target_high) = target.kernel[axis], target.dilation[axis], target.padding[axis]
        about = (
            f"kernel {k}, dilation {d}, padding {low}+{high} in kernel {size}, dilation {step}, "
            f"padding {target_low}+{target_high} along the {label}"
        )
        if low + high - d * (k - 1) != target_low + target_high - step * (size - 1):
            raise InputError(f"branch {name!r} is not aligned ({about}): outputs differ in size; change its padding")
        start, spacing = target_low - low, d if k > 1 else step
        if start % step or spacing % step:
            raise InputError(f"branch {name!r} is not aligned ({about}): its taps lie between the target's")
        first, last = start // step, (start + (k - 1) * spacing) // step
        if first < 0 or last >= size:
            raise InputError(f"branch {name!r} is not aligned ({about}): its taps lie outside the target's")
        found.append(slice(first, last + 1, spacing // step))
    return found[0], found[1]


def why_no_identity(shape: ConvShape) -> str:
    """Why x itself is not one of the maps that a convolution of this shape can be; "" when it is."""
    if shape.in_channels != shape.out_channels:
        return f"{shape.in_channels} channels come in and {shape.out_channels} go out"
    if shape.stride != (1, 1):
        return f"the stride is {shape.stride}"
    for (low, high), step, size in zip(shape.padding, shape.dilation, shape.kernel, strict=True):
        if low + high != step * (size - 1) or low % step:
            return f"kernel {size}, dilation {step} and padding {low}+{high} do not keep the size around a tap"
    return ""


def compose_pointwise(first: ConvMap, second: ConvMap) -> ConvMap:
    """A 1x1 convolution, then any convolution of as many groups (rule III); the second one's placement.

    Exact only if the second one's padding stands for padded *inputs of the first*, see ``hwsearch.reparam.branches``.
    Shapes: first (M, C/g, 1, 1), second (O, M/g, kh, kw), result (O, C/g, kh, kw).
    """
    g, (out, per_group, height, width) = second.shape.groups, second.weight.shape
    inner = first.weight.reshape(g, per_group, first.weight.shape[1])
    outer = second.weight.reshape(g, out // g, per_group, height, width)
    weight = torch.einsum("gomhw,gmc->gochw", outer, inner).reshape(out, -1, height, width)
    shift = torch.einsum("gomhw,gm->go", outer, first.bias.reshape(g, per_group)).reshape(out)
    return ConvMap(weight, second.bias + shift, replace(second.shape, in_channels=first.shape.in_channels))


def compose_depthwise(first: ConvMap, second: ConvMap) -> ConvMap:
    """A depth-wise convolution (with a channel multiplier t), then a 1x1 one in groups; the first one's placement.

    Exact for every padding: nothing is padded between the two. Shapes: first (C*t, 1, kh, kw), second (O, C*t/g, 1, 1).
    Reference: OREPA (Hu et al., CVPR 2022), the depth-wise separable branch.
    """
    channels, g = first.shape.in_channels, second.shape.groups
    times, per_group, out = first.weight.shape[0] // channels, channels // g, second.weight.shape[0]
    outer = second.weight.reshape(g, out // g, per_group, times)
    inner = first.weight.reshape(g, per_group, times, *first.shape.kernel)
    weight = torch.einsum("goct,gcthw->gochw", outer, inner).reshape(out, per_group, *first.shape.kernel)
    shift = torch.einsum("goct,gct->go", outer, first.bias.reshape(g, per_group, times)).reshape(out)
    return ConvMap(weight, second.bias + shift, replace(first.shape, out_channels=out, groups=g))


def add(parts: Sequence[ConvMap]) -> ConvMap:
    """The sum of maps of one shape (rule II)."""
    weight, bias = parts[0].weight, parts[0].bias
    for part in parts[1:]:
        weight, bias = weight + part.weight, bias + part.bias
    return ConvMap(weight, bias, parts[0].shape)


def _pair(value: Any) -> Pair:
    return int(value[0]), int(value[1])
