"""A diffusion model of points in the plane, small enough to train and distil in a test."""

import math

import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

CENTRES = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)])
SPREAD = 0.08


def draw_points(number, seed):
    """[N, 2, 1, 1]: eight small Gaussians on the unit circle."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(0, 8, (number,), generator=generator)
    return (CENTRES[which] + SPREAD * torch.randn(number, 2, generator=generator))[:, :, None, None]


def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'| of two sets of points [N, 2, 1, 1] (Szekely and Rizzo 2013)."""
    x, y = x.flatten(1), y.flatten(1)

    def within(z):
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


class PointNet(ModelMixin, ConfigMixin):
    """Predicts noise in points [B, 2, 1, 1], which diffusers takes for images of one pixel and two channels."""

    @register_to_config
    def __init__(self, width: int = 128, in_channels: int = 2, sample_size: int = 1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width),
            nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, sample, timestep, return_dict=True):
        frequencies = 2.0 ** torch.arange(8, device=sample.device) / 8
        angles = timestep.flatten().expand(len(sample))[:, None] / 1000 * frequencies * math.pi
        features = torch.cat([sample.flatten(1), angles.sin(), angles.cos()], dim=1)
        out = self.layers(features)[:, :, None, None]
        return {"sample": out} if return_dict else (out,)


def train_teacher(steps=1000, batch=256, seed=0):
    """A pipeline that has learnt draw_points."""
    torch.manual_seed(seed)
    net, scheduler = PointNet(), DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x0, t = draw_points(batch, 10_000 + step), torch.randint(0, 1000, (batch,))
        noise = torch.randn_like(x0)
        loss = (net(scheduler.add_noise(x0, noise, t), t, return_dict=False)[0] - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return DDPMPipeline(net.eval(), scheduler)


def untrained():
    """A teacher for what does not depend on what it knows: the same at each call."""
    torch.manual_seed(0)
    return DDPMPipeline(PointNet(width=16).eval(), DDIMScheduler())


def weights(pipe):
    """A copy of the network's tensors by name."""
    return {name: value.clone() for name, value in pipe.unet.state_dict().items()}
