"""The user's own code in a training: it decides what it says it does, resumes bit for bit, and fails in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hwsearch.config import RunConfig
from hwsearch.errors import InputError
from hwsearch.train.callback import Callback, make_callback
from hwsearch.train.data import split, synthetic_images
from hwsearch.train.loop import TrainConfig, train
from hwsearch.train.task import Classification

torch.set_num_threads(1)

SOURCE = '''
import torch
from hwsearch.train.callback import Callback

told = []


class Plain(Callback):
    """Everything by default."""


class Recipe(Callback):
    """AdamW, noise in the loss, an average of the weights that is kept at the end."""

    def begin(self, model, config, steps):
        self.average = {name: value.detach().clone() for name, value in model.named_parameters()}

    def optimiser(self, groups, config):
        groups[1]["factor"] = 0.5
        return torch.optim.AdamW(groups, lr=config.learning_rate)

    def loss(self, model, batch, task, step):
        return task.loss(model(batch[0] + 0.1 * torch.randn_like(batch[0])), batch)

    def update(self, optimiser, model, step):
        optimiser.step()
        for name, value in model.named_parameters():
            self.average[name].lerp_(value.detach(), 0.2)

    def after_step(self, model, step, steps, loss):
        told.append((step, steps, loss))
        print("a user's line")

    def end(self, model):
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(self.average[name])

    def state(self):
        return self.average


class Mortal(Recipe):
    """Dies behind its fifth step, once."""

    alive = [True]

    def after_step(self, model, step, steps, loss):
        if step == 4 and self.alive:
            self.alive.pop()
            raise KeyboardInterrupt


class Counting(torch.optim.SGD):
    """Keeps a plain number beside its tensors."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["taken"] = state.get("taken", 0) + 1
                parameter.data.mul_(1 - 0.001 * state["taken"])


class Counted(Callback):
    def optimiser(self, groups, config):
        return Counting(groups, lr=config.learning_rate, momentum=0.5, foreach=False)


class MortalCounted(Counted):
    alive = [True]

    def after_step(self, model, step, steps, loss):
        if step == 4 and self.alive:
            self.alive.pop()
            raise KeyboardInterrupt


class Lists(Callback):
    def optimiser(self, groups, config):
        made = torch.optim.SGD(groups, lr=config.learning_rate)
        for group in groups:
            for parameter in group["params"]:
                made.state[parameter]["history"] = []
        return made


class Broken(Callback):
    def loss(self, model, batch, task, step):
        return batch[7]


class NoLoss(Callback):
    def loss(self, model, batch, task, step):
        return 3.0


class NoOptimiser(Callback):
    def optimiser(self, groups, config):
        return "adam"


class NoState(Callback):
    def state(self):
        return {"count": 3}


class Duck:
    def loss(self, model, batch, task, step):
        return task.loss(model(batch[0]), batch)


def raising():
    raise RuntimeError("no teacher here")
'''


@pytest.fixture(autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_training_for_test.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(__import__("sys").modules, "own_training_for_test", raising=False)
    return "own_training_for_test"


def small() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


def task() -> Classification:
    parts = split(synthetic_images(160, seed=1, shape=(1, 12, 12)), 40, seed=0)
    return Classification(*parts)


def config(callback: str | None = None, **given: Any) -> TrainConfig:
    name = None if callback is None else f"own_training_for_test:{callback}"
    return TrainConfig(steps=9, batch_size=32, learning_rate=0.05, callback=name, **given)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def test_a_callback_that_says_nothing_changes_no_bit() -> None:
    one, other = small(), small()
    train(one, task(), config())
    train(other, task(), config("Plain"))
    assert same(one, other)


def test_every_method_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    import own_training_for_test as own  # type: ignore[import-not-found]

    model, plain = small(), small()
    report = train(model, task(), config("Recipe"))
    train(plain, task(), config())
    assert not same(model, plain)
    assert not model.training
    assert [entry[:2] for entry in own.told] == [(step, 9) for step in range(9)]
    assert [entry[2] for entry in own.told] == [loss for _, loss in report.history]
    assert capsys.readouterr().out == "", "standard output is for results"


@pytest.mark.parametrize(("mortal", "whole"), [("Mortal", "Recipe"), ("MortalCounted", "Counted")])
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path, mortal: str, whole: str) -> None:
    unbroken, broken = small(), small()
    train(unbroken, task(), config(whole))
    with pytest.raises(KeyboardInterrupt):
        train(broken, task(), config(mortal, checkpoint_s=0.0), folder=tmp_path)
    resumed = small()
    report = train(resumed, task(), config(mortal, checkpoint_s=0.0), folder=tmp_path)
    assert report.steps == 9
    assert same(unbroken, resumed)
    again = small()
    train(again, task(), config(mortal, checkpoint_s=0.0), folder=tmp_path)
    assert same(unbroken, again), "a finished training that is asked again ends the same"


def test_another_callback_is_another_training(tmp_path: Path) -> None:
    train(small(), task(), config("Plain"), folder=tmp_path)
    with pytest.raises(InputError, match="belongs to another run: callback was own_training_for_test:Plain"):
        train(small(), task(), config("Counted"), folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Broken", r"the callback own_training_for_test:Broken fails in loss: IndexError: .* \(own_training_for"),
        ("NoLoss", "gives no loss: give a tensor of one number"),
        ("NoOptimiser", "gives a str as optimiser"),
        ("NoState", "something else than tensors in its state"),
        ("Duck", "is a Duck without begin, optimiser, update"),
        ("raising", r"callback factory .* fails: RuntimeError: no teacher here"),
        ("Absent", "has no 'Absent'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        train(small(), task(), config(name), folder=tmp_path)
    assert "\n" not in str(caught.value)


def test_an_optimiser_that_no_checkpoint_holds_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the optimiser SGD keeps a list \(history\)"):
        train(small(), task(), config("Lists"), folder=tmp_path)


def test_a_class_of_callback_is_one() -> None:
    assert isinstance(make_callback("own_training_for_test:Recipe"), Callback)


def settings(**sections: Any) -> RunConfig:
    return RunConfig.from_dict(
        {
            "device": {"name": "simulated"},
            "model": {"factory": "a:b", "input": "1x1x8x8"},
            "search": {"budget": "50%"},
            **sections,
        }
    )


def test_a_config_names_a_callback_for_networks_only() -> None:
    assert settings(train={"callback": "mine:Recipe"}).training().callback == "mine:Recipe"
    assert settings().training().callback is None
    with pytest.raises(InputError, match=r"supernet\.callback is no setting"):
        settings(supernet={"callback": "mine:Recipe"})
    with pytest.raises(InputError, match="give module:name of your own code"):
        settings(train={"callback": "mine.py"})
    searched = settings(train={"callback": "mine:Recipe"}, search={"method": "repnas"})
    assert searched.repnas().repnas.training.callback == "mine:Recipe"


def test_a_config_names_data_once() -> None:
    assert settings(data={"factory": "mine:make", "kwargs": {"count": 3}}).data.kwargs == {"count": 3}
    for data, words in (
        ({"factory": "mine:make", "folder": "x"}, "data has both folder and factory"),
        ({"file": "x.npz", "kind": "synthetic"}, 'data has both kind = "synthetic" and file'),
        ({"kwargs": {}}, r"data\.kwargs are of a factory"),
        ({"task": "regression"}, r"data\.task is for data\.file and data\.factory"),
        ({"factory": "mine:make", "flip": True}, "a factory, which does so itself"),
        ({"file": "x.npz", "size": 3}, "not for a file of arrays"),
        ({"factory": "mine.py"}, "give module:name of your own code"),
    ):
        with pytest.raises(InputError, match=words):
            settings(data=data)
