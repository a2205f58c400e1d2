"""``shrink``: a width choice turned into a smaller plain module, weights carried over.

Contract: the function is preserved exactly where the dropped units are dead (nothing reads them, or they are read
with zero weights), for every neutral group. ``shrink`` checks shapes by running the result; ``verification.py`` checks
the promise itself, with random weights, once per space.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.capture import evaluation_mode, first_line, try_forward
from hwsearch.graph.foldable import folding_blocks
from hwsearch.graph.widths import IntArray, WidthChoice, WidthSpace

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Files whose lines are not the user's: PyTorch's own, and this package's.
_INTERNAL = re.compile(r"/(torch|hwsearch/graph)/")


def shrink(
    model: nn.Module,
    space: WidthSpace,
    choice: WidthChoice,
    keep: Mapping[str, np.ndarray] | None = None,
    *,
    check: bool = True,
) -> nn.Module:
    """A smaller copy of ``model`` at ``choice``; ``model`` itself is not touched.

    Args:
        model: the model that ``space`` was made from, or its folded form (a bias that folding added follows its
            weight).
        space: its width space.
        choice: units to keep per group.
        keep: unit indices per group name, as many as the choice says; a group that is not named keeps its first units.
        check: run the result once and compare the output shape.

    Raises:
        InputError: a choice or ``keep`` that does not fit the space.
        UnsupportedModelError: the model cannot be copied, or its Python code fixes a size that had to change.

    Example:
        >>> small = shrink(model, space, space.uniform(0.5))
    """
    space.validate(choice)
    kept = kept_units(space, choice, keep)
    try:
        small = copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error
    cut = axis_positions(space, kept, {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()})
    _cut_tensors(small, cut)
    if check:
        _check_shape(small, space, choice)
    return small


def kept_units(space: WidthSpace, choice: WidthChoice, keep: Mapping[str, np.ndarray] | None = None) -> list[IntArray]:
    """Kept unit indices of every group, ascending: from ``keep`` where given, else the first ones.

    Raises:
        InputError: an unknown group, indices out of range or repeated, or not as many as the choice says.
    """
    keep = keep or {}
    unknown = sorted(keep.keys() - {group.name for group in space.groups})
    if unknown:
        raise InputError(f"keep names no group of this space: {unknown[0]!r}")
    kept = []
    for group, width in zip(space.groups, choice.widths, strict=True):
        indices = np.sort(np.asarray(keep.get(group.name, np.arange(width))).ravel().astype(np.int64))
        if len(indices) != width or len(np.unique(indices)) != width:
            raise InputError(f"keep for group {group.name} must hold {width} distinct units, got {len(indices)}")
        if width and (indices[0] < 0 or indices[-1] >= group.units):
            raise InputError(f"keep for group {group.name} must lie in 0 to {group.units - 1}, got {indices.tolist()}")
        kept.append(indices)
    return kept


def axis_positions(
    space: WidthSpace, kept: list[IntArray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, int], IntArray]:
    """The positions to keep on every parameter axis that some group cuts, ascending.

    ``shapes`` names the tensors that exist. ``X.bias`` without a place of its own follows axis 0 of ``X.weight``:
    folding a batch normalisation into a convolution adds such a bias.
    """
    masks: dict[tuple[str, int], np.ndarray] = {}
    for group, units in zip(space.groups, kept, strict=True):
        dropped = np.setdiff1d(np.arange(group.units), units)
        if not len(dropped):
            continue
        for slot in group.slots:
            if slot.parameter not in shapes:
                continue
            size = shapes[slot.parameter][slot.axis]
            mask = masks.setdefault((slot.parameter, slot.axis), np.ones(size, dtype=bool))
            mask[slot.positions[dropped].ravel()] = False
    for name, owner in followers(space, shapes).items():
        if owner in masks:
            masks[name, 0] = masks[owner]
    return {key: np.flatnonzero(mask) for key, mask in masks.items()}


def followers(space: WidthSpace, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, int]]:
    """Biases that the space does not know, because folding added them, and the weight axis that each one follows."""
    transposed = {layer.weight for layer in space.network.layers if "transpose" in layer.op and layer.groups == 1}
    found = {}
    for name, shape in shapes.items():
        owner = name.removesuffix("bias") + "weight"
        if name.endswith("bias") and name not in space.network.shapes and owner in shapes:
            axis = 1 if owner in transposed else 0
            if shape == shapes[owner][axis : axis + 1]:
                found[name] = (owner, axis)
    return found


def _cut_tensors(model: nn.Module, cut: Mapping[tuple[str, int], IntArray]) -> None:
    import torch

    tensors = named_tensors(model)
    new: dict[str, Tensor] = {}
    for (name, axis), positions in cut.items():
        data = new.get(name, tensors[name].detach())
        new[name] = data.index_select(axis, torch.from_numpy(positions).to(data.device))
    put_tensors(model, new)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tensor with several names under the first of them."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def tensor_owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every place ``(module, attribute)`` at which a tensor of ``named_tensors`` hangs: tied tensors have several."""
    first: dict[int, str] = {}
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():  # a module under two names is visited once
        for local, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                name = first.setdefault(id(tensor), f"{path}.{local}" if path else local)
                owners.setdefault(name, []).append((module, local))
    return owners


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace tensors of ``model`` by name, of any shape, and bring the sizes that its modules remember in line."""
    import torch

    owners = tensor_owners(model)
    for name, data in tensors.items():
        module, local = owners[name][0]
        old = getattr(module, local)
        new = torch.nn.Parameter(data, old.requires_grad) if isinstance(old, torch.nn.Parameter) else data
        for module, local in owners[name]:  # tied tensors stay tied
            setattr(module, local, new)
    for module in model.modules():
        fix_attributes(module)
    for block in folding_blocks(model).values():
        block.sizes_changed()


def fix_attributes(module: nn.Module) -> None:
    """Bring a module's size attributes in line with its (already cut) tensors."""
    import torch
    from torch import nn

    weight: Any = getattr(module, "weight", None)
    size = tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and size:
        if module.groups == module.in_channels:
            module.groups = size[0]
        module.in_channels, module.out_channels = size[0], size[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd) and size:
        if module.groups == module.in_channels and module.groups > 1:
            module.groups = size[0] * module.groups // module.out_channels
        module.in_channels, module.out_channels = size[1] * module.groups, size[0]
    elif isinstance(module, nn.Linear) and size:
        module.out_features, module.in_features = size
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        mean: Any = module.running_mean
        extent = size or (tuple(mean.shape) if isinstance(mean, torch.Tensor) else None)
        if extent:
            module.num_features = extent[0]
    elif isinstance(module, nn.GroupNorm) and size:
        module.num_channels = size[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and size:
        module.normalized_shape = size
    elif isinstance(module, nn.PReLU) and size:
        module.num_parameters = size[0]
    elif isinstance(module, nn.Embedding) and size:
        module.num_embeddings, module.embedding_dim = size


def _check_shape(small: nn.Module, space: WidthSpace, choice: WidthChoice) -> None:
    import torch

    advice = "a size is written in its Python code, read it from the tensor's shape instead"
    with evaluation_mode(small):
        try:
            output = try_forward(small, example_for(small, space, torch.zeros))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{type(small).__name__} cannot run at widths {list(choice.widths)}: {blame(error)}; {advice}"
            ) from error
    found = tuple(first_tensor(output).shape)
    if found != space.network.output_shape:
        raise UnsupportedModelError(
            f"{type(small).__name__} at widths {list(choice.widths)} returns shape {found} instead of "
            f"{space.network.output_shape}; {advice}"
        )


def blame(error: BaseException) -> str:
    """The first line of the error that started a chain, and the line of the user's code that raised it."""
    import traceback

    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not _INTERNAL.search(f.filename.replace("\\", "/"))]
    place = f" at {own[-1].filename.replace(chr(92), '/').rpartition('/')[2]}:{own[-1].lineno}" if own else ""
    return first_line(error) + place


def example_for(model: nn.Module, space: WidthSpace, make: Any) -> Tensor:
    """An input of the captured shape on the model's device and in its dtype."""
    first = next((tensor for tensor in named_tensors(model).values() if tensor.is_floating_point()), None)
    example: Tensor = make(space.network.input_shape)
    return example if first is None else example.to(first.device, first.dtype)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a model's output (a tensor, or nested lists, tuples and dicts of them)."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    items = list(output.values()) if isinstance(output, dict) else list(output)
    return first_tensor(items[0])


def kill_units(model: nn.Module, space: WidthSpace, dropped: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of ``model`` in which nothing reads the dropped units: their columns in every reading weight are zero."""
    import torch

    dead = copy.deepcopy(model)
    tensors = named_tensors(dead)
    with torch.no_grad():
        for group in space.groups:
            units = np.asarray(dropped.get(group.name, ()), dtype=np.int64)
            for slot in group.slots:
                if slot.reads and len(units):
                    positions = torch.from_numpy(slot.positions[units].ravel())
                    tensors[slot.parameter].index_fill_(slot.axis, positions.to(tensors[slot.parameter].device), 0.0)
    return dead


def randomise(model: nn.Module) -> None:
    """Random weights and non-trivial statistics, scaled so that no layer dies or explodes."""
    import torch

    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1:
                fan_in = max(1, tensor[0].numel())
                tensor.copy_(torch.randn(tensor.shape) * (2.0 / fan_in) ** 0.5)
            elif name.endswith("running_var") or name.endswith("weight"):
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
            else:
                tensor.copy_(torch.randn(tensor.shape) * 0.1)
