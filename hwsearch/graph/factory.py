"""What ``package.module:name`` names, a model's factory or other code of the user's; a mistake is one clear line."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hwsearch.errors import InputError
from hwsearch.graph.capture import first_line

if TYPE_CHECKING:
    from torch import nn

_TIMM = "timm:"
_SPEC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_factory_name(text: str) -> bool:
    """Whether a text has the form ``package.module:factory``.

    Example:
        >>> is_factory_name("my_data:make"), is_factory_name("data/my:images")
        (True, False)
    """
    return _SPEC.fullmatch(text) is not None


def find_factory(spec: str, what: str = "model") -> Callable[..., Any]:
    """The callable that ``package.module:factory`` names, or ``timm:name`` of models. The working directory is
    searched as Python itself would.

    Importing runs the module's code: only names that the user typed, also into a config, may come here; never names
    from a file that hwsearch wrote, which may come from somebody else.

    Args:
        what: that it makes, for messages.

    Raises:
        InputError: the text is no such name, the module is missing or fails to import, or it has no such callable.
    """
    if what == "model" and isinstance(spec, str) and spec.startswith(_TIMM):
        return _timm(spec)
    if not isinstance(spec, str) or not is_factory_name(spec):
        such = ", such as hwsearch.models.vgg:vgg_small" if what == "model" else ""
        raise InputError(f"{spec!r} does not name a {what}; write package.module:factory{such}")
    path, _, name = spec.partition(":")
    try:
        with _working_directory_importable(), prints_aside():
            module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or path
        if path == missing or path.startswith(missing + "."):
            # the commonest slip: a file's name in the place of a module's
            file = f"; for the file {path} write {path[:-3]}:{name}" if path.endswith(".py") else ""
            raise InputError(
                f"no Python module {missing!r} for the {what} {spec}; check the name, or install it{file}"
            ) from None
        raise InputError(f"importing {path} for the {what} {spec} needs the module {missing!r}; install it") from error
    except (Exception, SystemExit) as error:  # a script that ends the program must not end ours with its status
        raise InputError(f"importing {path} for the {what} {spec} fails: {failure(error)}") from error
    found = getattr(module, name, None)
    if found is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"the module {path} has no {name!r}; it has {', '.join(sorted(public)[:8]) or 'no factories'}")
    if not callable(found):
        raise InputError(f"{spec} is a {type(found).__name__}, not a function that returns a {what}")
    return found  # type: ignore[no-any-return]


def build(spec: str, factory: Callable[..., Any], kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Call a model's factory; ``spec`` is its name for messages.

    Raises:
        InputError: the factory raises, or returns something that is not a ``torch.nn.Module``.
    """
    import torch

    model = call(spec, factory, kwargs)
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"the model factory {spec} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def call(spec: str, factory: Callable[..., Any], kwargs: Mapping[str, Any] | None = None, what: str = "model") -> Any:
    """Call a factory of anything; see ``build``.

    Raises:
        InputError: the factory raises.
    """
    try:
        # a factory may import its neighbours only now
        with _working_directory_importable(), prints_aside():
            return factory(**(kwargs or {}))
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"the {what} factory {spec} fails: {failure(error)}") from error


def _timm(spec: str) -> Callable[..., Any]:
    """The factory of a model of the timm library, without pre-trained weights unless it is asked for them."""
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise InputError(f"{spec} needs the timm library; install it with: pip install timm") from error
    except Exception as error:
        raise InputError(f"importing timm for {spec} fails: {first_line(error)}; reinstall timm") from error
    name = spec.removeprefix(_TIMM)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5] if name else []
        hint = f"; close names are {', '.join(near)}" if near else "; timm.list_models() lists them"
        raise InputError(f"timm has no model {name!r}{hint}")
    return functools.partial(timm.create_model, name)


def failure(error: BaseException) -> str:
    """What the user's own code raised, on one line: the error's type, the first line of its message, and its place.

    The place is the innermost line that is neither hwsearch's, an installed package's nor the standard library's.
    """
    told = f"{type(error).__name__}: {first_line(error)}"
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
    library = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, library, "<")) and "site-packages" not in frame.filename
    ]
    return f"{told} ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else told


def prints_aside() -> contextlib.AbstractContextManager[object]:
    """What the user's own code prints goes to standard error: standard output is for results."""
    return contextlib.redirect_stdout(sys.stderr)


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
