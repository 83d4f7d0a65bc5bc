"""The noise that rounding puts into the gradients by the weights, layer by layer, on one batch of a trained model.

Of stochastic rounding of dy to steps s the variance is f (1 - f) s^2, f the part of dy / s that is no whole number;
that of dw = dy^T x is its sum over the batch, weighted by x^2. Steps: groups along samples and channels (ours), along
one of them; exact ones for each sample, channel, and token or pixel, which no integer product could take back.
"""

from __future__ import annotations

import torch
from cifar10 import Split, to_signed
from reference_recipes import TRAIN_STEPS, build_scheduler
from shiftquant_measure import conditions
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4dm.kernels.formats import shift
from ptq4dm.kernels.formats.int8 import weight_limit
from ptq4dm.training.gradients import gradient_ranges, gradients_by_output


def batch_loss(net: nn.Module, split: Split, t: Tensor):
    """A function that calls the network once on noisy images of times t and gives its loss."""
    device = next(net.parameters()).device
    g = torch.Generator().manual_seed(21)
    rows = torch.randperm(len(split.images), generator=g)[: len(t)]
    x0, labels = to_signed(split.images[rows]), split.labels[rows].to(device)
    noise = torch.randn(x0.shape, generator=g)
    signal = build_scheduler().alphas_cumprod[t][:, None, None, None]
    x, noise = (signal.sqrt() * x0 + (1 - signal).sqrt() * noise).to(device), noise.to(device)
    return lambda: F.mse_loss(net(x, t.to(device), **conditions(net, labels), return_dict=False)[0].float(), noise)


def noise_rows(net: nn.Module, split: Split, number: int) -> list[dict]:
    """For 4 and 6 bits and times mixed or all equal: medians over layers of variance ratios."""
    g = torch.Generator().manual_seed(22)
    mixed = torch.randint(0, TRAIN_STEPS, (number,), generator=g)
    rows = []
    for times, t in (("mixed", mixed), ("equal", torch.full((number,), TRAIN_STEPS // 2))):
        found = gradients_by_output(net, batch_loss(net, split, t), number)
        for bits in (4, 6):
            ratios = [one for x, dy in found.values() if (one := _ratios(x, dy, bits)) is not None]
            row = {"times": times, "bits": bits, "layers": len(ratios)}
            for name in ratios[0]:
                values = torch.tensor([one[name] for one in ratios])
                row[name] = {
                    "geometric_mean": values.log().mean().exp().item(),
                    "median": values.median().item(),
                    "largest": values.max().item(),
                }
            rows.append(row)
    return rows


def range_row(net: nn.Module, split: Split, number: int) -> list[dict]:
    """Octaves that samples' gradients lie below the batch's, by bins of times."""
    t = torch.arange(number) * TRAIN_STEPS // number
    return gradient_ranges(net, batch_loss(net, split, t), t, TRAIN_STEPS)


def _ratios(x: Tensor, dy: Tensor, bits: int) -> dict[str, float] | None:
    """Variances of dw over that under one step for the tensor, and ours over that under exact steps for samples; None
    where inputs and outputs are not pixel by pixel."""
    x, dy = (one.permute(0, 2, 3, 1) if one.ndim == 4 else one for one in (x, dy))
    x, dy = (one.float().reshape(len(one), -1, one.shape[-1]) for one in (x, dy))
    if x.shape[1] != dy.shape[1] or not bool(dy.abs().amax() > 0):
        return None
    weight, limit = x.square().sum(2, keepdim=True), weight_limit(bits)

    def variance(steps: Tensor) -> float:
        steps = steps.clamp_min(1e-30)
        part = dy / steps
        part = part - part.floor()
        return (part * (1 - part) * steps.square() * weight).sum(dtype=torch.float64).item()

    def exact(*dims: int) -> Tensor:
        return dy.abs().amax(dims, keepdim=True) / limit

    groups = shift.groups_of(bits, 5)
    codes = shift.encode(dy, bits, groups)
    rows, columns = (shift.row_steps(shift.encode(one, bits, groups)) for one in (dy, dy.transpose(0, 2)))
    steps = {
        "groups": shift.row_steps(codes)[:, None, None] * shift.powers(-codes.columns),
        "groups of samples": rows[:, None, None],
        "groups of channels": columns,
        "exact samples": exact(1, 2),
        "exact channels": exact(0, 1),
        "exact tokens": exact(2),
    }
    tensor = variance(exact(0, 1, 2))
    found = {name: variance(one.expand_as(dy)) / tensor for name, one in steps.items()}
    return {**found, "groups over exact samples": found["groups"] / found["exact samples"]}
