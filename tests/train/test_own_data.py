"""Data of the user's own: torch data sets, arrays in a file, folders; and every mistake in one clear line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from hwsearch.errors import InputError, SchemaError
from hwsearch.train.data import Examples
from hwsearch.train.datasets import DatasetExamples, as_examples
from hwsearch.train.loop import TrainConfig
from hwsearch.train.npz import load_npz
from hwsearch.train.own_data import load_file, load_own
from hwsearch.train.rehearsal import rehearse
from hwsearch.train.segmentation import Segmentation
from hwsearch.train.task import Classification, MultiLabel, Regression, load_task

torch.set_num_threads(1)


class Drawn(Dataset[Any]):
    """Items that draw from every generator that transforms use."""

    def __init__(self, count: int = 12) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(3, 4, 4) + float(np.random.rand()) + random.random()
        return noise, index % 3


def images(count: int = 12, target: Tensor | None = None) -> TensorDataset:
    targets = torch.arange(count) % 3 if target is None else target
    return TensorDataset(torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(count)), targets)


def test_any_torch_data_set_serves() -> None:
    examples = DatasetExamples(TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6)), name="counting")
    assert isinstance(examples, Examples)
    inputs, targets = examples.take(np.array([5, 0]))
    assert inputs.tolist() == [[10.0, 11.0], [0.0, 1.0]]
    assert targets.tolist() == [5, 0]
    other = DatasetExamples(TensorDataset(torch.arange(12.0).view(6, 2) + 1, torch.arange(6)), name="counting")
    assert examples.identity.startswith("dataset counting 6 ")
    assert examples.identity != other.identity, "other content is another data set"


def test_what_items_draw_follows_the_step_and_disturbs_nobody() -> None:
    examples = DatasetExamples(Drawn(), "drawn")
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    one, again, other = (examples.take(np.array([1, 2]), augment=np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    plain, same = (examples.take(np.array([1, 2]))[0] for _ in range(2))
    after = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(one, again)
    assert torch.equal(plain, same)
    assert not torch.equal(one, other)
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


class Kinds(Dataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if self.items[index] == "broken":
            raise OSError("picture 7 is torn")
        return self.items[index]


def test_numbers_of_every_kind_become_what_a_network_takes() -> None:
    bytes_, doubles = np.full((1, 2, 2), 51, dtype=np.uint8), np.full((1, 2, 2), 0.5)
    inputs, targets = DatasetExamples(Kinds((bytes_, np.int32(4))), "bytes").take(np.array([0]))
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert inputs[0, 0, 0, 0] == pytest.approx(0.2)
    assert DatasetExamples(Kinds((doubles, 1)), "doubles").take(np.array([0]))[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("broken", r"item 0 of the data set mine fails: OSError: picture 7 is torn \(test_own_data\.py:\d+\)"),
        (torch.zeros(1, 2, 2), r"item 0 of the data set mine is a Tensor: give \(input, target\)"),
        ((object(), 1), "do not make a batch .*: give tensors of equal shapes"),
        ((torch.zeros(1, 2, 2), "cat"), r"are \(Tensor, .*\): give \(input, target\) of tensors"),
    ],
)
def test_items_that_are_none(item: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        DatasetExamples(Kinds(item), "mine").take(np.array([0]))
    assert "\n" not in str(caught.value)


def test_an_item_that_is_not_finite_is_named() -> None:
    broken = torch.full((1, 2, 2), float("nan"))
    examples = DatasetExamples(Kinds((torch.zeros(1, 2, 2), 1), (torch.ones(1, 2, 2), 0), (broken, 1)), "mine")
    assert examples.take(np.array([0, 1]))[0].shape == (2, 1, 2, 2)
    with pytest.raises(InputError, match="item 2 of the data set mine holds numbers that are not finite"):
        examples.take(np.array([1, 2]))


def test_sets_that_are_none() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([])

    with pytest.raises(InputError, match="Stream without a length"):
        as_examples(Stream(), "mine")
    with pytest.raises(InputError, match="mine is empty"):
        as_examples([], "mine")


SOURCE = """
import torch
from torch.utils.data import TensorDataset
from hwsearch.train.datasets import DatasetExamples
from hwsearch.train.task import Regression

def images(count, target=None):
    return TensorDataset(torch.zeros(count, 3, 4, 4), torch.arange(count) % 3 if target is None else target)

def two(count=20):
    print("noise on standard output")
    return images(count), images(6)

def three():
    return images(20), images(5), images(6)

def labels():
    return images(20, torch.ones(20, 4)), images(6, torch.ones(6, 4))

def masks(highest=2):
    return images(20, torch.full((20, 4, 4), highest)), images(6, torch.zeros(6, 4, 4, dtype=torch.int64))

def whole():
    part = DatasetExamples(images(4, torch.ones(4)), "part")
    return Regression(part, part), images(6, torch.ones(6))

def nothing():
    return None

def fails():
    raise OSError("the disk is away")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_data_for_test.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_data_for_test"


def test_data_sets_of_a_function(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    task, test = load_own(f"{module}:two", {"count": 30}, seed=3)
    assert isinstance(task, Classification)
    assert (len(task.train), len(task.valid), len(test)) == (24, 6, 6)
    assert capsys.readouterr().out == "", "standard output is for results"
    task, _ = load_own(f"{module}:two", valid=4, limit_to=10, label_smoothing=0.1)
    assert (len(task.train), len(task.valid)) == (6, 4)
    task, test = load_own(f"{module}:three")
    assert (len(task.train), len(task.valid), len(test)) == (20, 5, 6)
    assert isinstance(load_own(f"{module}:labels", task="multilabel")[0], MultiLabel)
    assert isinstance(load_own(f"{module}:labels", task="regression")[0], Regression)
    assert isinstance(load_own(f"{module}:masks", task="segmentation")[0], Segmentation)
    task, test = load_own(f"{module}:whole")
    assert (task.metric_name, len(test)) == ("rmse", 6)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("nothing", {}, r"returned NoneType: give \(train, test\)"),
        ("fails", {}, r"the data factory own_data_for_test:fails fails: OSError: the disk is away \(own_data_for"),
        ("absent", {}, "has no 'absent'"),
        ("labels", {}, "are float32, 4: say what they are with data.task"),
        ("labels", {"task": "classification"}, "no single whole numbers"),
        ("labels", {"task": "multilabel", "label_smoothing": 0.1}, "label_smoothing is for classes"),
        ("masks", {}, r"are int64, 4x4: say what they are with data.task, .* segmentation \(a class a pixel\)"),
        ("two", {"task": "segmentation"}, r"no whole numbers \(H, W\)"),
        ("two", {"valid": 20}, "cannot hold out 20 of 20"),
        ("three", {"valid": 2}, "brings held-out examples of its own"),
        ("whole", {"valid": 2}, "data.valid is for data sets"),
        ("whole", {"task": "regression"}, "data.task is for data sets"),
    ],
)
def test_functions_that_give_something_else(module: str, name: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_own(f"{module}:{name}", **given)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_is_called_data() -> None:
    with pytest.raises(InputError, match="no Python module 'no_such_data_for_test' for the data set"):
        load_own("no_such_data_for_test:make")


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found = {
        "x_train": rng.integers(0, 256, (20, 6, 6), dtype=np.uint8), "y_train": np.arange(20) % 4,
        "x_test": rng.integers(0, 256, (5, 6, 6), dtype=np.uint8), "y_test": np.arange(5) % 4,
    }  # fmt: skip
    return {name: value for name, value in {**found, **changes}.items() if value is not None}


def test_arrays_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "digits.npz"
    np.savez(file, **arrays())
    task, test = load_file(file, valid=5, shift=1)
    images, classes = test.take(np.arange(5))
    assert images.shape == (5, 1, 6, 6)
    assert classes.tolist() == [0, 1, 2, 3, 0]
    assert (len(task.train), len(task.valid)) == (15, 5)
    whole = np.load(file)["x_train"] / 255
    expected = (np.load(file)["x_test"][0] / 255 - whole.mean()) / whole.std()
    np.testing.assert_allclose(images[0, 0].numpy(), expected, atol=1e-4)
    assert load_task(str(file), valid=5)[0].train.identity == load_file(file, valid=5)[0].train.identity


def test_arrays_in_medmnists_names_with_channels_last(tmp_path: Path) -> None:
    file = tmp_path / "medical.npz"
    shape = {"train": 10, "val": 4, "test": 3}
    np.savez(
        file,
        **{f"{part}_images": np.full((count, 8, 8, 3), count, dtype=np.uint8) for part, count in shape.items()},
        **{f"{part}_labels": np.arange(count)[:, None] % 2 for part, count in shape.items()},
    )
    train, valid, test = load_npz(file)
    assert valid is not None
    assert [tuple(part.inputs.shape) for part in (train, valid, test)] == [(10, 3, 8, 8), (4, 3, 8, 8), (3, 3, 8, 8)]
    assert train.targets.tolist() == [0, 1] * 5
    assert train.take(np.array([0]))[0].isfinite().all(), "a channel that does not vary is not divided by 0"
    with pytest.raises(InputError, match="brings held-out examples of its own"):
        load_file(file, valid=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_test": None, "y_test": None}, "has no array x_test: give x_train, y_train, x_test, y_test"),
        ({"x_train": np.array([None] * 20)}, "cannot be read .*: save plain arrays of numbers"),
        ({"x_train": np.full((20, 6, 6), np.nan)}, "holds numbers that are not finite"),
        ({"x_train": np.full((20, 6, 6), 300)}, "beyond 0 to 255"),
        ({"y_train": np.array(["cat"] * 20)}, "give class numbers or values"),
        ({"y_train": np.arange(7)}, "20 inputs but 7 targets"),
        ({"y_train": np.random.rand(20, 2)}, "are float32, 2: say what they are"),
    ],
)
def test_arrays_that_do_not_serve(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = tmp_path / "bad.npz"
    np.savez(file, **arrays(**changes))
    with pytest.raises(InputError, match=words) as caught:
        load_file(file, valid=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04torn", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_archives(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "torn.npz"
    file.write_bytes(content)
    with pytest.raises(SchemaError, match=r"torn\.npz"):
        load_npz(file)
    with pytest.raises(InputError, match="there is no data file"):
        load_npz(tmp_path / "absent.npz")


def test_a_folder_a_class_spares_its_own_test_set(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    for name, value in (("dark", 10), ("bright", 240)):
        (tmp_path / name).mkdir()
        for number in range(10):
            pillow.new("RGB", (9, 7), (value, value, number)).save(tmp_path / name / f"{number}.PNG")
    (tmp_path / ".cache").mkdir()
    task, test = load_task(str(tmp_path), size=8, seed=1)
    assert (len(task.train), len(task.valid), len(test)) == (13, 3, 4)
    assert test.take(np.arange(4))[1].tolist() == [0, 0, 1, 1]
    assert load_task(str(tmp_path), size=8, seed=1)[1].identity == test.identity
    for path in list((tmp_path / "dark").iterdir())[:7]:
        path.unlink()
    with pytest.raises(InputError, match="dark has 3 pictures: give 5 or more"):
        load_task(str(tmp_path), size=8)


def task_of(found: Any, **given: Any) -> Any:
    examples = as_examples(found, "mine")
    return Classification(examples, examples, **given)


def net(outputs: int = 3, channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs))


def test_a_rehearsal_changes_nothing_and_tells_of_another_size() -> None:
    model, task = net().train(), task_of(images())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert rehearse(model, task, task.valid, TrainConfig(), (1, 3, 4, 4)) == ()
    (note,) = rehearse(model, task, task.valid, TrainConfig(), (1, 3, 8, 8))
    assert note == "the data's images are 3x4x4, the network is timed on 3x8x8 (model.input)"
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "found", "words"),
    [
        (net(channels=1), images(), r"fails on the training images, which are 3x4x4 \(model\.input is 1x1x4x4\)"),
        (net(outputs=2), images(), r"the data has class \d, but the network has 2 outputs"),
        (net(), images(target=torch.rand(12)), r"output \(12x3\) and the training targets \(float32 12\) do not go"),
        (
            nn.Sequential(net(), nn.Linear(3, 3)),
            images(target=torch.full((12,), -1)),
            "has class -1, but the network has 3",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(model: nn.Module, found: Any, words: str) -> None:
    task = task_of(found)
    with pytest.raises(InputError, match=words) as caught:
        rehearse(model, task, task.valid, TrainConfig(), (1, 1, 4, 4))
    assert "\n" not in str(caught.value)


class Heads(nn.Module):
    """A second head, in training alone or always."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.body, self.always = net(), always

    def forward(self, x: torch.Tensor) -> Any:
        out = self.body(x)
        return (out, out) if self.always or self.training else out


def test_a_network_of_several_outputs_is_told_before_the_search() -> None:
    task = task_of(images())
    for always, words in (
        (True, "Heads returns a tuple: .*torch.cat"),
        (False, "Heads returns in training mode a tup"),
    ):
        with pytest.raises(InputError, match=words):
            rehearse(Heads(always), task, task.valid, TrainConfig(), (1, 3, 4, 4))


def test_what_fails_in_training_mode_alone_is_told_before_the_search() -> None:
    task = task_of(images())
    model = nn.Sequential(net(), nn.BatchNorm1d(3))
    state = torch.random.get_rng_state()
    assert rehearse(model, task, task.valid, TrainConfig(), (1, 3, 4, 4)) == ()
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(InputError, match="fails in training mode, on 1x3x4x4: ValueError: Expected more than 1 value"):
        rehearse(model, task, task.valid, TrainConfig(batch_size=1), (1, 3, 4, 4))


def test_a_class_a_pixel_that_the_network_has_no_output_for(module: str) -> None:
    task, test = load_own(f"{module}:masks", {"highest": 3}, task="segmentation")
    with pytest.raises(InputError, match="has class 3, but the network has 3 outputs"):
        rehearse(nn.Conv2d(3, 3, 1), task, test, TrainConfig(), (1, 3, 4, 4))
    assert rehearse(nn.Conv2d(3, 4, 1), task, test, TrainConfig(), (1, 3, 4, 4)) == ()


def test_weights_that_are_not_numbers_are_told_before_the_search() -> None:
    model, task = net(), task_of(images())
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="the loss on a few training examples is nan"):
        rehearse(model, task, task.valid, TrainConfig(), (1, 3, 4, 4))
