"""What a trained network is worth: held-out loss by time, feature-FID, error against another network."""

from __future__ import annotations

import copy
import math

import torch
from cifar10 import Split, to_signed
from diffusers import DDPMPipeline
from reference_output import autocast
from reference_recipes import TRAIN_STEPS, build_scheduler
from torch import Tensor, nn

from ptq4dm.evaluation.feature_fid import FeatureFID
from ptq4dm.layers.shift.convert import to_floats
from ptq4dm.pipelines.images import to_uint8
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from ptq4dm.pipelines.sampling import sample
from ptq4dm.training.schedule import even_times

BATCH = 500
BINS = 10


class HeldOut:
    """Noisy test images, the same for every network: times spread evenly, noise of one seed."""

    def __init__(self, split: Split, number: int, device: torch.device) -> None:
        g = torch.Generator().manual_seed(20)
        rows = torch.randperm(len(split.images), generator=g)[:number]
        number = len(rows)
        x0 = to_signed(split.images[rows])
        self.t = even_times(number, TRAIN_STEPS)[torch.randperm(number, generator=g)]
        self.noise = torch.randn(x0.shape, generator=g)
        signal = build_scheduler().alphas_cumprod[self.t][:, None, None, None]
        self.x = signal.sqrt() * x0 + (1 - signal).sqrt() * self.noise
        self.labels = split.labels[rows]
        self.device = device

    @torch.no_grad()
    def predictions(self, net: nn.Module) -> Tensor:
        """epsilon_theta [N, 3, 32, 32], float32 on the CPU, of a network in evaluation mode."""
        found = []
        for rows in torch.arange(len(self.x)).split(BATCH):
            x, t, labels = (one[rows].to(self.device) for one in (self.x, self.t, self.labels))
            with autocast(self.device):
                found.append(net(x, t, **conditions(net, labels), return_dict=False)[0].float().cpu())
        return torch.cat(found)

    def losses(self, net: nn.Module) -> dict:
        """The mean squared error, over all and in ten bins of times; None where it is not finite."""
        each = (self.predictions(net.eval()) - self.noise).square().flatten(1).mean(1)
        bins = [each[self.t * BINS // TRAIN_STEPS == i].mean().item() for i in range(BINS)]
        return {"held_out": finite(each.mean().item()), "held_out_bins": [finite(one) for one in bins]}

    def error(self, net: nn.Module, reference: nn.Module) -> float | None:
        """|e - e_reference|^2 / |e_reference|^2 over all."""
        of, to = self.predictions(net.eval()), self.predictions(reference.eval())
        return finite(((of - to).square().sum() / to.square().sum()).item())


def conditions(net: nn.Module, labels: Tensor) -> dict:
    return {"class_labels": labels} if getattr(net.config, "num_embeds_ada_norm", None) else {}


def finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def feature_fid(net: nn.Module, number: int, steps: int, device: torch.device) -> float | None:
    """feature-FID of so many samples in so many steps of DDIM; image k has seed k. None for a network that fell to
    NaN."""
    net = net.eval()
    kinds = {"unet": net} if not conditions(net, torch.zeros(1)) else {"transformer": net}
    pipe = (DDPMPipeline if "unet" in kinds else PixelDiTPipeline)(**kinds, scheduler=build_scheduler())
    if not all(bool(p.isfinite().all()) for p in net.parameters()):
        return None
    batches = []
    for start in range(0, number, BATCH):
        with autocast(device):
            seeds = range(start, min(start + BATCH, number))
            batches.append(to_uint8(sample(pipe, seeds, num_inference_steps=steps)))
    return finite(FeatureFID(device)(batches))


def in_floats(net: nn.Module) -> nn.Module:
    """A copy whose layers are plain again; norms stay what they were trained as."""
    plain = copy.deepcopy(net)
    to_floats(plain)
    return plain
