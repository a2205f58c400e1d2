"""Models by name: every mistake is one clear line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hwsearch.errors import InputError
from hwsearch.graph.model_folder import load_model, save_model
from hwsearch.models import load_factory

torch.set_num_threads(1)

SOURCE = """
from torch import nn

size = 3

def good(classes=4):
    return nn.Linear(3, classes)

def bad():
    raise ValueError("no weights here\\nsecond line")

def number():
    return 7
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks_for_test.py").write_text(SOURCE)
    (tmp_path / "broken_import_for_test.py").write_text("1 / 0\n")
    (tmp_path / "missing_import_for_test.py").write_text("import no_such_library_for_test\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield "my_networks_for_test"
    for name in set(sys.modules) - before:
        sys.modules.pop(name)


def test_a_factory_in_the_working_directory(user_module: str) -> None:
    path = list(sys.path)
    model = load_factory(f"{user_module}:good", classes=5)
    assert isinstance(model, nn.Linear)
    assert model.out_features == 5
    assert not model.training
    assert sys.path == path


def test_a_reference_model() -> None:
    assert load_factory("hwsearch.models.resnet:resnet_small", classes=3).classifier.out_features == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_networks_for_test:absent", "has no 'absent'; it has bad, good, number"),
        ("my_networks_for_test:bad", r"fails: ValueError: no weights here \(my_networks_for_test\.py:10\)$"),
        ("my_networks_for_test:number", "returned int, not a torch.nn.Module"),
        ("my_networks_for_test:size", "is a int, not a function"),
        ("no_such_package_for_test.models:make", "no Python module 'no_such_package_for_test'"),
        ("hwsearch.models.alexnet:make", "no Python module 'hwsearch.models.alexnet'"),
        ("my_networks_for_test.py:good", r"for the file my_networks_for_test\.py write my_networks_for_test:g"),
        ("broken_import_for_test:make", "fails: ZeroDivisionError"),
        ("missing_import_for_test:make", "needs the module 'no_such_library_for_test'"),
        ("resnet_small", "does not name a model; write package.module:factory"),
        ("a b:c", "does not name a model"),
        (":x", "does not name a model"),
        ("", "does not name a model"),
    ],
)
def test_mistakes(user_module: str, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_factory(spec)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_for_a_factory(user_module: str) -> None:
    with pytest.raises(InputError, match="good fails: TypeError"):
        load_factory(f"{user_module}:good", depth=3)


def test_timm_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install timm"):
        load_factory("timm:resnet18")


def test_timm_models_are_built_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm.py").write_text(
        "from torch import nn\n"
        "def is_model(name): return name == 'tiny'\n"
        "def list_models(pattern): return ['tiny']\n"
        "def create_model(model_name, num_classes=2): return nn.Linear(3, num_classes)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    assert load_factory("timm:tiny", num_classes=6).out_features == 6
    with pytest.raises(InputError, match="timm has no model 'tin'; close names are tiny"):
        load_factory("timm:tin")
    # a run folder names its factory so, and whoever trusts it repeats the name
    folder = save_model(
        tmp_path / "saved", load_factory("timm:tiny"), factory="timm:tiny", input_shape=(1, 3), factory_kwargs={}
    )
    with pytest.raises(InputError, match="allow-factory timm:tiny"):
        load_model(folder)
    assert load_model(folder, allow_factory="timm:tiny").out_features == 2
    sys.modules.pop("timm")
