"""What a trained reference model leaves behind: its folder, its figures, a picture of samples."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline
from PIL import Image
from reference_recipes import build_scheduler
from reference_statistics import feature_statistics
from safetensors.torch import load_file, save_file
from torch import nn

from ptq4dm.evaluation.features import Features, load_features
from ptq4dm.evaluation.frechet import frechet_distance, write_statistics
from ptq4dm.files.atomic import replacing
from ptq4dm.pipelines.images import image_grid, to_uint8
from ptq4dm.pipelines.load import load_pipeline
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from ptq4dm.pipelines.sampling import sample
from ptq4dm.progress import progress_bar

EVALUATED_STEPS = (50, 10)
SAMPLING_BATCH = 2500
PICTURES = 64


def autocast(device: torch.device):
    """bfloat16 on a GPU; float32, plainly, on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def save_pipeline(kind: str, net: nn.Module, folder: Path) -> None:
    """Write a diffusers pipeline folder with fp16 weights in one file; each file appears only when whole."""
    net = copy.deepcopy(net).to(memory_format=torch.contiguous_format).half().cpu()
    if kind == "unet":
        pipe = DDPMPipeline(unet=net, scheduler=build_scheduler(kind))
    else:
        pipe = PixelDiTPipeline(transformer=net, scheduler=build_scheduler(kind))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        pipe.save_pretrained(temporary)
        for file in sorted(Path(temporary).rglob("*")):
            if file.is_file():
                target = folder / file.relative_to(temporary)
                target.parent.mkdir(exist_ok=True)
                with replacing(target) as whole:
                    file.replace(whole)


def evaluate_pipeline(
    folder: Path, train_images: torch.Tensor, number: int, device: str
) -> tuple[dict[str, float], Image.Image]:
    """feature-FID of the saved pipeline at each of EVALUATED_STEPS, and a picture of its last samples.

    Image k has seed k and, in a class-conditional model, class k % 10. Samples are rounded to 8 bits, as the
    training images are.
    """
    torch.backends.cudnn.allow_tf32 = False  # the feature network is read in float32
    net = load_features(device)
    real = feature_statistics(net, train_images)
    pipe = load_pipeline(folder, torch.float32, device)
    sampler = "DDIM" if isinstance(pipe.scheduler, DDIMScheduler) else "Euler"
    distances = {}
    for steps in EVALUATED_STEPS:
        batches = []
        for start in progress_bar(range(0, number, SAMPLING_BATCH), desc=f"sampling, {steps} steps"):
            with autocast(torch.device(device)):
                seeds = range(start, min(start + SAMPLING_BATCH, number))
                batches.append(to_uint8(sample(pipe, seeds, num_inference_steps=steps)))
        images = torch.cat(batches)
        fake = feature_statistics(net, images)
        distances[f"{sampler} {steps} steps"] = frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)
    return distances, image_grid(images[:PICTURES], columns=8, scale=3)


def save_features(net: Features, train_images: torch.Tensor, folder: Path) -> Features:
    """Write fp16 weights and the training set's statistics; returns the network as read back."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(half, temporary)
    net.load_state_dict(load_file(folder / "model.safetensors"))
    write_statistics(folder / "train-statistics.npz", feature_statistics(net, train_images))
    return net


def write_json(path: Path, result: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
