"""How deep a network is, and from where on it is not asked of torch.export: its time grows with the square of that.

What is in its way are tables of PyTorch's own that are made anew for every parameter; a network of 2,000 convolutions
takes a minute, one of 10,000 would take a quarter of an hour and more. An ONNX file has no such limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hwsearch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

#: Operations called in one forward pass, and parameters and buffers, together.
MAX_DEPTH = 6_000
#: What only looks at a tensor (its shape), or switches gradients off.
_NO_WORK = ("__get__", "_set_grad_enabled")


@dataclass
class Calls:
    """How many operations were called."""

    number: int = 0


@contextmanager
def counted() -> Iterator[Calls]:
    """Count the operations that are called inside; see ``_NO_WORK`` for what is none.

    Example:
        >>> with counted() as calls:
        ...     _ = torch.relu(torch.zeros(2)) + 1
        >>> calls.number
        3
    """
    from torch.overrides import TorchFunctionMode

    found = Calls()

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            found.number += getattr(func, "__name__", "") not in _NO_WORK
            return func(*args, **(kwargs or {}))

    with Mode():
        yield found


def check_depth(model: nn.Module, calls: int) -> None:
    """Refuse a network that torch.export would not be done with.

    Args:
        calls: operations of one forward pass, see ``counted``.
    Raises:
        UnsupportedModelError: with both numbers.
    """
    tensors = sum(1 for _ in model.parameters()) + sum(1 for _ in model.buffers())
    if calls + tensors > MAX_DEPTH:
        raise UnsupportedModelError(
            f"{type(model).__name__} calls {calls} operations on {tensors} parameters and buffers, and torch.export "
            f"takes far too long above {MAX_DEPTH} of them together: give a shallower network, or for estimate and "
            "measure its ONNX file"
        )
