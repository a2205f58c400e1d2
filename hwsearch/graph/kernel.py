"""``Kernel``: the unit of latency, one node of the graph that a runtime really executes.

Kernels come from a runtime's own optimised graph, so channel counts are the padded ones, fused tails are what the
runtime fused, and layout changes are kernels of their own. Two kernels are equal when the runtime would run the same
code on the same shapes; where they came from (``node``, ``source``) does not take part in the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

#: Families that the predictors know. ``other`` is the honest name for an operation nobody has mapped yet.
FAMILIES = (
    "conv",            # dense convolution with a spatial kernel larger than 1x1
    "conv_first",      # dense convolution fed by a plain-layout tensor of few channels (a stem)
    "pointwise",       # dense 1x1 convolution
    "depthwise",       # groups == channels
    "grouped",         # 1 < groups < channels
    "conv_transpose",
    "gemm",            # linear layers and matrix products
    "pool",
    "global_pool",     # spatial mean or global pooling
    "elementwise",     # add, mul, relu, sigmoid ... not fused into anything
    "reorder",         # change of tensor layout
    "concat",
    "move",            # transpose, slice, split, pad: bytes moved, nothing computed
    "free",            # reshape, flatten, identity: a view
    "other",
)

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int32": 4, "int64": 8}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One executed node: what it does, on which shapes, in which layout and precision.

    Shapes are those of the main input ``(batch, in_channels, in_height, in_width)`` and of the output
    ``(batch, out_channels, out_height, out_width)``; a flat tensor has height and width 1.
    ``fused`` lists the tail that the runtime merged into the node, in order: ``("add", "relu")``.
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
        """Number of weight elements that the kernel reads."""
        if self.family in ("conv", "conv_first", "pointwise", "depthwise", "grouped", "conv_transpose"):
            per_output = self.in_channels // max(self.groups, 1) * self.kernel_height * self.kernel_width
            return per_output * self.out_channels
        if self.family == "gemm":
            return self.in_channels * self.out_channels
        return 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates as run, padded channels included (batch times spatial positions times weights)."""
        if self.family == "gemm":
            return self.batch * self.in_height * self.in_width * self.weight_elements
        if self.family == "conv_transpose":
            return self.batch * self.in_height * self.in_width * self.weight_elements
        return self.batch * self.out_height * self.out_width * self.weight_elements

    @property
    def input_elements(self) -> int:
        """Elements read over all activation inputs (a fused add reads one more tensor of the output's shape)."""
        main = self.batch * self.in_channels * self.in_height * self.in_width
        extra = self.output_elements if "add" in self.fused else 0
        if self.family == "elementwise" and self.inputs > 1:
            extra += main * (self.inputs - 1)
        return main + extra

    @property
    def output_elements(self) -> int:
        """Elements written."""
        return self.batch * self.out_channels * self.out_height * self.out_width

    @property
    def memory_bytes(self) -> int:
        """Bytes read and written once each: inputs, weights and output."""
        size = _ELEMENT_BYTES.get(self.dtype, 4)
        return size * (self.input_elements + self.weight_elements + self.output_elements)
