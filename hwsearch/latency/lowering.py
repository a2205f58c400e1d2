"""``Lowering``: the kernels that a runtime really runs for a choice of widths, asked from the runtime itself."""

from __future__ import annotations

from collections.abc import Sequence

from hwsearch.device.session import DeviceSession
from hwsearch.graph.kernel import Kernel
from hwsearch.graph.onnx_build import OnnxTemplate
from hwsearch.graph.widths import WidthChoice


class Lowering:
    """Choices of one width space to kernels, each choice asked once.

    Args:
        template: slices a choice's ONNX out of one exported file.
        session: an open session on the device; its runtime optimises, the host reads the kernels.
    """

    def __init__(self, template: OnnxTemplate, session: DeviceSession) -> None:
        self.template, self.session = template, session
        self._known: dict[tuple[int, ...], tuple[Kernel, ...]] = {}
        # Equal kernels are one object: a search lowers thousands of networks out of some hundred kernels.
        self._kernels: dict[Kernel, Kernel] = {}

    def kernels(self, choices: Sequence[WidthChoice]) -> list[tuple[Kernel, ...]]:
        """The kernels of each choice, in the order in which the runtime runs them.

        Raises:
            InputError: a choice does not belong to the space.
            DeviceJobError: the runtime rejects a network.
        """
        missing = list(dict.fromkeys(c for c in choices if c.widths not in self._known))
        if missing:
            networks = [self.template.slice(choice) for choice in missing]
            names = ["x".join(map(str, choice.widths)) for choice in missing]
            for choice, kernels in zip(missing, self.session.lower(networks, names), strict=True):
                self._known[choice.widths] = tuple(self._kernels.setdefault(k, k) for k in kernels)
        return [self._known[choice.widths] for choice in choices]
