"""A network as people write them: nothing in this file knows of hwsearch, and nothing in it was made easy for it."""

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(i, o, k=3, s=1, g=1):
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, ch, r=4):
        super().__init__()
        self.down, self.up = nn.Linear(ch, max(ch // r, 4)), nn.Linear(max(ch // r, 4), ch)

    def forward(self, x):
        w = x.mean((2, 3))
        w = torch.sigmoid(self.up(F.silu(self.down(w))))
        return x * w[:, :, None, None]


class Mix(nn.Module):
    """Two views of the input beside each other, squeezed back: concat, gate, residual."""

    def __init__(self, ch, stride=1, out=None):
        super().__init__()
        out = out or ch
        self.near = conv_bn(ch, ch, 3, stride)
        self.far_a, self.far_b = conv_bn(ch, ch // 2, 1), conv_bn(ch // 2, ch // 2, 5, stride, g=ch // 2)
        self.squeeze = conv_bn(ch + ch // 2, out, 1)
        self.se = Gate(out)
        self.skip = conv_bn(ch, out, 1, stride) if stride > 1 or out != ch else nn.Identity()
        self.strength = nn.Parameter(torch.ones(1))

    def forward(self, x):
        near = F.relu(self.near(x))
        far = F.relu(self.far_b(F.relu(self.far_a(x))))
        y = self.se(self.squeeze(torch.cat((near, far), dim=1)))
        return F.relu(self.skip(x) + self.strength * y)


class Petal(nn.Module):
    def __init__(self, num_classes=5, base=16, blocks=(1, 2, 1)):
        super().__init__()
        self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.45))
        self.register_buffer("sigma", torch.full((1, 3, 1, 1), 0.25))
        self.stem = conv_bn(3, base, 3, 2)
        self.body = nn.ModuleList()
        ch = base
        for n, count in enumerate(blocks):
            for b in range(count):
                wide = base * 2**n
                self.body.append(Mix(ch, 2 if b == 0 and n > 0 else 1, wide))
                ch = wide
        self.head = nn.ModuleDict({"norm": nn.BatchNorm1d(2 * ch), "fc": nn.Linear(2 * ch, num_classes)})

    def forward(self, x):
        x = (x - self.mu) / self.sigma
        x = F.relu(self.stem(x))
        for layer in self.body:
            x = layer(x)
        x = torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1).flatten(1)
        return self.head["fc"](self.head["norm"](x))


def petal_small(num_classes=5, base=16):
    return Petal(num_classes, base)
