"""Train the reference models on CIFAR-10: the feature network, the UNet, the DiT and the flow-matching DiT.

    python scripts/training/train_reference.py features --data cifar10-jpeg.tar.xz --output out
    python scripts/training/train_reference.py unet --data cifar10-jpeg.tar.xz --minutes 14 --output out
    python scripts/training/train_reference.py dit --data cifar10-jpeg.tar.xz --minutes 8.6 --output out
    python scripts/training/train_reference.py dit --flow --data cifar10-jpeg.tar.xz --output out
    python scripts/training/train_reference.py dit --flow --large --data cifar10-jpeg.tar.xz --output out

--flow trains a DiT that predicts the velocity, `flow-dit`: a small one, or with --large one of the size of `dit`.
Each writes out/<model>/ in the layout of assets/<model>/ and out/<model>.json with what it measured; the
diffusion models also leave a picture of samples. --resume goes on from out/<model>.checkpoint.safetensors.
The package must be importable: `pip install -e .` once, or PYTHONPATH=. at the top of the checkout.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from checkpoint import Progress, load_checkpoint, save_checkpoint
from cifar10 import Split, read_cifar10, to_signed
from reference_output import autocast, evaluate_pipeline, save_features, save_pipeline, write_json
from reference_recipes import (
    FEATURES_EPOCHS,
    MINUTES,
    build_network,
    build_optimizer,
    diffusion_loss,
    features_loss,
    set_schedule,
)
from reference_statistics import accuracy
from torch import nn

from ptq4dm.errors import UserError, run
from ptq4dm.pipelines.devices import check_device
from ptq4dm.pipelines.images import save_picture
from ptq4dm.progress import progress_bar

UNCOUNTED_STEPS = 20  # the first steps compile; the time budget starts after them
SECONDS_BETWEEN_CHECKPOINTS = 120

# ----------------------------------------------------------------------------------------------- training


def train(options: argparse.Namespace, data: Split, checkpoint: Path) -> tuple[nn.Module, Progress]:
    """Train one network; returns it (of the diffusion models, the moving average) and how far it came."""
    kind, device = options.kind, check_device(options.device)
    torch.manual_seed(options.seed)
    net = build_network(kind, options.tiny).to(device)
    if kind in ("features", "unet"):
        net = net.to(memory_format=torch.channels_last)
    average = None if kind == "features" else copy.deepcopy(net).requires_grad_(False)
    nets = {"net": net} if average is None else {"net": net, "ema": average}
    optimizer = build_optimizer(kind, net)
    recipe = {name: getattr(options, name) for name in ("kind", "minutes", "batch_size", "tiny", "seed")}
    recipe["images"] = len(data.images)
    progress = Progress()
    if options.resume:
        progress = load_checkpoint(checkpoint, nets, optimizer, recipe, device)

    total_steps = FEATURES_EPOCHS * (len(data.images) // options.batch_size) if kind == "features" else None
    loss_of = features_loss if kind == "features" else diffusion_loss(kind, device)
    run = torch.compile(net) if device.type == "cuda" else net
    images, labels = to_signed(data.images.to(device)), data.labels.to(device)

    def done() -> float:
        """The share of the run that lies behind: of the steps, or of the minutes."""
        return progress.step / total_steps if total_steps else progress.seconds / (60 * options.minutes)

    first, clock = progress.step, time.monotonic()
    written = clock
    with progress_bar(initial=progress.step, total=total_steps, desc=kind, mininterval=2) as bar:
        while done() < 1 and (options.max_steps is None or progress.step < options.max_steps):
            set_schedule(kind, optimizer, progress.step, done())
            rows = torch.randint(0, len(images), (options.batch_size,), device=device)
            with autocast(device):
                loss = loss_of(run, images[rows], labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if average is not None:
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            if average is not None:
                keep = min(0.9995, (1 + progress.step) / (10 + progress.step))
                with torch.no_grad():
                    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - keep)
            progress.step += 1
            bar.update()
            if progress.step % 1000 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", done=f"{done():.0%}")
            now = time.monotonic()
            if progress.step - first > UNCOUNTED_STEPS:
                progress.seconds += now - clock
            clock = now
            if now - written > SECONDS_BETWEEN_CHECKPOINTS:
                save_checkpoint(checkpoint, nets, optimizer, progress, recipe, device)
                clock = written = time.monotonic()  # writing is not training
    save_checkpoint(checkpoint, nets, optimizer, progress, recipe, device)
    return (net if average is None else average).eval(), progress


# ------------------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("features", "unet", "dit"))
    parser.add_argument("--data", required=True, help="folder or .tar.xz with train/<class>/ and test/<class>/")
    parser.add_argument("--output", required=True, type=Path, help="folder that the model's folder goes into")
    parser.add_argument("--minutes", type=float, help="training time; features trains 60 epochs")
    parser.add_argument("--flow", action="store_true", help="of dit: predict the velocity of flow matching")
    parser.add_argument("--large", action="store_true", help="of dit --flow: as many parameters as dit has")
    parser.add_argument("--max-steps", type=int, help="stop after so many optimizer steps in all")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--num-fid", type=int, default=10_000, help="samples for feature-FID; 0 to leave it out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument("--tiny", action="store_true", help="a small diffusion network, to try the script out")
    options = parser.parse_args(arguments)
    if options.flow and options.kind != "dit":
        raise UserError(f"--flow goes with dit, not with {options.kind}.")
    if options.large and not options.flow:
        raise UserError("--large goes with dit --flow.")
    if options.flow:
        options.kind = "flow-dit-large" if options.large else "flow-dit"
    if options.kind == "features" and options.minutes is not None:
        raise UserError(f"features trains {FEATURES_EPOCHS} epochs; leave --minutes out.")
    if options.kind != "features" and options.minutes is None:
        options.minutes = MINUTES[options.kind]
    if options.minutes is not None and options.minutes <= 0:
        raise UserError(f"--minutes must be positive, not {options.minutes:g}.")
    if options.num_fid < 0 or options.num_fid == 1:
        raise UserError("--num-fid must be 0, or at least 2 for a covariance.")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; pass --device cpu.")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    train_split, test_split = read_cifar10(options.data)
    if not 1 <= options.batch_size <= len(train_split.images):
        raise UserError(f"--batch-size must be between 1 and the {len(train_split.images)} training images.")
    if options.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    name = f"{options.kind}-cifar10"
    folder = options.output / name
    options.output.mkdir(parents=True, exist_ok=True)
    net, progress = train(options, train_split, options.output / f"{name}.checkpoint.safetensors")
    result = {
        "model": name,
        "parameters": sum(p.numel() for p in net.parameters()),
        "steps": progress.step,
        "images_seen": progress.step * options.batch_size,
        "minutes": progress.seconds / 60,
        "seed": options.seed,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "training_images": len(train_split.images),
    }
    if options.kind == "features":
        result["test_accuracy"] = accuracy(save_features(net, train_split.images, folder), test_split)
        result["test_images"] = len(test_split.images)
    else:
        save_pipeline(options.kind, net, folder)
        if options.num_fid:
            result["feature-FID"], picture = evaluate_pipeline(
                folder, train_split.images, options.num_fid, options.device
            )
            result["feature-FID samples"] = options.num_fid
            save_picture(picture, options.output / f"{name}.png")
    write_json(options.output / f"{name}.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run(main)
