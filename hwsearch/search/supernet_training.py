"""Training a super-network: each step trains one sub-network, or the full one, on shared weights.

CafeNet's min-min: of m locally free patterns of one width vector, only the one of least loss on the batch is stepped.
With offset 0 this is slimmable training, with one pattern random-pattern training. BCNet's bilateral sharing trains
every width from the left and from the right instead.

Reference: Su et al., "Locally Free Weight Sharing for Network Width Search" (ICLR 2021); Su et al., "BCNet: Searching
for Network Width with Bilaterally Coupled Network" (CVPR 2021); in-place distillation: Yu and Huang (ICCV 2019).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from hwsearch.search.cafenet_config import CafeNetConfig
from hwsearch.search.grid import WidthGrid
from hwsearch.search.patterns import Pattern, bins_of, complement, draw, leftmost, rightmost
from hwsearch.search.supernet import SuperNet
from hwsearch.train import processes
from hwsearch.train.data import Batch
from hwsearch.train.loop import Progress, Step, run_steps
from hwsearch.train.seeds import generator, torch_seed
from hwsearch.train.task import Task

if TYPE_CHECKING:
    from hwsearch.graph.widths import WidthChoice, WidthSpace

#: Settings that decide what a super-network becomes, beside its training and its space.
_IDENTITY = ("offset", "patterns", "full_steps", "distillation", "sharing", "complementary")


def train_supernet(
    space: WidthSpace,
    model: nn.Module,
    task: Task,
    config: CafeNetConfig | None = None,
    checkpoint_folder: Path | None = None,
    progress: Progress | None = None,
) -> SuperNet:
    """Train a super-network of ``model`` over ``space``, from the model's own weights on.

    A call with the same folder goes on after a kill and ends with the same bits.

    Raises:
        InputError: the checkpoint belongs to another training, or the loss is not finite.
        UnsupportedModelError: a layer that would change its width has no elastic form.
    """
    config = config or CafeNetConfig()
    net = SuperNet(model, space)
    identity = {
        "kind": "supernet",
        "space": WidthGrid.of(space).digest,
        "bins": list(bins_of(space, config.bin_units)),
        **{name: getattr(config, name) for name in _IDENTITY},
    }
    run_steps(
        net,
        task.train,
        config.training,
        min_min_step(net, task, config),
        identity=identity,
        folder=checkpoint_folder,
        progress=progress,
    )
    return net


def min_min_step(net: SuperNet, task: Task, config: CafeNetConfig) -> Step:
    """The training step: a function of (step number, batch) that leaves gradients and returns the loss.

    1. draw widths uniformly; 2. draw m patterns; 3. loss of each on the same batch in the same batch-norm mode;
    4. backward of the best only, through the forward pass that judged it (the paper's code runs that one twice: m + 3
    passes where these are m + 2; at most two patterns' activations are held). Even steps train the full network where
    ``full_steps``. Bilateral sharing goes forward and backward twice, from the left and from the right, with half the
    loss each.
    """
    bins, seed = bins_of(net.space, config.bin_units), config.training.seed
    bilateral = config.sharing == "bilateral"

    def step(number: int, batch: Batch) -> Tensor:
        if config.full_steps and number % 2 == 0:
            net.activate(None)
            return _backward(task.loss(net(batch[0]), batch))
        same_noise = torch_seed(seed, "torch", number)  # dropout must not decide which pattern is best
        teacher = _output(net, None, batch, same_noise) if config.distillation else None

        def forward(pattern: Pattern) -> tuple[Tensor, Tensor]:
            net.activate(pattern)
            torch.manual_seed(same_noise)
            output = net(batch[0])
            return output, task.loss(output, batch)

        def trained(output: Tensor, loss: Tensor, share: float) -> Tensor:
            if teacher is not None:
                loss = (1 - config.distillation) * loss + config.distillation * task.imitate(output, teacher)
            return _backward(share * loss)

        if bilateral:
            choice = bilateral_choice(net.space, config, number)
            left = trained(*forward(leftmost(choice)), 0.5)
            return left + trained(*forward(rightmost(net.space, choice)), 0.5)
        rng = generator(seed, "pattern", number)
        choice = net.space.sample(rng)
        patterns = [draw(net.space, choice, config.offset, bins, rng) for _ in range(config.patterns)]
        best, least = forward(patterns[0]), np.inf
        if config.patterns > 1 and config.offset > 0:
            least = processes.mean(best[1].item())
            for pattern in patterns[1:]:
                other = forward(pattern)
                if (lost := processes.mean(other[1].item())) < least:
                    best, least = other, lost
                del other
        loss = trained(*best, 1.0)
        net.record(choice, processes.mean(float(loss)))
        return loss

    return step


def bilateral_choice(space: WidthSpace, config: CafeNetConfig, number: int) -> WidthChoice:
    """The widths of a bilateral step: drawn, or (every second time) the complement of the step before."""
    stride = 2 if config.full_steps else 1
    turn = number // stride
    if config.complementary and turn % 2 == 1:
        return complement(space, space.sample(generator(config.training.seed, "pattern", number - stride)))
    return space.sample(generator(config.training.seed, "pattern", number))


def _output(net: SuperNet, pattern: Pattern | None, batch: Batch, noise: int) -> Tensor:
    """Output of one sub-network without gradient, in training mode, its dropout fixed by ``noise``."""
    net.activate(pattern)
    torch.manual_seed(noise)
    with torch.no_grad():
        output: Tensor = net(batch[0])
    return output


def _backward(loss: Tensor) -> Tensor:
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()
