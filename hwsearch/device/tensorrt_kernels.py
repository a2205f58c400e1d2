"""A TensorRT engine's layers, as its inspector lists them, read as kernels (host side, standard library only).

The inspector says what runs: fused layers with their tactics, formats and reformats. It does not say every size, and
nothing at all of what a compiled region (Myelin) holds beyond the ONNX nodes that it came from. So the document that
``optimise`` writes holds both: the layers, and the kernels of the ONNX nodes by name. A layer takes the sizes of the
heaviest node in it, and the others become its tail; one that holds several products is listed as one kernel a product.
A layer of no known node is ``reorder`` where it reformats, else ``other``: listed, never dropped.

The names and keys are those of TensorRT 8.6 to 10 as documented and published; no GPU was at hand to see them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

from hwsearch.errors import DeviceJobError
from hwsearch.graph.kernel import Kernel

SCHEMA, VERSION = "hwsearch.tensorrt-graph", 1
#: Layers that wait or stand for tensors: no work, and no time of their own.
_SILENT = ("signal", "wait", "Constant")
_REFORMATS = ("Reformat", "reformat", "CopyNode", "Reformatting CopyNode")
#: Nodes with this family are the heart of a layer; the rest are its tail.
_PRODUCTS = (
    "conv",
    "conv_first",
    "pointwise",
    "depthwise",
    "grouped",
    "conv_transpose",
    "gemm",
    "attention",
    "recurrent",
)
_DTYPES = (
    ("int8", "int8"), ("uint8", "uint8"), ("bfloat16", "bfloat16"), ("bf16", "bfloat16"), ("fp16", "float16"),
    ("half", "float16"), ("fp8", "float8"), ("int32", "int32"), ("int64", "int64"), ("bool", "bool"),
    ("fp32", "float32"), ("float", "float32"),
)  # fmt: skip
_WIDE = {"two": 2, "four": 4, "eight": 8, "sixteen": 16, "thirty-two": 32}
_NO_WORK = ("free",)

Fields: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class EngineGraph:
    """The layers of an engine, and the kernels of the network's ONNX nodes by name."""

    layers: tuple[Mapping[str, Any], ...]
    nodes: Mapping[str, Kernel]


def write_graph(inspected: str, nodes: Mapping[str, Kernel]) -> bytes:
    """The document of an engine.

    Args:
        inspected: what the engine inspector said, as JSON.
        nodes: kernels of the ONNX nodes by the nodes' names.

    Raises:
        DeviceJobError: the inspector's answer holds no layers in detail.
    """
    try:
        layers = json.loads(inspected)["Layers"]
    except (ValueError, KeyError, TypeError):
        raise DeviceJobError("the engine inspector's answer holds no layers") from None
    if not all(isinstance(layer, dict) for layer in layers):
        raise DeviceJobError("the engine names its layers only: it was built without detailed profiling verbosity")
    kept = ("Name", "LayerType", "Inputs", "Outputs", "TacticName", "Metadata")
    document = {
        "schema": SCHEMA,
        "version": VERSION,
        "layers": [{key: layer[key] for key in kept if key in layer} for layer in layers],
        # a list: the order of the nodes says what lies between the ends of a region
        "nodes": [
            {"name": name, "kernel": {f.name: getattr(kernel, f.name) for f in fields(kernel)}}
            for name, kernel in nodes.items()
        ],
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def read_graph(data: bytes) -> EngineGraph:
    """The inverse of :func:`write_graph`.

    Raises:
        DeviceJobError: the bytes are something else.
    """
    try:
        document = json.loads(data)
        if document["schema"] != SCHEMA or document["version"] != VERSION:
            raise ValueError(f"schema {document['schema']} version {document['version']}")
        nodes = {}
        for item in document["nodes"]:
            values = item["kernel"]
            texts = {"fused": tuple(values["fused"]), "source": tuple(values["source"])}
            nodes[item["name"]] = Kernel(**values | texts)
        return EngineGraph(tuple(layer for layer in document["layers"] if isinstance(layer["Name"], str)), nodes)
    except (ValueError, KeyError, TypeError) as error:
        raise DeviceJobError(f"the optimised graph is not one of TensorRT ({error})") from None


def kernels_of(graph: EngineGraph) -> tuple[Kernel, ...]:
    """The kernels of an engine in the order of execution.

    Raises:
        DeviceJobError: a node that multiplies is in no layer: the layers' names are not understood.
    """
    return tuple(kernel for kernels in kernels_by_layer(graph) for kernel in kernels)


def kernels_by_layer(graph: EngineGraph) -> list[tuple[Kernel, ...]]:
    """The kernels of each layer; none for layers that only wait."""
    finder, used, found, count = _Finder(graph.nodes), set(), [], 0
    for layer in graph.layers:
        names = finder.nodes_of(layer)
        used.update(names)
        kernels = [] if layer.get("LayerType") in _SILENT else list(_kernels(layer, [graph.nodes[n] for n in names]))
        numbered = [replace(kernel, node=f"{count + i:03d}_{kernel.op}") for i, kernel in enumerate(kernels)]
        found.append(tuple(numbered))
        count += len(numbered)
    lost = [name for name, kernel in graph.nodes.items() if kernel.macs and name not in used]
    if lost:
        raise DeviceJobError(
            f"no layer of the engine names the node {lost[0]!r} ({len(lost)} in all): it would be lost"
        )
    return found


def shares_of(graph: EngineGraph, times: Mapping[str, float]) -> list[tuple[str, float]]:
    """(operation, share) of each kernel from milliseconds by layer; products of one layer share it by their MACs.

    A layer that the profiler did not report costs next to nothing, and gets a thousandth of the smallest one's time.
    """
    least = min((ms for ms in times.values() if ms > 0), default=1.0) / 1e3
    found: list[tuple[str, float]] = []
    for layer, kernels in zip(graph.layers, kernels_by_layer(graph), strict=True):
        ms = max(times.get(layer["Name"], 0.0), least)
        macs = sum(kernel.macs for kernel in kernels)
        parts = [kernel.macs / macs if macs else 1 / len(kernels) for kernel in kernels]
        found += [(kernel.op, ms * part) for kernel, part in zip(kernels, parts, strict=True)]
    whole = sum(ms for _, ms in found)
    return [(op, ms / whole) for op, ms in found]


class _Finder:
    """Which ONNX nodes a layer came from: its metadata says so, or else its name does."""

    def __init__(self, nodes: Mapping[str, Kernel]) -> None:
        self.order = {name: index for index, name in enumerate(nodes)}

    def nodes_of(self, layer: Mapping[str, Any]) -> list[str]:
        """Names of the nodes in the order of the network."""
        if _reformats(layer):
            return []
        told = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))
        if not any(name in self.order for name in told):
            name = str(layer["Name"]).removeprefix("{ForeignNode[").removesuffix("]}")
            told = re.split(r" \+ |\.\.\.|\x1e|\x1f|, ", name)
            told = [re.sub(r"^PWN\((.*)\)$", r"\1", part.strip()) for part in told]
            if layer["Name"].startswith("{ForeignNode[") and len(told) == 2 and all(n in self.order for n in told):
                first, last = (self.order[name] for name in told)  # a region is named by its ends
                return [name for name, index in self.order.items() if first <= index <= last]
        return sorted({name for name in told if name in self.order}, key=self.order.__getitem__)


def _reformats(layer: Mapping[str, Any]) -> bool:
    return layer.get("LayerType") in _REFORMATS or str(layer["Name"]).startswith("Reformatting CopyNode")


def _kernels(layer: Mapping[str, Any], nodes: Sequence[Kernel]) -> Iterator[Kernel]:
    tactic = re.sub(r"_0x[0-9a-f]+$", "", str(layer.get("TacticName", "")))
    op = f"{layer.get('LayerType', 'layer')}/{tactic}".rstrip("/").replace("|", ":")
    formats: Fields = {
        "dtype": _dtype(layer),
        "layout_in": _layout(layer, "Inputs"),
        "layout_out": _layout(layer, "Outputs"),
    }
    working = [node for node in nodes if node.family not in _NO_WORK] or list(nodes)
    products = [index for index, node in enumerate(working) if node.family in _PRODUCTS and node.macs]
    if not working:
        yield _unknown(layer, op, formats)
    elif not products:
        head, *rest = working
        yield replace(head, op=op, fused=tuple(node.op.lower() for node in rest), **formats)
    else:
        starts = [0, *products[1:]]
        for start, end, heart in zip(starts, [*starts[1:], len(working)], products, strict=True):
            tail = tuple(node.op.lower() for index, node in enumerate(working[start:end], start) if index != heart)
            yield _padded(replace(working[heart], op=op, fused=tail, **formats))


def _unknown(layer: Mapping[str, Any], op: str, formats: Fields) -> Kernel:
    """A layer of no node of the network: a change of format, or nobody knows."""
    sizes = [_spread(_first(layer, side).get("Dimensions", ())) for side in ("Inputs", "Outputs")]
    (batch, channels, height, width), (_, out_channels, out_height, out_width) = sizes
    return Kernel(
        family="reorder" if _reformats(layer) else "other", op=op, batch=batch, in_channels=channels, in_height=height,
        in_width=width, out_channels=out_channels, out_height=out_height, out_width=out_width, **formats,
    )  # fmt: skip


def _padded(kernel: Kernel) -> Kernel:
    """Channels in whole vectors where the format is one of vectors."""

    def whole(channels: int, layout: str) -> int:
        block = re.fullmatch(r"nchw(\d+)c", layout)
        return -(-channels // int(block[1])) * int(block[1]) if block else channels

    return replace(
        kernel,
        in_channels=whole(kernel.in_channels, kernel.layout_in),
        out_channels=whole(kernel.out_channels, kernel.layout_out),
        groups=whole(kernel.groups, kernel.layout_in) if kernel.family == "depthwise" else kernel.groups,
    )


def _first(layer: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    values = layer.get(side) or [{}]
    return values[0] if isinstance(values[0], Mapping) else {}


def _format(layer: Mapping[str, Any], side: str) -> str:
    value = _first(layer, side)
    return " ".join(str(value.get(key, "")) for key in ("Format/Datatype", "Format", "Datatype")).lower()


def _dtype(layer: Mapping[str, Any]) -> str:
    """Element types of the first input and, where it is another one, the first output."""
    read, written = (
        next((name for text, name in _DTYPES if text in _format(layer, side)), "float32")
        for side in ("Inputs", "Outputs")
    )
    return read if read == written else f"{read}>{written}"


def _layout(layer: Mapping[str, Any], side: str) -> str:
    """``nchw``, ``nhwc``, or channels in vectors (``nchw32c``)."""
    text = _format(layer, side)
    vector = re.search(r"(\S+) wide channel vectorized", text)
    if vector and vector[1] in _WIDE:
        return f"nchw{_WIDE[vector[1]]}c"
    return "nhwc" if "channel major" in text else "nchw"


def _spread(shape: Sequence[int]) -> tuple[int, int, int, int]:
    sizes = [max(1, int(size)) for size in shape]
    while len(sizes) < 4:
        sizes.append(1)
    return (sizes[0], sizes[1], sizes[2], sizes[3])
