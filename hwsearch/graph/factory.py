"""``build``: a model from ``package.module:factory``, with one clear line for everything that can go wrong."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hwsearch.errors import InputError
from hwsearch.graph.capture import first_line

if TYPE_CHECKING:
    from torch import nn

_SPEC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def find_factory(spec: str) -> Callable[..., Any]:
    """The callable that ``package.module:factory`` names. The working directory is searched as Python itself would.

    Importing runs the module's code: only names that the user typed may come here, never names read from a file.

    Raises:
        InputError: the text is no such name, the module is missing or fails to import, or it has no such callable.
    """
    if not isinstance(spec, str) or not _SPEC.fullmatch(spec):
        raise InputError(
            f"{spec!r} does not name a model; write package.module:factory, such as hwsearch.models.vgg:vgg_small"
        )
    path, _, name = spec.partition(":")
    try:
        with _working_directory_importable():
            module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or path
        if path == missing or path.startswith(missing + "."):
            raise InputError(
                f"no Python module {missing!r} for the model {spec}; check the name, or install it"
            ) from None
        raise InputError(f"importing {path} for the model {spec} needs the module {missing!r}; install it") from error
    except Exception as error:
        raise InputError(
            f"importing {path} for the model {spec} fails: {type(error).__name__}: {first_line(error)}"
        ) from error
    found = getattr(module, name, None)
    if found is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"the module {path} has no {name!r}; it has {', '.join(sorted(public)[:8]) or 'no factories'}")
    if not callable(found):
        raise InputError(f"{spec} is a {type(found).__name__}, not a function that returns a model")
    return found  # type: ignore[no-any-return]


def build(spec: str, factory: Callable[..., Any], kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Call a factory; ``spec`` is its name for messages.

    Raises:
        InputError: the factory raises, or returns something that is not a ``torch.nn.Module``.
    """
    import torch

    try:
        model = factory(**(kwargs or {}))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the model factory {spec} fails: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"the model factory {spec} returned {type(model).__name__}, not a torch.nn.Module")
    return model


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    """An installed command does not have the working directory on its import path; ``python -m`` has."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
