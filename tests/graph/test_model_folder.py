"""Model folders: what is saved is what is loaded, and a stranger's folder runs no code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwsearch.errors import InputError, SchemaError, UnsupportedModelError
from hwsearch.graph.growth import grow
from hwsearch.graph.model_folder import is_model_folder, load_model, read_description, save_model
from hwsearch.graph.surgery import randomise, shrink
from hwsearch.graph.widths import WidthSpace
from hwsearch.models import mobilenetv2_small, vgg_small
from hwsearch.reparam.fold import fold

SHAPE = (1, 1, 28, 28)
VGG = "hwsearch.models.vgg:vgg_small"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = vgg_small(widths=[4, 4, 4, 4, 4, 4])
    return save_model(
        tmp_path / "model", model, factory=VGG, factory_kwargs={"widths": [4] * 6}, input_shape=SHAPE, widths={"a": 4}
    )


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("folded", [False, True])
def test_a_shrunk_model_comes_back_the_same(tmp_path: Path, folded: bool) -> None:
    model = mobilenetv2_small(width=0.5).eval()
    randomise(model)
    space = WidthSpace.from_model(model, torch.zeros(SHAPE), verify=False)
    small = shrink(model, space, space.uniform(0.5))
    small = fold(small) if folded else small
    save_model(
        tmp_path,
        small,
        factory="hwsearch.models.mobilenetv2:mobilenetv2_small",
        factory_kwargs={"width": 0.5},
        input_shape=SHAPE,
        widths={g.name: w for g, w in zip(space.groups, space.uniform(0.5).widths, strict=True)},
        folded=folded,
    )
    assert is_model_folder(tmp_path)
    loaded = load_model(tmp_path, fold=fold)
    assert not loaded.training
    assert torch.equal(outputs(loaded), outputs(small))
    assert {name: p.shape for name, p in loaded.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    description = read_description(tmp_path)
    assert description.input_shape == SHAPE
    assert description.output_shape == (1, 10)
    assert description.folded is folded
    assert description.widths["stem.0"] == space.uniform(0.5).widths[0]


def test_a_grown_model_comes_back_the_same(tmp_path: Path) -> None:
    model = mobilenetv2_small(width=0.5).eval()
    randomise(model)
    space = WidthSpace.from_model(model, torch.zeros(SHAPE), verify=False)
    wide = grow(model, space, {group.name: group.units + 3 for group in space.groups})
    factory = "hwsearch.models.mobilenetv2:mobilenetv2_small"
    save_model(tmp_path, wide, factory=factory, factory_kwargs={"width": 0.5}, input_shape=SHAPE, grown=True)
    assert torch.equal(outputs(load_model(tmp_path)), outputs(wide))
    edit(tmp_path, grown=False)
    with pytest.raises(SchemaError, match="does not fit in the full model's"):
        load_model(tmp_path)


def test_saving_is_deterministic_and_leaves_no_scratch(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "weights.safetensors"]
    first = (saved / "model.json").read_bytes(), (saved / "weights.safetensors").read_bytes()
    again = load_model(saved)
    save_model(saved, again, factory=VGG, factory_kwargs={"widths": [4] * 6}, input_shape=SHAPE, widths={"a": 4})
    assert ((saved / "model.json").read_bytes(), (saved / "weights.safetensors").read_bytes()) == first


def test_tied_and_bare_tensors_come_back(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4))
            self.b.weight = self.a.weight
            self.register_buffer("shift", torch.randn(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * self.scale + self.shift

    model = Tied()
    save_model(tmp_path, model, factory=None, input_shape=(2, 4))
    loaded = load_model(tmp_path, build_full=Tied)
    assert loaded.a.weight is loaded.b.weight
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(InputError, match="names no factory; pass build_full"):
        load_model(tmp_path)


def test_a_folded_model_needs_fold(saved: Path) -> None:
    edit(saved, folded=True)
    with pytest.raises(InputError, match="saved folded; pass fold"):
        load_model(saved)


@pytest.mark.parametrize(
    "factory",
    [
        "os:getcwd",
        "evil:make",
        "hwsearch.graph.factory:find_factory",
        "hwsearch.models.vgg:a.b",
        "../x:y",
        "timm:resnet18",
    ],
)
def test_a_strangers_factory_is_never_imported(saved: Path, factory: str, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    edit(saved, factory=factory)
    with pytest.raises(InputError, match="not a reference model of hwsearch; if you trust it") as caught:
        load_model(saved)
    assert repr(factory) in str(caught.value)
    with pytest.raises(InputError, match="if you trust it"):
        load_model(saved, allow_factory="another:name")


@pytest.mark.parametrize(
    "factory",
    [
        "hwsearch.models.loading:load_factory",
        "hwsearch.models.vgg:scaled",
        "hwsearch.models.vgg:nn",
        "hwsearch.models.no:x",
    ],
)
def test_helpers_of_the_models_package_cannot_be_reached(saved: Path, factory: str) -> None:
    edit(saved, factory=factory, factory_kwargs={"spec": "os:getcwd"})
    with pytest.raises(SchemaError, match=r"reference model of this hwsearch|does not have"):
        load_model(saved)


def test_a_trusted_factory_is_built(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trusted_factory.py").write_text("from hwsearch.models.vgg import vgg_small as make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(saved, factory="trusted_factory:make")
    assert load_model(saved, allow_factory="trusted_factory:make")(torch.zeros(SHAPE)).shape == (1, 10)
    sys.modules.pop("trusted_factory")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "other"}, "not a model description"),
        ({"version": 99}, "has version 99"),
        ({"folded": "perhaps"}, "field folded"),
        ({"input_shape": ["a"]}, r"field input_shape\.0"),
        ({"surprise": 1}, "field surprise"),
        ({"output_shape": [1, 11]}, r"returns \(1, 10\), not \(1, 11\)"),
        ({"input_shape": [1, 2, 28, 28]}, "does not run"),
        ({"weights_sha256": "0"}, "checksum"),
        ({"factory_kwargs": {"classes": 9, "widths": [4] * 6}}, "classifier.0.bias has shape"),
        ({"factory": "hwsearch.models.resnet:resnet_small", "factory_kwargs": {}}, "tensor"),
        ({"factory_kwargs": {"width": 0.0}}, "width multiplier"),
        ({"factory_kwargs": {"depth": 3}}, "fails: TypeError"),
    ],
)
def test_damaged_or_foreign_descriptions(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit(saved, **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


def test_damaged_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_model(tmp_path / "nowhere")
    weights = saved / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(SchemaError, match="checksum"):
        load_model(saved)
    import hashlib

    edit(saved, weights_sha256=hashlib.sha256(content[:-10]).hexdigest())
    with pytest.raises(SchemaError, match="not a safetensors file"):
        load_model(saved)
    weights.unlink()
    with pytest.raises(InputError, match="cannot read"):
        load_model(saved)
    (saved / "model.json").write_text("{")
    with pytest.raises(SchemaError, match="not JSON"):
        read_description(saved)


def test_saving_refuses_what_cannot_be_saved(tmp_path: Path) -> None:
    model = vgg_small()
    with pytest.raises(InputError, match="JSON values"):
        save_model(tmp_path, model, factory=VGG, factory_kwargs={"x": object()}, input_shape=SHAPE)
    with pytest.raises(UnsupportedModelError, match="fails on an input of shape"):
        save_model(tmp_path, model, factory=VGG, input_shape=(1, 3, 28, 28))
    with pytest.raises(InputError, match="is not an input shape"):
        save_model(tmp_path, model, factory=VGG, input_shape=(-1, 3))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the model folder"):
        save_model(tmp_path / "file" / "model", model, factory=VGG, input_shape=SHAPE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot write the model folder"):
        save_model(tmp_path / "model", vgg_small(), factory=VGG, input_shape=SHAPE)
    tmp_path.chmod(0o700)
