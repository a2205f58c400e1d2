"""The error card: its numbers are what they say, and its rivals lose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwsearch.errors import InputError
from hwsearch.latency.card import ErrorCard, ErrorRow, spearman
from hwsearch.latency.predictor import LatencyPredictor


@pytest.fixture(scope="module")
def card(campaign: Any) -> ErrorCard:
    return ErrorCard.of(campaign.predictor, campaign.table)


def test_an_error_row_by_hand() -> None:
    row = ErrorRow.of(np.array([1.04, 1.92, 3.6, 4.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert row.count == 4
    assert row.mape == pytest.approx((0.04 + 0.04 + 0.2 + 0.0) / 4)
    assert row.rmspe == pytest.approx(np.sqrt((0.04**2 + 0.04**2 + 0.2**2) / 4))
    assert (row.within_5, row.within_10, row.spearman, row.coverage) == (0.75, 0.75, pytest.approx(1.0), None)


def test_rank_correlation() -> None:
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0])) == pytest.approx(0.5)
    assert spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == 0.0


def test_the_card_of_the_simulated_device(card: ErrorCard, campaign: Any) -> None:
    assert card.networks == len(campaign.table.networks) == card.unseen.count == len(card.points)
    assert card.kernels == campaign.table.kernel_count == sum(row.count for row in card.by_family.values())
    assert card.seconds == pytest.approx(sum(n.seconds for n in campaign.table.networks))
    assert set(card.rivals) == {"macs_line", "nn_meter", "raw_boosting"}
    assert card.unseen.mape < card.rivals["macs_line"].mape / 3
    assert card.unseen.mape < card.rivals["nn_meter"].mape / 2
    assert card.unseen.mape < card.rivals["raw_boosting"].mape
    assert card.unseen_family is not None
    assert card.unseen.mape <= card.unseen_family.mape < card.rivals["macs_line"].mape
    assert 0.75 < card.unseen.coverage <= 1
    assert set(card.by_source) == set(campaign.table.sources)
    error = np.mean([abs(predicted / measured - 1) for measured, predicted, _ in card.points])
    assert error == pytest.approx(card.unseen.mape, rel=1e-3)


def test_the_card_as_text_and_json(card: ErrorCard) -> None:
    text = card.to_markdown()
    for part in ("held out at random", "whole family held out", "a line through the MACs", "Noise floor", "| conv |"):
        assert part in text
    assert json.loads(json.dumps(card.to_dict(), allow_nan=False))["unseen"]["count"] == card.networks


def test_a_loaded_predictor_has_the_same_card(campaign: Any, card: ErrorCard, tmp_path: Path) -> None:
    campaign.predictor.save(tmp_path)
    assert ErrorCard.of(LatencyPredictor.load(tmp_path), campaign.table) == card


def test_another_table_is_refused(campaign: Any) -> None:
    smaller = campaign.table.with_networks(campaign.table.networks[:50])
    with pytest.raises(InputError, match="not the one"):
        ErrorCard.of(campaign.predictor, smaller)
    with pytest.raises(InputError, match="2 networks"):
        ErrorCard.of(campaign.predictor, campaign.table.with_networks(campaign.table.networks[:1]))


def test_one_source_only(campaign: Any) -> None:
    table = campaign.table.with_networks(replace(n, source="random:all") for n in campaign.table.networks[:20])
    card = ErrorCard.of(LatencyPredictor(rounds=2, folds=2).fit(table), table)
    assert card.unseen_family is None
    assert "whole family" not in card.to_markdown()
