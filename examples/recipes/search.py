#!/usr/bin/env python
"""Runs a recipe: a CafeNet search at a paper's settings, in one process or in several under torchrun.

    python examples/recipes/search.py examples/recipes/cifar10_vgg19.toml --mmacs 199
    torchrun --nproc-per-node 8 examples/recipes/search.py examples/recipes/imagenet_mobilenetv2.toml --mmacs 305
    torchrun --nproc-per-node 8 examples/recipes/search.py examples/recipes/imagenet_mobilenetv2.toml

Without ``--mmacs`` the budget is the recipe's: milliseconds on a device whose table lies in the hwsearch folder
(``hwsearch profile``, ``hwsearch fit``), predicted, each kept with a probability of 0.95. No device is touched here;
``hwsearch verify`` measures what was found. ``--set section.key=value`` changes one setting. The same command goes on
after a kill.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch

from hwsearch.config import RunConfig
from hwsearch.device.spec import Device
from hwsearch.errors import HwsearchError, InputError
from hwsearch.graph.model_folder import save_model
from hwsearch.graph.widths import WidthSpace
from hwsearch.latency.network import NetworkLatency
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.model_argument import load_model_argument
from hwsearch.preparation import PREDICTOR
from hwsearch.search.budget import Budget, Limit, MegaMacs
from hwsearch.search.cafenet import CafeNet
from hwsearch.train import processes
from hwsearch.train.loop import evaluate
from hwsearch.train.seeds import torch_seed
from hwsearch.train.weights import load_weights


def read(path: Path, changes: list[str]) -> RunConfig:
    """A recipe with some settings changed."""
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}; check the path") from error
    for change in changes:
        name, _, value = change.partition("=")
        section, _, key = name.partition(".")
        if not key or not value:
            raise InputError(f"--set {change!r}: give section.key=value, such as supernet.steps=1000")
        data.setdefault(section, {})[key] = tomllib.loads(f"value = {value}")["value"]
    return RunConfig.from_dict(data, source=str(path))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--mmacs", type=float, help="budget in millions of MACs, as the papers have it")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    asked = parser.parse_args()
    try:
        with processes.joined() as rank:
            config = read(asked.recipe, asked.set)
            torch.manual_seed(torch_seed(config.run.seed, "model"))
            argument = load_model_argument(config.model.factory, config.model.input_shape, config.model.kwargs)
            model = argument.need_module()
            if config.model.weights is not None:
                load_weights(model, config.model.weights)
            space = WidthSpace.from_model(
                model, argument.example_input, quantum=config.search.quantum, minimum=config.search.minimum
            )
            if asked.mmacs is not None:
                limit = Limit(MegaMacs(space), asked.mmacs, name="MMACs")
            else:
                device = Device.load(config.device.name)
                latency = NetworkLatency(space, LatencyPredictor.load(device.table_folder / PREDICTOR)).prepare()
                full_ms = float(latency.evaluate([space.full().widths])[0])
                limit = Limit(latency, config.search.max_ms(full_ms), config.search.quantile, device.name)
            task, test = config.data.load(config.run.seed)
            result = CafeNet(
                space, Budget([limit]), config.cafenet(), model=model, seed=config.run.seed, folder=config.run_folder,
                say=lambda line: print(line, file=sys.stderr) if rank == 0 else None,
            ).search(task, None)  # fmt: skip
            assert result.model is not None
            tested = evaluate(result.model, task, test, config.training())
            if rank == 0:
                save_model(
                    config.run_folder / "model", result.model, factory=config.model.factory,
                    input_shape=config.model.input_shape, factory_kwargs=config.model.kwargs,
                    widths=dict(zip(result.groups, result.choice.widths, strict=True)),
                )  # fmt: skip
                found = {
                    "widths": result.choice.widths, "mmacs": result.macs / 1e6, "held_out": result.metric,
                    "test": tested.metric, "metric": task.metric_name,
                }  # fmt: skip
                print(json.dumps(found))
    except HwsearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
