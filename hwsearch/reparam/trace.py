"""Who feeds whom: the calls of convolutions, linear layers and batch norms in one forward pass.

Two ways to look, one answer: ``torch.fx`` needs no input and takes milliseconds; ``torch.export`` needs an example
input, takes seconds, and also sees ranks and models whose Python control flow ``fx`` cannot follow.
Names are never trusted: ``conv1``/``bn1`` are a pair only if the graph says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.capture import try_forward
from hwsearch.graph.depth import check_depth, counted

#: Modules whose output is affine in their input, with the channel on axis 1 (last axis for a linear layer).
AFFINE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_IDENTITY_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_KEEPS_RANK = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Linear)
_ATEN_AFFINE = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an affine layer or a batch norm.

    ``module``: name of the module in ``model.named_modules()``, "" when no module owns it.
    ``kind``: "affine" or "norm". ``source``: for a norm, the module name of the affine call that is its *only* input
    and that nobody else reads; "" otherwise, and then ``reason`` says why. ``rank``: of the output, None if unknown.
    """

    module: str
    kind: str
    source: str = ""
    reason: str = ""
    rank: int | None = None


def is_plain_affine(module: nn.Module) -> bool:
    """True when the module computes what its torch base class computes (a subclass may carry extra attributes)."""
    for base in AFFINE:
        if isinstance(module, base):
            inner = "_conv_forward"  # what Conv1d/2d/3d.forward calls; quantisation-aware layers override it
            same_inner = getattr(type(module), inner, None) is getattr(base, inner, None)
            return type(module).forward is base.forward and same_inner
    return False


def is_plain_norm(module: nn.Module) -> bool:
    """True for torch's own batch norms (BatchNorm1d/2d/3d, SyncBatchNorm), not for subclasses that add to forward."""
    return isinstance(module, _BatchNorm) and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def trace(model: nn.Module, example_input: torch.Tensor | None = None) -> tuple[tuple[Call, ...], frozenset[str]]:
    """All calls in order of execution, and the modules whose parameters are also read outside their own call.

    Raises: InputError for a layer without weights yet (lazy); UnsupportedModelError when the model cannot be traced.
    """
    for name, module in model.named_modules():
        if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
            raise InputError(f"{name!r} ({type(module).__name__}) has no weights yet: run one forward pass first")
    if example_input is None:
        return _trace_fx(model)
    return _trace_export(model, example_input)


# --- torch.fx ---


class _Tracer(fx.Tracer):
    """Stops at batch norms and at affine layers that compute what torch's do; looks inside all else of the user."""

    proxy_buffer_attributes = True  # running statistics that other code reads must show in the graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_plain_affine(m) or isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _trace_fx(model: nn.Module) -> tuple[tuple[Call, ...], frozenset[str]]:
    if is_plain_affine(model) or is_plain_norm(model):
        return (), frozenset()  # a single layer has no partner, and fx would look inside it
    parameters = inspect.signature(model.forward).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not inspect.Parameter.empty}
    try:
        graph = _Tracer().trace(model, concrete_args=defaults or None)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be followed without an input ({reason}): pass example_input to fold"
        ) from error
    modules = dict(model.named_modules())

    def module_of(node: object) -> nn.Module | None:
        return modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None

    calls = []
    for node in graph.nodes:
        module = module_of(node)
        if module is not None and is_plain_affine(module):
            calls.append(Call(str(node.target), "affine"))
        elif module is not None and is_plain_norm(module):
            source = _through_identities(node, lambda n: isinstance(module_of(n), _IDENTITY_IN_EVAL))
            affine = module_of(source)
            is_affine = affine is not None and is_plain_affine(affine)
            rank = _rank(source, module_of) if isinstance(affine, nn.Linear) else None
            calls.append(_norm_call(str(node.target), source, str(source.target) if is_affine else "", rank))
    elsewhere = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr" and node.users}
    return tuple(calls), frozenset(elsewhere)


def _rank(node: Any, module_of: Any) -> int | None:
    """Rank of a tensor where the graph alone tells it: 2 behind a flatten, through layers that keep the rank."""
    while isinstance(node, fx.Node):
        module = module_of(node)
        if isinstance(module, nn.Flatten):
            return 2 if (module.start_dim, module.end_dim) == (1, -1) else None
        if module is not None and not isinstance(module, (*_KEEPS_RANK, *_IDENTITY_IN_EVAL, nn.BatchNorm1d)):
            return None
        if module is None:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            if name == "flatten":
                return 2 if (*node.args[1:], *node.kwargs.values()) in ((1,), (1, -1)) else None
            if name in ("view", "reshape"):
                sizes = node.args[1:]
                return len(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else len(sizes)
            if name not in ("relu", "relu_", "dropout", "gelu", "silu", "sigmoid", "tanh"):
                return None
        node = node.args[0] if node.args else None
    return None


# --- torch.export ---


def _trace_export(model: nn.Module, example_input: torch.Tensor) -> tuple[tuple[Call, ...], frozenset[str]]:
    with counted() as operations:
        try_forward(model, example_input)
    check_depth(model, operations.number)
    try:
        program = torch.export.export(model, (example_input,))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        shape = "x".join(map(str, example_input.shape))
        raise UnsupportedModelError(
            f"torch.export cannot capture {type(model).__name__} on an input of {shape}: {reason}"
        ) from error
    signature = program.graph_signature
    owner = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def operator(node: object) -> str:
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return ""
        return str(getattr(node.target, "__name__", "")).partition(".")[0]

    def module_of(node: fx.Node, argument: int) -> str:
        tensor = node.args[argument] if len(node.args) > argument else None
        name = str(owner.get(tensor.name, "")) if isinstance(tensor, fx.Node) else ""
        module = model.get_submodule(name.rpartition(".")[0]) if name else None
        plain = module is not None and (is_plain_affine(module) if argument == 1 else is_plain_norm(module))
        return name.rpartition(".")[0] if plain else ""

    calls: list[Call] = []
    called_by: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        rank = value.ndim if isinstance(value, torch.Tensor) else None
        if operator(node) in _ATEN_AFFINE:
            calls.append(Call(called_by.setdefault(node, module_of(node, 1)), "affine", rank=rank))
        elif operator(node) == "batch_norm":
            source = _through_identities(node, lambda n: operator(n) == "dropout")
            affine = module_of(source, 1) if operator(source) in _ATEN_AFFINE else ""
            calls.append(_norm_call(called_by.setdefault(node, module_of(node, 3)), source, affine, rank))
    elsewhere = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in owner:
            module = owner[node.name].rpartition(".")[0]
            if any(called_by.get(user) != module for user in node.users):
                elsewhere.add(module)
    return tuple(calls), frozenset(elsewhere)


# --- both ---


def _through_identities(node: fx.Node, is_identity: Any) -> Any:
    """The producer of a node's first input, looking through what does nothing in eval mode and has one reader."""
    source: Any = next(iter([*node.args, *node.kwargs.values()]), None)
    while isinstance(source, fx.Node) and is_identity(source) and len(source.users) == 1:
        source = source.args[0]
    return source


def _norm_call(name: str, source: Any, affine: str, rank: int | None) -> Call:
    if not affine:
        return Call(name, "norm", reason="its input does not come from a convolution or linear layer", rank=rank)
    if len(source.users) > 1:
        return Call(name, "norm", reason=f"the output of {affine!r} is also read by another layer", rank=rank)
    return Call(name, "norm", source=affine, rank=rank)


def batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every batch norm of the model by its first name (subclasses with more in their forward included)."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm))
