"""The user's own weights: loaded when every name and shape fits, else refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hwsearch.errors import InputError, SchemaError
from hwsearch.train.weights import load_weights


def model(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width))


def test_weights_and_statistics_are_loaded(tmp_path: Path) -> None:
    source, target = model(), model()
    source[1].running_mean.fill_(3.0)
    save_file(source.state_dict(), tmp_path / "own.safetensors")
    load_weights(target, tmp_path / "own.safetensors")
    pairs = zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    save_file(model(5).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match=r"shape \(5,\) for 0\.bias where the model has shape \(4,\)"):
        load_weights(model(), tmp_path / "wide.safetensors")
    state = model().state_dict()
    del state["1.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(InputError, match=r"nothing for 1\.weight"):
        load_weights(model(), tmp_path / "less.safetensors")
    (tmp_path / "other.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(SchemaError, match="no safetensors file"):
        load_weights(model(), tmp_path / "other.pt")
    with pytest.raises(InputError, match="no weights at"):
        load_weights(model(), tmp_path / "nowhere")
