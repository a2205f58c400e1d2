"""The user's own data as a task: data sets or a whole task from ``module:function``, or arrays in a file.

    def make(size=64):                        # my_data.py; [data] factory = "my_data:make", kwargs = { size = 64 }
        return train, test                    # torch data sets; or (train, held out, test); or (task, test)

and ``load_npz`` reads arrays that somebody saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hwsearch.errors import InputError
from hwsearch.graph.factory import call, find_factory
from hwsearch.train.data import Examples, limit, split
from hwsearch.train.datasets import as_examples
from hwsearch.train.npz import load_npz
from hwsearch.train.segmentation import Segmentation
from hwsearch.train.task import Classification, MultiLabel, Regression, Task

#: What targets can be, as a config calls it.
TASKS = ("classification", "multilabel", "regression", "segmentation")


def load_own(
    factory: str,
    kwargs: Mapping[str, Any] | None = None,
    *,
    task: str | None = None,
    valid: int | None = None,
    limit_to: int | None = None,
    seed: int = 0,
    label_smoothing: float = 0.0,
) -> tuple[Task, Examples]:
    """The task and the test set that a function of the user's returns.

    Args:
        factory: ``module:function``; importing and calling it runs the user's code.
        kwargs: its arguments.
        task: what the targets are (``TASKS``); None: classes, which single whole numbers are.
        valid: training examples held out for choosing, where the function returns none; None: a fifth, at most 5000.
        limit_to: at most so many training examples, held-out ones included.
        seed: of the split and of the limit.
        label_smoothing: of classes.

    Returns:
        The task and the test set. A function that returns ``(task, test)`` brings loss and metric of its own
        (``hwsearch.train.task.Task``); one that returns data sets gets those of ``task``.

    Raises:
        InputError: the function is missing, fails, or returns something else; or a setting is not for its data.

    Example:
        >>> task, test = load_own("my_data:make", {"size": 64})                       # doctest: +SKIP
    """
    found = call(factory, find_factory(factory, "data set"), kwargs, "data")
    if not isinstance(found, tuple | list) or len(found) not in (2, 3):
        raise InputError(
            f"the data factory {factory} returned {_kind(found)}: give (train, test) or (train, held out, test) data "
            "sets, or (task, test)"
        )
    if _is_task(found[0]):
        if len(found) == 3:
            raise InputError(f"the data factory {factory} returned a task and two sets: give (task, test)")
        given = {"task": task, "valid": valid, "limit": limit_to, "label_smoothing": label_smoothing or None}
        if more := [name for name, value in given.items() if value is not None]:
            raise InputError(f"data.{more[0]} is for data sets, and {factory} returns a whole task: leave it out")
        return found[0], as_examples(found[1], f"{factory} (test)")
    names = ("train", "test") if len(found) == 2 else ("train", "held out", "test")
    parts = [as_examples(part, f"{factory} ({name})") for part, name in zip(found, names, strict=True)]
    held_out = parts[1] if len(parts) == 3 else None
    return as_task(parts[0], held_out, task, valid, limit_to, seed, label_smoothing, factory), parts[-1]


def load_file(
    path: str | Path,
    *,
    task: str | None = None,
    valid: int | None = None,
    limit_to: int | None = None,
    seed: int = 0,
    label_smoothing: float = 0.0,
    shift: int = 0,
    flip: bool = False,
) -> tuple[Task, Examples]:
    """The task and the test set in an ``.npz`` file, see ``load_npz``; arguments as for ``load_own``.

    Raises:
        InputError, SchemaError: the file cannot be read, or its targets are not what ``task`` says.
    """
    train, held_out, test = load_npz(path, shift=shift, flip=flip)
    return as_task(train, held_out, task, valid, limit_to, seed, label_smoothing, str(path)), test


def as_task(
    train: Examples,
    held_out: Examples | None,
    task: str | None,
    valid: int | None,
    limit_to: int | None,
    seed: int,
    label_smoothing: float,
    name: str,
) -> Task:
    """Data sets with the loss and the metric of what their targets are; ``name`` is theirs for messages.

    Raises:
        InputError: targets that are no classes where nothing is said, or settings that do not go together.
    """
    target = train.take(np.arange(1))[1]
    if task is None:
        if target.is_floating_point() or target.dim() != 1:
            shape = "x".join(map(str, target.shape[1:])) or "single values"
            raise InputError(
                f"the targets of {name} are {str(target.dtype).removeprefix('torch.')}, {shape}: say what they are "
                "with data.task, one of multilabel, regression and segmentation (a class a pixel); give whole numbers "
                "for classes, or return a task of your own"
            )
        task = "classification"
    if task not in TASKS:
        raise InputError(f"data.task is {task!r}: give one of {', '.join(TASKS)}")
    if task == "classification" and (target.is_floating_point() or target.dim() != 1):
        raise InputError(f"data.task is classification, but the targets of {name} are no single whole numbers")
    if task == "segmentation" and (target.is_floating_point() or target.dim() != 3):
        raise InputError(f"data.task is segmentation, but the targets of {name} are no whole numbers (H, W)")
    if label_smoothing and task != "classification":
        raise InputError(f"data.label_smoothing is for classes, not {task}: leave it out")
    kept = limit(train, limit_to, seed)
    if held_out is None:
        kept, held_out = split(kept, valid, seed)
    elif valid is not None:
        raise InputError(f"{name} brings held-out examples of its own: leave data.valid out")
    if task == "classification":
        return Classification(kept, held_out, label_smoothing)
    if task == "segmentation":
        return Segmentation(kept, held_out)
    return MultiLabel(kept, held_out) if task == "multilabel" else Regression(kept, held_out)


def _is_task(found: Any) -> bool:
    """By its methods: asking a data set whether it is a task would ask for all of its attributes."""
    return all(callable(getattr(found, name, None)) for name in ("loss", "tally", "summary", "imitate"))


def _kind(found: Any) -> str:
    several = isinstance(found, tuple | list)
    return f"{type(found).__name__} of {len(found)}" if several else type(found).__name__
