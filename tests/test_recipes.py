"""Every recipe runs on a tiny folder of the same layout."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hwsearch.config import RunConfig

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = sorted((REPOSITORY / "examples" / "recipes").glob("*.toml"))
SMALL = {
    "imagenet_mobilenetv2": ("make_imagenet", 1.6, "1x3x64x64", ["model.kwargs={width = 0.25, classes = 2}"]),
    "cifar10_vgg19": (
        "make_cifar10", 0.35, "1x3x32x32", ["model.kwargs={stages = [[8], [16], [16]], classes = 10}"],
    ),
    "celeba_mobilenetv2": ("make_celeba", 1.6, "1x3x64x64", ["model.kwargs={width = 0.25, classes = 3}"]),
}  # fmt: skip

found = importlib.util.spec_from_file_location("stand_ins", REPOSITORY / "tests" / "train" / "stand_ins.py")
assert found is not None
assert found.loader is not None
stand_ins = importlib.util.module_from_spec(found)
found.loader.exec_module(stand_ins)


def test_every_recipe_is_a_config_that_is_tried_here() -> None:
    assert [recipe.stem for recipe in RECIPES] == sorted(SMALL)
    for recipe in RECIPES:
        config = RunConfig.load(recipe)
        assert config.cafenet().winner is not None
        assert config.data.folder is not None


def run_recipe(recipe: Path, tmp_path: Path, *launcher: str) -> str:
    """Search by a recipe on a stand-in folder, started as ``launcher`` says; what it told on standard error."""
    maker, mmacs, shape, changes = SMALL[recipe.stem]
    folder = getattr(stand_ins, maker)(tmp_path, images=32, noise=True)
    settings = [
        *changes, f'data.folder="{folder}"', "data.valid=8", f'model.input="{shape}"', f'run.folder="{tmp_path}"',
        "supernet.steps=3", "supernet.batch_size=4", "train.steps=3", "train.batch_size=4", "search.population=4",
        "search.generations=2", "search.score_images=8", "search.calibration_images=8", "search.finalists=0",
        'search.bins="macs"', "supernet.learning_rate=0.001", "train.learning_rate=0.001",
        *([] if maker == "make_cifar10" else ["data.size=64"]),
    ]  # fmt: skip
    # Epochs and steps exclude each other: a recipe in epochs is tried in steps.
    text = "\n".join(line for line in recipe.read_text().splitlines() if not line.startswith("epochs"))
    (tmp_path / recipe.name).write_text(text)
    command = [
        sys.executable, *launcher, str(REPOSITORY / "examples" / "recipes" / "search.py"), str(tmp_path / recipe.name),
        "--mmacs", str(mmacs), *(part for change in settings for part in ("--set", change)),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert 0 < result["mmacs"] <= mmacs
    assert 0 <= result["test"] <= 1
    return done.stderr


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_runs_on_a_folder_of_the_same_layout(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    assert "widths by macs" in run_recipe(recipe, tmp_path)


@pytest.mark.long
def test_a_recipe_runs_under_torchrun(tmp_path: Path) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "cifar10_vgg19")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert "widths by macs" in run_recipe(recipe, tmp_path, *launcher)
