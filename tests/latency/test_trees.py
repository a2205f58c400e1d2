"""Files of trees are looked through before XGBoost gets them: what it would end the process at is one clear error."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hwsearch.latency.trees import check_trees

FEATURES = 4


@pytest.fixture(scope="module")
def trees() -> bytes:
    xgboost = pytest.importorskip("xgboost")
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, FEATURES))
    matrix = xgboost.DMatrix(inputs, inputs[:, 0] + inputs[:, 1] ** 2)
    return bytes(xgboost.train({"max_depth": 2, "nthread": 1}, matrix, 3).save_raw("ubj"))


def test_what_xgboost_writes_is_let_through(trees: bytes) -> None:
    check_trees(trees, FEATURES)


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"[]", b"not a model", b"\x00" * 100, b"{" * 10_000])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        check_trees(data, FEATURES)


def numbers(trees: bytes, name: bytes, place: int, value: int) -> bytes:
    """One whole number of the first tree's array, replaced."""
    at = trees.index(name + b"[$l#L") + len(name) + 5 + 8 + 4 * place
    return trees[:at] + value.to_bytes(4, "big", signed=True) + trees[at + 4 :]


@pytest.mark.parametrize(
    ("name", "place", "value", "says"),
    [
        (b"left_children", 0, 0, "children are not its own"),
        (b"left_children", 0, 1_000_000, "children are not its own"),
        (b"right_children", 0, -7, "children are not its own"),
        (b"split_indices", 0, FEATURES, "asks for what is not there"),
        (b"split_indices", 0, -1, "asks for what is not there"),
        (b"parents", 1, 99, "parents are not its own"),
    ],
)
def test_a_tree_that_points_elsewhere_is_refused(trees: bytes, name: bytes, place: int, value: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_trees(numbers(trees, name, place, value), FEATURES)


def test_trees_of_other_features_are_refused(trees: bytes) -> None:
    with pytest.raises(ValueError, match="other features"):
        check_trees(trees, FEATURES + 1)


def test_whatever_is_cut_or_changed_ends_in_one_kind_of_error(trees: bytes) -> None:
    rng = random.Random(0)
    for _ in range(400):
        data = bytearray(trees)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.randrange(len(data))] if rng.random() < 0.3 else data
        try:
            check_trees(bytes(data), FEATURES)
        except (ValueError, TypeError):
            continue
