"""Several processes that train one network: ``torchrun`` starts them, gloo connects them.

Every process runs the same program with the same seeds. They share the work in two places: a training step splits its
batch (gradients and batch statistics are those of the whole batch), and candidates are scored by different processes.
What is read from files comes from the first process, and only that one writes. With one process all of this does
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from hwsearch.errors import InputError

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[int]:
    """Connect to the other processes that ``torchrun`` started, gives this one's number; without torchrun it gives 0.

    Example:
        >>> with joined() as rank:                        # torchrun --nproc-per-node 2 search.py
        ...     CafeNet(space, budget).search(task, None)                             # doctest: +SKIP
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield 0
        return
    dist.init_process_group("gloo")  # training runs on CPUs
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0; the first one reads and writes files."""
    return dist.get_rank() if count() > 1 else 0


def share(items: Sequence[Any] | Any) -> Any:
    """This process's part of a batch's indices: consecutive, equally many for each.

    Raises:
        InputError: they cannot be split equally, which would weigh examples unequally.
    """
    processes = count()
    if processes == 1:
        return items
    if len(items) % processes:
        raise InputError(f"a batch of {len(items)} cannot be split over {processes} processes: change batch_size")
    size = len(items) // processes
    return items[rank() * size : (rank() + 1) * size]


def from_first(value: T) -> T:
    """The first process's value, in every process."""
    if count() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def tensors_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors in place by the first process's."""
    if count() == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            plain = tensor.detach().contiguous()
            dist.broadcast(plain, src=0)
            tensor.copy_(plain)


def mean(value: float) -> float:
    """The mean of a number over the processes."""
    if count() == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(box)
    return float(box) / count()


def gathered(mine: Sequence[T]) -> list[T]:
    """All processes' lists, one after another."""
    if count() == 1:
        return list(mine)
    boxes: list[Any] = [None] * count()
    dist.all_gather_object(boxes, list(mine))
    return [item for box in boxes for item in box]


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes; one that some process lacks counts as zero there."""
    if count() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        plain = parameter.grad.contiguous()
        dist.all_reduce(plain)
        parameter.grad.copy_(plain / count())


class _Sum(torch.autograd.Function):
    """Sum over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:  # type: ignore[override]
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation by the statistics of the whole batch, over all processes.

    torch's own SyncBatchNorm runs on GPUs only.

    Returns:
        The output, and the batch's mean and biased variance (C,).
    """
    axes = [0, *range(2, x.dim())]
    shape = (1, -1) + (1,) * (x.dim() - 2)
    elements = count() * x.numel() / x.shape[1]
    centre = _Sum.apply(x.sum(axes)) / elements  # type: ignore[no-untyped-call]
    away = x - centre.view(shape)
    variance = _Sum.apply(away.square().sum(axes)) / elements  # type: ignore[no-untyped-call]
    y = away * torch.rsqrt(variance + eps).view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y, centre.detach(), variance.detach()


@contextmanager
def whole_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, plain batch-norm layers in training mode use, and keep, the statistics of the whole batch."""
    layers = [m for m in model.modules() if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)]
    if count() == 1 or not layers:
        yield
        return
    for layer in layers:
        layer.forward = _forward_of(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _forward_of(layer: nn.Module) -> Any:
    assert isinstance(layer, _BatchNorm)

    def forward(x: Tensor) -> Tensor:
        if not layer.training:
            return functional.batch_norm(
                x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps
            )
        y, centre, variance = batch_norm(x, layer.weight, layer.bias, layer.eps)
        if layer.running_mean is not None and layer.running_var is not None:
            assert layer.num_batches_tracked is not None
            with torch.no_grad():
                layer.num_batches_tracked += 1
                momentum = layer.momentum if layer.momentum is not None else 1.0 / float(layer.num_batches_tracked)
                elements = count() * x.numel() / x.shape[1]
                layer.running_mean.lerp_(centre, momentum)
                layer.running_var.lerp_(variance * (elements / max(elements - 1, 1)), momentum)
        return y

    return forward
