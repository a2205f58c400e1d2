"""``Lowering``: which kernels a candidate's network becomes, asked of the runtime itself and remembered.

Fusion and layout depend on the widths (a depth-wise layer of 30 channels takes another kernel than one of 32), so
nothing is guessed: each new choice is sliced from the template, optimised by the device's own runtime and read back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hwsearch.device.session import DeviceSession, open_session
from hwsearch.errors import InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.latency.sample import NetworkTemplate

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace

#: Candidates a job: enough to hide the round trip, few enough that their files stay small.
BATCH = 32


class Lowering:
    """Kernels of the choices of one width space on one device.

    Args:
        template: slices a choice's ONNX, such as an ``OnnxTemplate``.
        session: an open session on the device; it stays the caller's to close.

    Example:
        >>> lowering = Lowering(template, session)                      # doctest: +SKIP
        >>> [k.family for k in lowering.kernels([space.full()])[0]]     # doctest: +SKIP
        ['reorder', 'conv', 'pool', ...]
    """

    def __init__(self, template: NetworkTemplate, session: DeviceSession) -> None:
        self.template = template
        self.session = session
        self._known: dict[tuple[int, ...], tuple[Kernel, ...]] = {}
        self._shared: dict[tuple[tuple[str, ...], Kernel], Kernel] = {}

    @classmethod
    def of(cls, space: WidthSpace, device: str) -> Lowering:
        """A lowering of the space's own model, in a session of its own that ends with this process.

        On an ``int8`` device candidates are quantised first: the search is priced in 8-bit milliseconds.

        Raises:
            InputError: the space does not know its model, or there is no such device.
        """
        import torch

        from hwsearch.graph.onnx_build import OnnxTemplate
        from hwsearch.latency.quantising import template_for
        from hwsearch.reparam.fold import fold

        if space.model is None:
            raise InputError("the width space does not know its model: make it with WidthSpace.from_model")
        example = torch.zeros(space.network.input_shape)
        folded = fold(copy.deepcopy(space.model).eval(), example, require=False)
        session = open_session(device)
        template = OnnxTemplate(space, folded, example)
        return cls(template_for(template, session.device.precision), session)

    def kernels(self, choices: Sequence[WidthChoice]) -> list[tuple[Kernel, ...]]:
        """The kernels of each choice, in order of execution; new choices are lowered in batches.

        Raises:
            InputError: a choice does not belong to the space.
            DeviceJobError: the runtime rejects a candidate; its widths are named.
        """
        new = [choice for choice in dict.fromkeys(choices) if choice.widths not in self._known]
        for choice, kernels in zip(new, self._ask(new, self.template.slice), strict=True):
            # Most kernels of a space recur; one object each keeps thousands of candidates small.
            self._known[choice.widths] = tuple(self._shared.setdefault((k.source, k), k) for k in kernels)
        return [self._known[choice.widths] for choice in choices]

    def lower(self, choices: Sequence[WidthChoice]) -> list[tuple[Kernel, ...]]:
        """As ``kernels``, but nothing is remembered, and every kernel says which layer it came from.

        A runtime stores equal tensors once, under one name: the zero biases of an untrained network would make one
        layer look like another. So the networks that are lowered here have biases that are all different.
        """
        return self._ask(choices, lambda choice: with_distinct_biases(self.template.slice(choice)))

    def _ask(self, choices: Sequence[WidthChoice], network: Callable[[WidthChoice], bytes]) -> list[tuple[Kernel, ...]]:
        found: list[tuple[Kernel, ...]] = []
        for start in range(0, len(choices), BATCH):
            part = choices[start : start + BATCH]
            names = [f"widths {choice.widths}" for choice in part]
            found += self.session.lower([network(choice) for choice in part], names)
        return found

    @property
    def lowered(self) -> int:
        """Distinct choices lowered so far."""
        return len(self._known)


def with_distinct_biases(network: bytes) -> bytes:
    """A network of the same shapes whose biases (one-dimensional weights) all have values of their own."""
    import numpy as np
    import onnx

    proto = onnx.ModelProto()
    proto.ParseFromString(network)
    # Of an 8-bit network the biases are whole numbers that are dequantised; what is float are scales, which decide.
    pairs = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales = {name for node in pairs for name in node.input[1:]}
    whole = {node.input[0] for node in pairs}
    # these are one-dimensional weights too
    scales |= {name for node in proto.graph.node if node.op_type in ("Resize", "Upsample") for name in node.input[1:]}
    start = 1
    for tensor in proto.graph.initializer:
        bias = tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in scales
        eight = tensor.data_type == onnx.TensorProto.INT32 and tensor.name in whole
        if (bias or eight) and len(tensor.dims) == 1:
            values = np.arange(start, start + tensor.dims[0], dtype=np.int32 if eight else np.float32)
            start += len(values)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return bytes(proto.SerializeToString())
