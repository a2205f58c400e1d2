"""``stretch``: any module runs at narrower widths, on slices of its own parameters.

Layers that every network is made of have elastic classes of their own (``supernet``). For all the rest (group and layer
normalisation, PReLU, transposed convolutions, a layer scale in a block of the user's) the module's class becomes a
subclass of itself whose tensors are read through a slice: its own ``forward`` runs as it stands. The sizes that it
remembers (``normalized_shape``, ``groups``) follow by the rules that ``shrink`` goes by, so an active sub-network
computes what the shrunk one does wherever the space could be verified.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hwsearch.errors import UnsupportedModelError
from hwsearch.graph.surgery import fix_attributes

#: What is kept of a parameter axis: all of it, a range, or index positions (ascending, int64).
Selector = slice | Tensor | None

#: What ``fix_attributes`` may change.
_SIZES = (
    "groups", "in_channels", "out_channels", "num_features", "num_channels", "normalized_shape", "num_parameters",
    "num_embeddings", "embedding_dim",
)  # fmt: skip


class Stretched:
    """What stretched modules share; made by ``stretch`` only."""

    _plain: type[nn.Module]

    def fit(self, full: bool) -> None:
        """Bring the remembered sizes in line with the selectors; ``full``: as the module came."""
        values = vars(self)
        # from the full sizes every time: one channel of a convolution looks like a depth-wise one
        values.update(values["_full_sizes"])
        if not full:
            fix_attributes(self)  # type: ignore[arg-type]


def stretch(module: nn.Module, name: str, tensor: str, axis: int) -> str:
    """Let a module read one axis of one of its tensors through a selector, in place.

    Args:
        module: of any class.
        name: its own, for messages.
        tensor: a parameter or buffer of it.
        axis: of the tensor.

    Returns:
        The attribute that holds the selector, None at first.

    Raises:
        UnsupportedModelError: its class cannot be extended, or it keeps statistics that belong to one width.

    Example:
        >>> import torch
        >>> act = nn.PReLU(4)
        >>> setattr(act, stretch(act, "act", "weight", 0), slice(0, 3))
        >>> act(torch.ones(1, 3, 2, 2)).shape, type(act).__name__
        (torch.Size([1, 3, 2, 2]), 'PReLU')
    """
    if getattr(module, "running_mean", None) is not None:
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__} with running statistics, which belong to one width: use "
            "nn.BatchNorm1d or nn.BatchNorm2d itself, or keep its widths with [[groups]] and freeze = true"
        )
    attribute = f"_kept_{tensor}_{axis}"
    kind = type(module)
    if attribute in vars(module):
        return attribute
    if not isinstance(module, Stretched):
        vars(module)["_full_sizes"] = {size: vars(module)[size] for size in _SIZES if size in vars(module)}
        body = {"_plain": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    else:
        body = {"_plain": module._plain}
    try:
        bases = (kind,) if issubclass(kind, Stretched) else (Stretched, kind)
        module.__class__ = type(kind.__name__, bases, {**body, tensor: _reader(tensor)})
    except TypeError as error:
        raise UnsupportedModelError(
            f"{name} is a {kind.__name__}, which a super-network cannot run at other widths ({error}): keep its widths "
            "with [[groups]] and freeze = true"
        ) from error
    vars(module)[attribute] = None
    return attribute


def plainly(module: nn.Module) -> None:
    """A stretched module is again what it was, in place."""
    if not isinstance(module, Stretched):
        return
    module.fit(full=True)
    for attribute in [key for key in vars(module) if key.startswith("_kept_") or key == "_full_sizes"]:
        del vars(module)[attribute]
    module.__class__ = module._plain  # type: ignore[assignment]


def chosen(tensor: Tensor, axis: int, selector: Selector) -> Tensor:
    """The kept positions of an axis: a view where they have no gap."""
    if selector is None:
        return tensor
    if isinstance(selector, slice):
        return tensor.narrow(axis, selector.start, selector.stop - selector.start)
    return tensor.index_select(axis, selector)


def _reader(tensor: str) -> property:
    """The tensor as the selectors of its axes cut it. The module's own table keeps the full one, which learns."""

    def read(self: Any) -> Tensor | None:
        found: Tensor | None = self._parameters[tensor] if tensor in self._parameters else self._buffers[tensor]
        for axis in range(0 if found is None else found.dim()):
            found = chosen(found, axis, vars(self).get(f"_kept_{tensor}_{axis}"))  # type: ignore[arg-type]
        return found

    return property(read)
