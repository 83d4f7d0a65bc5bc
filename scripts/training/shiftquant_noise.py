"""The noise that rounding puts into the gradients by the weights, layer by layer, on one batch of a trained model.

Of stochastic rounding of dy to steps s the variance is f (1 - f) s^2, f the part of dy / s that is no whole number;
that of dw = dy^T x is its sum over the batch, weighted by x^2. Steps: groups along rows and channels (ours; rows are
samples, of Linear layers tokens), along samples or channels alone; exact ones for each sample, channel, and token or
pixel, which no integer product could take back. Rows of bias draw the gradients of some layers many times.
"""

from __future__ import annotations

import copy

import torch
from cifar10 import Split, to_signed
from reference_recipes import TRAIN_STEPS, build_scheduler
from shiftquant_measure import conditions
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4dm.kernels.formats import shift
from ptq4dm.kernels.formats.int8 import weight_limit
from ptq4dm.layers.shift.layers import ShiftConv2d, ShiftLinear
from ptq4dm.layers.shift.widths import Widths
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


DRAWN = 8  # layers of a network whose gradients are drawn many times


def bias_rows(net: nn.Module, split: Split, draws: int, bits: int = 4) -> list[dict]:
    """Whether the mean of a layer's gradient by its weight, over so many draws, is that of floats; of two samples.

    Floats: dy as it is and x at its codes, in float64. Of (mean - exact) / standard error over the entries of dw:
    the root mean square, 1 where there is no bias, and the share beyond 3, which is 0.27 % of normal values; `along`:
    the same number for dw's component along itself, which tells whether it is shrunk.
    """
    number = 2
    t = torch.tensor([TRAIN_STEPS // 10, TRAIN_STEPS // 2])
    found = gradients_by_output(net, batch_loss(net, split, t), number)
    names = [name for name, (x, dy) in found.items() if x.numel() + dy.numel() < 2**19 and bool(dy.abs().amax() > 0)]
    rows = []
    for name in names[:: max(1, len(names) // DRAWN)][:DRAWN]:
        layer, (x, dy) = net.get_submodule(name), found[name]
        integer = (ShiftConv2d if isinstance(layer, nn.Conv2d) else ShiftLinear)(layer, Widths(bits, bits, bits))
        with torch.no_grad():
            exact = _at_codes(layer, x.float(), dy.float(), bits)
        torch.manual_seed(0)
        y = integer(x.float())
        total, squares, along = torch.zeros_like(exact), torch.zeros_like(exact), []
        for _ in range(draws):
            (dw,) = torch.autograd.grad(y, integer.weight, dy.float(), retain_graph=True)
            off = dw.double() - exact
            total, squares = total + off, squares + off.square()
            along.append((off * exact).sum())
        mean, along = total / draws, torch.stack(along)
        error = ((squares / draws - mean.square()) / (draws - 1)).clamp_min(0).sqrt()
        z = (mean / error)[error > 1e-3 * error.max()]
        rows.append({
            "layer": name, "bits": bits, "draws": draws, "entries": z.numel(),
            "z_rms": z.square().mean().sqrt().item(), "beyond_3": (z.abs() > 3).double().mean().item(),
            "along": (along.mean() / (along.std() / draws**0.5)).item(),
        })  # fmt: skip
    return rows


def _at_codes(layer: nn.Module, x: Tensor, dy: Tensor, bits: int) -> Tensor:
    """The gradient by the weight at the codes of x [B, C, H, W] or [..., K], float64."""
    images = x.ndim == 4
    last = x.permute(0, 2, 3, 1) if images else x.reshape(-1, 1, x.shape[-1])
    groups = shift.groups_of(bits, Widths().groups)
    last = shift.decode(shift.encode(last.reshape(len(last), -1, last.shape[-1]), bits, groups)).view(last.shape)
    x, dy = (last.permute(0, 3, 1, 2) if images else last.view(x.shape)).double(), dy.double()
    with torch.enable_grad():
        plain = copy.deepcopy(layer).double()
        return torch.autograd.grad(plain(x), plain.weight, dy)[0]


def range_row(net: nn.Module, split: Split, number: int) -> list[dict]:
    """Octaves that samples' gradients lie below the batch's, by bins of times."""
    t = torch.arange(number) * TRAIN_STEPS // number
    return gradient_ranges(net, batch_loss(net, split, t), t, TRAIN_STEPS)


def _ratios(x: Tensor, dy: Tensor, bits: int) -> dict[str, float] | None:
    """Variances of dw over that under one step for the tensor, and ours over that under exact steps for samples; None
    where inputs and outputs are not pixel by pixel."""
    tokens = dy.ndim == 3  # a row of a Linear layer is a token
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
    codes = shift.encode(dy.reshape(-1, 1, dy.shape[2]) if tokens else dy, bits, groups)
    rows, columns = (shift.row_steps(shift.encode(one, bits, groups)) for one in (dy, dy.transpose(0, 2)))
    steps = {
        "groups": shift.row_steps(codes).view(len(dy), -1, 1) * shift.powers(-codes.columns),
        "groups of samples": rows[:, None, None],
        "groups of channels": columns,
        "exact samples": exact(1, 2),
        "exact channels": exact(0, 1),
        "exact tokens": exact(2),
    }
    tensor = variance(exact(0, 1, 2))
    found = {name: variance(one.expand_as(dy)) / tensor for name, one in steps.items()}
    return {**found, "groups over exact samples": found["groups"] / found["exact samples"]}
