"""``load_factory``: the model that a user names, as ``package.module:factory`` or ``timm:name``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hwsearch.errors import InputError
from hwsearch.graph.capture import first_line
from hwsearch.graph.factory import build, find_factory

if TYPE_CHECKING:
    from torch import nn


def load_factory(spec: str, **kwargs: Any) -> nn.Module:
    """Build the model that ``spec`` names, in evaluation mode.

    Args:
        spec: ``package.module:factory`` (the module is imported, which runs its code), or ``timm:name`` for a model
            of the timm library, without pre-trained weights unless ``pretrained=True`` is given.
        kwargs: passed to the factory.

    Raises:
        InputError: a missing module, attribute or library; a factory that raises or returns no ``torch.nn.Module``, or
            modules inside each other without an end.

    Example:
        >>> model = load_factory("hwsearch.models.vgg:vgg_small", classes=10)
    """
    timm = isinstance(spec, str) and spec.startswith("timm:")
    model = _timm(spec, kwargs) if timm else build(spec, find_factory(spec), kwargs)
    try:
        return model.eval()
    except RecursionError as error:
        raise InputError(f"the modules of {spec} nest deeper than Python can follow; nest them less") from error


def _timm(spec: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise InputError(f"{spec} needs the timm library; install it with: pip install timm") from error
    except Exception as error:
        raise InputError(f"importing timm for {spec} fails: {first_line(error)}; reinstall timm") from error
    name = spec.removeprefix("timm:")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5] if name else []
        hint = f"; close names are {', '.join(near)}" if near else "; timm.list_models() lists them"
        raise InputError(f"timm has no model {name!r}{hint}")
    return build(spec, timm.create_model, {"model_name": name, **kwargs})
