"""What is wrong with a config, in one line: the field as the file spells it, its value, and what it may be."""

from __future__ import annotations

import dataclasses
import difflib
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from hwsearch.search.journal import short


def explain(root: type, error: ValidationError) -> str:
    """One line for everything that is wrong: the first field in full, the paths of the others."""
    found: dict[str, dict[str, Any]] = {}
    for item in error.errors(include_url=False):
        path, _ = _field(root, item["loc"])
        found.setdefault(_printable(".".join(path)), dict(item))
    # An unknown key is often the reason why another one is missing: it goes first.
    order = sorted(found, key=lambda path: found[path]["type"] != "unexpected_keyword_argument")
    first = order[0]
    more = f" (also wrong: {', '.join(order[1:])})" if len(order) > 1 else ""
    return _sentence(root, first, found[first]) + more


def _printable(text: str) -> str:
    """A key as it stands in the file, on one line whatever it is made of."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _sentence(root: type, path: str, item: dict[str, Any]) -> str:
    """What is wrong with one field and what to do."""
    parts, annotation = _field(root, item["loc"])
    if item["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(_field(root, item["loc"][:-1])[1])]
        close = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.6)
        where = f"[{parts[0]}]" if len(parts) > 1 else "a config"
        hint = f"did you mean {close[0]}?" if close else f"{where} has {', '.join(known)}"
        return f"{path} is no setting: {hint}"
    if item["type"] == "missing":
        if dataclasses.is_dataclass(annotation):
            return f"the section [{path}] is missing: add it"
        return f"{path} is missing: give {_allowed(annotation) or 'a value'}"
    if item["type"] == "tuple_type":
        return f"{path} is {short(item['input'])}: give sections [[{path}]], with double brackets"
    if item["type"] in ("dataclass_type", "dict_type"):
        return f"{path} is {short(item['input'])}: give a section [{path}]"
    allowed = _allowed(annotation) or str(item["msg"]).removeprefix("Input should be ")
    return f"{path} is {short(repr(item['input']))}: give {allowed}"


def _field(root: type, location: tuple[Any, ...]) -> tuple[list[str], Any]:
    """The path of a field as the file spells it, and its annotation; pydantic's own additions are left out."""
    path: list[str] = []
    annotation: Any = root
    for part in location:
        if get_origin(annotation) is tuple and isinstance(part, int):
            annotation = get_args(annotation)[0]
            path[-1] += f"[{part + 1}]"
            continue
        if not dataclasses.is_dataclass(annotation):
            # Inside a union pydantic appends the member it tried; inside free-form values the file's own keys go on.
            if annotation is not None and get_origin(annotation) is dict:
                path.append(str(part))
            continue
        path.append(str(part))
        annotation = get_type_hints(annotation, include_extras=True).get(str(part))
    return path, annotation


def _allowed(annotation: Any) -> str:
    """What a field may be, in words."""
    for argument in getattr(annotation, "__metadata__", ()):
        if getattr(argument, "description", None):
            return str(argument.description)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return next(filter(None, (_allowed(member) for member in get_args(annotation))), "")
    return ""
