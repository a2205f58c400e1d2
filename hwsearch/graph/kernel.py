"""``Kernel``: the unit of latency, one node of the graph that a runtime really executes.

Kernels come from a runtime's own optimised graph, so channel counts are the padded ones, fused tails are what the
runtime fused, and layout changes are kernels of their own. Two kernels are equal when the runtime would run the same
code on the same shapes; where they came from (``node``, ``source``) does not take part in the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache

#: Families that the predictors know. ``other`` is the honest name for an operation nobody has mapped yet.
FAMILIES = (
    "conv",            # dense convolution with a spatial kernel larger than 1x1
    "conv_first",      # dense convolution fed by a plain-layout tensor of few channels (a stem)
    "pointwise",       # dense 1x1 convolution
    "depthwise",       # groups == channels
    "grouped",         # 1 < groups < channels
    "conv_transpose",
    "gemm",            # linear layers and matrix products
    "attention",       # scores, softmax and mixing in one node
    "recurrent",       # LSTM, GRU, RNN: a chain of products, one a step
    "pool",
    "global_pool",     # spatial mean or global pooling
    "reduce",          # any other sum, mean, maximum along axes
    "norm",            # layer, group, instance normalisation and softmax: several passes over each row
    "elementwise",     # add, mul, relu, sigmoid ... not fused into anything
    "resize",          # interpolation
    "reorder",         # change of tensor layout
    "concat",
    "move",            # transpose, slice, split, pad: bytes moved, nothing computed
    "free",            # reshape, flatten, identity: a view
    "other",
)  # fmt: skip

_CONVOLUTIONS = ("conv", "conv_first", "pointwise", "depthwise", "grouped", "conv_transpose")

_ELEMENT_BYTES = {
    "float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float64": 8.0, "int4": 0.5, "int8": 1.0, "uint8": 1.0,
    "int16": 2.0, "uint16": 2.0, "int32": 4.0, "uint32": 4.0, "int64": 8.0, "uint64": 8.0, "bool": 1.0,
}  # fmt: skip


@cache
def element_bytes(dtype: str) -> tuple[float, float, float]:
    """Bytes per element of (input, weights, output) of a kernel's ``dtype``; an unknown name counts as four.

    Example:
        >>> element_bytes("float32"), element_bytes("uint8*int8>int32")
        ((4.0, 4.0, 4.0), (1.0, 1.0, 4.0))
    """
    rest, _, written = dtype.partition(">")
    read, _, weights = rest.partition("*")
    size = _ELEMENT_BYTES.get(read, 4.0)
    return size, _ELEMENT_BYTES.get(weights, 4.0) if weights else size, _ELEMENT_BYTES.get(written, size)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One executed node: what it does, on which shapes, in which layout and precision.

    Shapes are those of the main input ``(batch, in_channels, in_height, in_width)`` and of the output
    ``(batch, out_channels, out_height, out_width)``; a flat tensor has height and width 1.
    ``fused`` lists the tail that the runtime merged into the node, in order: ``("add", "relu")``.

    ``dtype`` is the element type of the main input; where they differ, ``*`` and that of the weights, ``>`` and that of
    the output: ``float32``, ``uint8*int8`` (8-bit activations times signed weights), ``float32>uint8`` (quantising).

    Some families use the fields in a way of their own:

    * gemm: ``in_channels`` values a row, ``out_channels`` results. Rows are the batch where the second operand is one
      matrix; in a stack of products ``batch`` counts the stack and ``in_height`` the rows. ``inputs`` is 2 where the
      second operand is no constant.
    * attention: ``in_height`` queries of ``in_channels`` values, ``kernel_height`` keys, ``groups`` heads,
      ``kernel_width`` columns of a projection in the same node (1: none), ``out_channels`` results a query.
    * recurrent: ``in_height`` steps, ``groups`` directions, ``kernel_height`` gates; ``out_channels`` over all
      directions.
    * norm: ``in_height`` rows of ``in_channels`` values.
    * resize: ``kernel_height`` times ``kernel_width`` points read for each one written.
    """

    family: str
    op: str
    dtype: str = "float32"
    layout_in: str = "nchw"
    layout_out: str = "nchw"
    fused: tuple[str, ...] = ()
    batch: int = 1
    in_channels: int = 1
    in_height: int = 1
    in_width: int = 1
    out_channels: int = 1
    out_height: int = 1
    out_width: int = 1
    kernel_height: int = 1
    kernel_width: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    inputs: int = 1
    node: str = field(default="", compare=False)
    source: tuple[str, ...] = field(default=(), compare=False)

    @property
    def key(self) -> str:
        """A stable text identity, equal for equal kernels: used in tables and journals."""
        return "|".join(
            "+".join(value) if isinstance(value := getattr(self, f.name), tuple) else str(value)
            for f in fields(self)
            if f.compare
        )

    @property
    def weight_elements(self) -> int:
        """Number of weight elements that the kernel reads; the second of two activations is no weight."""
        if self.family in _CONVOLUTIONS:
            per_output = self.in_channels // max(self.groups, 1) * self.kernel_height * self.kernel_width
            return per_output * self.out_channels
        if self.family == "gemm":
            return self.in_channels * self.out_channels if self.inputs == 1 else 0
        if self.family == "attention":
            return self.in_channels * self.kernel_width if self.kernel_width > 1 else 0
        if self.family == "recurrent":
            inner = self.in_channels + self.out_channels // max(self.groups, 1)
            return self.kernel_height * self.out_channels * inner
        return 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates as run, padded channels included (batch times spatial positions times weights)."""
        rows = self.batch * self.in_height * self.in_width
        if self.family == "gemm":
            return rows * self.in_channels * self.out_channels
        if self.family in ("conv_transpose", "recurrent"):
            return rows * self.weight_elements
        if self.family == "attention":
            # Scores take the width of the keys, mixing that of the values; a projection has both twice and once.
            projected = self.kernel_width > 1
            width = (self.kernel_width - self.out_channels) // 2 if projected else self.in_channels
            return rows * (self.kernel_height * (width + self.out_channels) + self.weight_elements)
        return self.batch * self.out_height * self.out_width * self.weight_elements

    @property
    def input_elements(self) -> int:
        """Elements read over all activation inputs (a fused add reads one more tensor of the output's shape)."""
        if self.family == "concat":
            return self.output_elements  # all parts, of which ``in_channels`` names the first
        main = self.batch * self.in_channels * self.in_height * self.in_width
        extra = self.output_elements if "add" in self.fused else 0
        if self.family in ("elementwise", "norm") and self.inputs > 1:
            extra += main * (self.inputs - 1)
        if self.family == "gemm" and self.inputs > 1:
            extra += self.batch * self.in_channels * self.out_channels
        if self.family == "attention" and self.kernel_width == 1:
            extra += self.batch * self.kernel_height * (self.in_channels + self.out_channels)
        return main + extra

    @property
    def output_elements(self) -> int:
        """Elements written."""
        return self.batch * self.out_channels * self.out_height * self.out_width

    @property
    def memory_bytes(self) -> int:
        """Bytes read and written once each: inputs, weights and output."""
        read, weights, written = element_bytes(self.dtype)
        return int(self.input_elements * read + self.weight_elements * weights + self.output_elements * written)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights read."""
        return int(self.weight_elements * element_bytes(self.dtype)[1])
