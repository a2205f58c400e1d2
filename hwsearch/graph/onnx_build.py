"""The one exporter: a model to ONNX, and a candidate's ONNX by slicing one exported file, never by exporting again.

Fold batch normalisation first: the exporter then keeps every parameter under its own name, which is what slicing needs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.errors import HwsearchError, UnsupportedModelError
from hwsearch.graph.capture import evaluation_mode, first_line, try_forward
from hwsearch.graph.surgery import axis_positions, first_tensor, kept_units, named_tensors, randomise, shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Protocol buffers cannot hold more than this in one message.
_MAX_BYTES = 2_000_000_000
#: Largest relative difference between a slice in ONNX Runtime and the same shrunk module in PyTorch (float32).
_TOLERANCE = 1e-3


def export_onnx(model: nn.Module, example_input: Tensor) -> bytes:
    """A model as one ONNX file: input ``input``, output ``output``, static shapes, weights inside.

    The bytes hold no paths and no source lines, and are the same for the same model, input shape and versions.

    Args:
        model: any capturable module with one tensor in and one tensor out; its training mode is left as found.
        example_input: tensor of the shape to export for.

    Raises:
        UnsupportedModelError: the forward fails, the exporter cannot translate it, or it is above 2 GB.
    """
    import torch

    with evaluation_mode(model):
        output = try_forward(model, example_input)
        if not isinstance(output, torch.Tensor):
            raise UnsupportedModelError(
                f"{type(model).__name__} returns {type(output).__name__}; return one tensor to export to ONNX"
            )
        size = sum(tensor.numel() * tensor.element_size() for tensor in named_tensors(model).values())
        if size > _MAX_BYTES:
            raise UnsupportedModelError(
                f"{type(model).__name__} holds {size / 1e9:.1f} GB of weights; an ONNX file takes 2 GB at most"
            )
        try:
            with _quiet(), torch.no_grad():
                program = torch.onnx.export(
                    model, (example_input,), dynamo=True, optimize=True, verbose=False,
                    input_names=["input"], output_names=["output"],
                )  # fmt: skip
        except Exception as error:
            raise UnsupportedModelError(
                f"torch.onnx cannot export {type(model).__name__}: {first_line(error)}; "
                "replace the operation that it names by one that ONNX has"
            ) from error
    proto = program.model_proto  # type: ignore[union-attr]
    _strip(proto)
    return bytes(proto.SerializeToString(deterministic=True))


@dataclass(frozen=True)
class _Constant:
    """A whole-number constant that follows the widths: ``value - sum_g per_unit[g] * dropped[g]``, elementwise."""

    name: str
    value: np.ndarray
    per_unit: np.ndarray  # (groups, *value.shape)


class OnnxTemplate:
    """A whole width space as ONNX: exported once, then sliced for any choice in about a millisecond.

    Args:
        space: the width space of the model as trained.
        folded: the same model after folding, with the same parameter names; a model without batch normalisation serves
            as it is.
        example_input: tensor of the shape to export for.
        check: run two slices in ONNX Runtime and compare them with the shrunk module.

    Raises:
        UnsupportedModelError: the export fails, or its slices would not compute what the shrunk module computes.

    Example:
        >>> template = OnnxTemplate(space, fold(model), torch.zeros(1, 1, 28, 28))
        >>> small = template.slice(space.smallest())
    """

    def __init__(self, space: WidthSpace, folded: nn.Module, example_input: Tensor, *, check: bool = True) -> None:
        self.space = space
        self._folded = folded
        self._example = example_input
        self._build(folded, example_input)
        if check:
            failure = self._failure()
            if failure is not None and self._has_shape_constants:
                # A flatten is settled by -1. What is not (a split by sizes, a slice, two widths in one view) is found
                # by asking the exporter how each group moves the constants.
                self._learn_constants()
                failure = self._failure()
            if failure is not None:
                raise UnsupportedModelError(
                    f"slices of the ONNX file of {type(folded).__name__} do not match the shrunk model: {failure}; "
                    "avoid sizes written as numbers in its forward"
                )

    def slice(self, choice: WidthChoice, keep: Mapping[str, np.ndarray] | None = None) -> bytes:
        """The ONNX file of the network at ``choice``; ``keep`` names the kept units as in ``shrink``.

        Raises:
            InputError: the choice (or ``keep``) does not belong to the space.
        """
        import onnx

        self.space.validate(choice)
        return self._slice(onnx.ModelProto(), choice, keep)

    def _slice(self, proto: Any, choice: WidthChoice, keep: Mapping[str, np.ndarray] | None) -> bytes:
        proto.ParseFromString(self._skeleton)
        cut: dict[str, list[tuple[int, np.ndarray]]] = {}
        for (name, axis), positions in axis_positions(
            self.space, kept_units(self.space, choice, keep), self._shapes
        ).items():
            cut.setdefault(name, []).append((axis, positions))
        first: dict[str, int] = {}
        for name, (parameter, transposed) in self._sources.items():
            array = self._arrays[parameter]
            for axis, positions in cut.get(parameter, ()):
                array = _take(array, positions, axis)
            if transposed:
                array = np.ascontiguousarray(array.T)
            first[name] = array.shape[0] if array.ndim else 1
            _add_initializer(proto, name, array)
        dropped = np.asarray(self.space.full().widths) - np.asarray(choice.widths)
        for constant in self._constants:
            _add_initializer(proto, constant.name, constant.value - np.tensordot(dropped, constant.per_unit, 1))
        for index, weight, multiplier in self._depthwise:
            for attribute in proto.graph.node[index].attribute:
                if attribute.name == "group":
                    attribute.i = first[weight] // multiplier
        return bytes(proto.SerializeToString())

    def _build(self, folded: nn.Module, example_input: Tensor) -> None:
        import onnx

        # The exporter may merge equal initialisers and drop a zero bias: the structure is exported with random weights,
        # and the true ones are put in by name.
        probe = _random_copy(folded, seed=0)
        proto = onnx.load_from_string(export_onnx(probe, example_input))
        random, aliases = _arrays(probe), self.space.network.aliases
        self._arrays = _arrays(folded)
        self._shapes = {name: array.shape for name, array in self._arrays.items()}
        self._sources: dict[str, tuple[str, bool]] = {}
        fixed = []
        for initializer in proto.graph.initializer:
            source = _source(onnx.numpy_helper.to_array(initializer), initializer.name, random, aliases)
            if source is None:
                fixed.append(initializer)
            else:
                self._sources[initializer.name] = source
        self._depthwise = _depthwise(proto, {name: self._arrays[p].shape for name, (p, _) in self._sources.items()})
        self._has_shape_constants = any(item.data_type == onnx.TensorProto.INT64 for item in fixed)
        self._constants: list[_Constant] = []
        skeleton = onnx.ModelProto()
        skeleton.CopyFrom(proto)
        del skeleton.graph.initializer[:]
        del skeleton.graph.value_info[:]
        skeleton.graph.initializer.extend(fixed)
        _relax_reshapes(proto, skeleton)
        self._skeleton = bytes(skeleton.SerializeToString())

    def _failure(self) -> str | None:
        """Why slices and shrunk modules differ, or None; tried at the smallest choice and at a random one.

        Other random weights than those of the export show a constant that the exporter computed from weights.
        """
        probe, own = _random_copy(self._folded, seed=1), self._arrays
        self._arrays = _arrays(probe)
        try:
            for choice in (self.space.smallest(), self.space.sample(np.random.default_rng(0))):
                failure = _compare(self.slice(choice), shrink(probe, self.space, choice), self._example)
                if failure is not None:
                    return failure
            return None
        finally:
            self._arrays = own

    def _learn_constants(self) -> None:
        """Export once per group at its smallest width, and read off how the whole-number constants move."""
        import onnx

        probe = _random_copy(self._folded, seed=0)
        full = _integers(export_onnx(probe, self._example))
        moved: dict[str, np.ndarray] = {}
        for index, group in enumerate(self.space.groups):
            widths = [g.widths[0] if g is group else g.units for g in self.space.groups]
            if group.widths[0] == group.units:
                continue
            try:
                small = _integers(export_onnx(shrink(probe, self.space, WidthChoice(tuple(widths))), self._example))
            except HwsearchError:
                return
            if small.keys() != full.keys():
                return  # the exporter took another path: leave the failure standing
            for name, value in full.items():
                step = (value - small[name]) // (group.units - group.widths[0])
                if step.any():
                    table = moved.setdefault(name, np.zeros((len(self.space.groups), *value.shape), dtype=np.int64))
                    table[index] = step
        self._constants = [_Constant(name, full[name], table) for name, table in moved.items()]
        skeleton = onnx.load_from_string(self._skeleton)
        kept = [item for item in skeleton.graph.initializer if item.name not in moved]
        del skeleton.graph.initializer[:]
        skeleton.graph.initializer.extend(kept)
        self._skeleton = bytes(skeleton.SerializeToString())


def _source(
    array: np.ndarray, name: str, random: Mapping[str, np.ndarray], aliases: Mapping[str, str]
) -> tuple[str, bool] | None:
    """``(parameter, transposed)`` behind an initialiser: by name, else by its (random, hence unique) content."""
    for candidate in [aliases.get(name, name), *random]:
        value = random.get(candidate)
        if value is None or value.size != array.size or value.dtype != array.dtype or value.size == 1:
            continue
        if value.shape == array.shape and np.array_equal(value, array):
            return candidate, False
        if value.ndim == 2 and value.T.shape == array.shape and np.array_equal(value.T, array):
            return candidate, True
    return None


def _depthwise(proto: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, str, int]]:
    """``(node index, weight name, channel multiplier)`` of every depth-wise convolution."""
    found = []
    for index, node in enumerate(proto.graph.node):
        if node.op_type not in ("Conv", "ConvTranspose") or node.input[1] not in shapes:
            continue
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        shape = shapes[node.input[1]]
        if node.op_type == "Conv" and groups > 1 and shape[1] == 1:
            found.append((index, node.input[1], shape[0] // groups))
        elif node.op_type == "ConvTranspose" and groups > 1 and shape[0] == groups:
            found.append((index, node.input[1], 1))
    return found


def _relax_reshapes(proto: Any, skeleton: Any) -> None:
    """Let the one axis of each reshape that can move be computed (-1), so that a flatten fits every width."""
    from onnx import numpy_helper

    shapes = {
        info.name: tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        for info in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    }
    constants = {item.name: item for item in skeleton.graph.initializer}
    for node in skeleton.graph.node:
        if node.op_type != "Reshape" or node.input[1] not in constants or node.input[0] not in shapes:
            continue
        target = numpy_helper.to_array(constants[node.input[1]]).copy()
        axis = _moving_axis(shapes[node.input[0]], tuple(int(size) for size in target))
        if axis is None:
            continue
        target[axis] = -1
        relaxed = numpy_helper.from_array(target, f"{node.input[1]}_of_{node.output[0]}")
        skeleton.graph.initializer.append(relaxed)
        node.input[1] = relaxed.name


def _moving_axis(old: tuple[int, ...], new: tuple[int, ...]) -> int | None:
    """The target axis to leave open: the last one of the first run of axes that is really merged or split."""
    if -1 in new or 0 in new or math.prod(old) != math.prod(new):
        return None
    equal = 0
    while equal < min(len(old), len(new)) and old[equal] == new[equal]:
        equal += 1
    left, right, i, j = 1, 1, equal, equal
    while i < len(old) or j < len(new):
        if left <= right and i < len(old):
            left *= old[i]
            i += 1
        elif j < len(new):
            right *= new[j]
            j += 1
        if left == right and left > 1 and j > equal:
            break
    candidates = [axis for axis in range(equal, j) if new[axis] > 1]
    if candidates:
        return candidates[-1]
    # Only axes of size 1 come or go: the channel axis is the first long one before them.
    longer = [axis for axis in range(len(new)) if new[axis] > 1]
    return longer[0] if longer else None


def _compare(file: bytes, small: nn.Module, example: Tensor) -> str | None:
    """Why an ONNX file and a module differ on a random input, or None."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tuple(example.shape), generator=generator).to(example.dtype)
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        got = session.run(["output"], {"input": x.numpy()})[0]
    except Exception as error:
        return first_line(error)
    with evaluation_mode(small), torch.no_grad():
        wanted = first_tensor(small(x)).numpy()
    if got.shape != wanted.shape:
        return f"the shape is {got.shape} instead of {wanted.shape}"
    change = float(np.abs(got - wanted).max()) / (float(np.abs(wanted).max()) or 1.0)
    return None if change <= _TOLERANCE else f"the output differs by {change:.1%}"


def _arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in named_tensors(model).items()}


def _random_copy(model: nn.Module, *, seed: int) -> nn.Module:
    import torch

    probe = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        randomise(probe)
    return probe


def _integers(file: bytes) -> dict[str, np.ndarray]:
    import onnx

    proto = onnx.load_from_string(file)
    return {
        item.name: onnx.numpy_helper.to_array(item)
        for item in proto.graph.initializer
        if item.data_type == onnx.TensorProto.INT64
    }


def _take(array: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """``array`` at ``positions`` along ``axis``; a leading run is a view, which costs nothing."""
    count = len(positions)
    if count and positions[-1] == count - 1:
        index = [slice(None)] * array.ndim
        index[axis] = slice(0, count)
        return array[tuple(index)]
    return np.take(array, positions, axis=axis)


def _add_initializer(proto: Any, name: str, array: np.ndarray) -> None:
    from onnx import helper

    tensor = proto.graph.initializer.add()
    tensor.name = name
    tensor.dims.extend(array.shape)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.raw_data = array.tobytes()


def _strip(proto: Any) -> None:
    """Remove source lines and other notes of the exporter: they hold paths of the machine that exported."""
    items = [proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer,
             *proto.graph.input, *proto.graph.output]  # fmt: skip
    for item in items:
        item.ClearField("metadata_props")
        item.ClearField("doc_string")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about optional packages off the user's terminal."""
    names = [name for name in list(logging.root.manager.loggerDict) if name.startswith("torch.onnx")]
    levels = [(logger, logger.level) for logger in map(logging.getLogger, ["torch.onnx", *names])]
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
