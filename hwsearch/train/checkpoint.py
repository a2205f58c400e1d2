"""Checkpoints: one safetensors file whose header carries our JSON, replaced as a whole or not at all.

Weights and the step they belong to are in the same file, so no kill can leave one without the other, and reading a
stranger's checkpoint runs no code.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwsearch.errors import InputError, SchemaError

SCHEMA, VERSION = "hwsearch.checkpoint", 1
NAME = "checkpoint.safetensors"

#: What a checkpoint must agree on before work goes on from it: names to plain values.
Identity = Mapping[str, Any]


def save(path: Path, tensors: Mapping[str, Tensor], *, step: int, identity: Identity, notes: Mapping[str, Any]) -> None:
    """Write atomically: a reader sees the old file or the new one, also after a power cut.

    Args:
        tensors: any strides; they are stored in plain order.
        step: how many steps have been taken.
        identity: what the run is; ``load`` refuses a file that says otherwise.
        notes: more state, of JSON's types.

    Raises:
        InputError: the folder cannot be written.
    """
    from safetensors.torch import save as to_bytes

    header = {"schema": SCHEMA, "version": VERSION, "step": step, "identity": dict(identity), "notes": dict(notes)}
    # clones, because safetensors refuses names that share memory, as tied weights do
    plain = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    data = to_bytes(plain, metadata={"hwsearch": json.dumps(header, sort_keys=True)})
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"cannot write the checkpoint {path}: {error.strerror or error}; choose a folder that can be written"
        ) from error


def load(path: Path, *, identity: Identity) -> tuple[dict[str, Tensor], int, dict[str, Any]] | None:
    """Read (tensors, step, notes), or ``None`` where there is no checkpoint yet.

    Raises:
        SchemaError: the file is damaged or of another kind.
        InputError: it belongs to another run; the message names what differs.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("hwsearch", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError, RecursionError, LookupError, TypeError, RuntimeError) as error:
        raise SchemaError(f"{path} cannot be read ({error}); delete it to start this training afresh") from error
    header = header if isinstance(header, dict) else {}
    if header.get("schema") != SCHEMA or header.get("version") != VERSION:
        found = f"{header.get('schema')} {header.get('version')}"
        raise SchemaError(f"{path} is {found}, not {SCHEMA} {VERSION}; delete it to start this training afresh")
    kinds = {"identity": dict, "notes": dict, "step": int}
    if wrong := [name for name, kind in kinds.items() if type(header.get(name)) is not kind]:
        raise SchemaError(f"{path} is damaged (its {wrong[0]}); delete it to start this training afresh")
    # compare what JSON makes of it: tuples become lists
    wanted = json.loads(json.dumps(dict(identity)))
    found_identity = header["identity"]
    for key in sorted(wanted.keys() | found_identity.keys()):
        if wanted.get(key) != found_identity.get(key):
            was, now = _short(found_identity.get(key)), _short(wanted.get(key))
            raise InputError(
                f"{path} belongs to another run: {key} was {was}, now {now}; use another folder, or delete it"
            )
    return tensors, int(header["step"]), header["notes"]


def copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy stored values into existing tensors, whose strides stay: the same bits follow from the same strides.

    Raises:
        SchemaError: a name is missing or a shape differs.
    """
    with torch.no_grad():
        for name, target in targets.items():
            value = tensors.get(name)
            if value is None or value.shape != target.shape:
                found = "nothing" if value is None else tuple(value.shape)
                shape = tuple(target.shape)
                raise SchemaError(f"{path} has {found} for {name}, not {shape}; delete it to start afresh")
            target.copy_(value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
