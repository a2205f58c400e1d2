"""``Lowering``: which kernels a candidate's network becomes, asked of the runtime itself and remembered.

Fusion and layout depend on the widths (a depth-wise layer of 30 channels takes another kernel than one of 32), so
nothing is guessed: each new choice is sliced from the template, optimised by the device's own runtime and read back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
        self._shared: dict[Kernel, Kernel] = {}

    @classmethod
    def of(cls, space: WidthSpace, device: str) -> Lowering:
        """A lowering of the space's own model, in a session of its own that ends with this process.

        Raises:
            InputError: the space does not know its model, or there is no such device.
        """
        import torch

        from hwsearch.graph.onnx_build import OnnxTemplate
        from hwsearch.reparam.fold import fold

        if space.model is None:
            raise InputError("the width space does not know its model: make it with WidthSpace.from_model")
        example = torch.zeros(space.network.input_shape)
        folded = fold(copy.deepcopy(space.model).eval(), example, require=False)
        return cls(OnnxTemplate(space, folded, example), open_session(device))

    def kernels(self, choices: Sequence[WidthChoice]) -> list[tuple[Kernel, ...]]:
        """The kernels of each choice, in order of execution; new choices are lowered in batches.

        Raises:
            InputError: a choice does not belong to the space.
            DeviceJobError: the runtime rejects a candidate; its widths are named.
        """
        new = [choice for choice in dict.fromkeys(choices) if choice.widths not in self._known]
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            networks = [self.template.slice(choice) for choice in part]
            names = [f"widths {choice.widths}" for choice in part]
            for choice, kernels in zip(part, self.session.lower(networks, names), strict=True):
                # Most kernels of a space recur; one object each keeps thousands of candidates small.
                self._known[choice.widths] = tuple(self._shared.setdefault(k, k) for k in kernels)
        return [self._known[choice.widths] for choice in choices]

    @property
    def lowered(self) -> int:
        """Distinct choices lowered so far."""
        return len(self._known)
