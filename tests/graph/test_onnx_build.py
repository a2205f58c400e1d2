"""ONNX export, and templates whose slices compute what the shrunk and folded module computes."""

from __future__ import annotations

import graph_zoo as zoo
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graph_checks import random_keep
from torch import Tensor, nn

from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.graph.onnx_build import OnnxTemplate, export_onnx
from hwsearch.graph.onnx_slicing import _layout, _open_shape, laid_out
from hwsearch.graph.surgery import randomise, shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace
from hwsearch.models import mobilenetv2_small, resnet_small, vgg_small
from hwsearch.reparam.fold import fold


def run(file: bytes, x: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session.run(["output"], {"input": x.numpy()})[0]


def same(file: bytes, model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        wanted = model.eval()(x).numpy()
    return bool(np.abs(run(file, x) - wanted).max() <= 1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("factory", [vgg_small, resnet_small, mobilenetv2_small], ids=lambda f: f.__name__)
def test_slices_of_reference_networks_equal_shrink_and_fold(factory: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, example = factory().eval(), torch.randn(1, 1, 28, 28)
    randomise(model)
    space = WidthSpace.from_model(model, example, verify=False)
    template = OnnxTemplate(space, fold(model), example)
    rng = np.random.default_rng(0)
    for choice in (space.full(), space.smallest(), space.sample(rng)):
        keep = random_keep(space, choice, rng)
        assert same(template.slice(choice, keep), fold(shrink(model, space, choice, keep).eval()), example)
    assert template.slice(choice) == template.slice(choice)


@pytest.mark.parametrize(
    "network",
    [
        zoo.Halves,
        zoo.Norms,
        zoo.Shuffled,
        zoo.Transposed,
        zoo.Grouped,
        zoo.BareParameters,
        zoo.LinearToImage,
        zoo.Dense,
        zoo.ConvNeXtBlock,
    ],
    ids=lambda network: network.__name__,
)
@pytest.mark.slow
def test_slices_of_micro_networks_equal_the_shrunk_module(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, example = network().eval(), torch.randn(zoo.IMAGE)
    randomise(model)
    folded = fold(model, example, require=False)
    space = WidthSpace.from_model(model, example, verify=False)
    template = OnnxTemplate(space, folded, example)
    rng = np.random.default_rng(1)
    choice = space.sample(rng)
    keep = random_keep(space, choice, rng)
    assert same(template.slice(choice, keep), shrink(folded, space, choice, keep), example)


def test_equal_weights_are_not_merged() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    example = torch.randn(zoo.IMAGE)
    space = WidthSpace.from_model(model, example)
    file = OnnxTemplate(space, model, example).slice(WidthChoice((1, 3)))
    shapes = {item.name: tuple(item.dims) for item in onnx.load_from_string(file).graph.initializer}
    assert (shapes["0.bias"], shapes["2.bias"]) == ((1,), (3,))


def test_template_keeps_its_own_weights() -> None:
    model, example = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.randn(zoo.IMAGE)
    space = WidthSpace.from_model(model, example)
    template = OnnxTemplate(space, model, example, check=False)
    before = template.slice(space.full())
    nn.init.zeros_(model[0].weight)
    assert template.slice(space.full()) == before


def test_slice_refuses_a_foreign_choice() -> None:
    model, example = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.randn(zoo.IMAGE)
    space = WidthSpace.from_model(model, example, quantum=2)
    template = OnnxTemplate(space, model, example, check=False)
    with pytest.raises(InputError, match="cannot be 3 wide"):
        template.slice(WidthChoice((3,)))


def test_unfolded_batch_normalisation_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    example = torch.randn(zoo.IMAGE)
    with pytest.raises(UnsupportedModelError, match="fold its batch normalisation first where"):
        OnnxTemplate(WidthSpace.from_model(model, example), model, example)


def weight_normed(wrap: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1))
    model[3] = wrap(model[3])  # type: ignore[operator]
    return model.eval()


def test_what_is_left_of_weight_norm_keeps_its_size_and_the_rest_can_change() -> None:
    model, example = weight_normed(nn.utils.parametrizations.weight_norm), torch.randn(1, 3, 12, 12)
    space = WidthSpace.from_model(model, example)
    assert [group.name for group in space.groups] == ["0"]
    assert any(
        "no rule for _weight_norm" in why and "remove_parametrizations" in why for why in space.frozen_reasons.values()
    )
    template = OnnxTemplate(space, fold(model, example, require=False), example)
    small = shrink(model, space, space.smallest())
    assert same(template.slice(space.smallest()), small, example)
    assert "3.parametrizations.weight.original0" in small.state_dict(), "the network that is trained keeps it"


def test_weight_norm_by_a_hook_is_named() -> None:
    model, example = weight_normed(nn.utils.weight_norm), torch.randn(1, 3, 12, 12)
    space = WidthSpace.from_model(model, example)
    with pytest.raises(UnsupportedModelError, match="call remove_weight_norm first"):
        OnnxTemplate(space, fold(model, example, require=False), example)


def test_export_names_shapes_and_nothing_of_the_machine() -> None:
    model, example = resnet_small().eval(), torch.randn(1, 1, 28, 28)
    randomise(model)  # equal initialisers, such as zero biases, share one name
    model = fold(model)
    file = export_onnx(model, example)
    graph = onnx.load_from_string(file).graph
    assert [value.name for value in graph.input] == ["input"]
    assert [value.name for value in graph.output] == ["output"]
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [1, 1, 28, 28]
    assert {name for name, _ in model.named_parameters()} <= {item.name for item in graph.initializer}
    assert b".py" not in file
    assert export_onnx(model, example) == file
    assert same(file, model, example)


def test_the_memory_layout_of_the_weights_does_not_reach_the_file() -> None:
    from hwsearch.models.vgg import vgg_small

    model, example = vgg_small(width=0.25), torch.zeros(1, 1, 16, 16)
    file = export_onnx(model, example)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert export_onnx(model, example.to(memory_format=torch.channels_last)) == file
    assert model.features[3].weight.is_contiguous(memory_format=torch.channels_last)  # left as found


def test_export_leaves_training_mode_and_output_streams_alone(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout()).train()
    export_onnx(model, torch.zeros(zoo.IMAGE))
    assert model.training
    assert model[1].training
    assert capsys.readouterr().out == ""


def test_export_refuses_what_it_cannot_translate() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Untranslatable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svdvals(x)

    with pytest.raises(UnsupportedModelError, match="Several returns tuple; return one tensor"):
        export_onnx(Several(), torch.zeros(1, 3))
    with pytest.raises(UnsupportedModelError, match=r"torch\.onnx cannot export Untranslatable") as caught:
        export_onnx(Untranslatable(), torch.zeros(3, 3))
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedModelError, match="fails on an input of shape"):
        export_onnx(nn.Linear(4, 2), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("old", "new", "opened"),
    [
        ((1, 128, 7, 7), (1, 6272), (0, -1)),
        ((2, 8, 1, 1), (2, 8), (0, 0)),
        ((2, 8), (2, 8, 1, 1), (0, 0, 1, 1)),
        ((2, 12, 8, 8), (2, 3, 4, 8, 8), (0, 3, -1, 8, 8)),
        ((2, 4, 3, 8, 8), (2, 12, 8, 8), (0, -1, 8, 8)),
        ((2, 80), (2, 5, 4, 4), (0, 5, 4, -1)),
        ((1, 6), (1, -1), (1, -1)),
    ],
)
def test_reshapes_are_opened(old: tuple[int, ...], new: tuple[int, ...], opened: tuple[int, ...]) -> None:
    assert _open_shape(old, new) == opened


def test_layouts_are_found_by_content() -> None:
    vector, matrix = np.arange(4.0), np.arange(6.0).reshape(2, 3)
    assert _layout(matrix, matrix) == (0, 1)
    assert _layout(matrix, matrix.T.copy()) == (1, 0)
    assert _layout(vector, vector.reshape(4, 1, 1)) == (0, None, None)
    assert _layout(vector, vector + 1) is None
    assert _layout(matrix, matrix.reshape(3, 2)) is None
    assert laid_out(vector[:1], (0, None, None)).shape == (1, 1, 1)
    assert (laid_out(matrix, (1, 0)) == matrix.T).all()


def test_half_precision_weights_are_refused() -> None:
    model, example = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.randn(zoo.IMAGE)
    space = WidthSpace.from_model(model, example)
    with pytest.raises(UnsupportedModelError, match=r"has bfloat16 weights; call \.float"):
        OnnxTemplate(space, model.bfloat16(), example.bfloat16())
