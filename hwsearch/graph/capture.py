"""``capture``: a PyTorch module and an example input become a ``Network``, the frozen description of what runs.

The graph comes from ``torch.export`` before decomposition, so that convolutions, linear layers and normalisations stay
whole and every parameter keeps its name. Nothing is trained and no gradient is taken: frozen models work as well.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.depth import check_depth, counted

if TYPE_CHECKING:
    from torch import Tensor, fx, nn
    from torch.export import ExportedProgram

#: Operations that hold multiply-accumulates, by ATen name: (index of the weight argument, index of the bias argument).
_MAC_OPS = {
    "conv1d": (1, 2), "conv2d": (1, 2), "conv3d": (1, 2),
    "conv_transpose1d": (1, 2), "conv_transpose2d": (1, 2), "conv_transpose3d": (1, 2),
    "linear": (1, 2), "addmm": (2, 0), "mm": (1, None), "matmul": (1, None), "bmm": (1, None), "baddbmm": (2, 0),
}  # fmt: skip

#: Other operations that multiply activations with each other.
_PRODUCTS = ("einsum", "scaled_dot_product_attention")


@dataclass(frozen=True)
class Layer:
    """One call of an operation that owns parameters or multiplies.

    ``weight`` is the parameter's full name (None where both operands are activations). ``kernel`` is the spatial extent
    (``()`` for linear layers). ``macs`` counts multiply-accumulates at the captured input, batch included;
    ``parameters`` counts the trainable elements that the call reads.
    """

    name: str
    op: str
    weight: str | None
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1
    macs: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class Network:
    """What a model computes: its layers in execution order, shapes, and the exported program they came from.

    ``macs`` counts every call (a shared layer counts once per call); ``parameters`` counts every trainable element
    once, used or not. ``shapes`` maps each distinct parameter and buffer to its shape; ``aliases`` maps the other
    names of a shared tensor to the first one. ``nodes`` names the graph node of each layer.
    """

    layers: tuple[Layer, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    parameters: int
    program: ExportedProgram = field(compare=False, repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(compare=False, repr=False, default_factory=dict)
    trainable: frozenset[str] = field(compare=False, repr=False, default=frozenset())
    aliases: Mapping[str, str] = field(compare=False, repr=False, default_factory=dict)
    nodes: tuple[str, ...] = field(compare=False, repr=False, default=())

    def tensor_name(self, node: object) -> str | None:
        """The canonical parameter or buffer behind a graph node, or None when the node is not one."""
        name = self._tensor_of.get(getattr(node, "name", ""))
        return None if name is None else self.aliases.get(name, name)

    @cached_property
    def places(self) -> dict[str, tuple[int, ...]]:
        """Places in ``layers`` by the weight that a layer has, and by its name with a dot behind."""
        found: dict[str, list[int]] = {}
        for place, layer in enumerate(self.layers):
            for key in (f"{layer.name}.", *([] if layer.weight is None else [layer.weight])):
                found.setdefault(key, []).append(place)
        return {key: tuple(places) for key, places in found.items()}

    @cached_property
    def _tensor_of(self) -> dict[str, str]:
        """Parameters and buffers by graph node: the signature makes such a table anew whenever it is asked."""
        signature = self.program.graph_signature
        return {**signature.inputs_to_buffers, **signature.inputs_to_parameters}


def capture(model: nn.Module, example_input: Tensor) -> Network:
    """Run ``model`` once in evaluation mode, export it, and describe it.

    Args:
        model: any module with one tensor in; its training mode is left as it was found.
        example_input: tensor of shape ``(N, C, H, W)`` or whatever the model takes; values do not matter.

    Raises:
        InputError: the arguments are not a module and a tensor.
        UnsupportedModelError: the forward fails on this shape, or ``torch.export`` cannot follow it, or it is too deep
            for that.

    Example:
        >>> network = capture(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 10, 10))
        >>> network.layers[0].macs
        13824
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise InputError(f"capture needs a torch.nn.Module, got {type(model).__name__}; build the model first")
    if not isinstance(example_input, torch.Tensor):
        raise InputError(
            f"capture needs one example tensor, got {type(example_input).__name__}; "
            "models with several inputs are not supported yet"
        )
    with evaluation_mode(model):
        with counted() as calls:
            try_forward(model, example_input)
        check_depth(model, calls.number)
        try:
            if any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()]):
                model = copy.deepcopy(model)  # export marks gradients, which such tensors refuse
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # notes about the user's own modules, which export all the same
                program = torch.export.export(model, (example_input,))
        except Exception as error:
            raise UnsupportedModelError(
                f"torch.export cannot capture {type(model).__name__}: {first_line(error)}; "
                "rewrite data-dependent Python in its forward, or wrap it in a module that avoids it"
            ) from error
    return _describe(model, program, tuple(example_input.shape))


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation, and back to whatever each of them was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def try_forward(model: nn.Module, example_input: Tensor) -> Any:
    """The model's output without gradients; a failure becomes one clear line.

    Raises:
        UnsupportedModelError: naming the input shape and the first line of the model's own error.
    """
    import torch

    try:
        with torch.no_grad():
            return model(example_input)
    except (Exception, SystemExit) as error:  # a forward that ends the program must not end ours with its status
        raise UnsupportedModelError(
            f"the forward of {type(model).__name__} fails on an input of shape {tuple(example_input.shape)}: "
            f"{type(error).__name__}: {first_line(error)}; give the input shape that the model expects"
        ) from error


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def op_name(node: fx.Node) -> str:
    """The operation of a graph node without namespace or overload: ``conv2d``, ``add``, ``getitem``."""
    if node.op != "call_function":
        return node.op
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).rpartition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def node_shape(node: object) -> tuple[int, ...] | None:
    """The shape of a node's tensor value, or None where it has none."""
    value: Any = getattr(node, "meta", {}).get("val")
    return tuple(int(size) for size in value.shape) if hasattr(value, "shape") else None


def source_line(node: fx.Node) -> str:
    """Where the user's code made this node: the module's path and ``file.py:12`` as far as they are known."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', (getattr(node, "meta", {}).get("stack_trace")) or "")
    # The innermost frame is often PyTorch's own layer; the caller's line is the one that helps.
    own = [(path, line) for path, line in frames if "/torch/" not in path.replace("\\", "/")]
    place = f"{own[-1][0].replace(chr(92), '/').rpartition('/')[2]}:{own[-1][1]}" if own else ""
    return " in ".join(part for part in (module_path(node), place) if part) or node.name


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module that made this node (empty for the root)."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _describe(model: nn.Module, program: ExportedProgram, input_shape: tuple[int, ...]) -> Network:
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    trainable: set[str] = set()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in named:
        canonical = first.setdefault(id(tensor), name)
        aliases[name] = canonical
        shapes.setdefault(canonical, tuple(tensor.shape))
        if canonical in parameters:
            trainable.add(canonical)
    bare = Network((), input_shape, (), 0, 0, program, shapes, frozenset(trainable), aliases)
    found = [(node.name, layer) for node in program.graph.nodes if (layer := _layer(bare, node)) is not None]
    layers = tuple(layer for _, layer in found)
    outputs = [node for node in program.graph.nodes if node.op == "output"][-1].args[0]
    tensors = [shape for node in outputs if (shape := node_shape(node)) is not None]
    if not tensors:
        raise UnsupportedModelError(f"{type(model).__name__} returns no tensor; return the predictions")
    return Network(
        layers=layers,
        input_shape=input_shape,
        output_shape=tensors[0],
        macs=sum(layer.macs for layer in layers),
        parameters=sum(math.prod(shapes[name]) for name in trainable),
        program=program,
        shapes=shapes,
        trainable=frozenset(trainable),
        aliases=aliases,
        nodes=tuple(name for name, _ in found),
    )


def _layer(network: Network, node: fx.Node) -> Layer | None:
    """The layer that a graph node is, or None for a node without parameters and without multiplications."""
    if node.op != "call_function":
        return None
    op, out_shape = op_name(node), node_shape(node)
    owned = [name for arg in node.all_input_nodes if (name := network.tensor_name(arg)) is not None]
    if out_shape is None or (op not in _MAC_OPS and op not in _PRODUCTS and not owned):
        return None
    parameters = sum(math.prod(network.shapes[name]) for name in dict.fromkeys(owned) if name in network.trainable)
    data = next((arg for arg in node.all_input_nodes if network.tensor_name(arg) is None), node.all_input_nodes[0])
    in_shape = node_shape(data) or ()
    if op == "scaled_dot_product_attention":
        query, key, value = (node_shape(arg) or () for arg in node.args[:3])
        macs = math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
        return Layer(module_path(node) or node.name, op, None, in_shape, out_shape, macs=macs)
    weight = next((name for name in owned if name in network.trainable), owned[0] if owned else None)
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups, macs = 1, 0
    if op == "einsum":
        weight = next((name for name in owned if name in network.trainable), None)
        macs = _einsum_macs(node)
    elif op in _MAC_OPS:
        weight_node = node.args[_MAC_OPS[op][0]]
        weight_shape = node_shape(weight_node) or ()
        weight = _weight_name(network, weight_node)
        if op.startswith("conv"):
            kernel = weight_shape[2:]
            groups, stride = _conv_settings(node, len(kernel))
            # A transposed convolution multiplies once per input position, a plain one once per output position.
            positions = (in_shape if "transpose" in op else out_shape)[2:]
            batch = in_shape[0] if len(in_shape) == len(kernel) + 2 else 1
            macs = batch * math.prod(positions) * math.prod(weight_shape)
        else:
            inner = weight_shape[-1] if op == "linear" else weight_shape[-2 if len(weight_shape) > 1 else -1]
            macs = math.prod(out_shape) * inner
    name = module_path(node) or (weight.rpartition(".")[0] if weight else "") or node.name
    return Layer(name, op, weight, in_shape, out_shape, kernel, stride, groups, macs, parameters)


def _einsum_macs(node: fx.Node) -> int:
    """One multiplication for every combination of the letters of a product of two tensors."""
    terms = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
    shapes = [node_shape(arg) or () for arg in node.args[1]]  # type: ignore[union-attr]
    if len(terms) != 2 or [len(term) for term in terms] != [len(shape) for shape in shapes]:
        return 0
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values())


def _weight_name(network: Network, node: Any) -> str | None:
    """The parameter that a weight operand is, or is computed from without a change of shape; None for an activation."""
    seen, queue = set(), deque([node])
    while queue:
        found = queue.popleft()
        name = network.tensor_name(found)
        if name is not None and network.shapes[name] == node_shape(node):
            return name
        if found not in seen:
            seen.add(found)
            queue += found.all_input_nodes
    return None


def _conv_settings(node: fx.Node, dimensions: int) -> tuple[int, tuple[int, ...]]:
    """``(groups, stride)`` of a convolution node, from its schema's argument names and defaults."""
    arguments = bound_arguments(node)
    stride = arguments.get("stride", 1)
    strides = tuple(stride) if isinstance(stride, list | tuple) else (stride,)
    return int(arguments.get("groups", 1)), tuple(int(s) for s in (strides * dimensions)[:dimensions])


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen node by their schema names, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(index): value for index, value in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound
