"""What the catalogue of pipelines is made of: a case, tiny networks, pictures, and the parts that families share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import diffusers as d
import numpy as np
import PIL.Image
import torch
import transformers as tr
from diffusers.utils import is_ftfy_available
from families import standins
from torch import nn

PROMPTS = ["a red cube", "two cats on a mat"]
STEPS = 2  # of every sampler
EULER = d.FlowMatchEulerDiscreteScheduler


@dataclass
class Case:
    """A pipeline and what it is called with.

    conditioning: arguments that differ from image to image, one value an image, as in `ptq4dm.collect`.
    pipeline_kwargs: arguments that are the same for all.
    alone: the pipeline makes one image a call.
    plain: and takes one prompt and one generator, no lists of one.
    output: the `output_type` that it knows.
    """

    pipe: d.DiffusionPipeline
    conditioning: dict = field(default_factory=lambda: {"prompt": list(PROMPTS)})
    pipeline_kwargs: dict = field(default_factory=dict)
    alone: bool = False
    plain: bool = False
    output: str = "pt"


Builders = dict[str, Callable[[], Case]]


def tiny(kind: type, **config: object) -> nn.Module:
    """A network of diffusers with random weights, the same at every call; no weight is zero, as some are made."""
    torch.manual_seed(0)
    model = kind(**config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and weight.numel():
                weight.normal_(0, weight[0].numel() ** -0.5)
    return model


def make(kind: type, **components: object) -> d.DiffusionPipeline:
    """A pipeline without a progress bar. Where ftfy, which mends texts, is missing, texts stay as they are."""
    if not is_ftfy_available():
        sys.modules[kind.__module__].ftfy = SimpleNamespace(fix_text=str)
    pipe = kind(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(size: int = 32, seed: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    """A picture of noise, `size` pixels wide and high."""
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).convert(mode)


def pictures(size: int = 32, count: int = 2) -> list[PIL.Image.Image]:
    """Pictures of noise, each its own."""
    return [picture(size, seed) for seed in range(count)]


def uniform(*shape: int) -> torch.Tensor:
    """float32 in [0, 1]: images as tensors."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def normal(*shape: int) -> torch.Tensor:
    """float32: embeddings and latents."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def mask(size: int = 32, count: int = 2) -> torch.Tensor:
    """float32 [count, 1, size, size]: the right half is to be painted anew."""
    values = torch.zeros(count, 1, size, size)
    values[..., size // 2 :] = 1
    return values


def prompted(**more: object) -> dict:
    """Conditioning of prompts, with what else there is for each image."""
    return {"prompt": list(PROMPTS), **more}


def vae(blocks: int = 2, latent_channels: int = 4, width: int = 8, **more: object) -> nn.Module:
    """AutoencoderKL that halves pictures `blocks - 1` times."""
    names = {
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "block_out_channels": [width] * blocks,
        "latent_channels": latent_channels,
        "norm_num_groups": 2,
    }
    return tiny(d.AutoencoderKL, **names | more)


def flux_vae(latent_channels: int = 1, **more: object) -> nn.Module:
    """AutoencoderKL of FLUX and Stable Diffusion 3, which does not change the size of pictures."""
    own = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609, "scaling_factor": 1.5035}
    return vae(1, latent_channels, **own | more)


def wan_vae(**more: object) -> nn.Module:
    """AutoencoderKLWan: 8 times smaller in space, 4 times in time."""
    own = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return tiny(d.AutoencoderKLWan, **own | {"temperal_downsample": [False, True, True]} | more)


def text(**more: object) -> dict:
    """The parts that read prompts in many pipelines: T5 as `text_encoder` and its tokenizer."""
    return {"text_encoder": standins.t5(), "tokenizer": standins.tokenizer(), **more}


def gemma(**more: object) -> dict:
    """Gemma 2 and its tokenizer."""
    encoder = standins.decoder(tr.Gemma2Model, tr.Gemma2Config)
    return {"text_encoder": encoder, "tokenizer": standins.tokenizer(512, ends=False, bos=True), **more}
