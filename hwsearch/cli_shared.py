"""What the verbs of the command line share: options that mean the same everywhere, and how results are printed."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hwsearch.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
DeviceName = Annotated[str, typer.Option("--device", "-d", help="A device of devices/, or the path of its TOML file.")]
Model = Annotated[
    str, typer.Argument(help="An ONNX file, package.module:factory, timm:name, or a folder that hwsearch wrote.")
]
Allow = Annotated[
    str | None,
    typer.Option("--allow-factory", help="The factory that a model folder names, repeated: loading runs its code."),
]
Unfolded = Annotated[
    bool,
    typer.Option("--allow-unfolded", help="Take the model as it stands: neither fold it, nor refuse an unfolded file."),
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", help="Use a Ray cluster: auto, host:port of its head, or local (processes of this machine)."),
]
Input = Annotated[str | None, typer.Option("--input", "-i", help="Shape of one inference, such as 1x3x224x224.")]


@contextlib.contextmanager
def on_cluster(address: str | None, talk: Console) -> Iterator[Any]:
    """Inside, a Ray cluster is joined, if one is named; what Ray itself prints goes where words go, not the results."""
    from hwsearch.train.cluster import joined

    if address is None:
        yield None
        return
    with contextlib.redirect_stdout(sys.stderr), joined(address, talk.say) as cluster:
        yield cluster


def show_facts(console: Console, title: str, facts: dict[str, Any], *, indent: str = "") -> None:
    """Plain values, one a line, those that there are; nested ones below their name."""
    if not indent:
        console.show(title)
    for name, value in facts.items():
        if isinstance(value, dict):
            console.show(f"{indent}  {name}:")
            show_facts(console, "", value, indent=indent + "  ")
        elif isinstance(value, (list, tuple)) and len(value) > 4:
            console.show(f"{indent}  {name}: {len(value)} entries")
        elif value is not None:
            console.show(f"{indent}  {name}: {f'{value:.5g}' if isinstance(value, float) else value}")


def show_result(as_json: bool, facts: Any, show: Callable[[Console], None]) -> None:
    """The result of a verb: one JSON object, or what ``show`` prints."""
    if as_json:
        plain = _finite({"items": facts} if isinstance(facts, list) else facts)
        sys.stdout.write(json.dumps(plain, default=_plain, sort_keys=True, allow_nan=False) + "\n")
    else:
        show(Console())


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have: NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _finite(asdict(value))
    if isinstance(value, Path):
        return str(value)
    item = getattr(value, "item", None)
    return _finite(item()) if callable(item) else str(value)
