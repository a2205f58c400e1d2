#!/usr/bin/env python
"""Half of the milliseconds: widths searched with CafeNet, then folded, deployed and verified.

    python examples/03_widths.py                      # on the simulated device, made-up images: a minute or two
    python examples/03_widths.py --device this-cpu    # on this CPU: some minutes the first time, on a quiet machine

It says what was asked, predicted and measured; its exit status is that of the verification. Killed, it goes on where it
was: what it makes lies in runs/03_widths. For your own network replace ``model``, ``example`` and the data (any dataset
of (image, class), or a task of your own), and give the trainings the epochs that they need.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import hwsearch as hs
from hwsearch.device.session import open_session
from hwsearch.graph.onnx_build import OnnxTemplate
from hwsearch.latency.lowering import Lowering
from hwsearch.models.vgg import vgg_small
from hwsearch.search.cafenet import CafeNetConfig
from hwsearch.search.evolution import EvolutionSettings
from hwsearch.search.scoring import ScoringConfig
from hwsearch.train.data import split, synthetic_images
from hwsearch.train.loop import TrainConfig

# Far too short to be useful; the defaults are a place to begin for real data.
SHORT = TrainConfig(steps=30, batch_size=64)
SEARCH = CafeNetConfig(
    training=SHORT,
    winner=SHORT,
    scoring=ScoringConfig(images=200, calibration_images=128),
    evolution=EvolutionSettings(evaluations=40),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="simulated")
    parser.add_argument("--share", type=float, default=0.5, help="of the full network's measured milliseconds")
    parser.add_argument("--folder", type=Path, default=Path("runs/03_widths"))
    asked = parser.parse_args()

    torch.manual_seed(0)
    model, example = vgg_small(width=0.5), torch.zeros(1, 1, 28, 28)
    train, valid = split(synthetic_images(1200, seed=1), 200, seed=0)

    device = hs.Device.load(asked.device)
    table = hs.profile(device, minutes=0.2 if device.simulated else 3.0)
    predictor = hs.LatencyPredictor().fit(table)

    # Channels that go together, every fourth width of each, and at least a quarter of it.
    space = hs.WidthSpace.from_model(model, example, quantum=4, minimum=0.25)
    with open_session(device) as session:
        networks = OnnxTemplate(space, hs.fold(model.eval(), example), example)  # any choice of widths as an ONNX file
        latency = hs.NetworkLatency(space, predictor, Lowering(networks, session))

        def measured_ms(choice: hs.WidthChoice) -> float:
            return hs.measure(networks.slice(choice), session, reference_ms=table.reference_ms).measured_ms

        full_ms = measured_ms(space.full())
        limit = hs.Limit(latency, asked.share * full_ms, name=device.name, measure=measured_ms)
        search = hs.CafeNet(space, hs.Budget([limit]), SEARCH, model=model, folder=asked.folder)
        result = search.search(train, valid)

    assert result.model is not None
    bundle = asked.folder / "bundle"
    hs.deploy(hs.fold(result.model, example), example, device, bundle, budget_ms=result.budget_ms)
    verdict = hs.verify(bundle, device)

    pairs = zip(result.choice.widths, space.groups, strict=True)
    widths = ", ".join(f"{width} of {group.units}" for width, group in pairs)
    print(f"full network {full_ms:.4f} ms, budget {result.budget_ms:.4f} ms")
    print(f"found: predicted {result.predicted_ms:.4f} ms, measured {result.measured_ms:.4f} ms, widths {widths}")
    print(f"verdict of {device.name}: {verdict.status}")
    return verdict.exit_code


if __name__ == "__main__":
    sys.exit(main())
