"""What is special about how this network is trained: an optimiser of its own, mixed images, averaged weights, a log."""

import json

import torch
from torch import nn

from hwsearch.train.callback import Callback


class Recipe(Callback):
    """AdamW, mix-up, and an exponential average of the weights that is what the network keeps."""

    def begin(self, model, config, steps):
        self.average = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.log = open("recipe.log", "a")  # noqa: SIM115  (closed at the end)

    def optimiser(self, groups, config):
        return torch.optim.AdamW(groups, lr=config.learning_rate)

    def loss(self, model, batch, task, step):
        images, targets = batch
        share = float(torch.distributions.Beta(0.2, 0.2).sample())  # torch's generator is seeded for every step
        order = torch.randperm(len(images))
        output = model(share * images + (1 - share) * images[order])
        return share * task.loss(output, (images, targets)) + (1 - share) * task.loss(output, (images, targets[order]))

    def update(self, optimiser, model, step):
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        for name, value in model.named_parameters():
            self.average[name].lerp_(value.detach(), 0.1)

    def after_step(self, model, step, steps, loss):
        if step % 10 == 0:
            print(json.dumps({"step": step, "steps": steps, "loss": loss}), file=self.log, flush=True)

    def end(self, model):
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(self.average[name])
        self.log.close()

    def state(self):
        return self.average
