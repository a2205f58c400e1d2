"""``GatedNet``: the width groups of any network under MGAS's filter gates instead of PaS's binary masks.

A unit is on while its score, a sigmoid, is above its group's threshold; both are learnt, through the long-tailed
surrogate. Where a group's masks of PaS fall one by one, here the threshold rises under the price of milliseconds and
takes the units with it whose scores the task has not kept up.

Reference: MGAS (arXiv 2310.15074), filters; the step is that of ``hwsearch.search.gates``. A threshold's gradient is
the mean over a group's units, not their sum: wide groups would be cut first whatever they cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwsearch.search.gates import step
from hwsearch.search.pas_masks import START, MaskedNet

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthSpace

#: Where thresholds and switched-off scores stand when masks are set by hand.
_BETWEEN, _OFF = 0.25, -10.0


class GatedNet(MaskedNet):
    """``MaskedNet`` with a learnt threshold for every group. ``thresholds`` are parameters (1,), at 0 where it begins.

    Example:
        >>> net = GatedNet(model, space)                                              # doctest: +SKIP
        >>> net.widths()                                                              # doctest: +SKIP
        (32, 64)
    """

    #: The surrogate's slope where search begins: of the threshold, and of the score through its sigmoid twice.
    pace: ClassVar[float] = 0.4 + 0.4 / 16

    def __init__(self, model: nn.Module, space: WidthSpace, *, jitter: float = 0.0, seed: int = 0) -> None:
        super().__init__(model, space, jitter=jitter, seed=seed)
        self.thresholds = nn.ParameterList(
            nn.Parameter(torch.zeros(1, device=latent.device), requires_grad=latent.requires_grad)
            for latent in self.latents
        )

    def margins(self) -> list[Tensor]:
        """Score minus threshold (units,) of every group."""
        found = []
        for latent, threshold in zip(self.latents, self.thresholds, strict=True):
            held = threshold.detach()
            found.append(torch.sigmoid(latent - START) - held - (threshold - held) / len(latent))
        return found

    def masks(self) -> list[Tensor]:
        """One mask (units,) per group; the smallest width's units stay on, those of the largest scores."""
        found = []
        for margin, least in zip(self.margins(), self.least, strict=True):
            mask = step(margin)
            if int(mask.detach().sum()) < least:
                order = torch.sort(margin.detach(), descending=True, stable=True).indices[:least]
                kept = torch.zeros_like(mask)
                kept[order] = 1.0
                mask = mask + kept * (1 - mask.detach())
            found.append(mask)
        return found

    def latent_names(self) -> list[str]:
        """Names of what is learnt beside the weights: latents and thresholds."""
        learnt = [n for n, p in self.named_parameters() if n.startswith("thresholds.") and p.requires_grad]
        return [*super().latent_names(), *learnt]

    def set_masks(self, kept: Mapping[str, NDArray[np.int64]], *, freeze: bool = False) -> None:
        """See ``MaskedNet.set_masks``."""
        with torch.no_grad():
            for group, latent, threshold in zip(self.space.groups, self.latents, self.thresholds, strict=True):
                if group.name in kept:
                    latent.fill_(_OFF)
                    latent[torch.from_numpy(np.asarray(kept[group.name], dtype=np.int64))] = START
                    threshold.fill_(_BETWEEN)
                if freeze:
                    latent.requires_grad_(False)
                    threshold.requires_grad_(False)
