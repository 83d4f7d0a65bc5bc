"""The denoisers that bench_cpu.py runs, with calls to calibrate on, calls to measure errors on, and calls to time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ptq4dm
from ptq4dm.pipelines.denoiser import class_count, denoiser
from ptq4dm.pipelines.load import load_reference

CALIBRATED, HELD_OUT = 20, 50  # steps
SEEDS, OTHER_SEEDS = list(range(1000, 1004)), list(range(4))
ERRORS_AT = 12  # of the held-out steps, the first and the last among them
LATENT_UNET = "latent-unet"

Row = tuple[Tensor, ...]
"""What a denoiser is called with: x [B, C, H, W], t [B], and class labels [B] or a text [B, L, D], if it has any."""

METHODS = {
    "W8A8": ptq4dm.PTQ4DMConfig(),
    "SVDQuant (4 bits)": ptq4dm.SVDQuantConfig(),
    "SVDQuant (4 bits, int8 inputs)": ptq4dm.SVDQuantConfig(activations="int8"),
    "QoQ (4 bits)": ptq4dm.QoQConfig(),
}


@dataclass
class Subject:
    """exact: the float32 model. seen: calls of one sample, of all times. held_out: calls of other seeds and times.
    lowest: the least time that calibration saw. quantized: a recipe -> the model quantized by it. batch: a number of
    samples -> one call."""

    exact: nn.Module
    seen: list[Row]
    held_out: list[Row]
    lowest: float
    quantized: Callable[[ptq4dm.QuantConfig], nn.Module]
    batch: Callable[[int], Row]
    methods: dict[str, ptq4dm.QuantConfig]


def subject_of(name: str, count: int) -> Subject:
    """An embedded model by its name, or `LATENT_UNET`; `count` calls of one sample for NNCF."""
    return latent_unet(count) if name == LATENT_UNET else embedded(name, count)


def embedded(name: str, count: int) -> Subject:
    """A model of this project, on calls of its own sampling."""
    pipe = load_reference(name)
    pipe.set_progress_bar_config(disable=True)
    exact = copy.deepcopy(denoiser(pipe)).eval().to(memory_format=torch.channels_last)
    alone = singles(rows_of(pipe, SEEDS, CALIBRATED))
    seen = alone[:: max(1, len(alone) // count)][:count]
    sampled = rows_of(pipe, OTHER_SEEDS, HELD_OUT)
    held_out = [sampled[i] for i in torch.linspace(0, HELD_OUT - 1, ERRORS_AT).round().long().tolist()]
    calibration = ptq4dm.CalibrationConfig(num_samples=32, num_inference_steps=CALIBRATED)
    store = ptq4dm.collect(pipe, calibration)
    classes = class_count(pipe)

    def quantized(config: ptq4dm.QuantConfig) -> nn.Module:
        fresh = load_reference(name)
        ptq4dm.quantize(fresh, config, store)
        return denoiser(fresh).eval()

    def batch(size: int) -> Row:
        x = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        labels = () if classes is None else (torch.arange(size) % classes,)
        return x, torch.full((size,), 500), *labels

    return Subject(exact, seen, held_out, float(min(row[1].min() for row in alone)), quantized, batch, METHODS)


def latent_unet(count: int) -> Subject:
    """Stable Diffusion 1.5's denoiser for pictures of 256 pixels: its shape with random weights, on random latents.

    Errors are of nothing that was trained; times are what it is for.
    """
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(sample_size=32, cross_attention_dim=768).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)

    def rows(times: list[int], size: int = 1) -> list[Row]:
        def one(time: int) -> Row:
            x = torch.randn(size, 4, 32, 32, generator=random)
            return x, torch.full((size,), time), torch.randn(size, 77, 768, generator=random)

        return [one(time) for time in times]

    seen = rows(torch.linspace(20, 980, min(count, 8)).long().tolist())

    def quantized(config: ptq4dm.QuantConfig) -> nn.Module:
        fresh = copy.deepcopy(model)
        with ptq4dm.record(fresh) as calls:
            for row in seen:
                fresh(*row)
        ptq4dm.quantize(fresh, config, calls)
        return fresh.eval()

    exact = copy.deepcopy(model).to(memory_format=torch.channels_last)
    eight = {"W8A8": ptq4dm.PTQ4DMConfig(objective="max")}  # a search of ranges changes no time, and takes 10 minutes
    return Subject(exact, seen, rows([1, 500, 990]), 20, quantized, lambda size: rows([500], size)[0], eight)


@torch.no_grad()
def rows_of(pipe, seeds: list[int], steps: int) -> list[Row]:
    """The calls of a pipeline's denoiser while it samples, one row for each step, of all seeds."""
    found: list[Row] = []
    model = denoiser(pipe)
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def look(_, args, kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        x = given[names[0]]
        time = torch.as_tensor(given["timestep"]).reshape(-1).expand(len(x))
        labels = given.get("class_labels")
        found.append((x.clone(), time.clone()) if labels is None else (x.clone(), time.clone(), labels.clone()))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        ptq4dm.sample(pipe, seeds, num_inference_steps=steps)
    finally:
        handle.remove()
    return found


def singles(rows: list[Row]) -> list[Row]:
    """Calls of one sample, from calls of several."""
    return [tuple(part[i : i + 1] for part in row) for row in rows for i in range(len(row[0]))]
