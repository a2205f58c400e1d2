"""Unfolded networks are found in the graph, whoever wrote it, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwsearch.device.session import open_session
from hwsearch.device.spec import Device
from hwsearch.device.stopwatch import PROFILE
from hwsearch.errors import InputError
from hwsearch.estimation import network_of
from hwsearch.graph.onnx_build import export_onnx
from hwsearch.latency.measure import measure
from hwsearch.latency.quantising import is_quantised, quantise_network
from hwsearch.latency.unfolded import find_unfolded, refuse_unfolded
from hwsearch.model_argument import ModelArgument
from hwsearch.reparam.algebra import ConvShape
from hwsearch.reparam.fold import fold
from hwsearch.reparam.odbb import ODBB
from hwsearch.reparam.statistics import randomise

torch.set_num_threads(1)
X = torch.randn(1, 8, 10, 10, generator=torch.Generator().manual_seed(0))


class Sum(nn.Module):
    """Parts side by side, added; ``residual`` adds the input too."""

    def __init__(self, *parts: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x) for part in self.parts] + ([x] if self.residual else [])
        total = outputs[0]
        for out in outputs[1:]:
            total = total + out
        return total


def conv(kernel: int = 3, *, norm: bool = True, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Module:
    layer = nn.Conv2d(8, 8, kernel, stride, dilation * (kernel // 2), groups=groups, dilation=dilation, bias=not norm)
    return nn.Sequential(layer, nn.BatchNorm2d(8)) if norm else layer


def exported(model: nn.Module) -> bytes:
    model = model.eval()
    randomise(model, X, torch.Generator().manual_seed(1))
    return export_onnx(model, X)


def odbb(border: str, post_norm: bool = False) -> nn.Module:
    host = ConvShape(8, 8, (3, 3), padding=((1, 1), (1, 1)))
    return nn.Sequential(nn.ReLU(), ODBB(host, "odbb", border=border, post_norm=post_norm), nn.ReLU())


UNFOLDED = {
    "repvgg": (nn.Sequential(Sum(conv(), conv(1), nn.BatchNorm2d(8)), nn.ReLU()), 3),
    "bare identity beside two": (Sum(conv(), conv(1, norm=False), residual=True), 3),
    "depth-wise": (Sum(conv(5, groups=8), conv(3, groups=8), conv(1, groups=8)), 3),
    "dilated": (Sum(conv(dilation=2), conv(1)), 2),
    "average": (Sum(conv(), nn.Sequential(conv(1, norm=False), nn.AvgPool2d(3, 1, 1))), 2),
    "a sum of sums": (Sum(Sum(conv(), conv(1)), conv(1)), 3),
    "odbb": (odbb("pad_first"), 7),
    "odbb as DBB pads": (odbb("bn_pad"), 7),
    "odbb, a batch norm behind the sum": (odbb("pad_first", True), 7),
    "no identity": (Sum(conv(stride=2), conv(1, stride=2)), 2),
}
FOLDED = {
    "plain": nn.Sequential(conv(norm=False), nn.ReLU(), conv(1, norm=False)),
    "batch norms": nn.Sequential(conv(), nn.ReLU(), conv(1)),
    "residual": nn.Sequential(Sum(nn.Sequential(conv(), nn.ReLU(), conv()), residual=True), nn.ReLU()),
    "shortcut": Sum(nn.Sequential(conv(stride=2), nn.ReLU(), conv()), conv(1, stride=2)),
    "linear residual": Sum(conv(groups=8), residual=True),
    "two residuals in a row": nn.Sequential(
        Sum(nn.Sequential(nn.ReLU(), conv()), residual=True), Sum(nn.Sequential(nn.ReLU(), conv()), residual=True)
    ),
    "activations in the branches": Sum(nn.Sequential(nn.ReLU(), conv()), nn.Sequential(nn.Sigmoid(), conv(1))),
    "dilations that do not fit": Sum(conv(dilation=2), conv(3)),
    "other groups": Sum(conv(groups=8), conv(1)),
}  # fmt: skip


def in_a_row(cases: list[nn.Module]) -> nn.Module:
    """Cases with activations between them: one export for all."""
    return nn.Sequential(*[part for case in cases for part in (case, nn.ReLU())])


def test_branches_are_found() -> None:
    network = exported(in_a_row([model for model, _ in UNFOLDED.values()]))
    for found in (find_unfolded(network), find_unfolded(quantise_network(network))):
        assert len(found.blocks) == len(UNFOLDED), found
        for number, (label, (case, (_, branches))) in enumerate(zip(found.blocks, UNFOLDED.items(), strict=True)):
            name, count = label.split(" (")
            assert name.split(".")[0] == str(2 * number), label
            assert int(count.split()[0]) == branches, case
    with pytest.raises(InputError, match="it holds 10 blocks of branches that folding makes one convolution each"):
        refuse_unfolded(network, "it")


def test_nothing_else_is() -> None:
    assert find_unfolded(exported(in_a_row(list(FOLDED.values())))).blocks == ()


def test_a_fold_is_found_folded() -> None:
    model = nn.Sequential(odbb("pad_first"), odbb("bn_pad")).eval()
    assert find_unfolded(export_onnx(fold(model, X), X)).blocks == ()


def test_a_batch_norm_is_told_not_refused() -> None:
    import onnx
    from onnx import helper, numpy_helper

    names = ["w", "scale", "bias", "mean", "var"]
    arrays = [np.ones((8, 8, 1, 1), np.float32), *[np.ones(8, np.float32)] * 4]
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["y"]),
        helper.make_node("BatchNormalization", ["y", *names[1:]], ["output"], name="norm"),
    ]
    info = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 8, 10, 10]) for n in ("input", "output")]
    graph = helper.make_graph(
        nodes, "g", info[:1], info[1:], [numpy_helper.from_array(a, n) for n, a in zip(names, arrays, strict=True)]
    )
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    assert refuse_unfolded(network, "it").norms == ("norm",)
    told: list[str] = []
    device = Device(name="simulated", runtime="simulated")
    assert network_of(ModelArgument("it.onnx", (1, 8, 10, 10), onnx=network), device, tell=told.append) == network
    assert told == [
        "it.onnx holds 1 batch norms behind convolutions (the first: norm): the runtime may fold them when it loads "
        "the file; `hwsearch fold` does it for certain"
    ]


def test_what_is_no_network_is_left_to_the_runtime() -> None:
    assert find_unfolded(b"\xff\xff\xff").blocks == ()


def test_measure_refuses_unless_told(home: Path) -> None:
    device = Device.load("simulated")
    network = exported(UNFOLDED["repvgg"][0])
    with open_session(device) as session:
        with pytest.raises(InputError, match=r"a block of branches .*allow_unfolded=True"):
            measure(network, session, reference_ms=None, settings=PROFILE)
        slow = measure(network, session, reference_ms=None, settings=PROFILE, allow_unfolded=True)
        fast = measure(
            export_onnx(fold(nn.Sequential(odbb("pad_first")[1], nn.ReLU()).eval(), X), X), session,
            reference_ms=None, settings=PROFILE,
        )  # fmt: skip
    assert slow.measured_ms > fast.measured_ms


def test_a_model_is_folded_and_said_to_be() -> None:
    module = UNFOLDED["odbb"][0].eval()
    randomise(module, X, torch.Generator().manual_seed(1))
    argument = ModelArgument("model", tuple(X.shape), module=module)
    told: list[str] = []
    device, eight = (Device(name="d", runtime="simulated", precision=precision) for precision in ("float32", "int8"))
    folded = network_of(argument, device, tell=told.append)
    assert find_unfolded(folded).blocks == ()
    assert told == ["model is folded first: 1 block of branches"]
    norms = ModelArgument("norms", tuple(X.shape), module=nn.Sequential(conv(), conv()).eval())
    network_of(norms, device, tell=told.append)
    assert told.pop() == "norms is folded first: 2 batch norms"
    as_it_stands = network_of(argument, device, allow_unfolded=True, tell=told.append)
    assert len(find_unfolded(as_it_stands).blocks) == 1
    assert len(told) == 1
    # on a device of 8 bits it is looked at in 8 bits
    network = network_of(argument, eight, tell=told.append)
    assert is_quantised(network)
    assert not is_quantised(folded)
    assert "is looked at in 8 bits" in told[-1]
    again = ModelArgument("it.onnx", tuple(X.shape), onnx=network)
    assert network_of(again, eight, tell=told.append) == network
