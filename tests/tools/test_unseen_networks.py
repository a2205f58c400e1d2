"""The list of unseen networks: as the papers publish them, the same each time, resumed where it stopped."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from hwsearch.errors import CheckFailedError, SchemaError


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("unseen_networks")


def with_tiny_list(patch: pytest.MonkeyPatch) -> list[str]:
    """Replace the list by two tiny networks; their names."""
    from unseen import catalogue
    from unseen.mobile import mobilenetv1
    from unseen.residual import resnet

    entries = (
        catalogue.Entry("one", "tiny_mobile", 32, partial(mobilenetv1, 0.25, classes=4), "a test"),
        catalogue.Entry("two", "tiny_resnet", 16, partial(resnet, (1, 1), small=True, classes=4), "a test"),
    )
    patch.setattr(catalogue, "CATALOGUE", entries)
    return [entry.name for entry in entries]


@pytest.fixture
def tiny(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tool with the tiny list, and the names in it."""
    return with_tiny_list(monkeypatch)


@pytest.fixture(scope="module")
def written(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two tiny networks; read it, or change a copy."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        with_tiny_list(patch)
        tool.main(["--output", str(folder)])
    return folder


def macs_of(make: Callable[[], nn.Module], size: int) -> float:
    """Millions of multiply-accumulates, from shapes alone."""
    from unseen.pack import count_macs

    with torch.device("meta"):
        return count_macs(make(), (1, 3, size, size))[0] / 1e6


@functools.cache
def listed_mmacs() -> dict[str, float]:
    """Of every network of the list, by name."""
    from unseen.catalogue import CATALOGUE

    return {entry.name: macs_of(entry.make, entry.size) for entry in CATALOGUE}


def test_the_list_is_broad_and_its_names_are_unique(tool: ModuleType) -> None:
    from unseen.catalogue import CATALOGUE

    networks = [entry for entry in CATALOGUE if not entry.beyond]
    assert len({entry.family for entry in networks}) >= 12
    assert len(networks) >= 52
    assert len({entry.name for entry in CATALOGUE}) == len(CATALOGUE)
    assert {entry.family for entry in networks}.isdisjoint(entry.family for entry in CATALOGUE if entry.beyond)
    for family in {entry.family for entry in CATALOGUE}:
        assert sum(entry.family == family for entry in CATALOGUE) >= 4


def test_the_committed_list_is_the_catalogue(tool: ModuleType) -> None:
    from unseen.catalogue import CATALOGUE

    lines = {line["name"]: line for line in tool.read_lines(tool.LIST)}
    assert lines.keys() == {entry.name for entry in CATALOGUE}
    for entry in CATALOGUE:
        line = lines[entry.name]
        assert line["macs"] / 1e6 == pytest.approx(listed_mmacs()[entry.name], abs=1e-9)
        assert (line["family"], tuple(line["input_shape"])) == (entry.family, entry.input_shape)
        assert line["beyond_cnn_kernels"] == entry.beyond
    assert len({line["structure_sha256"] for line in lines.values()}) == len(lines)


def test_macs_are_the_published_ones(tool: ModuleType) -> None:
    from unseen.catalogue import CATALOGUE

    published = [entry for entry in CATALOGUE if entry.published_mmacs is not None]
    assert len(published) >= 20
    for entry in published:
        # Small figures are published in whole millions.
        assert listed_mmacs()[entry.name] == pytest.approx(entry.published_mmacs, rel=0.03, abs=1.0), entry.name


def test_macs_and_parameters_at_the_published_size(tool: ModuleType) -> None:
    """Families whose listed inputs are smaller than the published ones, checked at 224."""
    from unseen import inception, mobile, plain, residual, searched
    from unseen.pack import count_macs

    for make, mmacs, million_parameters in (
        (partial(residual.resnet, (2, 2, 2, 2)), 1820, 11.69),
        (partial(residual.resnet, (3, 4, 6, 3), bottleneck=True), 4110, 25.56),
        (partial(residual.regnet, 24.48, 24, 2.54, 22, 16), 400, 5.2),
        (partial(residual.densenet, (6, 12, 24, 16), 32, 64), 2830, 7.98),
        (partial(plain.squeezenet, "1.0"), 820, 1.25),
        (inception.googlenet, 1580, 7.0),
        (partial(searched.mnasnet, "B1"), 315, 4.38),
        (searched.fbnet_c, 375, 5.57),
        (partial(mobile.ghostnet, 1.3), 226, 7.36),
        (partial(mobile.mobilenetv3, "large", minimal=True), 209, 3.92),
        (partial(plain.repvgg, (2, 4, 14, 1), 0.75, 2.5), 1400, 8.31),
        (plain.darknet19, 2790, 20.84),
        (plain.darknet53, 7140, 41.61),
        (plain.cspdarknet53, 5040, 27.64),
        (partial(residual.convnext, (40, 80, 160, 320)), 550, 3.7),
    ):
        with torch.device("meta"):
            macs, parameters = count_macs(make(), (1, 3, 224, 224))
        assert macs / 1e6 == pytest.approx(mmacs, rel=0.03)
        assert parameters / 1e6 == pytest.approx(million_parameters, rel=0.01)


def test_regnet_stages_are_the_published_ones(tool: ModuleType) -> None:
    from unseen.residual import regnet_stages

    assert regnet_stages(36.44, 24, 2.49, 13, 8) == [(24, 1), (56, 1), (152, 4), (368, 7)]


def test_every_drawn_cell_reaches_its_output(tool: ModuleType) -> None:
    from unseen.residual import draw_cell, nasbench201

    for seed in range(10):
        with torch.device("meta"):
            network = nasbench201(draw_cell(seed)).eval()
            assert network(torch.empty(1, 3, 32, 32)).shape == (1, 10)


def test_the_hash_sees_structure_and_not_weights(tool: ModuleType) -> None:
    from unseen.pack import structure_sha256

    from hwsearch.graph.onnx_export import export_onnx

    def hash_of(seed: int, stride: int = 1, swapped: bool = False) -> str:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 3, 3, stride), nn.ReLU(), nn.MaxPool2d(2)]
        layers = [layers[1], layers[0], layers[2]] if swapped else layers
        data = export_onnx(nn.Sequential(*layers), torch.zeros(1, 3, 12, 12))
        return structure_sha256(onnx.load_from_string(data))

    assert hash_of(0) == hash_of(1)
    assert len({hash_of(0), hash_of(0, stride=2), hash_of(0, swapped=True)}) == 3


@pytest.mark.real
def test_a_network_that_gives_no_sane_output_is_refused(tool: ModuleType) -> None:
    from unseen.pack import check_runs

    from hwsearch.graph.onnx_export import export_onnx

    layer = nn.Conv2d(3, 2, 1)
    nn.init.constant_(layer.weight, 1e-40)
    with pytest.raises(CheckFailedError, match="subnormal"):
        check_runs("it", export_onnx(layer, torch.zeros(1, 3, 4, 4)), (1, 3, 4, 4))
    nn.init.constant_(layer.weight, 3e38)
    with pytest.raises(CheckFailedError, match="an output is not finite"):
        check_runs("it", export_onnx(layer, torch.zeros(1, 3, 4, 4)), (1, 3, 4, 4))
    nn.init.zeros_(layer.weight)
    with pytest.raises(CheckFailedError, match="the same output"):
        check_runs("it", export_onnx(layer, torch.zeros(1, 3, 4, 4)), (1, 3, 4, 4))


def test_what_the_user_can_mend_is_one_line(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--output", str(tmp_path), "--only", "alexnet"]) == 2
    assert "no family 'alexnet': choose from vgg, resnet" in capsys.readouterr().err
    assert tool.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "manifest.json").write_text('{"schema": "another"}')
    assert tool.main(["--output", str(tmp_path), "--only", "vgg"]) == 2
    assert "schema is 'another'" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text(
        json.dumps({"schema": tool.SCHEMA, "version": tool.VERSION, "networks": [{"name": 1}]})
    )
    with pytest.raises(SchemaError, match="its networks are not what this tool writes"):
        tool.read_lines(tmp_path / "manifest.json")


def test_the_list_is_printed_without_building(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--list", "--only", "resnet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.real
def test_two_runs_write_the_same_files(tool: ModuleType, tiny: list[str], written: Path, tmp_path: Path) -> None:
    tool.main(["--output", str(tmp_path)])
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (written, tmp_path))
    assert first == second
    assert set(first) == {"manifest.json", *(f"{name}.onnx" for name in tiny)}


@pytest.mark.real
def test_the_files_are_folded_static_and_sane(tiny: list[str], written: Path) -> None:
    for name in tiny:
        graph = onnx.load(written / f"{name}.onnx").graph
        assert "BatchNormalization" not in {node.op_type for node in graph.node}
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
        weights = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
        assert all(0 < np.abs(weight).max() < 100 for weight in weights if weight.dtype == np.float32)


@pytest.mark.real
def test_a_second_run_builds_only_what_is_missing_or_damaged(
    tool: ModuleType, tiny: list[str], written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "copy"))
    built = []

    def build(entry: Any) -> tuple[bytes, dict[str, Any]]:
        built.append(entry.name)
        data = (written / f"{entry.name}.onnx").read_bytes()
        return data, {line["name"]: line for line in tool.read_lines(written / "manifest.json")}[entry.name]

    monkeypatch.setattr(tool, "build", build)
    tool.main(["--output", str(folder)])
    assert built == []
    (folder / f"{tiny[0]}.onnx").write_bytes(b"cut off")
    (folder / f"{tiny[1]}.onnx").unlink()
    tool.main(["--output", str(folder), "--only", "one"])
    assert built == tiny[:1]
    tool.main(["--output", str(folder)])
    assert built == tiny
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in written.iterdir()}


@pytest.mark.real
def test_a_structure_that_differs_from_the_list_is_told(
    tool: ModuleType,
    tiny: list[str],
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tool.main(["--output", str(written), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["unlike_the_list"] == tiny
    assert (answer["networks"], answer["families"]) == (2, 2)
    monkeypatch.setattr(tool, "LIST", tmp_path / "list.json")
    assert tool.main(["--output", str(written), "--update-list", "--only", "one"]) == 2
    assert not tool.LIST.exists()
    assert tool.main(["--output", str(written), "--update-list"]) == 0
    assert [line.get("file_sha256") for line in tool.read_lines(tool.LIST)] == [None, None]
    assert tool.main(["--output", str(written)]) == 0
