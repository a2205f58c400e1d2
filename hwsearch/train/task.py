"""A task is what to learn: data, a loss and a metric, behind one small protocol.

Nothing else in hwsearch knows what is learnt. A metric that is not a mean over examples (mean IoU, R2, F1) still fits:
``tally`` returns sums that add up over batches (and over processes), ``summary`` turns the total into numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from hwsearch.errors import InputError
from hwsearch.train import folders
from hwsearch.train.data import Batch, Examples, limit, split, synthetic_images
from hwsearch.train.fashion_mnist import load_fashion_mnist

#: Names of the tasks that ``hwsearch.train.garments`` makes.
GARMENTS = ("segmentation", "detection", "translation")


@dataclass(frozen=True)
class Evaluation:
    """What a network is worth on some examples: ``loss`` is always better when lower, ``metric`` as the task says."""

    loss: float
    metric: float
    examples: int


@runtime_checkable
class Task(Protocol):
    """Data, loss and metric of one thing to learn.

    ``train`` is what weights are fitted on, ``valid`` is what choices are made on; a test set belongs to neither.
    """

    @property
    def train(self) -> Examples: ...

    @property
    def valid(self) -> Examples: ...

    @property
    def metric_name(self) -> str:
        """What ``Evaluation.metric`` is, as shown to people."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger metric is a better one."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Scalar training loss, a mean over the batch; it may be smoothed or weighted."""

    def tally(self, output: Tensor, batch: Batch) -> Tensor:
        """Sums (K,) float64 of one batch; over batches they are added."""

    def summary(self, tally: Tensor) -> Evaluation:
        """From the sums over all batches: the plain loss (not smoothed), the metric and the number of examples."""

    def imitate(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Scalar loss that is smallest where ``output`` says what ``teacher`` (no gradient) says: for distillation."""


@dataclass(frozen=True)
class Classification:
    """One class each: cross-entropy and accuracy. Batches: (inputs, classes int64 (B,)); outputs: (B, classes)."""

    train: Examples
    valid: Examples
    label_smoothing: float = 0.0
    metric_name: str = "accuracy"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise InputError(f"label_smoothing is {self.label_smoothing}; give 0 or more and below 1")

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy, label-smoothed.

        Raises:
            InputError: a class that the network has no output for.
        """
        with classes_fit(output, batch[1]):
            return functional.cross_entropy(output, batch[1], label_smoothing=self.label_smoothing)

    def tally(self, output: Tensor, batch: Batch) -> Tensor:
        """(sum of negative log-likelihoods, number right, number of examples)."""
        with classes_fit(output, batch[1]):
            loss = functional.cross_entropy(output.double(), batch[1], reduction="sum")
        right = (output.argmax(dim=1) == batch[1]).sum()
        return torch.stack([loss, right.double(), torch.tensor(float(len(output)), dtype=torch.float64)])

    def summary(self, tally: Tensor) -> Evaluation:
        """Negative log-likelihood in nats and accuracy in 0 to 1."""
        loss, right, count = tally.tolist()
        return Evaluation(loss / count, right / count, int(count))

    def imitate(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Cross-entropy against the teacher's probabilities."""
        return functional.cross_entropy(output, teacher.softmax(dim=1))


@contextmanager
def classes_fit(output: Tensor, classes: Tensor) -> Iterator[None]:
    """A class beyond the outputs is the user's to mend, and told when it is met: reading all targets may be slow."""
    try:
        yield
    except IndexError as error:
        wrong = classes.min() if classes.min() < 0 else classes.max()
        raise InputError(
            f"the data has class {int(wrong)}, but the network has {output.shape[1]} outputs (classes 0 to "
            f"{output.shape[1] - 1}): give the network as many outputs as there are classes, or number them from 0"
        ) from error


@dataclass(frozen=True)
class MultiLabel:
    """Any number of yes-or-no labels each: binary cross-entropy, and the accuracy averaged over the labels.

    Batches: (inputs, labels (B, K) of 0 and 1); outputs: logits (B, K).
    """

    train: Examples
    valid: Examples
    metric_name: str = "label accuracy"
    higher_is_better: bool = True

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean binary cross-entropy over examples and labels."""
        return functional.binary_cross_entropy_with_logits(output, batch[1].to(output.dtype))

    def tally(self, output: Tensor, batch: Batch) -> Tensor:
        """(sum of cross-entropies, labels right, labels, examples)."""
        labels = batch[1].double()
        loss = functional.binary_cross_entropy_with_logits(output.double(), labels, reduction="sum")
        right = ((output > 0) == (batch[1] > 0.5)).sum()
        counts = torch.tensor([float(output.numel()), float(len(output))], dtype=torch.float64)
        return torch.cat([torch.stack([loss, right.double()]), counts])

    def summary(self, tally: Tensor) -> Evaluation:
        """Cross-entropy in nats a label, and the share of labels that are right."""
        loss, right, labels, examples = tally.tolist()
        return Evaluation(loss / labels, right / labels, int(examples))

    def imitate(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Binary cross-entropy against the teacher's probabilities."""
        return functional.binary_cross_entropy_with_logits(output, teacher.sigmoid())


@dataclass(frozen=True)
class Regression:
    """Values of any shape: mean squared error, reported as its root. Batches: (inputs, values shaped as outputs)."""

    train: Examples
    valid: Examples
    metric_name: str = "rmse"
    higher_is_better: bool = False

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean squared error."""
        return functional.mse_loss(output, batch[1].to(output.dtype))

    def tally(self, output: Tensor, batch: Batch) -> Tensor:
        """(sum of squared errors, number of values, number of examples)."""
        squared = (output.double() - batch[1].double()).square().sum()
        return torch.stack([squared, torch.tensor(float(output.numel()), dtype=torch.float64),
                            torch.tensor(float(len(output)), dtype=torch.float64)])  # fmt: skip

    def summary(self, tally: Tensor) -> Evaluation:
        """Mean squared error, and its root as the metric."""
        squared, values, count = tally.tolist()
        return Evaluation(squared / values, (squared / values) ** 0.5, int(count))

    def imitate(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared difference."""
        return functional.mse_loss(output, teacher)


def load_task(
    data: str,
    *,
    valid: int | None = None,
    limit_to: int | None = None,
    seed: int = 0,
    label_smoothing: float = 0.0,
    shift: int = 0,
    flip: bool = False,
    size: int = 224,
    folder: str | None = None,
) -> tuple[Task, Examples]:
    """The task that a name stands for, and its test set, which no search may look at.

    Args:
        data: ``fashion-mnist``, ``synthetic`` (no files needed), ``segmentation``, ``detection`` or ``translation``
            (pictures made of Fashion-MNIST's garments, see ``load_garments``), or a folder. Its layout is recognised:
            Fashion-MNIST's four IDX files, ImageNet's class folders, a folder a class, CIFAR-10's binary files, or
            CelebA's attributes (multi-label). Or an ``.npz`` file, see ``load_npz``. Code is never run for a name:
            ``own_data.load_own`` is for that.
        size: side of the images, where they are cut from files.
        valid: training examples held out for choosing; None: a fifth, at most 5000.
        limit_to: at most this many training examples (held-out ones included); ``None``: all.
        seed: of the split and of the limit.
        folder: where the garments are, if not in a usual place.

    Raises:
        InputError: the name is neither known nor a folder, a setting is none of this data, or files are missing or
            damaged.
    """
    if data.endswith(".npz"):
        from hwsearch.train.own_data import load_file

        return load_file(
            data, valid=valid, limit_to=limit_to, seed=seed, label_smoothing=label_smoothing, shift=shift, flip=flip
        )
    if data in GARMENTS:
        from hwsearch.train.garments import load_garments

        if label_smoothing or shift or flip:
            raise InputError(
                f"label_smoothing, shift and flip are for classes of whole images, not {data}: leave them out"
            )
        return load_garments(data, folder, count=limit_to, valid=5000 if valid is None else valid, seed=seed)
    whole: Examples
    test: Examples
    if data == "synthetic":
        whole, test = synthetic_images(4096, seed=1), synthetic_images(1024, seed=2)
    elif data == "fashion-mnist":
        whole, test = load_fashion_mnist(shift=shift, flip=flip)
    elif (Path(data) / "list_attr_celeba.txt").is_file():
        whole, test, _ = folders.attributes(data, size=size)
        train, held_out = split(limit(whole, limit_to, seed), valid, seed)
        return MultiLabel(train, held_out), test
    elif (Path(data) / "train").is_dir():
        whole, test = folders.class_folders(data, size=size)
    elif any((Path(data) / name).exists() for name in ("cifar-10-batches-bin", "data_batch_1.bin")):
        whole, test = folders.cifar10(data, shift=shift, flip=flip)
    elif folders.has_class_folders(data):
        whole, test = folders.unsplit_class_folders(data, size=size, seed=seed)
    elif Path(data).is_dir() and not any(any(Path(data).glob(p)) for p in ("*ubyte*", "*/*ubyte*")):
        raise InputError(
            f"the folder {data} holds no pictures in folders of two or more classes ({', '.join(folders.ENDINGS)}), "
            "neither by themselves nor in train/ and val/, and no data set as published: give a folder a class"
        )
    elif Path(data).is_dir():
        whole, test = load_fashion_mnist(data, shift=shift, flip=flip)
    else:
        raise InputError(
            f"data {data!r} is neither fashion-mnist, synthetic, {', '.join(GARMENTS)}, a folder nor an .npz file; "
            "name one of these"
        )
    train, held_out = split(limit(whole, limit_to, seed), valid, seed)
    return Classification(train, held_out, label_smoothing), test
