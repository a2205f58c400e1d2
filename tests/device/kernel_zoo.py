"""Networks with every kind of operator, by the exporters that people use, and graphs as third parties write them."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hwsearch.graph.onnx_export import export_onnx

TOKENS, IMAGE, LINE, VOLUME = (1, 12, 32), (1, 3, 16, 16), (1, 3, 24), (1, 2, 6, 8, 8)


class Wrapped(nn.Module):
    """Layers, and a function of them and the input."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.layers.items()))


def _attention(x: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
    batch, rows, width = x.shape
    q, k, v = qkv(x).reshape(batch, rows, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = ((q @ k.transpose(-2, -1)) * (width // 4) ** -0.5).softmax(-1) @ v
    return out(mixed.transpose(1, 2).reshape(batch, rows, width))


def _convnext(x: Tensor, deep: nn.Module, norm: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    y = norm(deep(x).permute(0, 2, 3, 1))
    return x + down(F.gelu(up(y))).permute(0, 3, 1, 2)


def _shuffle(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    x = a(x)
    first, second = x.chunk(2, 1)
    x = torch.cat([first, b(second)], 1)
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def _resized(x: Tensor, a: nn.Module) -> Tensor:
    x = a(x)
    up = F.interpolate(x, scale_factor=2, mode="nearest")
    smooth = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)
    return up + smooth + F.interpolate(x, size=(32, 32), mode="bicubic", align_corners=False)


def _moved(x: Tensor, a: nn.Module) -> Tensor:
    x = a(x)
    x = torch.cat([x[:, :, ::2], F.pad(x, (1, 1, 0, 0), mode="reflect")[:, :, :8, 1:-1]], 1)
    x = torch.roll(x, 1, 1).index_select(1, torch.tensor([3, 1, 0, 2, 7, 5]))
    first, second, third = x.split([1, 2, 3], 1)
    return torch.stack([first, second.mean(1, keepdim=True), third.amax(1, keepdim=True)], 0).squeeze()


def _pooled(x: Tensor, a: nn.Module) -> Tensor:
    x = F.max_pool2d(a(x), 3, 2, ceil_mode=True)
    x = F.avg_pool2d(x, 3, 2, padding=1, ceil_mode=True, count_include_pad=False)
    return F.adaptive_avg_pool2d(x, 1).flatten(1) + x.amax((2, 3))


def _gates(x: Tensor, a: nn.Module, down: nn.Module, up: nn.Module) -> Tensor:
    x = F.silu(a(x))
    y = F.hardswish(x) * up(F.relu(down(x.mean((2, 3), keepdim=True)))).sigmoid()
    return F.mish(y) + F.gelu(x) + F.leaky_relu(x) + F.softplus(y).sqrt()


def _norms(x: Tensor, a: nn.Module, group: nn.Module, instance: nn.Module, batch: nn.Module) -> Tensor:
    return F.normalize(batch(F.relu(instance(group(a(x))))), dim=1).softmax(1).log_softmax(-1)


def _einsum(x: Tensor, a: nn.Module) -> Tensor:
    x = a(x)
    scores = torch.einsum("bnd,bmd->bnm", x, x)
    return torch.einsum("bnm,bmd->bnd", scores.softmax(-1), x)


MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "attention": (Wrapped(_attention, qkv=nn.Linear(32, 96), out=nn.Linear(32, 32)), TOKENS),
    # the old exporter cannot trace this one: see NOT_TRACEABLE
    "encoder": (nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True), TOKENS),
    "lstm": (Wrapped(lambda x, a: a(x)[0], a=nn.LSTM(32, 24, batch_first=True)), TOKENS),
    "gru": (Wrapped(lambda x, a: a(x)[0], a=nn.GRU(32, 24, bidirectional=True)), TOKENS),
    "rnn": (Wrapped(lambda x, a: a(x)[0], a=nn.RNN(32, 24)), TOKENS),
    "convnext": (
        Wrapped(
            _convnext,
            deep=nn.Conv2d(3, 3, 7, padding=3, groups=3), norm=nn.LayerNorm(3), up=nn.Linear(3, 12),
            down=nn.Linear(12, 3),
        ),
        IMAGE,
    ),
    "shuffle": (Wrapped(_shuffle, a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(8, 8, 3, padding=1, groups=8)), IMAGE),
    "resized": (Wrapped(_resized, a=nn.Conv2d(3, 16, 3, padding=1)), IMAGE),
    "pixels": (nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.PixelUnshuffle(4)), IMAGE),
    "moved": (Wrapped(_moved, a=nn.Conv2d(3, 16, 3, padding=1)), IMAGE),
    "pooled": (Wrapped(_pooled, a=nn.Conv2d(3, 16, 3)), (1, 3, 17, 17)),
    "gates": (
        Wrapped(_gates, a=nn.Conv2d(3, 20, 3, 2, 1), down=nn.Conv2d(20, 6, 1), up=nn.Conv2d(6, 20, 1)),
        IMAGE,
    ),
    "norms": (
        Wrapped(
            _norms, a=nn.Conv2d(3, 16, 3), group=nn.GroupNorm(4, 16), instance=nn.InstanceNorm2d(16, affine=True),
            batch=nn.BatchNorm2d(16),
        ),
        IMAGE,
    ),
    "einsum": (Wrapped(_einsum, a=nn.Linear(32, 16)), TOKENS),
    "line": (nn.Sequential(nn.Conv1d(3, 8, 5, 2, 2), nn.ReLU(), nn.MaxPool1d(2), nn.ConvTranspose1d(8, 4, 2, 2)), LINE),
    "volume": (nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2)), VOLUME),
    "up": (
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 12, 2, 2),
            nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=12),
        ),
        IMAGE,
    ),
    "grouped": (nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 3, groups=4, dilation=2)), IMAGE),
}  # fmt: skip


NOT_TRACEABLE = {"encoder"}


@cache
def dynamo(name: str) -> bytes:
    """A module by torch's exporter of today."""
    module, shape = MODULES[name]
    return export_onnx(module.eval(), torch.zeros(shape))


@cache
def torchscript(name: str, opset: int = 13) -> bytes:
    """A module by torch's exporter of old, which writes other graphs: shapes computed by nodes, constants as nodes."""
    module, shape = MODULES[name]
    file = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), (torch.zeros(shape),), file, dynamo=False, opset_version=opset,
            input_names=["input"], output_names=["output"],
        )  # fmt: skip
    return file.getvalue()


def _graph(
    nodes: list, shape: list, weights: dict[str, np.ndarray], output: str, opset: int = 17, **more: object
) -> bytes:
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape), *more.pop("inputs", [])]  # type: ignore[misc]
    graph = helper.make_graph(
        nodes,
        "third",
        inputs,
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())


def _random(*shape: int) -> np.ndarray:
    values = np.random.default_rng(sum(shape)).standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))
    return np.asarray(values, np.float32)


def constant_nodes() -> bytes:
    """Weights as Constant nodes, a shape computed from the input, in an old opset (attributes instead of inputs)."""
    node = helper.make_node
    return _graph(
        [
            node("Constant", [], ["w"], value=numpy_helper.from_array(_random(8, 3, 3, 3))),
            node("Conv", ["input", "w"], ["a"], pads=[1, 1, 1, 1]),
            node("Shape", ["a"], ["size"]),
            node("Constant", [], ["zero"], value=numpy_helper.from_array(np.array(0, np.int64))),
            node("Gather", ["size", "zero"], ["batch"]),
            node("Unsqueeze", ["batch"], ["batch1"], axes=[0]),
            node("Constant", [], ["rest"], value=numpy_helper.from_array(np.array([-1], np.int64))),
            node("Concat", ["batch1", "rest"], ["to"], axis=0),
            node("Reshape", ["a", "to"], ["flat"]),
            node("Softmax", ["flat"], ["output"]),
        ],
        [2, 3, 6, 6],
        {},
        "output",
        opset=11,
    )


def weights_as_inputs() -> bytes:
    """Initialisers listed among the inputs too, as old files have them."""
    listed = [helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 3, 3, 3])]
    return _graph(
        [helper.make_node("Conv", ["input", "w"], ["output"])], [1, 3, 6, 6], {"w": _random(8, 3, 3, 3)}, "output",
        inputs=listed,
    )  # fmt: skip


def branches() -> bytes:
    """An If whose condition depends on the values, with branches of different weight."""
    node = helper.make_node

    def branch(name: str, nodes: list) -> onnx.GraphProto:
        return helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)]
        )

    heavy = branch("heavy", [node("Conv", ["a", "w"], ["h"], pads=[1] * 4), node("Relu", ["h"], ["heavy_out"])])
    light = branch("light", [node("Sigmoid", ["a"], ["light_out"])])
    return _graph(
        [
            node("Tanh", ["input"], ["a"]),
            node("ReduceSum", ["a"], ["sum"], keepdims=0),
            node("Greater", ["sum", "limit"], ["big"]),
            node("If", ["big"], ["c"], then_branch=heavy, else_branch=light),
            node("Relu", ["c"], ["output"]),
        ],
        [1, 8, 6, 6],
        {"w": _random(8, 8, 3, 3), "limit": np.array(-1e9, np.float32)},
        "output",
    )


def loop(rounds: int = 3) -> bytes:
    """A Loop of a known number of rounds."""
    node = helper.make_node
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("MatMul", ["x", "w"], ["y"]), node("Tanh", ["y"], ["x_out"]), node("Identity", ["go"], ["go_out"])],
        "body",
        [info("turn", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("x", TensorProto.FLOAT, [4, 16])],
        [info("go_out", TensorProto.BOOL, []), info("x_out", TensorProto.FLOAT, [4, 16])],
    )
    return _graph(
        [node("Loop", ["rounds", "", "input"], ["x_last"], body=body), node("Relu", ["x_last"], ["output"])],
        [4, 16],
        {"w": _random(16, 16), "rounds": np.array(rounds, np.int64)},
        "output",
    )


def scan() -> bytes:
    """A Scan: a state carried over five slices, its steps stacked."""
    node, info = helper.make_node, helper.make_tensor_value_info
    body = helper.make_graph(
        [
            node("Add", ["state", "slice"], ["sum"]),
            node("Tanh", ["sum"], ["state_out"]),
            node("Exp", ["sum"], ["step"]),
        ],
        "body",
        [info("state", TensorProto.FLOAT, [3]), info("slice", TensorProto.FLOAT, [3])],
        [info("state_out", TensorProto.FLOAT, [3]), info("step", TensorProto.FLOAT, [3])],
    )
    return _graph(
        [
            node("Scan", ["start", "input"], ["last", "steps"], body=body, num_scan_inputs=1),
            node("Softmax", ["steps"], ["soft"]),
            node("Add", ["soft", "last"], ["output"]),
        ],
        [5, 3],
        {"start": np.ones(3, np.float32)},
        "output",
    )


def operator_set_21() -> bytes:
    """Normalisation, activation and reduction as opset 21 has them."""
    node = helper.make_node
    return _graph(
        [
            node("Conv", ["input", "w"], ["a"], pads=[1] * 4),
            node("GroupNormalization", ["a", "one", "zero"], ["g"], num_groups=4),
            node("Gelu", ["g"], ["x"]),
            node("ReduceMax", ["x", "axes"], ["m"], keepdims=0),
            node("LayerNormalization", ["m", "one"], ["output"]),
        ],
        [2, 3, 6, 6],
        {
            "w": _random(16, 3, 3, 3), "one": np.ones(16, np.float32), "zero": np.zeros(16, np.float32),
            "axes": np.array([2, 3], np.int64),
        },
        "output",
        opset=21,
    )  # fmt: skip


def operator_set_23() -> bytes:
    """ONNX's own attention, of three and of four axes, and its normalisation by the mean square."""
    node = helper.make_node
    return _graph(
        [
            node("RMSNormalization", ["input", "one"], ["n"]),
            node("Attention", ["n", "n", "n"], ["a"], q_num_heads=4, kv_num_heads=4),
            node("Reshape", ["a", "to"], ["r"]),
            node("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3]),
            node("Attention", ["t", "t", "t"], ["b"]),
            node("Sigmoid", ["b"], ["output"]),
        ],
        list(TOKENS),
        {"one": np.ones(32, np.float32), "to": np.array([1, 12, 4, 8], np.int64)},
        "output",
        opset=23,
    )


def fused_attention() -> bytes:
    """ORT's own attention with its projection, its residual normalisation, and attention of given queries."""
    node = helper.make_node
    ones, zeros = np.ones(32, np.float32), np.zeros(32, np.float32)
    return _graph(
        [
            node("Attention", ["input", "w", "b"], ["a"], domain="com.microsoft", num_heads=4),
            node("SkipLayerNormalization", ["input", "a", "one", "zero"], ["n"], domain="com.microsoft"),
            node("MatMul", ["n", "p"], ["q"]),
            node("MultiHeadAttention", ["q", "n", "n"], ["m"], domain="com.microsoft", num_heads=4),
            node("FastGelu", ["m"], ["output"], domain="com.microsoft"),
        ],
        list(TOKENS),
        {"w": _random(32, 96), "b": np.zeros(96, np.float32), "one": ones, "zero": zeros, "p": _random(32, 32)},
        "output",
    )


def odd_operators() -> bytes:
    """What has no family of its own: listed as unknown."""
    node = helper.make_node
    return _graph(
        [
            node("TopK", ["input", "k"], ["values", "places"], axis=-1),
            node("CumSum", ["values", "axis"], ["sums"]),
            node("Einsum", ["sums", "sums", "sums"], ["output"], equation="ij,ij,ij->ij"),
        ],
        [4, 16],
        {"k": np.array([5], np.int64), "axis": np.array(1, np.int64)},
        "output",
    )


def space_to_depth() -> bytes:
    node = helper.make_node
    return _graph(
        [
            node("SpaceToDepth", ["input"], ["s"], blocksize=2),
            node("Conv", ["s", "w"], ["c"]),
            node("DepthToSpace", ["c"], ["d"], blocksize=2, mode="CRD"),
            node("LpNormalization", ["d"], ["n"], axis=1),
            node("Tile", ["n", "times"], ["output"]),
        ],
        [1, 3, 8, 8],
        {"w": _random(16, 12, 1, 1), "times": np.array([1, 1, 2, 1], np.int64)},
        "output",
    )  # fmt: skip


THIRD_PARTY: dict[str, Callable[[], bytes]] = {
    "constant_nodes": constant_nodes,
    "weights_as_inputs": weights_as_inputs,
    "branches": branches,
    "loop": loop,
    "scan": scan,
    "operator_set_21": operator_set_21,
    "operator_set_23": operator_set_23,
    "fused_attention": fused_attention,
    "odd_operators": odd_operators,
    "space_to_depth": space_to_depth,
}
