"""ONNX files of a model and of every network in its width space: one export, then slices, never another export.

Fold batch normalisation first: the exporter then keeps every parameter under its own name, which is what slicing needs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from hwsearch.errors import UnsupportedModelError
from hwsearch.graph.capture import evaluation_mode, first_line
from hwsearch.graph.onnx_export import export_onnx
from hwsearch.graph.onnx_slicing import (
    Constant,
    add_initializer,
    find_depthwise,
    find_sources,
    laid_out,
    learn_constants,
    take,
    with_open_reshapes,
    without_weights,
)
from hwsearch.graph.surgery import axis_positions, first_tensor, kept_units, named_tensors, randomise, shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["OnnxTemplate", "export_onnx"]

#: Largest relative difference between a slice in ONNX Runtime and the same shrunk module in PyTorch (float32).
_TOLERANCE = 1e-3


class OnnxTemplate:
    """A whole width space as ONNX: exported once, then sliced for any choice in about a millisecond.

    Args:
        space: the width space of the model as trained.
        folded: the same model after folding, with the same parameter names; a model without batch normalisation serves
            as it is. Its weights are copied: later changes to it do not show.
        example_input: tensor of the shape to export for.
        check: run two slices in ONNX Runtime and compare them with the shrunk module.

    Raises:
        UnsupportedModelError: the export fails, or its slices would not compute what the shrunk module computes.

    Example:
        >>> template = OnnxTemplate(space, fold(model), torch.zeros(1, 1, 28, 28))
        >>> small = template.slice(space.smallest())
    """

    def __init__(self, space: WidthSpace, folded: nn.Module, example_input: Tensor, *, check: bool = True) -> None:
        import onnx
        import torch

        self.space = space
        coarse = {tensor.dtype for tensor in named_tensors(folded).values()} & {torch.float16, torch.bfloat16}
        if coarse:
            raise UnsupportedModelError(
                f"{type(folded).__name__} has {str(coarse.pop()).removeprefix('torch.')} weights; call .float() on it: "
                "precision is chosen when it is deployed"
            )
        self._arrays = _arrays(folded)
        self._constants: tuple[Constant, ...] = ()
        # The exporter may merge equal initialisers and drop a zero bias: the structure is exported with random weights,
        # and the true ones are put in by name.
        probe = _random_copy(folded, seed=0)
        proto = onnx.load_from_string(export_onnx(probe, example_input))
        self._sources, fixed = find_sources(proto, _arrays(probe), space.network.aliases)
        self._depthwise = find_depthwise(proto, self._sources, self._arrays)
        plain = without_weights(proto, fixed)
        self._skeleton = bytes(with_open_reshapes(proto, plain).SerializeToString())
        if not check:
            return
        failure = self._failure(folded, example_input)
        if failure is not None:
            # Open reshapes settle a flatten. What is left (slices, splits by sizes, a view with a width in the middle)
            # is learnt by asking the exporter how each group moves the constants.
            learnt = learn_constants(plain, space, probe, example_input)
            if learnt is not None:
                self._skeleton, self._constants = learnt
                failure = self._failure(folded, example_input)
        if failure is not None:
            advice = "avoid sizes written as numbers in its forward"
            if any(hasattr(module, "weight_v") for module in folded.modules()):
                advice = "its weights are computed anew (torch.nn.utils.weight_norm): call remove_weight_norm first"
            elif any(type(module).__name__.startswith("BatchNorm") for module in folded.modules()):
                advice += ", or fold its batch normalisation first where that is not done"
            raise UnsupportedModelError(
                f"slices of the ONNX file of {type(folded).__name__} do not match the shrunk model: {failure}; {advice}"
            )

    def slice(self, choice: WidthChoice, keep: Mapping[str, np.ndarray] | None = None) -> bytes:
        """The ONNX file of the network at ``choice``; ``keep`` names the kept units as in ``shrink``.

        Raises:
            InputError: the choice (or ``keep``) does not belong to the space.
        """
        import onnx

        self.space.validate(choice)
        proto = onnx.ModelProto()
        proto.ParseFromString(self._skeleton)
        arrays = self._cut(kept_units(self.space, choice, keep))
        for name, source in self._sources.items():
            add_initializer(proto, name, laid_out(arrays[source.parameter], source.layout))
        dropped = np.asarray(self.space.full().widths) - np.asarray(choice.widths)
        for constant in self._constants:
            add_initializer(proto, constant.name, constant.value - np.tensordot(dropped, constant.per_unit, 1))
        for index, weight, multiplier in self._depthwise:
            for attribute in proto.graph.node[index].attribute:
                if attribute.name == "group":
                    attribute.i = arrays[weight].shape[0] // multiplier
        return bytes(proto.SerializeToString())

    def _cut(self, kept: list[np.ndarray]) -> dict[str, np.ndarray]:
        arrays = dict(self._arrays)
        shapes = {name: array.shape for name, array in arrays.items()}
        for (name, axis), positions in axis_positions(self.space, kept, shapes).items():
            arrays[name] = take(arrays[name], positions, axis)
        return arrays

    def _failure(self, folded: nn.Module, example: Tensor) -> str | None:
        """Why slices and shrunk modules differ, or None; tried at the smallest choice and at a random one.

        Other random weights than those of the export show a constant that the exporter computed from weights.
        """
        probe, own = _random_copy(folded, seed=1), self._arrays
        self._arrays = _arrays(probe)
        try:
            for choice in (self.space.smallest(), self.space.sample(np.random.default_rng(0))):
                failure = _compare(self.slice(choice), shrink(probe, self.space, choice), example)
                if failure is not None:
                    return failure
            return None
        finally:
            self._arrays = own


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
        wanted = first_tensor(small.cpu()(x)).numpy()
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
