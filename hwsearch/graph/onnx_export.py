"""The one exporter: a model to an ONNX file with static shapes, its weights inside and nothing of the machine in it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hwsearch.errors import UnsupportedModelError
from hwsearch.graph.capture import evaluation_mode, first_line, try_forward
from hwsearch.graph.depth import check_depth, counted
from hwsearch.graph.surgery import named_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Protocol buffers cannot hold more than this in one message.
_MAX_BYTES = 2_000_000_000


def export_onnx(model: nn.Module, example_input: Tensor) -> bytes:
    """A model as one ONNX file: input ``input``, output ``output``, static shapes, weights inside.

    The bytes hold no paths and no source lines, and are the same for the same model, input shape and versions.

    Args:
        model: any capturable module with one tensor in and one tensor out; its training mode is left as found.
        example_input: tensor of the shape to export for.

    Raises:
        UnsupportedModelError: the forward fails, the exporter cannot translate it, it is too deep for it, or above
            2 GB.
    """
    import torch

    example_input = _plain(example_input)
    with evaluation_mode(model), _plain_layout(model):
        with counted() as calls:
            output = try_forward(model, example_input)
        check_depth(model, calls.number)
        if not isinstance(output, torch.Tensor):
            raise UnsupportedModelError(
                f"{type(model).__name__} returns {type(output).__name__}; return one tensor to export to ONNX "
                "(torch.cat joins heads)"
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


@contextlib.contextmanager
def _plain_layout(model: nn.Module) -> Iterator[None]:
    """Weights in the plain layout for as long as it lasts.

    After training in ``channels_last`` an adaptive pooling would be exported with the strides of its output, as a
    gather that copies nothing but costs a node.
    """
    tensors = list(named_tensors(model).values())
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = _plain(tensor.data)
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def _plain(tensor: Tensor) -> Tensor:
    """The tensor in the plain layout; ``contiguous()`` leaves the strides of one channel as they are."""
    import torch

    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor if tensor.stride() == plain.stride() else plain.copy_(tensor)


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
