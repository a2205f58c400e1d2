"""The MODEL of the command line: an ONNX file, ``package.module:factory``, ``timm:name`` or a folder of hwsearch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hwsearch.graph.model_folder import ModelDescription
    from hwsearch.graph.onnx_build import OnnxTemplate

_MAX_DIMENSION = 1 << 20
#: Of an input: axes, and elements (4 GB of float32): more is a slip of the finger, and would take all memory.
_MAX_AXES, _MAX_ELEMENTS = 8, 1 << 30


@dataclass(frozen=True)
class ModelArgument:
    """A model as the user named it. An ONNX file has no ``module``; its bytes, inputs pinned, are in ``onnx``.

    Attributes:
        input_shape: of the input, batch included; of the first one where an ONNX file has several.
    """

    spec: str
    input_shape: tuple[int, ...]
    module: nn.Module | None = field(default=None, compare=False, repr=False)
    onnx: bytes | None = field(default=None, repr=False)
    factory: str | None = None
    description: ModelDescription | None = field(default=None, compare=False, repr=False)

    @property
    def widths(self) -> dict[str, int]:
        """Kept units per group, where a model folder tells them; {} for a model at its full widths."""
        return {} if self.description is None else dict(self.description.widths)

    def full_module(self) -> nn.Module:
        """The unfolded model at full widths: what a model folder's factory builds, else the module itself.

        Raises:
            InputError: the model is an ONNX file.
        """
        module, found = self.need_module(), self.description
        if found is None or found.factory is None or not found.widths:
            return module
        from hwsearch.graph.factory import build, find_factory

        # Loading the folder has run this very factory already, so it is allowed.
        return build(found.factory, find_factory(found.factory), found.factory_kwargs).eval()

    @property
    def example_input(self) -> Tensor:
        """Random float32 input of ``input_shape``, the same at every call."""
        import torch

        return torch.randn(self.input_shape, generator=torch.Generator().manual_seed(0))

    def to_onnx(self, *, unfolded: bool = False) -> bytes:
        """The network as it would be deployed: blocks and batch norms folded where there are any, then exported.

        Args:
            unfolded: export it as it stands instead.
        Raises:
            UnsupportedModelError: the module does not run on ``input_shape``, or cannot be exported.
        """
        if self.onnx is not None:
            return self.onnx
        from hwsearch.graph.onnx_build import export_onnx
        from hwsearch.reparam.fold import fold

        module = self.need_module()
        if not unfolded:
            module = fold(module, self.example_input, require=False)
        return export_onnx(module, self.example_input)

    def need_module(self) -> nn.Module:
        """The PyTorch module.

        Raises:
            InputError: the model is an ONNX file, which cannot be changed or trained.
        """
        if self.module is None:
            raise InputError(
                f"{self.spec} is an ONNX file; this verb changes or trains the model and needs PyTorch: "
                "give package.module:factory or a folder that hwsearch wrote"
            )
        return self.module


def parse_shape(text: str) -> tuple[int, ...]:
    """``1x3x224x224`` as a tuple.

    Raises:
        InputError: the text is no such shape.

    Example:
        >>> parse_shape("1x3x224x224")
        (1, 3, 224, 224)
    """
    parts = re.split(r"[x,]", text.strip().lower())
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and 0 < int(part) <= _MAX_DIMENSION for part in parts):
        raise InputError(f"the input shape is {text!r}: give positive sizes joined by x, such as 1x3x224x224")
    return tuple(int(part) for part in parts)


def _check_size(shape: tuple[int, ...]) -> None:
    """Raises InputError where no network has an input so large."""
    if len(shape) > _MAX_AXES or math.prod(shape) > _MAX_ELEMENTS:
        shown = _text(shape) if len(shape) <= _MAX_AXES else f"{_text(shape[:_MAX_AXES])}x..."
        raise InputError(
            f"the input shape {shown} has {len(shape)} axes and {math.prod(shape):.3g} elements: give at most "
            f"{_MAX_AXES} axes and {_MAX_ELEMENTS:.3g} elements"
        )


def parse_inputs(text: str) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """The value of ``--input``: one shape, or ``name=shape`` for each input, joined by commas.

    Raises:
        InputError: the text is neither.

    Example:
        >>> parse_inputs("1x3x224x224"), parse_inputs("image=1x3x8x8,ids=1x12")
        ((1, 3, 224, 224), {'image': (1, 3, 8, 8), 'ids': (1, 12)})
    """
    if "=" not in text:
        return parse_shape(text)
    found: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        # a name may hold colons and slashes, and even a sign of equality
        name, _, shape = part.rpartition("=")
        if not name.strip() or name.strip() in found:
            raise InputError(f"the input {part!r} in --input {text!r}: give name=shape once for each, joined by commas")
        found[name.strip()] = parse_shape(shape)
    return found


def load_model_argument(
    spec: str,
    input_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    allow_factory: str | None = None,
) -> ModelArgument:
    """Load what the user named.

    Args:
        spec: see the module.
        input_shape: of one inference, batch included; a folder and an ONNX file of fixed shape bring their own. By
            name for an ONNX file with several inputs.
        kwargs: arguments of a factory.
        allow_factory: the factory that a model folder names, where it is not one of hwsearch's own: loading runs it.

    Raises:
        InputError, SchemaError, UnsupportedModelError: one line each: no such file, a damaged file, a factory that
            fails, an input shape that is missing or does not fit.
    """
    for shape in input_shape.values() if isinstance(input_shape, Mapping) else [input_shape]:
        _check_size(shape or ())
    path = Path(spec)
    if path.suffix == ".py" and ":" not in spec:
        raise InputError(f"{spec} is Python code: name a function in it that returns the model, {path.stem}:FUNCTION")
    if path.suffix in (".pt", ".pth", ".safetensors") and ":" not in spec:
        raise InputError(
            f"{spec} holds weights, no network: give the function that builds it, package.module:factory; a run takes "
            "weights as a safetensors file with [model] weights"
        )
    if path.suffix == ".onnx" or (os.path.isfile(path) and ":" not in spec):
        onnx, shape = _pinned_onnx(path, input_shape)
        return ModelArgument(spec, shape, onnx=onnx)
    if isinstance(input_shape, Mapping):
        raise InputError(f"{spec} is no ONNX file and has one input: give its shape alone, such as --input 1x3x224x224")
    if os.path.isdir(path):
        return _from_folder(path, input_shape, allow_factory)
    if ":" not in spec:
        raise InputError(
            f"there is no model {spec!r:.100}: give an ONNX file, a folder that hwsearch wrote, timm:name, or "
            "package.module:factory such as hwsearch.models.resnet:resnet18"
        )
    from hwsearch.graph.capture import try_forward
    from hwsearch.models.loading import load_factory

    if input_shape is None:
        raise InputError(f"{spec} needs the shape of its input: add --input, such as --input 1x3x224x224")
    argument = ModelArgument(spec, input_shape, module=load_factory(spec, **dict(kwargs or {})), factory=spec)
    # A forward that fails, or a shape that does not fit, is told here and not by whatever runs the model first.
    try_forward(argument.need_module(), argument.example_input)
    return argument


def _from_folder(folder: Path, input_shape: tuple[int, ...] | None, allow_factory: str | None) -> ModelArgument:
    """A model folder, or a run folder, whose found network stands in ``model/``."""
    from hwsearch.graph.model_folder import is_model_folder, load_model, read_description
    from hwsearch.reparam.fold import fold

    found = folder if is_model_folder(folder) else folder / "model"
    if not is_model_folder(found):
        raise InputError(f"{folder} holds no model.json: give a model folder, or the folder of a finished run")
    description = read_description(found)
    shape = description.input_shape
    _check_size(shape)
    if input_shape is not None and input_shape != shape:
        raise InputError(f"the model in {found} takes {_text(shape)}, not {_text(input_shape)}: leave --input out")
    return ModelArgument(
        str(folder),
        shape,
        module=load_model(found, fold=fold, allow_factory=allow_factory),
        factory=description.factory,
        description=description,
    )


def _pinned_onnx(
    path: Path, input_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None
) -> tuple[bytes, tuple[int, ...]]:
    """The file with fixed input shapes, and the first of them."""
    import onnx

    from hwsearch.graph.onnx_pinning import ANY, pin_inputs

    try:
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
    except OSError as error:
        raise InputError(f"cannot read the model {path}: {error.strerror or error}; check the path") from error
    except Exception as error:  # the parser and the checker have no common exception type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a usable ONNX file: {reason}; export the model again") from error
    shapes = input_shape if isinstance(input_shape, Mapping) else {} if input_shape is None else {ANY: input_shape}
    pinned = pin_inputs(proto, shapes, str(path))
    return proto.SerializeToString(), next(iter(pinned.values()), ())


def _text(shape: tuple[int, ...] | list[int]) -> str:
    return "x".join(str(size) for size in shape)


def templates_of(models: list[str], shape: str | None) -> tuple[OnnxTemplate, ...]:
    """Width templates of models that the user named, so that a campaign covers their widths too."""
    from hwsearch.graph.onnx_build import OnnxTemplate
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.reparam.fold import fold

    templates = []
    for name in models:
        argument = load_model_argument(name, parse_shape(shape) if shape else None)
        module, example = argument.need_module(), argument.example_input
        space = WidthSpace.from_model(module, example)
        templates.append(OnnxTemplate(space, fold(module, example, require=False), example))
    return tuple(templates)


def fold_model(argument: ModelArgument, output: Path | None, *, prove_it: bool) -> dict[str, Any]:
    """Fold a model's blocks and batch norms, prove it where asked for, write it as ONNX where asked for; what was done.

    A proof is written beside the ONNX file, as ``<name>.fold.json``.

    Raises:
        InputError: there is nothing to fold, or the output cannot be written.
        CheckFailedError: the folded network does not compute what the model does.
    """
    from hwsearch.graph.onnx_build import export_onnx
    from hwsearch.reparam.check import prove
    from hwsearch.reparam.fold import fold
    from hwsearch.search.journal import write_atomic

    module, example = argument.need_module(), argument.example_input
    folded = fold(module, example)
    facts: dict[str, Any] = {"model": argument.spec}
    if prove_it:
        proof = prove(module, folded, argument.input_shape).require()
        facts["proof"] = proof.to_dict()
    if output is not None:
        # whole or not at all: a full disk must not cost the file that was there
        write_atomic(output, export_onnx(folded, example))
        facts["onnx"] = str(output)
        if prove_it:
            proof.save(output.with_suffix(".fold.json"))
    return facts
