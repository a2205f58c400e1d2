"""``ODBB``: several linear branches in training, one convolution when folded.

Any subset of the branches folds into one kernel, so at run time a block costs what its fold costs and the branches are
free. There is one way in which they are not: if only 1x1 branches are left, the fold is a 1x1 convolution (minimal
support), and that is faster than 3x3.

Reference: Zhang et al., RepNAS, 2021 (Optimal Diverse Branch Block); Ding et al., Diverse Branch Block, CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hwsearch.errors import CheckFailedError, InputError
from hwsearch.reparam.algebra import ConvMap, ConvShape, Pair, taps
from hwsearch.reparam.branches import BORDERS, Branch, NormMaker, Source, make_branch, total, why_not

#: Branches of blocks that have a name.
BLOCKS: dict[str, tuple[str, ...]] = {
    "odbb": ("kxk", "1x1", "1xk", "kx1", "1x1-kxk", "1x1-avg", "identity"),
    "dbb": ("kxk", "1x1", "1x1-kxk", "1x1-avg"),
    "repvgg": ("kxk", "1x1", "identity"),
    "acb": ("kxk", "1xk", "kx1"),
}


class ODBB(nn.Module):
    """A block of branches in the place of one convolution.

    Args:
        host: the convolution's shape (``ConvShape.of(conv)``).
        branches: kinds, see ``BRANCHES``, or a name of ``BLOCKS``; a kind may occur several times. Kinds that the host
            cannot have are left out, unless ``strict``.
        border: ``"pad_first"`` or ``"bn_pad"``, see ``hwsearch.reparam.branches``.
        post_norm: a batch norm after the sum and none on 1x1 and identity: folded weights that survive 8 bits
            (QARepVGG, Chu et al., AAAI 2024).
        norm: makes the batch norms; ``None``: the branches are bare.
        middle_ratio: channels between the convolutions of 1x1-kxk over the input channels; by default 2 for a
            depth-wise host (as DBB has it), else 1.
        factory: device and dtype.
    Raises:
        InputError: an unknown kind, no branch left, or one that the host cannot have while ``strict``.

    Example:
        >>> block = ODBB(ConvShape.of(nn.Conv2d(8, 8, 3, padding=1))).eval()
        >>> block.kinds
        ('kxk', '1x1', '1xk', 'kx1', '1x1-kxk', '1x1-avg', 'identity')
        >>> block.fold()
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    active: Tensor

    def __init__(
        self,
        host: ConvShape,
        branches: str | Sequence[str] = "odbb",
        *,
        border: str = "pad_first",
        post_norm: bool = False,
        norm: NormMaker | None = nn.BatchNorm2d,
        middle_ratio: int | None = None,
        strict: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        if border not in BORDERS:
            raise InputError(f"border is {border!r}: give one of {', '.join(BORDERS)}")
        kinds = branch_kinds(branches)
        self.host, self.border = host, border
        self.kinds = kinds if strict else tuple(kind for kind in kinds if not why_not(kind, host))
        if not self.kinds:
            raise InputError(f"no branch of {', '.join(kinds)} fits: {kinds[0]}: {why_not(kinds[0], host)}")
        ratio = middle_ratio or (2 if host.depthwise else 1)

        def make_norm(channels: int) -> nn.Module:
            return nn.Identity() if norm is None else norm(channels).to(**factory)

        def no_norm(channels: int) -> nn.Module:
            return nn.Identity()

        self.branches = nn.ModuleDict()
        for index, kind in enumerate(self.kinds):
            number = self.kinds[:index].count(kind)
            self.branches[kind if not number else f"{kind}#{number + 1}"] = make_branch(
                kind,
                host,
                no_norm if post_norm and kind in ("1x1", "identity") else make_norm,
                middle=host.in_channels * ratio,
                border=border,
                **factory,
            )
        self.post_norm: nn.Module = make_norm(host.out_channels) if post_norm else nn.Identity()
        self.register_buffer("active", torch.ones(len(self.kinds), dtype=torch.bool))
        self._active = (True,) * len(self.kinds)
        self._gate: Tensor | None = None
        self.folded: nn.Conv2d | None = None
        self.register_load_state_dict_post_hook(_read_mask)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the branches, in order: kinds, with a number from the second of a kind on."""
        return tuple(self.branches)

    @property
    def mask(self) -> tuple[bool, ...]:
        """Which branches run; the buffer ``active``."""
        return self._active

    def activate(self, mask: Sequence[bool], gate: Tensor | None = None) -> None:
        """Run only some branches, each times its ``gate`` (number of branches,) where one is given.

        Raises:
            InputError: a mask of another length, or without a branch.
        """
        chosen = tuple(bool(value) for value in mask)
        if len(chosen) != len(self.kinds) or not any(chosen):
            raise InputError(f"a mask of {list(chosen)} does not fit {len(self.kinds)} branches: run at least one")
        self._active, self._gate = chosen, gate
        self.active.copy_(torch.tensor(chosen))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, H', W'): the sum over the branches that run."""
        if self.folded is not None:
            result: Tensor = self.folded(x)
            return result
        source, out = Source(x, self.host), None
        for index, branch in enumerate(self._running()):
            if branch is None:
                continue
            y = branch.run(source)
            y = y if self._gate is None else y * self._gate[index]
            out = y if out is None else out + y
        result = self.post_norm(out)
        return result

    def conv_map(self) -> ConvMap:
        """What the running branches compute together in eval mode, in the host's kernel; float64, differentiable."""
        if self.folded is not None:
            return ConvMap.of(self.folded).embedded(self.host, "folded")
        return total(self._maps(), self.host).then_norm(self.post_norm)

    def equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """Kernel (O, C/groups, kh, kw) and bias (O,) of the fold, float64 and differentiable."""
        found = self.conv_map()
        return found.weight, found.bias

    def support(self) -> tuple[Pair, Pair]:
        """(first, last) tap along height and width that a running branch *can* reach, whatever its numbers are."""
        boxes = [taps(branch.window(), self.host, name) for name, branch in self._named()]
        rows, columns = zip(*boxes, strict=True)
        height = (min(s.start for s in rows), max(s.stop for s in rows) - 1)
        return height, (min(s.start for s in columns), max(s.stop for s in columns) - 1)

    def folded_shape(self, minimal: bool = True) -> ConvShape:
        """The shape of the convolution that the running branches fold into.

        With ``minimal`` it is the smallest window around all of them that a torch layer can pad. Numbers never count,
        only kinds: a branch that happens to be zero today still has its place.
        """
        if self.folded is not None:
            return ConvShape.of(self.folded)
        if not minimal:
            return self.host
        boxes = [
            _shrunk(box, size, step, pads)
            for box, size, step, pads in zip(
                self.support(), self.host.kernel, self.host.dilation, self.host.padding, strict=True
            )
        ]
        (top, bottom), (left, right) = boxes
        shape = self.host.window((top, left), (bottom - top + 1, right - left + 1))
        return shape if shape.is_plain else self.host

    def fold(self, minimal: bool = True) -> nn.Conv2d:
        """One convolution that computes what the running branches do; this block is not changed.

        Sums are taken in float64 and rounded once to the block's dtype; device, training flag and memory format stay.
        The new parameters require grad if any parameter of the running branches does. Folding a folded block gives
        its convolution.

        Raises:
            InputError: training mode, a batch norm without statistics, a hook, or a branch that is not aligned.
            CheckFailedError: the kernel is not finite in the block's dtype.
        """
        if self.folded is not None:
            return self.folded
        if training := [name for name, module in self.named_modules() if module.training]:
            raise InputError(f"{training[0] or 'ODBB'!r} of an ODBB is in training mode: call model.eval() first")
        shape = self.folded_shape(minimal)
        with torch.no_grad():
            found = self.conv_map()
        start = [(o[0] - s[0]) // d for o, s, d in zip(self.host.padding, shape.padding, self.host.dilation,
                                                       strict=True)]  # fmt: skip
        rows, columns = (slice(first, first + size) for first, size in zip(start, shape.kernel, strict=True))
        own = [parameter for _, branch in self._named() for parameter in branch.parameters()]
        own += self.post_norm.parameters()
        like = next(tensor for tensor in (*own, *self.buffers(), torch.zeros(())) if tensor.is_floating_point())
        conv = shape.layer(True, device=like.device, dtype=like.dtype)
        learns = any(parameter.requires_grad for parameter in own)
        layout = next(
            (torch.channels_last for _, p in self.named_parameters() if p.dim() == 4 and _is_channels_last(p)),
            torch.contiguous_format,
        )
        weight = found.weight[:, :, rows, columns].to(like.dtype).contiguous(memory_format=layout)
        bias = found.bias.to(like.dtype)
        if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise CheckFailedError(
                f"the fold of an ODBB of {', '.join(self.names)} is not finite in {like.dtype}: look for NaN, a "
                "negative variance or values too large in its branches"
            )
        conv.weight, conv.bias = nn.Parameter(weight, learns), nn.Parameter(bias, learns)
        return conv.train(self.training)

    def folded_axes(self) -> tuple[tuple[tuple[str, int], tuple[str, int]], ...]:
        """Axes of the folded convolution's parameters with the block's own of the same channels; () once folded, or
        without a branch of one convolution or two (see ``hwsearch.graph.foldable``)."""
        for name, branch in self.branches.items() if self.folded is None else ():
            assert isinstance(branch, Branch)  # an ODBB holds nothing else
            if ends := branch.ends():
                first, last = (f"branches.{name}.{end}" for end in ends)
                return (("weight", 1), (first, 1)), (("weight", 0), (last, 0)), (("bias", 0), (last, 0))
        return ()

    def sizes_changed(self) -> None:
        """Follow parameters and buffers whose shapes or values were exchanged: the host's channels, and the mask."""
        _read_mask(self, None)
        axes = dict(self.folded_axes())
        if not axes:
            return
        last = self.get_parameter(axes["weight", 0][0])
        first = self.get_parameter(axes["weight", 1][0])
        convs = {f"{name}.weight": m for name, m in self.named_modules() if isinstance(m, nn.Conv2d)}
        groups = convs[axes["weight", 1][0]].groups
        host = replace(self.host, in_channels=first.shape[1] * groups, out_channels=last.shape[0], groups=groups)
        self.host = host
        for branch in self.branches.values():
            if isinstance(branch, Branch):
                branch.resize(host)

    def fuse(self) -> nn.Conv2d:
        """``fold``, under the name that timm's ``reparameterize_model`` and YOLO tools look for."""
        return self.fold()

    def reparameterize(self) -> None:
        """Fold in place: the branches are gone, the block is its convolution. A second call does nothing."""
        if self.folded is None:
            self.folded = self.fold()
            self.branches, self.post_norm = nn.ModuleDict(), nn.Identity()

    switch_to_deploy = reparameterize

    def __getstate__(self) -> dict[str, Any]:
        """A gate belongs to one step and its graph: copies go without."""
        return {**self.__dict__, "_gate": None}

    def _running(self) -> list[Branch | None]:
        found: list[Branch | None] = []
        for branch, runs in zip(self.branches.values(), self._active, strict=True):
            if not isinstance(branch, Branch):
                raise InputError(f"a {type(branch).__name__} stands among the branches of an ODBB: use a Branch")
            found.append(branch if runs else None)
        return found

    def _named(self) -> list[tuple[str, Branch]]:
        pairs = zip(self.names, self._running(), strict=True)
        return [(name, branch) for name, branch in pairs if branch is not None]

    def _maps(self) -> list[tuple[str, ConvMap]]:
        found = []
        for name, branch in self._named():
            if hooked := [m for m in branch.modules() if m._forward_hooks or m._forward_pre_hooks]:
                raise InputError(f"branch {name!r} has a forward hook on a {type(hooked[0]).__name__}: remove it first")
            try:
                found.append((name, branch.conv_map()))
            except InputError as error:
                raise InputError(f"branch {name!r}: {error}") from error
        return found

    def extra_repr(self) -> str:
        """Shown when the block is printed."""
        rows, columns = self.host.kernel
        return f"{self.host.in_channels}, {self.host.out_channels}, {rows}x{columns}, running={list(self._active)}"


def branch_kinds(branches: str | Sequence[str]) -> tuple[str, ...]:
    """Kinds of branches by a block's name, or as they are given.

    Raises:
        InputError: there is no such block, or no branch.
    """
    if isinstance(branches, str):
        if branches not in BLOCKS:
            raise InputError(f"there is no block {branches!r}: give one of {', '.join(BLOCKS)}, or a list of branches")
        return BLOCKS[branches]
    if not branches:
        raise InputError("a block needs at least one branch")
    return tuple(branches)


def _shrunk(box: Pair, size: int, step: int, pads: Pair) -> Pair:
    """The smallest run of taps around ``box`` whose padding is equal on both sides and not negative; else all taps."""
    fits = [
        (first, last)
        for first in range(box[0] + 1)
        for last in range(box[1], size)
        if pads[0] - first * step == pads[1] - (size - 1 - last) * step >= 0
    ]
    return min(fits, key=lambda pair: pair[1] - pair[0], default=(0, size - 1))


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _read_mask(module: nn.Module, _: Any) -> None:
    """After a state was loaded the mask is what the buffer says."""
    if isinstance(module, ODBB):
        module._active = tuple(bool(value) for value in module.active.tolist())
