"""One row of compare_shiftquant.py: a network is put on its codes, trained, and measured."""

from __future__ import annotations

import copy
import time

import torch
from cifar10 import Split, to_signed
from fast_steps import Recipe, Trainer
from reference_output import autocast
from reference_recipes import TRAIN_STEPS, build_scheduler, diffusion_loss
from shiftquant_measure import HeldOut, conditions, feature_fid, finite, in_floats
from shiftquant_rows import SERVED, Row
from torch import nn

from ptq4dm import RTNConfig, quantize
from ptq4dm.files import checkpoint
from ptq4dm.layers.shift.convert import to_integers
from ptq4dm.layers.shift.norms import ratios
from ptq4dm.layers.shift.sensitive import most_sensitive

LOOK = 250  # steps between two looks at the clock
FIRST = 10  # steps until the first


def train_row(
    row: Row, net: nn.Module, split: Split, held: HeldOut, rate: float, seed: int, steps: int, args
) -> dict | None:
    """The figures of a row; None where --minutes ran out, and a checkpoint was left."""
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
    began = time.monotonic()
    trainer = Trainer(net.train(), recipe, images, labels, loss, compiled, args.graph)
    before, losses, first = resumed(trainer, row, seed, args)
    trained = time.monotonic()
    warm = None  # the moment from which steps are timed: the first ones compile
    while trainer.step < steps:
        last = trainer.step
        trainer.run(min(steps, last + (LOOK if warm else FIRST)))
        losses.append(finite(trainer.lost() / (trainer.step - last)))
        if warm is None:
            warm = time.monotonic(), trainer.step
        if args.minutes is not None and time.monotonic() - trained > 60 * args.minutes and trainer.step < steps:
            save(trainer, losses, before + time.monotonic() - began, row, seed, args)
            return None
    taken = time.monotonic()
    average = trainer.average.eval()
    timed = trainer.step - warm[1] if warm else 0
    found |= {
        "seconds": round(before + taken - began, 1),
        "ms_per_step": round((taken - warm[0]) * 1e3 / timed, 3) if timed else None,
        "resumed_at": first,
        "losses": losses,
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
    return found


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


def _path(row: Row, seed: int, args):
    name = row.name.replace("/", "-").replace(" ", "_")
    return args.output.with_name(f"{args.output.stem}.{name}.{seed}.safetensors")


def _recipe(trainer: Trainer, row: Row, seed: int) -> dict:
    return {"row": row.name, "seed": seed, "steps": trainer.recipe.steps, "batch_size": trainer.recipe.batch_size}


def save(trainer: Trainer, losses: list, seconds: float, row: Row, seed: int, args) -> None:
    nets, optimizers = {"net": trainer.net, "average": trainer.average}, {"optimizer": trainer.optimizer}
    progress = {"step": trainer.step, "seconds": seconds, "losses": losses}
    recipe = _recipe(trainer, row, seed)
    checkpoint.save_checkpoint(_path(row, seed, args), nets, optimizers, progress, recipe)


def resumed(trainer: Trainer, row: Row, seed: int, args) -> tuple[float, list, int]:
    """(seconds taken before, losses, step) of a checkpoint, put into the trainer; zeros where there is none.

    Noise and data go on from another seed than a run in one piece: the steps before are not drawn again.
    """
    path = _path(row, seed, args)
    if not path.exists():
        return 0.0, [], 0
    nets, optimizers = {"net": trainer.net, "average": trainer.average}, {"optimizer": trainer.optimizer}
    progress, _ = checkpoint.load_checkpoint(path, nets, optimizers, _recipe(trainer, row, seed))
    trainer.step = progress["step"]
    torch.manual_seed(seed + 10**6 * trainer.step)
    return progress["seconds"], progress["losses"], trainer.step
