#!/usr/bin/env python
"""How long does my network take, and why is it not faster?

A network of your own, priced kernel by kernel as the device's runtime would execute it; it is not timed. The device is
profiled and its predictor fitted first.

    python examples/01_estimate.py                      # on the simulated device: less than a minute
    python examples/01_estimate.py --device this-cpu    # on this CPU: some minutes the first time, on a quiet machine

For your own network replace ``MyNetwork`` and ``SHAPE``.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import hwsearch as hs
from hwsearch.device.session import open_session
from hwsearch.graph.onnx_build import OnnxTemplate
from hwsearch.latency.explain import explain_choice
from hwsearch.latency.lowering import Lowering

SHAPE = (1, 1, 28, 28)


class MyNetwork(nn.Module):
    """A few convolutions and a residual sum; 30 channels are a width that few runtimes like."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 30, 3, padding=1, bias=False), nn.BatchNorm2d(30), nn.ReLU())
        self.side = nn.Sequential(nn.Conv2d(30, 30, 3, padding=1, bias=False), nn.BatchNorm2d(30), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(30, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) to logits (N, 10)."""
        x = self.stem(x)
        x = self.down(x + self.side(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="simulated")
    parser.add_argument("--minutes", type=float, help="of profiling; by default 3, on the simulated device 0.2")
    asked = parser.parse_args()

    device = hs.Device.load(asked.device)
    table = hs.profile(device, minutes=asked.minutes or (0.2 if device.simulated else 3.0))  # goes on where it was
    predictor = hs.LatencyPredictor().fit(table)

    model, example = MyNetwork().eval(), torch.zeros(SHAPE)
    space = hs.WidthSpace.from_model(model, example)  # for the stair edges: which widths there are
    with open_session(device) as session:
        network = OnnxTemplate(space, hs.fold(model, example), example)  # folded, as it would be deployed
        latency = hs.NetworkLatency(space, predictor, Lowering(network, session)).prepare()
        whole = space.full()
        found = latency.estimate(whole)
        explained = explain_choice(latency, whole, network.slice(whole))

    print(f"{found.ms:.4f} ms on {device.name} (90 % interval {found.low_ms:.4f} to {found.high_ms:.4f})")
    for layer in explained.layers:
        edge = "" if layer.stair is None or layer.stair.down is None else f", the next edge is {layer.stair.down}"
        print(f"  {layer.ms:.4f} ms  {layer.name}: {layer.bound}, {layer.channels} channels{edge}")
    print("Why it is not faster:")
    for reason in explained.reasons:
        print(f"  {reason}")


if __name__ == "__main__":
    main()
