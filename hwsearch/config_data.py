"""``[data]`` of a config: what is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict

from hwsearch.config_types import Below1, Count, Switch, Text, Whole
from hwsearch.errors import InputError

if TYPE_CHECKING:
    from hwsearch.train.data import Examples
    from hwsearch.train.task import Task

#: Kinds that are made of Fashion-MNIST's garments, see ``hwsearch.train.garments``.
_GARMENTS = ("segmentation", "detection", "translation")
#: Names that stand for data without a folder.
KINDS = ("fashion-mnist", "synthetic", *_GARMENTS)


@dataclass(frozen=True)
class DataSettings:
    """``[data]``: what is learnt. ``valid`` training examples are held out for choosing; ``limit`` counts both.

    ``segmentation``, ``detection`` and ``translation`` are pictures made of Fashion-MNIST's garments, whose files
    ``folder`` holds where they are not in a usual place; else ``folder`` is the data itself.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: Literal["fashion-mnist", "synthetic", "segmentation", "detection", "translation"] = "fashion-mnist"
    folder: Text | None = None
    limit: Count | None = None
    valid: Count | None = None
    label_smoothing: Below1 | None = None
    shift: Whole | None = None
    flip: Switch | None = None
    size: Count | None = None

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "shift", "flip", "size"):
            if self.kind in _GARMENTS and getattr(self, name) is not None:
                raise InputError(f"data.{name} is for classes of whole images, not {self.kind}: leave it out")

    def load(self, seed: int) -> tuple[Task, Examples]:
        """The task, and the test set that no search may look at.

        Raises:
            InputError: files are missing, or more examples are held out than there are.
        """
        from hwsearch.train.task import load_task

        names = ("valid", "label_smoothing", "shift", "flip", "size")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.kind in _GARMENTS:
            return load_task(self.kind, folder=self.folder, limit_to=self.limit, seed=seed, **given)
        return load_task(self.folder or self.kind, limit_to=self.limit, seed=seed, **given)
