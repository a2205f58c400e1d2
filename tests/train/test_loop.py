"""The loop: what it does to weights, and that a kill at any moment changes no bit of the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hwsearch.errors import InputError, SchemaError
from hwsearch.train import checkpoint
from hwsearch.train.data import TensorExamples, synthetic_images
from hwsearch.train.loop import TrainConfig, evaluate, laid_out, run_steps, settings, train
from hwsearch.train.task import Classification

REPOSITORY = Path(__file__).resolve().parents[2]


def small_task(seed: int = 0) -> Classification:
    whole = synthetic_images(160, classes=4, shape=(1, 10, 10), seed=seed)
    images = TensorExamples(whole.inputs, whole.targets, mean=(0.5,), std=(0.25,), shift=1, flip=True)
    return Classification(images, synthetic_images(80, classes=4, shape=(1, 10, 10), seed=9))


def small_model() -> nn.Module:
    """With everything that could break a resume: batch-norm buffers, dropout, depth-wise layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 4),
    )  # fmt: skip


CONFIG = TrainConfig(steps=25, batch_size=32, learning_rate=0.2, seed=3, checkpoint_s=0)


class Stop(Exception):
    """Raised by a progress callback to break a run off."""


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss_and_leaves_global_state_alone() -> None:
    task, model = small_task(), small_model()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    before = evaluate(model, task, task.valid)
    report = train(model, task, CONFIG)
    after = evaluate(model, task, task.valid)
    assert after.loss < before.loss
    assert after.metric > before.metric + 0.1
    assert (report.steps, report.examples, report.history[-1][0]) == (25, 800, 25)
    assert not model.training
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    models = [small_model() for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        train(model, small_task(), TrainConfig(steps=8, batch_size=32, seed=seed))
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


@pytest.mark.parametrize("stop_at", [0, 7, 24])
def test_going_on_from_a_checkpoint_equals_the_unbroken_run(tmp_path: Path, stop_at: int) -> None:
    unbroken = small_model()
    whole = train(unbroken, small_task(), CONFIG)

    calls = 0

    def broken_step(step: int, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        nonlocal calls
        if calls == stop_at:
            raise Stop
        calls += 1
        loss = small_task().loss(first(batch[0]), batch)
        loss.backward()
        return loss.detach()

    first = small_model()
    with pytest.raises(Stop):
        run_steps(first, small_task().train, CONFIG, broken_step, identity={"kind": "train"}, folder=tmp_path)
    resumed = small_model()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    report = train(resumed, small_task(), CONFIG, folder=tmp_path)
    assert same(unbroken, resumed)
    assert report == whole


_SCRIPT = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("kill_me", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["kill_me"] = module
spec.loader.exec_module(module)
module.train(module.small_model(), module.small_task(), module.CONFIG, folder=Path(sys.argv[2]))
"""


def steps_taken(folder: Path) -> int:
    """How far the checkpoint in a folder is; -1 where there is none."""
    path = folder / checkpoint.NAME
    if not path.exists():
        return -1
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["hwsearch"])["step"])


def test_kill_9_at_any_moment_changes_no_bit(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", _SCRIPT, __file__, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 100
    while steps_taken(tmp_path) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= steps_taken(tmp_path) < 25
    resumed, unbroken = small_model(), small_model()
    train(resumed, small_task(), CONFIG, folder=tmp_path)
    train(unbroken, small_task(), CONFIG)
    assert same(unbroken, resumed)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first, second = small_model(), small_model()
    train(first, small_task(), CONFIG, folder=tmp_path)

    def never(step: int, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        raise AssertionError("a step was taken")

    run_steps(second, small_task().train, CONFIG, never, identity={"kind": "train"}, folder=tmp_path)
    assert same(first, second)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train(small_model(), small_task(), CONFIG, folder=tmp_path)
    with pytest.raises(InputError, match=r"learning_rate was 0\.2, now 0\.3"):
        train(small_model(), small_task(), TrainConfig(**{**vars(CONFIG), "learning_rate": 0.3}), folder=tmp_path)
    with pytest.raises(InputError, match="data was"):
        train(small_model(), small_task(seed=5), CONFIG, folder=tmp_path)
    train(small_model(), small_task(), TrainConfig(**{**vars(CONFIG), "checkpoint_s": 60.0}), folder=tmp_path)
    wider = nn.Sequential(nn.Flatten(), nn.Linear(100, 4))
    with pytest.raises(SchemaError, match=r"1\.weight"):
        train(wider, small_task(), CONFIG, folder=tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    train(small_model(), small_task(), CONFIG, folder=tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:100], b"", whole[:-10]):
        path.write_bytes(damaged)
        with pytest.raises(SchemaError, match="delete it"):
            train(small_model(), small_task(), CONFIG, folder=tmp_path)
    save_file({"x": torch.zeros(1)}, path, metadata={"hwsearch": json.dumps({"schema": "else", "version": 1})})
    with pytest.raises(SchemaError, match="else 1"):
        train(small_model(), small_task(), CONFIG, folder=tmp_path)


def test_a_checkpoint_is_plain_safetensors_and_keeps_tied_weights(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, {"a": weight, "b": weight}, step=2, identity={"kind": "x"}, notes={"history": []})
    assert torch.equal(load_file(path)["b"], weight)
    assert checkpoint.load(path, identity={"kind": "x"}) is not None
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.NAME]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*file"):
        train(small_model(), small_task(), CONFIG, folder=tmp_path / "file" / "run")


def test_biases_and_norms_do_not_decay() -> None:
    model, task = small_model(), small_task()
    start = {name: value.clone() for name, value in model.named_parameters()}

    def no_gradient(step: int, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        loss = sum((parameter * 0).sum() for parameter in model.parameters())
        assert isinstance(loss, torch.Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    config = TrainConfig(steps=3, batch_size=16, learning_rate=0.1, weight_decay=0.1)
    run_steps(model, task.train, config, no_gradient, identity={})
    for name, value in model.named_parameters():
        assert torch.equal(value, start[name]) == (value.dim() == 1), name


def test_a_long_gradient_is_shortened_to_the_clip_and_a_short_one_is_not() -> None:
    for length, moved in ((8.0, 2.0), (1.0, 1.0)):
        model = nn.Linear(4, 1, bias=False)
        start, pull = model.weight.detach().clone(), torch.full((1, 4), length / 2)

        def step(number: int, batch: tuple[torch.Tensor, ...], model: nn.Linear = model, pull: torch.Tensor = pull):  # type: ignore[no-untyped-def]
            loss = (model.weight * pull).sum()
            loss.backward()
            return loss.detach()

        config = TrainConfig(
            steps=1, batch_size=16, learning_rate=1.0, warmup=0.0, momentum=0.0, nesterov=False, weight_decay=0.0,
            clip=2.0,
        )  # fmt: skip
        run_steps(model, small_task().train, config, step, identity={})
        assert torch.linalg.norm(model.weight - start).item() == pytest.approx(moved, rel=1e-5)


def test_the_rate_warms_up_and_then_follows_a_cosine() -> None:
    config = TrainConfig(learning_rate=0.4, final_rate=0.0, warmup=0.1)
    rates = [config.rate(step, 100) for step in range(100)]
    assert np.all(np.diff(rates[:11]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
    assert max(rates) == rates[10] == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2)
    assert rates[99] < 0.001
    assert TrainConfig(epochs=2.5, batch_size=10).total_steps(100) == 25
    assert TrainConfig(steps=7).total_steps(100) == 7


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(InputError, match=r"the loss is nan at step 0 .* lower learning_rate"):
        run_steps(
            small_model(), small_task().train, CONFIG, lambda step, batch: torch.tensor(float("nan")), identity={}
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("threads", 0), ("seed", -1), ("learning_rate", float("nan")), ("epochs", 0.0), ("steps", 0),
     ("momentum", -0.1), ("warmup", 1.0), ("precision", "float16"), ("weight_decay", float("inf")), ("clip", 0.0)],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        TrainConfig(**{field: value})  # type: ignore[arg-type]


def test_bfloat16_is_refused_where_the_cpu_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwsearch.train.loop._has_bfloat16", lambda: False)
    with pytest.raises(InputError, match="no bfloat16 instructions"), settings(TrainConfig(precision="bfloat16")):
        pass


def test_bfloat16_autocast_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwsearch.train.loop._has_bfloat16", lambda: True)
    task = small_task()
    report = train(small_model(), task, TrainConfig(**{**vars(CONFIG), "steps": 3, "precision": "bfloat16"}))
    assert np.isfinite(report.final_loss)


def test_progress_counts_up_to_the_total() -> None:
    seen: list[tuple[int, int, str]] = []
    train(small_model(), small_task(), CONFIG, progress=lambda *call: seen.append(call))
    assert seen[-1][:2] == (25, 25)
    assert "loss" in seen[-1][2]


def test_one_channel_images_keep_their_layout_through_convolutions() -> None:
    """Whatever the layout of the weights: a layer that answers in the other layout slows all that follow."""
    batch = laid_out((torch.rand(4, 1, 6, 6),), TrainConfig())
    conv = nn.Conv2d(1, 3, 3)
    assert torch.equal(batch[0], batch[0].contiguous())
    assert conv(batch[0]).is_contiguous(memory_format=torch.channels_last)
    plain = laid_out((torch.rand(4, 1, 6, 6),), TrainConfig(channels_last=False))
    assert conv(plain[0]).is_contiguous()
