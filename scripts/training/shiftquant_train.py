"""One row of compare_shiftquant.py: a network is put on its codes, trained, and measured."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from cifar10 import Split, to_signed
from fast_steps import Recipe, Trainer
from reference_output import autocast
from reference_recipes import TRAIN_STEPS, build_scheduler, diffusion_loss
from shiftquant_measure import HeldOut, conditions, feature_fid, in_floats
from shiftquant_rows import SERVED, Row
from shiftquant_steps import Steps
from torch import nn

from ptq4dm import RTNConfig, quantize
from ptq4dm.layers.shift.convert import to_integers
from ptq4dm.layers.shift.norms import ratios
from ptq4dm.layers.shift.sensitive import most_sensitive


def train_row(
    row: Row,
    net: nn.Module,
    split: Split,
    held: HeldOut,
    rate: float,
    seed: int,
    steps: int,
    args: argparse.Namespace,
    deadline: float | None,
) -> tuple[dict, Path] | None:
    """The figures of a row and the checkpoint that is over with them; None where time ran out."""
    device = held.device
    found = {"before": quantized(net, net, held, args, device)} if row.stage == "qat" else {}
    original = copy.deepcopy(net).eval() if row.stage == "qat" else None
    if row.network == "unet":
        net = net.to(memory_format=torch.channels_last)
    if row.widths is not None or row.norms:
        measured, wide = None, row.wide
        if row.trained and row.widths is not None and wide is None and not row.widths.served:
            wide = most_sensitive(net.eval(), lambda: first_predictions(net, split, device), row.widths)
            found["wide"] = wide
        if row.norms and row.trained:  # on the held-out inputs, of which only the spread is used
            measured = ratios(net.eval(), lambda: held.predictions(net))
        found["converted"] = str(to_integers(net, row.widths, row.norms, ratios=measured, wide=wide))
    recipe = Recipe(steps, args.batch_size, rate, 0.0 if row.network == "unet" else 0.01)
    images, labels = to_signed(split.images.to(device)), split.labels.to(device)
    loss = diffusion_loss(row.network, device)
    compiled = device.type == "cuda" and not args.eager
    if compiled:
        torch._dynamo.reset()  # the graphs of the last row count against a limit
    trainer = Trainer(net.train(), recipe, images, labels, loss, compiled, args.graph)
    steps_taken = Steps(trainer, row, seed, args.output, deadline)
    if not steps_taken.go():
        return None
    average = trainer.average.eval()
    found |= {
        "seconds": round(steps_taken.seconds, 1),
        "ms_per_step": steps_taken.milliseconds,
        "resumed_at": steps_taken.first,
        "losses": steps_taken.losses,
    }
    if device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
        torch.cuda.reset_peak_memory_stats(device)
    found |= held.losses(average)
    plain = in_floats(average)
    found["held_out_float"] = held.losses(plain)["held_out"]
    if row.stage == "qat":
        found["after"] = quantized(plain, original, held, args, device)
    elif args.num_fid:
        found["feature_fid"] = feature_fid(average, args.num_fid, args.fid_steps, device)
    return found, steps_taken.path


def first_predictions(net: nn.Module, split: Split, device: torch.device) -> torch.Tensor:
    """epsilon_theta of 16 training images at evenly spread times, with noise of one seed."""
    g, number = torch.Generator().manual_seed(23), 16
    rows = torch.randperm(len(split.images), generator=g)[:number]
    x0, t = to_signed(split.images[rows]), torch.arange(number) * TRAIN_STEPS // number
    signal = build_scheduler().alphas_cumprod[t][:, None, None, None]
    x = signal.sqrt() * x0 + (1 - signal).sqrt() * torch.randn(x0.shape, generator=g)
    labels = split.labels[rows].to(device)
    with autocast(device):
        return net(x.to(device), t.to(device), **conditions(net, labels), return_dict=False)[0].float()


def quantized(net: nn.Module, original: nn.Module, held: HeldOut, args, device: torch.device) -> dict:
    """Figures of a float network quantized as it would be served; error: against the original's epsilon."""
    packed = copy.deepcopy(net).to(memory_format=torch.contiguous_format).eval()
    widths = {"weight_bits": SERVED.weight, "activation_bits": SERVED.input}
    quantize(packed, RTNConfig(**widths, activations="dynamic", rounding="nearest"))
    found = {"held_out": held.losses(packed)["held_out"], "error": held.error(packed, original)}
    if args.num_fid:
        found["feature_fid"] = feature_fid(packed, args.num_fid, args.fid_steps, device)
    return found
