"""What is too deep for torch.export is told at once; what stands below the limit is not touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hwsearch.errors import UnsupportedModelError
from hwsearch.graph import depth
from hwsearch.graph.capture import capture
from hwsearch.graph.depth import counted
from hwsearch.graph.onnx_build import export_onnx
from hwsearch.reparam.fold import fold


class Looks(nn.Module):
    """Looks at its input, and works twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + x.shape[0]


def deep(layers: int) -> nn.Module:
    return nn.Sequential(*[nn.ReLU()] * layers).eval()


def test_operations_are_counted_and_looks_are_not() -> None:
    given = torch.zeros(1, 2)
    with counted() as calls, torch.no_grad():
        Looks()(given)
    assert calls.number == 2
    with counted() as calls:
        deep(7)(given)
    assert calls.number == 7


@pytest.mark.parametrize("what", [capture, export_onnx])
def test_a_network_above_the_limit_is_refused_with_the_limit(what: object) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"calls {depth.MAX_DEPTH + 1} operations on 0 .* above 6000"):
        what(deep(depth.MAX_DEPTH + 1), torch.zeros(1, 2))  # type: ignore[operator]


def test_the_limit_counts_operations_and_tensors_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()).eval()  # 2 calls, 2 parameters
    monkeypatch.setattr(depth, "MAX_DEPTH", 4)
    assert len(capture(model, torch.zeros(1, 1, 4, 4)).layers) == 1
    monkeypatch.setattr(depth, "MAX_DEPTH", 3)
    with pytest.raises(UnsupportedModelError, match="calls 2 operations on 2 parameters and buffers"):
        capture(model, torch.zeros(1, 1, 4, 4))


def test_a_fold_has_no_such_limit() -> None:
    layers = [layer for _ in range(1500) for layer in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))]
    model = nn.Sequential(*layers, *[nn.ReLU()] * depth.MAX_DEPTH).eval()
    folded = fold(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
