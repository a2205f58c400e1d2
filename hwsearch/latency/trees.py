"""Read a file of trees without trusting it: XGBoost ends the whole process on bytes that are no UBJSON, and follows a
tree's numbers wherever they point.

XGBoost's own format is UBJSON with sizes and strings written one way; only that is read here. A tree whose children
come after it, within its arrays, ends; one that asks for features that there are reads nothing else.

Reference: https://ubjson.org/type-reference/ and XGBoost's ``UBJReader``; the schema is XGBoost's ``model.schema``.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

#: Marker of a number -> (``struct`` format, NumPy type), big-endian.
_NUMBERS = {
    b"i": (">b", ">i1"), b"U": (">B", ">u1"), b"I": (">h", ">i2"), b"l": (">i", ">i4"), b"L": (">q", ">i8"),
    b"d": (">f", ">f4"), b"D": (">d", ">f8"),
}  # fmt: skip
_WORDS = {b"Z": None, b"T": True, b"F": False}
_DEEPEST = 32


def check_trees(data: bytes, features: int) -> None:
    """Raises ValueError where XGBoost should not be given the bytes; ``features`` is how many it may ask for.

    Example:
        >>> check_trees(b"not a model", 4)
        Traceback (most recent call last):
        ValueError: no UBJSON object
    """
    if data[:1] != b"{":
        raise ValueError("no UBJSON object")
    reader = _Reader(data)
    document = reader.value(reader.take(1), 0)
    if reader.at != len(data):
        raise ValueError(f"{len(data) - reader.at} bytes too many")
    learner = _object(_object(document, "model").get("learner"), "learner")
    booster = _object(learner.get("gradient_booster"), "gradient_booster")
    objective = str(_object(learner.get("objective"), "objective").get("name"))
    if booster.get("name") != "gbtree" or not objective.startswith("reg:"):
        raise ValueError(f"{str(booster.get('name'))!r:.20} of {objective!r:.40} instead of regression trees")
    model = _object(booster.get("model"), "model")
    trees = model.get("trees")
    parameters = _object(model.get("gbtree_model_param"), "gbtree_model_param")
    if not isinstance(trees, list) or parameters.get("num_trees") != str(len(trees)):
        raise ValueError("another number of trees than it says")
    rounds = np.asarray(model.get("iteration_indptr"), dtype=np.int64)
    info = np.asarray(model.get("tree_info"), dtype=np.int64)
    if len(info) != len(trees) or info.any() or not np.array_equal(rounds, np.arange(len(trees) + 1)):
        raise ValueError("trees of several outputs")
    for tree in trees:
        _check_tree(_object(tree, "tree"), features)


def _check_tree(tree: dict[str, Any], features: int) -> None:
    left, right, split, kind = (
        np.asarray(tree.get(name), dtype=np.int64)
        for name in ("left_children", "right_children", "split_indices", "split_type")
    )
    count = len(left)
    others = ("split_conditions", "base_weights", "default_left", "parents", "loss_changes", "sum_hessian")
    sizes = {len(right), len(split), len(kind), *(len(tree.get(name, ())) for name in others)}
    parameters = _object(tree.get("tree_param"), "tree_param")
    if not count or sizes != {count} or parameters.get("num_nodes") != str(count):
        raise ValueError("a tree whose arrays differ in length")
    if parameters.get("num_feature") != str(features) or parameters.get("size_leaf_vector") not in ("0", "1"):
        raise ValueError("a tree of other features")
    inner = left >= 0
    place = np.arange(count)
    for children in (left, right):
        if (children[inner] <= place[inner]).any() or (children >= count).any() or (children[~inner] != -1).any():
            raise ValueError("a tree whose children are not its own")
    if (split < 0).any() or (split >= features).any() or kind.any() or len(tree.get("categories", ())):
        raise ValueError("a tree that asks for what is not there")
    parents = np.asarray(tree["parents"], dtype=np.int64)
    if ((parents[1:] < 0) | (parents[1:] >= count)).any():
        raise ValueError("a tree whose parents are not its own")


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is missing")
    return value


class _Reader:
    """Walks the bytes once. Raises ValueError at whatever does not fit."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        part = self.data[self.at : self.at + count]
        if count < 0 or len(part) != count:
            raise ValueError("it ends too early")
        self.at += count
        return part

    def value(self, marker: bytes, depth: int) -> Any:
        """The value behind a marker."""
        if depth > _DEEPEST:
            raise ValueError("too deep")
        if marker in _NUMBERS:
            layout = _NUMBERS[marker][0]
            return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        if marker in _WORDS:
            return _WORDS[marker]
        if marker == b"S":
            return self._text()
        if marker == b"{":
            found: dict[str, Any] = {}
            while self.data[self.at : self.at + 1] != b"}":
                name = self._text()
                found[name] = self.value(self.take(1), depth + 1)
            self.take(1)
            return found
        if marker == b"[":
            return self._list(depth)
        raise ValueError(f"the marker {marker!r}")

    def _list(self, depth: int) -> Any:
        kind = self.take(1)
        if kind == b"$":
            marker = self.take(1)
            if marker not in _NUMBERS or self.take(1) != b"#":
                raise ValueError("an array of no numbers")
            numbers = np.dtype(_NUMBERS[marker][1])
            return np.frombuffer(self.take(self._size() * numbers.itemsize), numbers)
        if kind == b"#":
            return [self.value(self.take(1), depth + 1) for _ in range(self._size())]
        raise ValueError("a list without a length")

    def _text(self) -> str:
        return self.take(self._size()).decode()

    def _size(self) -> int:
        """A length: always written in 64 bits."""
        size = struct.unpack(">q", self.take(8))[0] if self.take(1) == b"L" else -1
        if not 0 <= size <= len(self.data):
            raise ValueError(f"the length {size}")
        return int(size)
