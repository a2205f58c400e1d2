"""A kernel as numbers: what a regressor sees (``describe``) and what the analytic base is a sum of (``cost_terms``).

Both know how blocked convolutions spend their time. A runtime that keeps channels in blocks of 8 or 16 computes up to
four blocks of output channels at once; a remainder of one block runs at a fraction of the speed, which is the staircase
that widths show. Padded image borders, and partial sums written once per block of input channels, cost extra too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwsearch.graph.kernel import Kernel

CONVOLUTIONS = ("conv", "conv_first", "pointwise", "depthwise", "grouped", "conv_transpose")
_BLOCKS_AT_ONCE = 4

FEATURES = (
    "log_base", "log_macs", "log_bytes", "log_in", "log_out", "log_weights", "intensity",
    "in_channels", "out_channels", "channels_per_group", "in_height", "in_width", "out_height", "out_width",
    "positions",
    "kernel_area", "kernel_width", "stride", "dilation", "groups", "batch", "inputs",
    "in_mod_4", "in_mod_8", "in_mod_16", "out_mod_4", "out_mod_8", "out_mod_16",
    "in_blocks", "out_blocks", "last_set", "block_sets", "out_width_mod_3", "out_width_mod_6", "border",
    "l1_fit", "l2_fit", "weights_l2_fit", "has_add", "tail", "op", "layout", "dtype",
)  # fmt: skip

TERMS = (
    "one", "macs_full", "macs_last_1", "macs_last_2", "macs_last_3", "macs_border", "partial_sums", "rows",
    "macs_plain", "columns_plain", "calls_plain", "bytes_in", "bytes_out", "bytes_weights", "bytes_far", "gate",
)  # fmt: skip

_L1_BYTES, _L2_BYTES = 32 * 1024, 1024 * 1024


@dataclass(frozen=True)
class Vocabulary:
    """The texts a fit has seen, each with a number; the rest are unknown (NaN to the regressor).

    Attributes:
        tails, ops, layouts, dtypes: sorted distinct values.
        block: channels in a block of the blocked layout (8 or 16), read off the channel counts themselves.
    """

    tails: tuple[str, ...]
    ops: tuple[str, ...]
    layouts: tuple[str, ...]
    dtypes: tuple[str, ...]
    block: int = 8

    @classmethod
    def of(cls, kernels: Iterable[Kernel]) -> Vocabulary:
        """The vocabulary of these kernels."""
        kernels = list(kernels)
        divisor = 0
        for kernel in kernels:
            if kernel.family in CONVOLUTIONS and is_blocked(kernel.layout_out):
                divisor = math.gcd(divisor, kernel.out_channels)
        return cls(
            tails=tuple(sorted({tail(k) for k in kernels})),
            ops=tuple(sorted({k.op for k in kernels})),
            layouts=tuple(sorted({layouts(k) for k in kernels})),
            dtypes=tuple(sorted({k.dtype for k in kernels})),
            block=16 if divisor and divisor % 16 == 0 else 8,
        )

    def knows(self, kernel: Kernel) -> bool:
        """Whether every text of the kernel was seen."""
        return (
            tail(kernel) in self.tails
            and kernel.op in self.ops
            and layouts(kernel) in self.layouts
            and kernel.dtype in self.dtypes
        )


def weight_mb(kernels: Sequence[Kernel]) -> np.ndarray:
    """Megabytes (2^20) of weights that each kernel reads, (N,)."""
    found = []
    for k in kernels:
        elements = k.input_elements + k.weight_elements + k.output_elements
        found.append(k.weight_elements * (k.memory_bytes / elements) / 2**20 if elements else 0.0)
    return np.array(found, dtype=np.float64)


def is_blocked(layout: str) -> bool:
    """Whether a layout keeps channels in blocks (``nchwc``, ``nchw8c``, ``nchw16c``)."""
    return layout.startswith("nchw") and layout.endswith("c")


def tail(kernel: Kernel) -> str:
    """The fused tail as one text."""
    return "+".join(kernel.fused)


def layouts(kernel: Kernel) -> str:
    """Both layouts as one text."""
    return f"{kernel.layout_in}>{kernel.layout_out}"


def variant(kernel: Kernel) -> str:
    """The code path a kernel takes, as far as its texts tell: its operation, layouts, tail and precision."""
    return f"{kernel.op}|{layouts(kernel)}|{tail(kernel)}|{kernel.dtype}"


def _numbers(kernels: Sequence[Kernel]) -> Mapping[str, np.ndarray]:
    """The integer fields as float64 columns, (N,) each, and what both tables below derive from them."""
    rows = np.array(
        [
            (
                k.batch, k.in_channels, k.in_height, k.in_width, k.out_channels, k.out_height, k.out_width,
                k.kernel_height, k.kernel_width, k.stride, k.dilation, k.groups, k.inputs, k.macs, k.memory_bytes,
                k.input_elements, k.output_elements, k.weight_elements, k.family in CONVOLUTIONS,
                is_blocked(k.layout_in), is_blocked(k.layout_out), "add" in k.fused,
            )
            for k in kernels
        ],
        dtype=np.float64,
    ).reshape(len(kernels), 22)  # fmt: skip
    names = (
        "batch", "ic", "ih", "iw", "oc", "oh", "ow", "kh", "kw", "stride", "dilation", "groups", "inputs", "macs",
        "bytes", "in", "out", "weights", "is_conv", "blocked_in", "blocked_out", "add",
    )  # fmt: skip
    return {name: rows[:, index] for index, name in enumerate(names)}


def _blocks(n: Mapping[str, np.ndarray], block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of input channels of a group, blocks of output channels, and the share of output columns at a border."""
    depthwise = (n["groups"] > 1) & (n["groups"] >= n["ic"])
    in_blocks = np.where(depthwise, 1, np.ceil(n["ic"] / np.maximum(n["groups"], 1) / block))
    out_blocks = np.ceil(n["oc"] / block)
    padding = np.maximum((n["ow"] - 1) * n["stride"] + (n["kw"] - 1) * n["dilation"] + 1 - n["iw"], 0)
    border = np.where(n["is_conv"] > 0, np.minimum(np.ceil(padding / n["stride"]) / n["ow"], 1), 0)
    return in_blocks, out_blocks, border


def _inside(n: Mapping[str, np.ndarray]) -> np.ndarray:
    """Share of the window taps that fall inside the image: those at the padded border are skipped."""
    shares = []
    for size, out, taps in (("ih", "oh", "kh"), ("iw", "ow", "kw")):
        reach = (n[taps] - 1) * n["dilation"]
        before = np.maximum((n[out] - 1) * n["stride"] + reach + 1 - n[size], 0) // 2
        inside = np.zeros(len(before))
        for tap in range(int(n[taps].max(initial=1))):
            # Output positions whose tap number ``tap`` lies in [0, size).
            low = np.ceil(np.maximum(before - tap * n["dilation"], 0) / n["stride"])
            high = np.floor((n[size] - 1 + before - tap * n["dilation"]) / n["stride"])
            count = np.clip(np.minimum(high, n[out] - 1) - low + 1, 0, None)
            inside += np.where(tap < n[taps], count, 0)
        shares.append(inside / np.maximum(n[out] * n[taps], 1))
    return np.asarray(np.clip(shares[0] * shares[1], 1e-3, 1))


def cost_terms(kernels: Sequence[Kernel], vocabulary: Vocabulary) -> np.ndarray:
    """What time is a non-negative sum of: (N, len(TERMS)), in millions (of MACs, elements, bytes) except ``one``."""
    n = _numbers(kernels)
    in_blocks, out_blocks, border = _blocks(n, vocabulary.block)
    blocked = (n["blocked_out"] > 0) & (n["is_conv"] > 0)
    # Depth-wise convolutions have one input channel an output: no sets of blocks, and no remainder to pay for.
    in_sets = blocked & (n["groups"] < n["oc"])
    last = np.where(in_sets, out_blocks % _BLOCKS_AT_ONCE, 0)
    last_share = last / np.maximum(out_blocks, 1)
    size = np.divide(n["bytes"], np.maximum(n["in"] + n["out"] + n["weights"], 1))
    gate = np.array([any(t not in ("add", "relu") for t in k.fused) for k in kernels], dtype=np.float64)
    plain = (n["is_conv"] > 0) & ~blocked
    macs = n["macs"] * np.where(blocked, _inside(n), 1)
    columns = [
        np.full(len(kernels), 1e6),
        np.where(blocked, macs * (1 - last_share), 0),
        *(np.where(blocked & (last == r), macs * last_share, 0) for r in (1, 2, 3)),
        np.where(blocked, macs * border, 0),
        np.where(in_sets, n["out"] * (in_blocks - 1), 0),
        np.where(blocked, n["batch"] * n["oh"] * np.ceil(out_blocks / _BLOCKS_AT_ONCE) * in_blocks, 0),
        np.where(blocked, 0, n["macs"]),
        # A plain convolution copies its windows into a matrix first, once a group, then multiplies.
        np.where(plain, n["batch"] * n["ic"] * n["kh"] * n["kw"] * n["oh"] * n["ow"], 0),
        np.where(plain, n["batch"] * n["groups"], 0),
        n["in"] * size,
        n["out"] * size,
        n["weights"] * size,
        np.maximum(n["weights"] * size - _L2_BYTES / 2, 0),
        gate * n["out"],
    ]
    return np.stack(columns, axis=1) / 1e6


def describe(kernels: Sequence[Kernel], vocabulary: Vocabulary, log_base: np.ndarray) -> np.ndarray:
    """Features for the regressor: (N, len(FEATURES)) float32.

    Args:
        kernels: N kernels.
        vocabulary: texts to numbers; unseen ones become NaN.
        log_base: log of the analytic base in ms, (N,).
    """
    n = _numbers(kernels)
    in_blocks, out_blocks, border = _blocks(n, vocabulary.block)
    log = {name: np.log(np.maximum(n[name], 1)) for name in ("macs", "bytes", "in", "out", "weights")}
    codes = [
        (vocabulary.tails, [tail(k) for k in kernels]),
        (vocabulary.ops, [k.op for k in kernels]),
        (vocabulary.layouts, [layouts(k) for k in kernels]),
        (vocabulary.dtypes, [k.dtype for k in kernels]),
    ]
    coded = []
    for known, texts in codes:
        number = {text: float(index) for index, text in enumerate(known)}
        coded.append(np.array([number.get(text, math.nan) for text in texts]))
    size = np.divide(n["bytes"], np.maximum(n["in"] + n["out"] + n["weights"], 1))
    columns = [
        log_base, log["macs"], log["bytes"], log["in"], log["out"], log["weights"], log["macs"] - log["bytes"],
        n["ic"], n["oc"], n["ic"] / np.maximum(n["groups"], 1), n["ih"], n["iw"], n["oh"], n["ow"], n["oh"] * n["ow"],
        n["kh"] * n["kw"], n["kw"], n["stride"], n["dilation"], n["groups"], n["batch"], n["inputs"],
        n["ic"] % 4, n["ic"] % 8, n["ic"] % 16, n["oc"] % 4, n["oc"] % 8, n["oc"] % 16,
        in_blocks, out_blocks, out_blocks % _BLOCKS_AT_ONCE, np.ceil(out_blocks / _BLOCKS_AT_ONCE),
        n["ow"] % 3, n["ow"] % 6, border,
        # Does a row of inputs stay in L1, do the tensors and the weights stay in L2? Logs of the ratio: trees cut them.
        np.log(np.maximum(n["ic"] * n["kh"] * n["iw"] * size, 1) / _L1_BYTES),
        np.log(np.maximum((n["in"] + n["out"]) * size, 1) / _L2_BYTES),
        np.log(np.maximum(n["weights"] * size, 1) / _L2_BYTES),
        n["add"], *coded,
    ]  # fmt: skip
    return np.stack(columns, axis=1).astype(np.float32)
