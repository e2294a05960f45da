"""A net of a few weights, batches for it, and the counts of four classes."""

import torch
from torch import nn

from rescom_timm.methods import create_method
from rescom_timm.models.net import Net, ProjectorConfig

COUNTS = torch.tensor([50, 20, 8, 3])


class Encoder(nn.Module):
    """With BatchNorm, so that running statistics and modes can be watched."""

    head_hidden_size = 6

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 6)
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.bn(self.linear(x.flatten(1)))


def make_net(seed=0):
    torch.manual_seed(seed)
    return Net(Encoder(), len(COUNTS), ProjectorConfig(hidden=8, dim=5)).double()


def make(config, seed=0):
    return create_method(make_net(seed), COUNTS, config).double()


def batch(size=8, views=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, views, 3, 2, 2, generator=generator, dtype=torch.float64)
    return {"image": images, "label": torch.randint(0, len(COUNTS), (size,), generator=generator)}


def train(method, steps=3, lr=0.1):
    """A few steps as the trainer makes them; returns the last outputs."""
    optimizer = torch.optim.SGD([p for p in method.net.parameters() if p.requires_grad], lr)
    method.train()
    for step in range(steps):
        outputs = method(batch(views=method.views, seed=step))
        outputs["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
    return outputs
