"""The user's own weights: a safetensors file of a model's state, checked name by name before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hwsearch.errors import InputError, SchemaError

if TYPE_CHECKING:
    from torch import nn

#: What DataParallel, Lightning and torch.compile put before a model's own names.
_WRAPPERS = ("module.", "model.", "_orig_mod.")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into ``model`` in place; every parameter and buffer must be there, with its shape.

    Make one with ``safetensors.torch.save_file(model.state_dict(), "weights.safetensors")``. Pickled checkpoints
    (``.pt``, ``.pth``) are not read: a file from a stranger must not run code. Weights that fit a part of the model (a
    head of one's own on a trained trunk) are for its factory to load.

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
        if _pickled(file):
            raise SchemaError(
                f"{file} is no safetensors file but a pickled one, which could run code and is not read: convert it "
                "once, with safetensors.torch.save_file(torch.load(OLD, weights_only=True), NEW)"
            ) from error
        raise SchemaError(
            f"{file} is no safetensors file ({str(error).splitlines()[0]}): save the model's state with "
            "safetensors.torch.save_file"
        ) from error
    wanted = model.state_dict()
    for prefix in _WRAPPERS:
        if wanted.keys() != found.keys() and wanted.keys() == {name.removeprefix(prefix) for name in found}:
            raise InputError(
                f"the names in {file} begin with {prefix!r}, those of a wrapper around the model: save the state of "
                "the model inside it"
            )
    for name in sorted({*wanted, *found}):
        shapes = tuple(tuple(tensors[name].shape) if name in tensors else None for tensors in (wanted, found))
        if shapes[0] != shapes[1]:
            has, needs = (f"shape {shape}" if shape is not None else "nothing" for shape in (shapes[1], shapes[0]))
            raise InputError(
                f"{file} has {has} for {name} where the model has {needs}: give weights of this very model"
            )
    model.load_state_dict(found)


def _pickled(file: Path) -> bool:
    """Whether a file begins as ``torch.save`` writes: a zip archive, or a bare pickle."""
    try:
        with file.open("rb") as stream:
            return stream.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    except OSError:
        return False
