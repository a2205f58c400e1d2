"""The user's own weights: a safetensors file of a model's state, checked name by name before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hwsearch.errors import InputError, SchemaError

if TYPE_CHECKING:
    from torch import nn


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into ``model`` in place; every parameter and buffer must be there, with its shape.

    Make one with ``safetensors.torch.save_file(model.state_dict(), "weights.safetensors")``. Pickled checkpoints
    (``.pt``, ``.pth``) are not read: a file from a stranger must not run code.

    Raises:
        InputError: the file is missing, or does not fit the model; the first name that differs is told.
        SchemaError: it is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path)
    if not file.is_file():
        raise InputError(f"there are no weights at {file}: check the path")
    try:
        found = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise SchemaError(
            f"{file} is no safetensors file ({str(error).splitlines()[0]}): save the model's state with "
            "safetensors.torch.save_file"
        ) from error
    wanted = model.state_dict()
    for name in sorted({*wanted, *found}):
        shapes = tuple(tuple(tensors[name].shape) if name in tensors else None for tensors in (wanted, found))
        if shapes[0] != shapes[1]:
            has, needs = (f"shape {shape}" if shape is not None else "nothing" for shape in (shapes[1], shapes[0]))
            raise InputError(
                f"{file} has {has} for {name} where the model has {needs}: give weights of this very model"
            )
    model.load_state_dict(found)
