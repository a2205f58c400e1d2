"""``Segmentation``: a class a pixel, judged by the mean intersection over union."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hwsearch.train.data import Batch, Examples
from hwsearch.train.task import Evaluation, classes_fit


@dataclass(frozen=True)
class Segmentation:
    """A class each pixel: cross-entropy, and the mean over classes of intersection over union.

    Batches: (inputs, classes (B, H, W), whole numbers); outputs: (B, classes, H, W).

    Reference: Everingham et al., "The PASCAL visual object classes challenge" (2015), section 4.5: the intersections
    and unions of a class are summed over all pixels of all images; classes that occur nowhere are left out.
    """

    train: Examples
    valid: Examples
    metric_name: str = "mIoU"
    higher_is_better: bool = True

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy over pixels.

        Raises:
            InputError: a class that the network has no output for.
        """
        with classes_fit(output, batch[1]):
            return functional.cross_entropy(output, batch[1].long())

    def tally(self, output: Tensor, batch: Batch) -> Tensor:
        """(pixels by true class and told class, row by row; sum of cross-entropies, pixels, examples)."""
        classes = output.shape[1]
        with classes_fit(output, batch[1]):
            loss = functional.cross_entropy(output.double(), batch[1].long(), reduction="sum").cpu()
        pairs = batch[1].long().flatten() * classes + output.argmax(dim=1).flatten()
        counts = torch.bincount(pairs, minlength=classes**2).double().cpu()
        sizes = torch.tensor([float(batch[1].numel()), float(len(output))], dtype=torch.float64)
        return torch.cat([counts, loss[None], sizes])

    def summary(self, tally: Tensor) -> Evaluation:
        """Cross-entropy in nats a pixel, and the mean intersection over union in 0 to 1."""
        loss, pixels, examples = tally[-3:].tolist()
        counts = tally[:-3].view(round((len(tally) - 3) ** 0.5), -1)
        union = counts.sum(dim=0) + counts.sum(dim=1) - counts.diagonal()
        there = union > 0
        shares = counts.diagonal()[there] / union[there]
        return Evaluation(loss / pixels, float(shares.mean()), int(examples))

    def imitate(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Cross-entropy against the teacher's probabilities, a mean over pixels."""
        return functional.cross_entropy(output, teacher.softmax(dim=1))
