"""Random networks to time kernels in: plain, residual, separable, gated, dense, branched ..., straight to ONNX.

A kernel's time depends on what stands around it (layouts, fused tails), so kernels are never timed alone: they are
timed inside networks that look like those that people run. Networks are written with ``onnx.helper``, which takes
milliseconds; weights are random but scaled so that activations neither vanish nor overflow (denormals are slow).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

OPSET = 18


class _Scale:
    """How much a network may be: its share of all, MACs (log-uniform), parameters, and factors on its widths."""

    def __init__(self, share: float, macs: tuple[float, float], parameters: int, widths: tuple[float, float]) -> None:
        self.share, self.macs, self.parameters, self.widths = share, macs, parameters, widths


#: Most networks are middling, which is quick. A few are as small as what runs in microseconds, and some have the many
#: weights of whole networks, which no cache holds.
_SCALES = {
    "small": _Scale(0.08, (0.15e6, 3e6), 300_000, (0.4, 0.7)),
    "middle": _Scale(0.80, (3e6, 120e6), 3_000_000, (1.0, 1.0)),
    "large": _Scale(0.12, (50e6, 600e6), 16_000_000, (2.0, 4.0)),
}
_POOL = 1 << 16  # weights are drawn so many at a time and repeated: their values do not matter, their number does


class _Shape:
    """A tensor while a network is being written: its ONNX name, channels and side."""

    def __init__(self, name: str, channels: int, side: int) -> None:
        self.name, self.channels, self.side = name, channels, side


class _Writer:
    """Writes nodes one after another and counts MACs and parameters."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.macs = 0
        self.parameters: int = 0
        self._nodes_before = -1
        self.kind = str(rng.choice(list(_SCALES), p=[scale.share for scale in _SCALES.values()]))
        self.scale = _SCALES[self.kind]
        low, high = self.scale.macs
        self.budget = float(low * (high / low) ** rng.random())
        self.values = rng.standard_normal(_POOL, dtype=np.float32)
        # One alignment a network: user spaces are aligned or they are not, and layouts depend on the neighbours'
        # widths.
        self.align = int(rng.choice([16, 8, 4, 1], p=[0.25, 0.3, 0.2, 0.25]))
        self.activation = str(rng.choice(["Relu", "Clip", "HardSwish", "Silu"], p=[0.62, 0.22, 0.1, 0.06]))

    def width(self, low: float, high: float) -> int:
        """A channel count, log-uniform in the range, aligned as this network is."""
        low, high = low * self.scale.widths[0], high * self.scale.widths[1]
        raw = float(low * (max(high, low) / low) ** self.rng.random())
        align = self.align
        if align > 1 and self.rng.random() < 0.05:
            align = 1
        return max(align, round(raw / align) * align, 2)

    def coin(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def goes_on(self, nodes: int) -> bool:
        """Whether another block is due: not when MACs or nodes are reached, nor when nothing more fits."""
        stuck = len(self.nodes) == self._nodes_before
        self._nodes_before = len(self.nodes)
        return self.macs < self.budget and len(self.nodes) < nodes and not stuck

    def fits(self, macs: float, parameters: float) -> bool:
        """Whether a layer may be added: networks stay near their budget, within some ten milliseconds."""
        return self.macs + macs <= 1.25 * self.budget + 1e5 and (self.parameters + parameters <= self.scale.parameters)

    def node(self, op: str, inputs: list[str], **attributes: object) -> str:
        from onnx import helper

        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n_{name}", **attributes))
        return name

    def weight(self, shape: tuple[int, ...], fan_in: int) -> str:
        name = f"w{len(self.weights)}"
        shift = int(self.rng.integers(_POOL))
        values = np.resize(np.roll(self.values, shift), shape) * np.float32((2.0 / fan_in) ** 0.5)
        self.weights[name] = values
        self.parameters += values.size
        return name

    def constant(self, values: np.ndarray) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = values
        return name

    def conv(
        self, x: _Shape, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: str | None = "default"
    ) -> _Shape:
        """A convolution with bias ("same" padding), then its activation; left out when it would not fit."""
        side = (x.side - 1) // stride + 1
        macs = side * side * channels * (x.channels // groups) * kernel * kernel
        if not self.fits(macs, channels * (x.channels // groups) * kernel * kernel):
            return x
        self.macs += macs
        per_group = x.channels // groups
        weight = self.weight((channels, per_group, kernel, kernel), per_group * kernel * kernel)
        bias = self.weight((channels,), 200)
        y = self.node(
            "Conv", [x.name, weight, bias], kernel_shape=[kernel, kernel], strides=[stride, stride], group=groups,
            pads=[kernel // 2] * 4, dilations=[1, 1],
        )  # fmt: skip
        return self.act(_Shape(y, channels, side), act)

    def act(self, x: _Shape, kind: str | None = "default") -> _Shape:
        kind = self.activation if kind == "default" else kind
        if kind is None:
            return x
        if kind == "Clip":
            limits = [self.constant(np.array(v, dtype=np.float32)) for v in (0.0, 6.0)]
            return _Shape(self.node("Clip", [x.name, *limits]), x.channels, x.side)
        if kind == "Silu":
            return _Shape(self.node("Mul", [x.name, self.node("Sigmoid", [x.name])]), x.channels, x.side)
        return _Shape(self.node(kind, [x.name]), x.channels, x.side)

    def add(self, x: _Shape, y: _Shape, act: str | None = None) -> _Shape:
        """Residual sum where the shapes agree, else ``y`` alone."""
        if x.name == y.name or (x.channels, x.side) != (y.channels, y.side):
            return y
        return self.act(_Shape(self.node("Add", [y.name, x.name]), y.channels, y.side), act)

    def concat(self, parts: list[_Shape]) -> _Shape:
        parts = [p for i, p in enumerate(parts) if p.name not in {q.name for q in parts[:i]}]
        if len(parts) == 1:
            return parts[0]
        name = self.node("Concat", [p.name for p in parts], axis=1)
        return _Shape(name, sum(p.channels for p in parts), parts[0].side)

    def split(self, x: _Shape) -> tuple[_Shape, _Shape]:
        """Both halves of the channels (an even number), in one of the two forms that exporters write."""
        half = x.channels // 2
        if self.coin(0.5):
            self.node("Split", [x.name, self.constant(np.array([half, half], dtype=np.int64))], axis=1)
            first = self.nodes[-1].output[0]
            second = f"{first}_b"
            self.nodes[-1].output.append(second)
            return _Shape(first, half, x.side), _Shape(second, half, x.side)
        parts = []
        for low in (0, half):
            limits = [self.constant(np.array([v], dtype=np.int64)) for v in (low, low + half, 1)]
            parts.append(_Shape(self.node("Slice", [x.name, *limits]), half, x.side))
        return parts[0], parts[1]

    def shuffle(self, x: _Shape, groups: int = 2) -> _Shape:
        """Channels of the groups interleaved: reshape, transpose, reshape."""
        apart = self.constant(np.array([1, groups, x.channels // groups, x.side, x.side], dtype=np.int64))
        together = self.constant(np.array([1, x.channels, x.side, x.side], dtype=np.int64))
        name = self.node("Transpose", [self.node("Reshape", [x.name, apart])], perm=[0, 2, 1, 3, 4])
        return _Shape(self.node("Reshape", [name, together]), x.channels, x.side)

    def pool(self, x: _Shape) -> _Shape:
        if x.side < 4:
            return x
        kind = "MaxPool" if self.coin(0.75) else "AveragePool"
        kernel, pad = (3, 1) if self.coin(0.35) else (2, 0)
        name = self.node(kind, [x.name], kernel_shape=[kernel] * 2, strides=[2, 2], pads=[pad] * 4)
        return _Shape(name, x.channels, (x.side + 2 * pad - kernel) // 2 + 1)

    def mean(self, x: _Shape) -> _Shape:
        """Spatial mean, in one of the two forms that exporters write."""
        if self.coin(0.5):
            return _Shape(self.node("GlobalAveragePool", [x.name]), x.channels, 1)
        axes = self.constant(np.array([2, 3], dtype=np.int64))
        return _Shape(self.node("ReduceMean", [x.name, axes], keepdims=1), x.channels, 1)

    def gemm(self, name: str, features: int, out: int) -> str:
        weight, bias = self.weight((out, features), features), self.weight((out,), 200)
        self.macs += features * out
        return self.node("Gemm", [name, weight, bias], transB=1)


def _vgg(w: _Writer, x: _Shape) -> _Shape:
    while w.goes_on(40):
        channels = w.width(8, 1.6 * min(x.channels, 160) + 24)
        for _ in range(w.rng.integers(1, 4)):
            kernel = int(w.rng.choice([3, 5, 1, 7], p=[0.72, 0.1, 0.15, 0.03]))
            x = w.conv(x, channels if w.coin(0.6) else w.width(8, 1.5 * channels), kernel)
        if w.coin(0.6):
            x = w.pool(x) if w.coin(0.7) else w.conv(x, x.channels, 3, 2)
    return x


def _resnet(w: _Writer, x: _Shape) -> _Shape:
    bottleneck, late = w.coin(0.35), w.coin(0.8)
    x = w.conv(x, w.width(12, 96), 3)
    while w.goes_on(70):
        stride = 2 if x.side > 6 and w.coin(0.3) else 1
        out = w.width(12, 256) if stride == 2 or w.coin(0.15) else x.channels
        middle = w.width(max(8, out / 4), out) if w.coin(0.8) else out
        y = w.conv(x, middle, 1 if bottleneck else 3, 1 if bottleneck else stride)
        if bottleneck:
            y = w.conv(y, middle, 3, stride)
        y = w.conv(y, out, 1 if bottleneck else 3, act=None if late else "default")
        skip = x if (out, stride) == (x.channels, 1) else w.conv(x, out, 1, stride, act=None)
        x = w.add(skip, y, act="Relu" if late else None)
    return x


def _grouped(w: _Writer, x: _Shape) -> _Shape:
    groups = int(w.rng.choice([2, 4, 8]))
    x = w.conv(x, w.width(32, 96) // groups * groups + groups, 3)
    while w.goes_on(60):
        stride = 2 if x.side > 6 and w.coin(0.25) else 1
        middle = max(1, w.width(24, 192) // groups) * groups
        y = w.conv(x, middle, 1)
        if y.channels % groups == 0:
            y = w.conv(y, middle, 3, stride, groups=groups if y.channels == middle else 1)
        x = w.add(x, w.conv(y, x.channels, 1, act=None), act="Relu")
    return x


def _squeeze(w: _Writer, x: _Shape) -> _Shape:
    """Squeeze and excite: the gate is a spatial mean, two 1x1 convolutions and a product."""
    y = w.conv(w.mean(x), max(2, x.channels // int(w.rng.choice([4, 8, 16]))), 1, act="Relu")
    y = w.conv(y, x.channels, 1, act="Sigmoid" if w.coin(0.6) else "HardSigmoid")
    return _Shape(w.node("Mul", [x.name, y.name]), x.channels, x.side) if y.channels == x.channels else x


def _inverted(w: _Writer, x: _Shape, *, squeeze: float) -> _Shape:
    x = w.conv(x, w.width(8, 48), 3)
    while w.goes_on(90):
        stride = 2 if x.side > 6 and w.coin(0.25) else 1
        out = w.width(8, 160) if stride == 2 or w.coin(0.25) else x.channels
        # Pruned networks have free expansion widths; the textbook ones a factor of the input's.
        middle = w.width(16, 384) if w.coin(0.6) else x.channels * int(w.rng.choice([1, 2, 3, 4, 6]))
        y = w.conv(x, middle, 1) if middle != x.channels else x
        kernel = int(w.rng.choice([3, 5, 7], p=[0.65, 0.3, 0.05]))
        y = w.conv(y, y.channels, kernel, stride, groups=y.channels)
        if w.coin(squeeze):
            y = _squeeze(w, y)
        x = w.add(x, w.conv(y, out, 1, act=None))
    return x


def _mobile(w: _Writer, x: _Shape) -> _Shape:
    return _inverted(w, x, squeeze=0.0)


def _se(w: _Writer, x: _Shape) -> _Shape:
    if w.coin(0.6):
        return _inverted(w, x, squeeze=0.7)
    x = w.conv(x, w.width(12, 96), 3)
    while w.goes_on(70):
        x = w.add(x, _squeeze(w, w.conv(w.conv(x, w.width(12, 160), 3), x.channels, 3, act=None)), act="Relu")
        x = w.pool(x) if w.coin(0.2) else x
    return x


def _separable(w: _Writer, x: _Shape) -> _Shape:
    x = w.conv(x, w.width(8, 64), 3)
    while w.goes_on(80):
        stride = 2 if x.side > 6 and w.coin(0.25) else 1
        x = w.conv(x, x.channels, int(w.rng.choice([3, 5])), stride, groups=x.channels)
        x = w.conv(x, w.width(12, 320), 1)
    return x


def _dense(w: _Writer, x: _Shape) -> _Shape:
    x = w.conv(x, w.width(12, 64), 3)
    growth = w.width(8, 40)
    while w.goes_on(70):
        y = w.conv(x, w.width(growth, 4 * growth), 1) if w.coin(0.6) else x
        x = w.concat([x, w.conv(y, growth, 3)])
        if x.channels > 200 or w.coin(0.12):
            x = w.pool(w.conv(x, w.width(16, 96), 1))
    return x


def _branches(w: _Writer, x: _Shape) -> _Shape:
    x = w.conv(x, w.width(12, 96), 3)
    while w.goes_on(80):
        parts = [w.conv(w.conv(x, w.width(8, 64), 1), w.width(8, 96), int(k)) for k in w.rng.choice([3, 5], size=2)]
        parts.append(w.conv(x, w.width(8, 64), 1))
        x = w.concat([p for p in parts if p.name != x.name] or [x])
        x = w.pool(x) if w.coin(0.3) else x
    return x


def _even(channels: int) -> int:
    return max(2, channels + channels % 2)


def _shuffle(w: _Writer, x: _Shape) -> _Shape:
    """Half of the channels passes by, the other goes through a separable branch; then they are interleaved."""
    x = w.conv(x, _even(w.width(16, 64)), 3)
    while w.goes_on(90):
        if x.side > 6 and w.coin(0.3):
            half = max(2, w.width(x.channels / 2, 1.2 * x.channels))
            left = w.conv(w.conv(x, x.channels, 3, 2, groups=x.channels, act=None), half, 1)
            right = w.conv(x, half, 1)
            right = w.conv(right, right.channels, 3, 2, groups=right.channels, act=None)
            right = w.conv(right, half, 1)
            if (left.channels, left.side) != (right.channels, right.side):
                return x
            x = w.shuffle(w.concat([left, right]))
        elif x.channels % 2:
            return x
        else:
            left, right = w.split(x)
            y = w.conv(w.conv(right, right.channels, 1), right.channels, 3, groups=right.channels, act=None)
            x = w.shuffle(w.concat([left, w.conv(y, right.channels, 1)]))
    return x


def _cheap(w: _Writer, x: _Shape) -> _Shape:
    """A few channels by a dense convolution, as many again by a depth-wise one of those, side by side."""
    x = w.conv(x, w.width(12, 48), 3)
    while w.goes_on(90):
        out = w.width(12, 160) if w.coin(0.3) else x.channels
        y = w.conv(x, w.width(16, 160), 1)
        y = w.concat([y, w.conv(y, y.channels, 3, groups=y.channels)])
        if x.side > 6 and w.coin(0.25):
            y = w.conv(y, y.channels, 3, 2, groups=y.channels, act=None)
        if w.coin(0.3):
            y = _squeeze(w, y)
        z = w.conv(y, max(1, out // 2), 1, act=None)
        z = w.concat([z, w.conv(z, z.channels, 3, groups=z.channels, act=None)])
        x = w.add(x, z)
    return x


def _partial(w: _Writer, x: _Shape) -> _Shape:
    """Residual blocks on a part of the channels; all parts are joined at the end of a stage."""
    x = w.conv(x, _even(w.width(16, 96)), 3)
    while w.goes_on(80):
        if x.side > 6 and w.coin(0.5):
            x = w.conv(x, _even(w.width(x.channels, 1.6 * x.channels)), 3, 2)
        if x.channels % 2 == 0 and w.coin(0.5):
            left, y = w.split(x)
        else:
            left, y = w.conv(x, w.width(8, 96), 1), w.conv(x, w.width(8, 96), 1)
        parts = [left, y]
        for _ in range(w.rng.integers(1, 4)):
            y = w.add(y, w.conv(w.conv(y, w.width(8, 96), 1), y.channels, 3))
            parts.append(y)
        x = w.conv(w.concat(parts if w.coin(0.5) else [left, y]), _even(w.width(16, 160)), 1)
    return x


#: Families by name. A later source (user models) only adds names; the order is part of the plan.
FAMILIES: dict[str, Callable[[_Writer, _Shape], _Shape]] = {
    "vgg": _vgg,
    "resnet": _resnet,
    "mobile": _mobile,
    "se": _se,
    "separable": _separable,
    "dense": _dense,
    "branches": _branches,
    "grouped": _grouped,
    "shuffle": _shuffle,
    "cheap": _cheap,
    "partial": _partial,
}
_SHARES = {
    "vgg": 4, "resnet": 5, "mobile": 6, "se": 3, "separable": 3, "dense": 2, "branches": 2, "grouped": 2, "shuffle": 2,
    "cheap": 2, "partial": 2,
}  # fmt: skip


def random_family(rng: np.random.Generator) -> str:
    """A family name, the commoner ones more often."""
    shares = np.array([_SHARES[name] for name in FAMILIES], dtype=float)
    return str(rng.choice(list(FAMILIES), p=shares / shares.sum()))


def random_network(family: str, rng: np.random.Generator) -> bytes:
    """One random network of a family as ONNX bytes: batch 1, input ``input``, output ``output``, weights inside.

    Args:
        family: a key of ``FAMILIES``.
        rng: decides everything; the same state gives the same bytes.

    Example:
        >>> len(random_network("vgg", np.random.default_rng(0))) > 1000
        True
    """
    from onnx import TensorProto, helper, numpy_helper

    writer = _Writer(rng)
    if writer.kind == "large" and writer.coin(0.75):
        # The later stages of a large network: those hold its weights.
        side = int(rng.choice([4, 7, 8, 14, 28, 56], p=[0.15, 0.25, 0.15, 0.2, 0.15, 0.1]))
        channels = writer.width(48, 192 if side <= 14 else 64)
        x = _Shape("input", channels, side)
    elif writer.kind == "small":
        side = int(rng.choice([8, 14, 16, 28, 32], p=[0.1, 0.2, 0.2, 0.3, 0.2]))
        channels = int(rng.choice([1, 3])) if writer.coin(0.75) else writer.width(8, 64)
        x = _Shape("input", channels, side)
    elif writer.coin(0.45):
        # A whole network, image first. Large images only with few channels: they are slow and all alike.
        side = int(rng.choice([28, 32, 48, 56, 64, 96, 112, 224], p=[0.3, 0.22, 0.1, 0.1, 0.12, 0.06, 0.06, 0.04]))
        channels = int(rng.choice([1, 3]))
        x = _Shape("input", channels, side)
        if side > 32 or writer.coin(0.4):
            x = writer.conv(x, writer.width(8, 48 if side < 100 else 24), int(rng.choice([3, 5, 7])), 2)
        if side > 64:
            x = writer.pool(x) if writer.coin(0.5) else writer.conv(x, writer.width(8, 40), 3, 2)
    else:
        # The middle of one: the kernels that an image-first network of this size would never reach.
        side = int(rng.choice([7, 8, 14, 16, 20, 28, 40, 56], p=[0.17, 0.1, 0.2, 0.1, 0.08, 0.2, 0.05, 0.1]))
        channels = writer.width(8, 256 if side <= 14 else 96)
        x = _Shape("input", channels, side)
    shape = [1, channels, side, side]
    x = FAMILIES[family](writer, x)
    x = writer.conv(x, writer.width(32, 256), 1) if writer.coin(0.2) else x
    if x.side * x.side * x.channels <= 2048 and writer.coin(0.3):
        features = x.side * x.side * x.channels
        flat = writer.node("Flatten", [x.name])
    else:
        x, features = writer.mean(x), x.channels
        target = writer.constant(np.array([1, features], dtype=np.int64))
        flat = writer.node("Flatten", [x.name]) if writer.coin(0.5) else writer.node("Reshape", [x.name, target])
    if writer.coin(0.3):
        hidden = writer.width(32, 512)
        flat, features = writer.node("Relu", [writer.gemm(flat, features, hidden)]), hidden
    classes = int(rng.choice([10, 100, 1000]))
    writer.gemm(flat, features, classes)
    writer.nodes[-1].output[0] = "output"
    graph = helper.make_graph(
        writer.nodes,
        family,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, classes])],
        [numpy_helper.from_array(values, name) for name, values in writer.weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="hwsearch")
    model.ir_version = 9
    return bytes(model.SerializeToString(deterministic=True))
