"""The sentences of an explanation: what the time goes into that could be had for less, at most two, the largest first.

Each candidate sentence has the milliseconds it speaks of. One about a stair comes first when there is one: it is the
only one that names a change that costs next to no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hwsearch.latency.features import CONVOLUTIONS, is_blocked

if TYPE_CHECKING:
    from hwsearch.latency.explain import Explanation, LayerCost
    from hwsearch.latency.stairs import StairCurve

_MOST = 2
#: Shares of the network's time from which on something is worth a sentence.
_STAIR, _REORDERS, _OVERHEAD, _MEMORY, _PADDING = 0.01, 0.05, 0.3, 0.3, 0.1


def reasons(found: Explanation) -> tuple[str, ...]:
    """One or two plain sentences why the network is not faster."""
    first = [text] if (text := _stair(found) or _padding(found)) else []
    rest = sorted(
        (entry for entry in (_reorders(found), _overhead(found), _memory(found)) if entry), key=lambda e: -e[0]
    )
    told = [*first, *(text for _, text in rest)]
    return tuple((told or [_compute(found)])[:_MOST])


def _stair(found: Explanation) -> str:
    """The group that is farthest beyond an edge: where dropping few channels saves much more than their part.

    Their part is that of every layer which makes or reads them: all of those have less to do.
    """
    best, waste = None, _STAIR * found.ms
    for stair in found.stairs:
        if stair.down is None:
            continue
        part_ms = sum(layer.ms for layer in found.layers if layer.name in (stair.touched or stair.layers))
        extra = stair.saved_ms - part_ms * (stair.width - stair.down) / stair.width
        if extra > waste:
            best, waste = stair, extra
    return "" if best is None else _stair_words(found, best)


def _stair_words(found: Explanation, stair: StairCurve) -> str:
    layer = next((layer for layer in found.layers if layer.name in stair.layers), None)
    channels = layer.channels if layer is not None and layer.channels is not None else stair.width
    down = stair.channels_at(stair.down, channels)
    runs_as = layer.runs_as if layer is not None else None
    padded = f" run as {runs_as}" if runs_as is not None and runs_as > channels else ""
    name = stair.layers[0] if stair.layers else stair.group
    others = f" (and {_count(len(stair.layers) - 1, 'layer')} tied to it)" if len(stair.layers) > 1 else ""
    saved = f"{stair.saved_ms:.3g} ms ({_percent(stair.saved_ms, found)})"
    return f"{name}{others}: {channels} channels{padded}: {down} would save {saved}"


def _padding(found: Explanation) -> str:
    """Where nothing is known of other widths, the layer whose channels are padded at the greatest cost."""
    worst, waste = None, _PADDING
    for layer in found.layers:
        if not layer.channels or not layer.runs_as or layer.share < _STAIR:
            continue
        padded = 1 - layer.channels / layer.runs_as
        if padded > waste:
            worst, waste = layer, padded
    if worst is None:
        return ""
    return (
        f"{worst.name} ({_percent(worst.ms, found)} of the time): {worst.channels} channels run as {worst.runs_as}, so "
        f"{100 * waste:.0f} % of its arithmetic is padding"
    )


def _reorders(found: Explanation) -> tuple[float, str] | None:
    kernels = [cost for layer in found.layers for cost in layer.kernels]
    ms = sum(cost.ms for cost in kernels if cost.kernel.family == "reorder")
    if ms < _REORDERS * found.ms:
        return None
    count = sum(cost.kernel.family == "reorder" for cost in kernels)
    plain = [
        layer.name
        for layer in found.layers
        if any(c.kernel.family in CONVOLUTIONS and not is_blocked(c.kernel.layout_out) for c in layer.kernels)
    ]
    if plain:
        cause = f"{_list(plain)} cannot run in the blocked layout (their channels or groups do not fit its blocks)"
    else:
        cause = "convolutions run in the blocked layout and other operations between them do not"
    return ms, f"{_percent(ms, found)} of the time is in {_count(count, 'reorder')} because {cause}"


def _overhead(found: Explanation) -> tuple[float, str] | None:
    ms = found.parts.overhead_ms + found.overhead_ms
    if ms < _OVERHEAD * found.ms:
        return None
    count = sum(len(layer.kernels) for layer in found.layers)
    return ms, (
        f"{_percent(ms, found)} of the time is paid for starting {_count(count, 'kernel')}, whatever their size: fewer "
        "layers would be faster, narrower ones hardly"
    )


def _memory(found: Explanation) -> tuple[float, str] | None:
    ms = found.parts.memory_ms
    if ms < _MEMORY * found.ms:
        return None
    most = _list(_largest(found, lambda layer: layer.parts.memory_ms))
    return ms, (
        f"{_percent(ms, found)} of the time moves memory, most of it in {most}: smaller tensors or weights help, fewer "
        "operations on the same tensors do not"
    )


def _compute(found: Explanation) -> str:
    most = _largest(found, lambda layer: layer.ms)
    ms = sum(layer.ms for layer in found.layers if layer.name in most)
    return (
        f"{_percent(found.parts.compute_ms, found)} of the time is arithmetic at the speed that the device gives, "
        f"{_percent(ms, found)} in {_list(most)}: only fewer channels or operations there make it faster"
    )


def _largest(found: Explanation, key: Callable[[LayerCost], float]) -> list[str]:
    """The one to three layers that make up half of what ``key`` counts."""
    ordered: list[LayerCost] = sorted(found.layers, key=key, reverse=True)
    half, names = sum(key(layer) for layer in ordered) / 2, []
    for layer in ordered[:3]:
        names.append(layer.name)
        half -= key(layer)
        if half <= 0:
            break
    return names


def _percent(ms: float, found: Explanation) -> str:
    return f"{100 * ms / found.ms:.0f} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _list(names: list[str]) -> str:
    shown = names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
