"""``[data]`` of a config: what is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from hwsearch.config_types import Below1, Count, OwnCode, Switch, Text, Whole
from hwsearch.errors import InputError
from hwsearch.graph.factory import is_factory_name

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

    Data of one's own are an ``.npz`` file (``file``), or what a function returns that ``factory`` names and ``kwargs``
    go to: torch data sets, or a whole task. ``task`` says what their targets are. See ``hwsearch.train.own_data``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: Literal["fashion-mnist", "synthetic", "segmentation", "detection", "translation"] = "fashion-mnist"
    folder: Text | None = None
    file: Text | None = None
    factory: OwnCode | None = None
    kwargs: dict[str, Any] | None = None
    task: Literal["classification", "multilabel", "regression", "segmentation"] | None = None
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
        named = [name for name in ("folder", "file", "factory") if getattr(self, name) is not None]
        if len(named) > 1:
            raise InputError(f"data has both {named[0]} and {named[1]}: give one of the two")
        if self.kwargs is not None and self.factory is None:
            raise InputError("data.kwargs are of a factory: give data.factory, or leave them out")
        if self.task is not None and self.factory is None and self.file is None:
            raise InputError("data.task is for data.file and data.factory: leave it out")
        if self.factory is not None or self.file is not None:
            if self.kind != "fashion-mnist":
                raise InputError(f'data has both kind = "{self.kind}" and {named[0]}: give one of the two')
            unfit = ("size",) if self.file is not None else ("size", "shift", "flip")
            for name in unfit:
                if getattr(self, name) is not None:
                    what = "a file of arrays" if self.file is not None else "a factory, which does so itself"
                    raise InputError(f"data.{name} is not for {what}: leave it out")

    def load(self, seed: int) -> tuple[Task, Examples]:
        """The task, and the test set that no search may look at. A ``factory`` is imported, which runs its code.

        Raises:
            InputError: files are missing, more examples are held out than there are, or the factory fails.
        """
        from hwsearch.train.task import load_task

        names = ("valid", "label_smoothing", "shift", "flip", "size")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.factory is not None:
            from hwsearch.train.own_data import load_own

            return load_own(self.factory, self.kwargs, task=self.task, limit_to=self.limit, seed=seed, **given)
        if self.file is not None:
            from hwsearch.train.own_data import load_file

            return load_file(self.file, task=self.task, limit_to=self.limit, seed=seed, **given)
        if self.kind in _GARMENTS:
            return load_task(self.kind, folder=self.folder, limit_to=self.limit, seed=seed, **given)
        return load_task(self.folder or self.kind, limit_to=self.limit, seed=seed, **given)


def named_data(data: str) -> dict[str, str]:
    """``[data]`` for what a user types on the command line: a kind, a folder, an ``.npz`` file, or ``module:function``.

    Example:
        >>> named_data("synthetic"), named_data("my_data:make"), named_data("pictures")
        ({'kind': 'synthetic'}, {'factory': 'my_data:make'}, {'folder': 'pictures'})
    """
    if data in KINDS:
        return {"kind": data}
    if data.endswith(".npz"):
        return {"file": data}
    return {"factory": data} if is_factory_name(data) and not Path(data).exists() else {"folder": data}
