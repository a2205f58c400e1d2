"""``load_factory``: the model that a user names, as ``package.module:factory`` or ``timm:name``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hwsearch.errors import InputError
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
    model = build(spec, find_factory(spec), kwargs)
    try:
        return model.eval()
    except RecursionError as error:
        raise InputError(f"the modules of {spec} nest deeper than Python can follow; nest them less") from error
