"""A network of the list as a file: sane random weights, batch norm folded, exported, run once, counted, hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from hwsearch.errors import CheckFailedError

#: Images over which the statistics of batch normalisation are taken.
_IMAGES = 4
#: A channel that hardly varies would be blown up by its normalisation.
_SMALLEST_VARIANCE = 0.05


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> tuple[int, int]:
    """(multiply-accumulates of one inference, parameters) of an unfolded model, by shapes alone.

    Convolutions and linear layers are counted, as the papers do. The model must stand on the "meta" device, so that
    nothing is computed.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        >>> count_macs(model, (1, 3, 10, 10))
        (21600, 216)
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += output.numel() * weight.numel() // weight.shape[0]

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(torch.empty(tuple(input_shape), device="meta"))
    for handle in handles:
        handle.remove()
    return total, sum(parameter.numel() for parameter in model.parameters())


def give_weights(model: nn.Module, input_shape: Sequence[int], seed: int) -> None:
    """Random weights under which every layer's values stay of the order of one; the model is left in eval mode.

    Convolutions are drawn for their fan-in, and the statistics of batch normalisation are those of a few random
    images, so that neither depth nor a sum of branches makes values overflow, vanish or turn subnormal.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                gain = 2.0 if isinstance(module, nn.Conv2d) else 1.0
                module.weight.normal_(0.0, (gain / module.weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    module.bias.uniform_(-0.1, 0.1)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.2)
                module.bias.uniform_(-0.2, 0.2)
                module.momentum = None  # the statistics become exactly those of the one batch below
        model.train()
        model(torch.randn(_IMAGES, *input_shape[1:]))
        for norm in norms:
            assert norm.running_var is not None
            norm.running_var.clamp_(min=_SMALLEST_VARIANCE)
            norm.momentum = 0.1
    model.eval()


def structure_sha256(proto: onnx.ModelProto) -> str:
    """A hash of what the graph computes on which shapes; names and values of weights do not enter.

    Nodes come with operation, attributes and the places their inputs come from; weights with type and shape; integer
    constants (axes, shapes) and single numbers (bounds of a clip) with their values too.
    """
    graph = proto.graph
    place: dict[str, str] = {"": "none"}
    lines = []
    for value in graph.input:
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        lines.append(f"input {value.type.tensor_type.elem_type} {shape}")
        place[value.name] = lines[-1]
    for tensor in graph.initializer:
        place[tensor.name] = f"constant {_constant(tensor)}"
    for at, node in enumerate(graph.node):
        attributes = sorted(f"{attribute.name}={_attribute(attribute)}" for attribute in node.attribute)
        inputs = [place[name] for name in node.input]
        lines.append(f"{at} {node.domain}:{node.op_type} {attributes} {inputs}")
        for number, name in enumerate(node.output):
            place[name] = f"node {at}.{number}"
    lines += [f"output {place[value.name]}" for value in graph.output]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _constant(tensor: onnx.TensorProto) -> str:
    shape = list(tensor.dims)
    values = onnx.numpy_helper.to_array(tensor)
    told = values.tolist() if values.dtype.kind in "iub" or values.ndim == 0 else ""
    return f"{tensor.data_type} {shape} {told}"


def _attribute(attribute: onnx.AttributeProto) -> str:
    value: Any = onnx.helper.get_attribute_value(attribute)
    return _constant(value) if isinstance(value, onnx.TensorProto) else repr(value)


def check_runs(name: str, data: bytes, input_shape: Sequence[int]) -> None:
    """Run the file once on random images.

    Raises:
        CheckFailedError: a weight or an output is not finite or subnormal, or the output does not depend on the input.
    """
    import onnxruntime

    smallest = float(np.finfo(np.float32).tiny)
    for tensor in onnx.load_from_string(data).graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and not _is_sane(values, smallest):
            raise CheckFailedError(f"{name}: the weight {tensor.name} is not finite or subnormal; choose another seed")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    outputs = []
    for _ in range(2):
        image = generator.standard_normal(tuple(input_shape)).astype(np.float32)
        outputs.append(np.asarray(session.run(None, {"input": image})[0]))
    if not all(_is_sane(output, smallest) for output in outputs):
        raise CheckFailedError(f"{name}: an output is not finite or subnormal; choose another seed")
    if np.abs(outputs[0] - outputs[1]).max() <= 1e-4 * np.abs(outputs[0]).max():
        raise CheckFailedError(f"{name}: two random images give the same output; choose another seed")


def _is_sane(values: np.ndarray, smallest: float) -> bool:
    return bool(np.isfinite(values).all() and not ((values != 0) & (np.abs(values) < smallest)).any())
