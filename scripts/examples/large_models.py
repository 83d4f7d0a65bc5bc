"""The models of these examples: where they are, what their cards call them with, and a recipe for each.

    pipe, inputs = large_models.opened("qwen-image", ["a lighthouse at dusk"], device="cuda")  # of the hub
    pipe, inputs = large_models.opened("qwen-image", ["a lighthouse at dusk"], tiny=True)  # random, of its class

Tiny ones show that a page runs. What recipes are worth on trained models of this size was not measured here.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import ptq4dm
from ptq4dm.errors import UserError


@dataclass(frozen=True)
class Model:
    """One of the hub. kind: the class of its pipeline. steps, call: of its card. negative: what guidance leads away
    from, where a pipeline guides only with one. family: the file of scripts/sweep/families with a tiny one.
    convolutions: a UNet of many, which SVDQuant leaves in 8 bits."""

    id: str
    kind: str
    family: str
    steps: int
    call: dict
    negative: str | None = None
    convolutions: bool = False


MODELS = {
    "flux": Model("black-forest-labs/FLUX.1-dev", "FluxPipeline", "flux", 28, {"guidance_scale": 3.5}),
    "flux2": Model("black-forest-labs/FLUX.2-dev", "Flux2Pipeline", "flux", 50, {"guidance_scale": 4.0}),
    "qwen-image": Model("Qwen/Qwen-Image", "QwenImagePipeline", "readers", 50, {"true_cfg_scale": 4.0}, " "),
    "z-image": Model("Tongyi-MAI/Z-Image-Turbo", "ZImagePipeline", "readers", 8, {"guidance_scale": 0.0}),
    "sdxl": Model(
        "stabilityai/stable-diffusion-xl-base-1.0", "StableDiffusionXLPipeline", "stable_diffusion", 50,
        {"guidance_scale": 5.0}, convolutions=True,
    ),
    "sd3": Model(
        "stabilityai/stable-diffusion-3.5-large", "StableDiffusion3Pipeline", "image", 28, {"guidance_scale": 3.5}
    ),
    "wan": Model(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "WanPipeline", "wan", 50,
        {"guidance_scale": 5.0, "height": 480, "width": 832, "num_frames": 81},
    ),
    "ltx": Model(
        "Lightricks/LTX-Video", "LTXPipeline", "video", 50,
        {"guidance_scale": 3.0, "height": 480, "width": 704, "num_frames": 161},
    ),
}  # fmt: skip


def opened(name: str, prompts: list[str], tiny: bool = False, device: str = "cpu", folder: Path | None = None):
    """(pipeline, {"conditioning", "pipeline_kwargs"} as ptq4dm's verbs take them). folder: a pipeline saved there
    instead, such as a quantized one; tiny: in float32, else bfloat16. UserError where it is of another class."""
    model, sizes, pipe = MODELS[name], MODELS[name].call, None
    if tiny:
        sys.path.append(str(Path(__file__).resolve().parents[1] / "sweep"))
        case = importlib.import_module(f"families.{model.family}").PIPELINES[model.kind]()
        pipe = case.pipe
        sizes = case.pipeline_kwargs | {key: value for key, value in sizes.items() if key.endswith("scale")}
    if folder is not None or not tiny:
        pipe = ptq4dm.load_pipeline(folder or model.id, torch.float32 if tiny else torch.bfloat16, device)
    if type(pipe).__name__ != model.kind:
        raise UserError(f"{folder or model.id} holds a {type(pipe).__name__}, and {name} is a {model.kind}.")
    conditioning = {"prompt": prompts}
    if model.negative is not None:
        conditioning["negative_prompt"] = [model.negative] * len(prompts)
    return pipe, {"conditioning": conditioning, "pipeline_kwargs": sizes}


def steps_of(name: str, tiny: bool, asked: int | None) -> int:
    """Steps asked for, else 2 of a tiny model and those of the card of others. Raises UserError below 1."""
    if asked is not None and asked < 1:
        raise UserError(f"--steps is a whole number from 1 on; got {asked}.")
    return asked or (2 if tiny else MODELS[name].steps)


def paint(pipe, inputs: dict, steps: int, output_type: str = "pil"):
    """What a pipeline makes of the first prompt and seed 0: a picture, or the frames of a video."""
    arguments = {name: values[0] for name, values in inputs["conditioning"].items()} | inputs["pipeline_kwargs"]
    more = {"generator": torch.Generator().manual_seed(0), "output_type": output_type, "return_dict": False}
    return pipe(**arguments, num_inference_steps=steps, **more)[0][0]


def recipe(name: str, device: str = "cpu", **more) -> ptq4dm.QuantConfig:
    """4 bits: SVDQuant for transformers, on fp8 inputs where a GPU multiplies them; for a UNet of many convolutions
    4-bit weights that gptq rounds (ptq4dm/methods/README.md says why). more: further options of SVDQuant."""
    if MODELS[name].convolutions and not more:
        return ptq4dm.PTQ4DMConfig(weight_bits=4, rounding="gptq", activations="dynamic")
    fp8 = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 9)
    return ptq4dm.SVDQuantConfig(activations="fp8" if fp8 else "int8", **more)
