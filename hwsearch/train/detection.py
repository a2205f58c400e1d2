"""``Detection``: boxes of objects from a one-stage head, judged by the average precision at half overlap.

The head is a map of cells, each with one box: how likely an object's middle lies in the cell, where in it, how large
the object is, and its class. The size of a cell is the network's choice, which the task reads off the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hwsearch.errors import InputError
from hwsearch.train.data import Batch, Examples
from hwsearch.train.task import Evaluation

#: Numbers of a cell before its classes: object, x, y, width, height.
BOX = 5
#: Size that a cell's box has where its head says 0, in pixels.
ANCHOR = 24.0
#: Overlap (intersection over union) from which a box is right, and from which two boxes of a class are one.
RIGHT, SAME = 0.5, 0.5
#: Boxes of an image that are looked at, the likeliest, and steps of their scores that precision is taken at.
MOST, BINS = 24, 100

_LARGEST = 3.0  # of the logarithm of size over anchor: exp must not overflow


class Boxes(NamedTuple):
    """Boxes of a batch, likeliest first: ``corners`` (B, K, 4) as left, top, right, bottom in pixels, ``classes`` and
    ``scores`` (B, K), these from 0 to 1; a box that another one of its class stands for has score 0."""

    corners: Tensor
    classes: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Detection:
    """Objects with a class each: a loss for a one-stage head, and the mean average precision at IoU 0.5.

    Batches: (images (B, C, S, S), boxes (B, M, 5) as class, left, top, right, bottom in pixels, class -1 for none);
    outputs: (B, 5 + classes, cells, cells).

    Reference: Redmon and Farhadi, "YOLO9000" (CVPR 2017), section 2: middles by a sigmoid inside their cell, sizes by
    an exponential over an anchor. Average precision: Everingham et al. (2015), the area under the precision that no
    higher recall exceeds, taken at ``BINS`` steps of the score so that batches add up.
    """

    train: Examples
    valid: Examples
    metric_name: str = "AP at IoU 0.5"
    higher_is_better: bool = True

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropies of object and class and the absolute error of the box, a sum over cells by images."""
        there, places, sizes, classes = _wanted(batch, output)
        objects = functional.binary_cross_entropy_with_logits(output[:, 0], there.to(output.dtype), reduction="sum")
        head = output.permute(0, 2, 3, 1)[there]
        off = (head[:, 1:3].sigmoid() - places).abs().sum() + (head[:, 3:BOX] - sizes).abs().sum()
        return (objects + off + functional.cross_entropy(head[:, BOX:], classes, reduction="sum")) / len(output)

    def tally(self, output: Tensor, batch: Batch) -> Tensor:
        """Per class boxes that are right and wrong by score, and objects; then the loss, and examples."""
        count = output.shape[1] - BOX
        found = decode(output.detach().double(), batch[0].shape[-1])
        right = _matched(found, batch[1].double())
        step = (found.scores * BINS).long().clamp(max=BINS - 1)
        at = (found.classes * BINS + step)[found.scores > 0]
        hits = right[found.scores > 0]
        sums = [torch.bincount(part, minlength=count * BINS).double() for part in (at[hits], at[~hits])]
        true = batch[1][..., 0].flatten().long()
        objects = torch.bincount(true[true >= 0], minlength=count).double()
        loss = self.loss(output.double(), batch).detach() * len(output)
        last = torch.tensor([float(loss), float(len(output))], dtype=torch.float64)
        return torch.cat([*(part.cpu() for part in (*sums, objects)), last])

    def summary(self, tally: Tensor) -> Evaluation:
        """The loss of an image, and the average precision, a mean over the classes that occur, in 0 to 1."""
        loss, examples = tally[-2:].tolist()
        count = (len(tally) - 2) // (2 * BINS + 1)
        right, wrong = tally[: 2 * count * BINS].view(2, count, BINS).flip(-1).cumsum(dim=-1)
        objects = tally[2 * count * BINS : -2]
        there = objects > 0
        recall = right[there] / objects[there, None]
        precision = right[there] / (right[there] + wrong[there]).clamp(min=1)
        best = precision.flip(-1).cummax(dim=-1).values.flip(-1)
        gained = torch.diff(recall, dim=-1, prepend=torch.zeros(len(recall), 1, dtype=recall.dtype))
        average = float((best * gained).sum(dim=-1).mean()) if len(recall) else 0.0
        return Evaluation(loss / examples, average, int(examples))

    def imitate(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Cross-entropy against the teacher's objects, and its boxes and classes where it is sure of an object."""
        sure = teacher[:, :1].sigmoid()
        objects = functional.binary_cross_entropy_with_logits(output[:, :1], sure)
        off = (output[:, 1:BOX] - teacher[:, 1:BOX]).abs().mean(dim=1, keepdim=True)
        told = -(teacher[:, BOX:].softmax(dim=1) * output[:, BOX:].log_softmax(dim=1)).sum(dim=1, keepdim=True)
        return objects + (sure * (off + told)).mean()


def decode(output: Tensor, side: int) -> Boxes:
    """The boxes that a head (B, 5 + classes, cells, cells) says, for images of ``side`` pixels; K is at most ``MOST``.

    Raises:
        InputError: an output that is no map of square cells.
    """
    cell = _cell(output, side)
    head = output.flatten(2).transpose(1, 2)  # (B, cells^2, numbers)
    likely, classes = head[..., BOX:].softmax(dim=-1).max(dim=-1)
    scores = head[..., 0].sigmoid() * likely
    grid = torch.arange(output.shape[-1], dtype=output.dtype, device=output.device)
    corner = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1).view(-1, 2)
    middle = (corner + head[..., 1:3].sigmoid()) * cell
    size = head[..., 3:BOX].clamp(max=_LARGEST).exp() * ANCHOR
    corners = torch.cat([middle - size / 2, middle + size / 2], dim=-1)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    order, scores = order[:, :MOST], scores[:, :MOST].clone()
    corners = corners.gather(1, order[..., None].expand(-1, -1, 4))
    classes = classes.gather(1, order)
    same = (overlaps(corners, corners) > SAME) & (classes[:, :, None] == classes[:, None, :])
    for rank in range(scores.shape[1] - 1):
        alive = (scores[:, rank] > 0)[:, None]
        scores[:, rank + 1 :][same[:, rank, rank + 1 :] & alive] = 0.0
    return Boxes(corners, classes, scores)


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union (B, K, M) of boxes (B, K, 4) and (B, M, 4).

    Example:
        >>> overlaps(torch.tensor([[[0.0, 0.0, 2.0, 2.0]]]), torch.tensor([[[1.0, 0.0, 3.0, 2.0]]])).item()
        0.3333333432674408
    """
    low = torch.maximum(first[:, :, None, :2], second[:, None, :, :2])
    high = torch.minimum(first[:, :, None, 2:], second[:, None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1) for boxes in (first, second)]
    return shared / (areas[0][:, :, None] + areas[1][:, None, :] - shared).clamp(min=1e-9)


def _matched(found: Boxes, true: Tensor) -> Tensor:
    """Which boxes (B, K) are right: the likeliest first, each object counted once."""
    shares = overlaps(found.corners, true[..., 1:])
    fits = (found.classes[:, :, None] == true[:, None, :, 0]) & (shares >= RIGHT)
    free = torch.ones(true.shape[:2], dtype=torch.bool, device=true.device)
    right = torch.zeros_like(found.scores, dtype=torch.bool)
    for rank in range(found.scores.shape[1]):
        open_ = shares[:, rank].masked_fill(~(fits[:, rank] & free), -1.0)
        best, which = open_.max(dim=1)
        hit = (best > 0) & (found.scores[:, rank] > 0)
        right[:, rank] = hit
        free[hit, which[hit]] = False
    return right


def _wanted(batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(cells with an object (B, H, W), and of these in order: place in the cell (P, 2), size (P, 2), class (P,))."""
    cell = _cell(output, batch[0].shape[-1])
    true, cells = batch[1].to(output.dtype), output.shape[-1]
    corners = true[..., 1:]
    middle = (corners[..., :2] + corners[..., 2:]) / 2 / cell
    at = middle.floor().clamp(0, cells - 1)
    size = ((corners[..., 2:] - corners[..., :2]).clamp(min=1) / ANCHOR).log()
    wanted = torch.full((len(true), cells, cells, 1 + 2 + 2), -1.0, dtype=output.dtype, device=output.device)
    for place in range(true.shape[1]):  # of two objects in one cell the later one is learnt
        there = true[:, place, 0] >= 0
        image = torch.arange(len(true), device=true.device)[there]
        column, row = at[there, place].long().unbind(dim=-1)
        inside = (middle - at)[there, place]
        wanted[image, row, column] = torch.cat([true[there, place, :1], inside, size[there, place]], dim=-1)
    there = wanted[..., 0] >= 0
    picked = wanted[there]
    return there, picked[:, 1:3], picked[:, 3:], picked[:, 0].long()


def _cell(output: Tensor, side: int) -> float:
    """Pixels of a cell's side."""
    if output.dim() != 4 or output.shape[1] <= BOX or output.shape[2] != output.shape[3] or side % output.shape[3]:
        raise InputError(
            f"a detection head gives (images, {BOX} + classes, cells, cells) for images of {side} pixels, not "
            f"{tuple(output.shape)}: use a network such as hwsearch.models.detector:detector_small"
        )
    return side / output.shape[3]
