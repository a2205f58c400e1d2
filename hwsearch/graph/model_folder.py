"""A model on disk: ``model.json`` (what it is) beside ``weights.safetensors``. No code is stored and none is unpickled.

A folder names the factory that builds the full model; the shapes of the stored weights say how it was shrunk or grown.
Because a folder can come from a stranger, only the reference factories of ``hwsearch.models`` are built unasked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.errors import InputError, SchemaError, UnsupportedModelError
from hwsearch.graph.capture import evaluation_mode, first_line, try_forward
from hwsearch.graph.factory import build, find_factory
from hwsearch.graph.surgery import first_tensor, named_tensors, put_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMA = "hwsearch.model"
VERSION = 1
_DESCRIPTION, _WEIGHTS = "model.json", "weights.safetensors"
_REFERENCE = re.compile(r"hwsearch\.models\.[a-z0-9_]+:[a-z0-9_]+")


@dataclass(frozen=True)
class ModelDescription:
    """The contents of ``model.json``.

    ``factory`` builds the full, unfolded model with ``factory_kwargs`` (None: the caller has to bring the model).
    ``widths`` names the kept units per group, for the reader; the shapes of the weights are what counts. ``folded``
    says that batch normalisation was folded before saving, ``grown`` that weights may be larger than the factory's.
    """

    factory: str | None
    factory_kwargs: dict[str, Any]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    widths: dict[str, int] = field(default_factory=dict)
    folded: bool = False
    grown: bool = False
    weights_sha256: str = ""


def save_model(
    folder: str | Path,
    model: nn.Module,
    *,
    factory: str | None,
    input_shape: Sequence[int],
    factory_kwargs: Mapping[str, Any] | None = None,
    widths: Mapping[str, int] | None = None,
    folded: bool = False,
    grown: bool = False,
) -> Path:
    """Write a model folder; an existing one is replaced file by file, the description last.

    Args:
        model: the model as it is now (shrunk, folded or not).
        factory: ``package.module:factory`` of the full model, or None.
        input_shape: the shape that the model takes, batch included; it is run once.
        factory_kwargs: what the factory was called with; JSON values only.
        widths: kept units per group name (``{group.name: width}``), for the reader.
        folded: whether batch normalisation has been folded.
        grown: whether some weights are larger than those of the factory's model (see ``grow``).

    Raises:
        InputError: arguments that JSON cannot hold, or a folder that cannot be written.
        UnsupportedModelError: the model does not run on ``input_shape``.
    """
    import safetensors.torch
    import torch

    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors(model).items()}
    with evaluation_mode(model):
        output = first_tensor(try_forward(model, _zeros(model, input_shape)))
    content = safetensors.torch.save({name: torch.clone(tensor) for name, tensor in tensors.items()})
    description = ModelDescription(
        factory=factory,
        factory_kwargs=dict(factory_kwargs or {}),
        input_shape=tuple(int(size) for size in input_shape),
        output_shape=tuple(output.shape),
        widths={name: int(width) for name, width in (widths or {}).items()},
        folded=folded,
        grown=grown,
        weights_sha256=hashlib.sha256(content).hexdigest(),
    )
    try:
        text = json.dumps({"schema": SCHEMA, "version": VERSION, **asdict(description)}, indent=2, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"factory_kwargs must be JSON values (text, numbers, lists): {first_line(error)}") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / _WEIGHTS, content)
        _write(folder / _DESCRIPTION, (text + "\n").encode())
    except OSError as error:
        raise InputError(
            f"cannot write the model folder {folder}: {error.strerror or error}; choose another folder"
        ) from error
    return folder


def is_model_folder(path: str | Path) -> bool:
    """Whether ``path`` looks like a folder that ``save_model`` wrote."""
    return (Path(path) / _DESCRIPTION).is_file()


def read_description(folder: str | Path) -> ModelDescription:
    """What a model folder says about itself; builds nothing.

    Raises:
        InputError: there is no such folder or file.
        SchemaError: the file is not a model description of this version, naming the field.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

    path = Path(folder) / _DESCRIPTION
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; give a folder that hwsearch wrote") from error
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path} is not JSON: {first_line(error)}; save the model again") from error
    if not isinstance(record, dict) or record.pop("schema", None) != SCHEMA:
        raise SchemaError(f"{path} is not a model description (schema {SCHEMA!r}); give a folder that hwsearch wrote")
    version = record.pop("version", None)
    if version != VERSION:
        raise SchemaError(
            f"{path} has version {version!r}, this hwsearch reads {VERSION}; update hwsearch or save it again"
        )
    adapter = TypeAdapter(with_config(ConfigDict(extra="forbid"))(ModelDescription))
    try:
        return adapter.validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SchemaError(f"{path}: field {where}: {first['msg']}") from error


def load_model(
    folder: str | Path,
    *,
    fold: Callable[[nn.Module], nn.Module] | None = None,
    allow_factory: str | None = None,
    build_full: Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """The model of a folder, in evaluation mode, run once to prove that it works.

    Args:
        folder: a folder that ``save_model`` wrote.
        fold: how to fold batch normalisation, needed when the model was saved folded (``hwsearch.reparam.fold.fold``).
        allow_factory: the folder's own factory name, repeated by a caller who trusts it: needed for every factory
            outside ``hwsearch.models``, because building it runs its code.
        build_full: builds the full, unfolded model instead of the named factory.

    Raises:
        InputError: a missing file, a factory that is not allowed or fails, or a needed ``fold`` that was not given.
        SchemaError: the description or the weights are damaged, or do not belong to the factory's model.
    """
    folder = Path(folder)
    description = read_description(folder)
    if description.folded and fold is None:
        raise InputError(f"the model in {folder} was saved folded; pass fold=hwsearch.fold to load it")
    weights = _read_weights(folder / _WEIGHTS, description.weights_sha256)
    model = build_full() if build_full is not None else _build_named(folder, description, allow_factory)
    model.eval()
    if description.folded and fold is not None:
        model = fold(model).eval()
    _put_checked(model, weights, folder, description.grown)
    try:
        output = first_tensor(try_forward(model, _zeros(model, description.input_shape)))
    except UnsupportedModelError as error:
        raise SchemaError(f"the model in {folder} does not run: {first_line(error)}; save it again") from error
    if tuple(output.shape) != description.output_shape:
        raise SchemaError(
            f"the model in {folder} returns {tuple(output.shape)}, not {description.output_shape} as saved"
        )
    return model


def _build_named(folder: Path, description: ModelDescription, allow_factory: str | None) -> nn.Module:
    spec = description.factory
    if spec is None:
        raise InputError(
            f"the model in {folder} names no factory; pass build_full, a function that builds the full model"
        )
    if spec == allow_factory:
        return build(spec, find_factory(spec), description.factory_kwargs)
    if not _REFERENCE.fullmatch(spec):
        raise InputError(
            f"the model in {folder} wants to run {spec!r}, which is not a reference model of hwsearch; "
            f"if you trust it, allow it by name: allow_factory={spec!r}, or --allow-factory {spec}"
        )
    path, _, name = spec.partition(":")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise SchemaError(
            f"the model in {folder} names {spec}, which this hwsearch does not have; update it"
        ) from error
    # Only what a module lists: a helper in the same file (a loader of other names) must not be reachable from a file.
    if name not in getattr(module, "FACTORIES", ()):
        raise SchemaError(f"the model in {folder} names {spec}, which is not a reference model of this hwsearch")
    return build(spec, getattr(module, name), description.factory_kwargs)


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; save the model again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SchemaError(f"{path} is not the file that {_DESCRIPTION} describes (checksum); save the model again")
    try:
        return safetensors.torch.load(content)  # type: ignore[no-any-return]
    except Exception as error:
        raise SchemaError(f"{path} is not a safetensors file: {first_line(error)}; save the model again") from error


def _put_checked(model: nn.Module, weights: Mapping[str, Tensor], folder: Path, grown: bool) -> None:
    """Put stored tensors into the full model: of equal or smaller shape, or of equal rank where it was grown."""
    own = named_tensors(model)
    for name in sorted(own.keys() ^ weights.keys()):
        side = "misses" if name in own else "has an unknown"
        raise SchemaError(
            f"{folder / _WEIGHTS} {side} tensor {name!r}: it belongs to another model than its description says"
        )
    for name, tensor in sorted(weights.items()):
        full, shape = tuple(own[name].shape), tuple(tensor.shape)
        larger = any(size > limit for size, limit in zip(shape, full, strict=False)) and not grown
        if len(full) != len(shape) or larger or any(size < 1 for size in shape):
            raise SchemaError(
                f"{folder / _WEIGHTS}: {name} has shape {shape}, which does not fit in the full model's {full}"
            )
    put_tensors(model, weights)


def _zeros(model: nn.Module, shape: Sequence[int]) -> Tensor:
    import torch

    first = next((tensor for tensor in named_tensors(model).values() if tensor.is_floating_point()), None)
    like = torch.empty(0) if first is None else first
    try:
        return torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{list(shape)} is not an input shape: {first_line(error)}") from error


def _write(path: Path, content: bytes) -> None:
    """Write through a neighbour and rename, so that a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
