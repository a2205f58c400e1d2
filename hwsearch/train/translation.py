"""``Translation``: an image for an image, judged by the peak signal-to-noise ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hwsearch.train.data import Batch, Examples
from hwsearch.train.task import Evaluation


@dataclass(frozen=True)
class Translation:
    """An image each: mean absolute error, and the peak signal-to-noise ratio over all pixels in dB.

    Batches: (inputs, images (B, C, H, W): uint8, or floating point from 0 to 1); outputs: the same shape, 0 to 1.

    Reference: the absolute error is pix2pix's (Isola et al., CVPR 2017, equation 3), without its adversary.
    """

    train: Examples
    valid: Examples
    metric_name: str = "PSNR"
    higher_is_better: bool = True

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean absolute error."""
        return functional.l1_loss(output, _target(batch, output))

    def tally(self, output: Tensor, batch: Batch) -> Tensor:
        """(sums of absolute and of squared errors, pixels, examples)."""
        error = output.double() - _target(batch, output.double())
        sizes = torch.tensor([float(error.numel()), float(len(output))], dtype=torch.float64)
        return torch.cat([torch.stack([error.abs().sum(), error.square().sum()]).cpu(), sizes])

    def summary(self, tally: Tensor) -> Evaluation:
        """Mean absolute error in parts of the full brightness, and the peak signal-to-noise ratio in dB."""
        absolute, squared, pixels, examples = tally.tolist()
        # a perfect answer has no finite ratio: 1e-12 stands for the smallest error that anybody asks for
        psnr = -10 * math.log10(max(squared / pixels, 1e-12))
        return Evaluation(absolute / pixels, psnr, int(examples))

    def imitate(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Mean absolute difference."""
        return functional.l1_loss(output, teacher)


def _target(batch: Batch, like: Tensor) -> Tensor:
    target = batch[1].to(like.dtype)
    return target / 255 if batch[1].dtype == torch.uint8 else target
