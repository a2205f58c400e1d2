"""A guard for one convolution that cannot be trained on CPUs as it stands: 1x1 with a stride, on few channels.

oneDNN up to at least 3.12 (torch 2.13) writes past its workspace in that layer's weight gradient when the input is
channels-last with fewer channels than one SIMD block (8 on AVX2, 16 on AVX-512): wrong gradients, or a crash. Narrow
residual networks have such layers on their shortcuts. Reference: https://github.com/uxlfoundation/oneDNN/issues/6035
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def strided_inputs(model: nn.Module) -> Iterator[None]:
    """Inside, every strided 1x1 convolution reads every n-th pixel itself and then has stride 1: the same function."""
    found = [
        (module, module.stride) for module in model.modules() if isinstance(module, nn.Conv2d) and _strided(module)
    ]
    hooks = []
    try:
        for module, stride in found:
            hooks.append(module.register_forward_pre_hook(_every(*stride)))
            module.stride = (1, 1)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, stride in found:
            module.stride = stride


def _strided(module: nn.Conv2d) -> bool:
    return module.kernel_size == (1, 1) and module.stride != (1, 1) and module.padding == (0, 0)


def _every(rows: int, columns: int):  # type: ignore[no-untyped-def]  # torch's hook types are not public
    def thin(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][:, :, ::rows, ::columns], *inputs[1:])

    return thin
