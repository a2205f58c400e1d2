"""Good files changed at random, byte by byte and in their structure; a seed gives the same change every time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

#: What a field may hold instead of what belongs there.
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**9, 10**18, -(10**18), 10**400, 0.5, -0.0, 1e-300, 1e300, float("nan"),
        float("inf"),
    "", "x", "..", "../../etc/passwd", "/etc/passwd", "[/]", "\x1b[2J", "\ud800", "a\nb", "x" * 5000, "1e999", [], {},
    [[]], [None], ["x"], {"x": {}}, [1, 2, 3], [[[[[[[[[[]]]]]]]]]],
)  # fmt: skip


def bytewise(rng: Random, data: bytes) -> bytes:
    """A few bytes flipped, taken out, doubled, put in, zeroed, or the end cut off."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(found) + 1)
        length = min(rng.choice((1, 1, 4, 64)), len(found) - at)
        kind = rng.randrange(7)
        if kind == 0 and length:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at : at + length]
        elif kind == 2:
            found[at:at] = found[at : at + length]
        elif kind == 3:
            found[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
        elif kind == 4:
            found[at : at + length] = bytes(length)
        elif kind == 5:
            found[at : at + length] = rng.choice((b"\xff", b'"', b"[", b"{", b"}", b"\n", b",", b"-", b"9" * 30))
        else:
            del found[at:]
    return bytes(found)


def jsonwise(rng: Random, data: bytes) -> bytes:
    """Fields of a JSON document (or of a line of one) set to what they cannot hold, taken out, or moved."""
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        path = _somewhere(rng, content)
        if not path:
            content = rng.choice(NASTY)
            break
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        kind = rng.randrange(6)
        if kind == 0:
            del holder[path[-1]]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("more", "../x", "", str(path[-1]).upper()))] = holder.pop(path[-1])
        elif kind == 2 and isinstance(holder, list):
            holder.append(holder[path[-1]])
        else:
            holder[path[-1]] = rng.choice(NASTY)
    return json.dumps(content).encode()


def _somewhere(rng: Random, content: Any) -> list[Any]:
    path: list[Any] = []
    while isinstance(content, dict | list) and content and (not path or rng.random() < 0.8):
        key = rng.choice(list(content)) if isinstance(content, dict) else rng.randrange(len(content))
        path.append(key)
        content = content[key]
    return path


def linewise(rng: Random, data: bytes) -> bytes:
    """One of several JSON lines changed as a document."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = jsonwise(rng, lines[at])
    return b"\n".join(lines) + b"\n"


def cellwise(rng: Random, data: bytes) -> bytes:
    """Cells of a CSV file; sometimes a line or a column out of its place."""
    rows = list(csv.reader(io.StringIO(data.decode())))
    row = rng.randrange(len(rows))
    kind = rng.randrange(8)
    if kind == 0:
        del rows[row]
    elif kind == 1:
        rows.insert(rng.randrange(len(rows)), list(rows[row]))
    elif kind == 2:
        del rows[row][rng.randrange(len(rows[row]))]
    else:
        value = rng.choice((*NASTY, "nan", "inf", "-1", "0", "1.5", "²", "9" * 13, "1e-310"))
        rows[row][rng.randrange(len(rows[row]))] = str(value).encode(errors="replace").decode()
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def tomlwise(rng: Random, data: bytes) -> bytes:
    """Values of a TOML file replaced, and lines moved, doubled or renamed."""
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif kind == 1:
        del lines[at]
    elif kind == 2 and "=" in lines[at]:
        lines[at] = "x" + lines[at]
    elif "=" in lines[at]:
        value = rng.choice((*NASTY, "2024-13-01", {"a": 1}))
        text = (
            "nan" if value is None else json.dumps(value, ensure_ascii=True).replace("NaN", "nan").replace("Inf", "inf")
        )
        lines[at] = f"{lines[at].partition('=')[0]}= {text}"
    return ("\n".join(lines) + "\n").encode()
