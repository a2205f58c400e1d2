"""Ridge, table and base beside the trees: what each tells, and which one a family gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hwsearch.errors import SchemaError
from hwsearch.latency.boosting import BoostSettings
from hwsearch.latency.corrections import BASE, RIDGE, TABLE, TREES, Correction, choose
from hwsearch.latency.features import FEATURES
from hwsearch.latency.model import KernelModel
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.latency.training import Rows

FEW = BoostSettings(rounds=8)


@pytest.fixture(scope="module")
def rows(campaign: Any) -> Rows:
    return Rows.of(campaign.table.networks)


def test_a_ridge_finds_a_line_and_does_not_run_away() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((4000, len(FEATURES))).astype(np.float32)
    features[:, -4:] = np.nan  # unknown texts have no number
    target = 0.2 + 0.1 * features[:, 1] - 0.05 * features[:, 3]
    found = Correction.fit(RIDGE, [], features, target, np.ones(4000))
    assert found.log_factor([], features) == pytest.approx(target, abs=2e-3)
    assert np.abs(found.log_factor([], 1e6 * features)).max() <= 1.5
    assert Correction.from_dict(found.to_dict()) == found


def test_a_table_knows_its_kernels_and_no_others(campaign: Any) -> None:
    one, two, three = list(dict.fromkeys(campaign.table.networks[0].kernels))[:3]
    target, weight = np.array([0.1, 0.4, 0.7]), np.array([1.0, 2.0, 1.0])
    found = Correction.fit(TABLE, [one, one, two], np.zeros((3, len(FEATURES))), target, weight)
    asked = [one, replace(one, node="elsewhere"), two, three]
    assert found.log_factor(asked, np.zeros((4, len(FEATURES)))) == pytest.approx([0.3, 0.3, 0.7, 0.0])
    assert Correction.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("errors", "wanted"),
    [
        ({TREES: 0.10, BASE: 0.20, RIDGE: 0.15, TABLE: 0.18}, TREES),
        ({TREES: 0.10, BASE: 0.099, RIDGE: 0.15, TABLE: 0.18}, TREES),
        ({TREES: 0.10, BASE: 0.20, RIDGE: 0.05, TABLE: 0.18}, RIDGE),
        ({BASE: 0.1, RIDGE: 0.05}, RIDGE),
    ],
)
def test_the_choice_prefers_trees_unless_clearly_worse(errors: dict[str, float], wanted: str) -> None:
    assert choose({kind: np.full(3, value) for kind, value in errors.items()}, np.ones(3)) == wanted


def test_cross_validation_chooses_what_errs_least(campaign: Any) -> None:
    checked = campaign.predictor.cross_validation_
    assert campaign.predictor.kinds_ == dict(checked.kinds)
    assert set(checked.kinds.values()) <= {TREES, BASE, RIDGE, TABLE}
    assert checked.kinds["conv"] == TREES


def test_a_family_with_another_kind_is_priced_by_it_and_saved(campaign: Any, rows: Rows) -> None:
    trees = KernelModel.fit(rows, FEW)
    mixed = KernelModel.fit(rows, FEW, {"conv": RIDGE, "pool": TABLE, "pointwise": BASE})
    assert set(trees.boosters) - set(mixed.boosters) == {"conv", "pool", "pointwise"}
    kernels = list(dict.fromkeys(k for n in campaign.table.networks for k in n.kernels))[:400]
    one, other = trees.ms(kernels), mixed.ms(kernels)
    differ = {k.family for k, a, b in zip(kernels, one, other, strict=True) if abs(a / b - 1) > 1e-6}
    assert {"conv", "pool", "pointwise"} <= differ
    document, files = mixed.to_files()
    assert KernelModel.from_files(document, files).ms(kernels) == pytest.approx(other, rel=1e-12)
    document["corrections"]["conv"]["slope"] = [1.0]
    with pytest.raises(SchemaError, match="damaged"):
        KernelModel.from_files(document, files)


def test_a_saved_predictor_remembers_its_kinds(campaign: Any, tmp_path: Any) -> None:
    campaign.predictor.save(tmp_path)
    assert LatencyPredictor.load(tmp_path).kinds_ == campaign.predictor.kinds_
