"""The figures by which pictures are published: which can be measured here, and of those that cannot, why.

with two models     PSNR, SSIM, LPIPS      of the pictures of one seed
with prompts        CLIP score, ImageReward    of each model's pictures by themselves
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..options import option
from ..pipelines.loading import not_while_loading
from ..pipelines.sampling import choose_conditioning
from .paired import BOUNDS, image_errors, mean_interval, psnr
from .prompted import Score, load_clip, load_image_reward
from .similarity import LPIPS, SMALLEST_LPIPS, SMALLEST_SSIM, load_lpips, ssim

LABELS = {"frechet": "FID", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "clip": "CLIP", "image_reward": "IR"}
LOWER_IS_BETTER = ("frechet", "lpips")
FLAGS = {"lpips": "--lpips-weights FILE", "clip": "--clip DIR", "image_reward": "--image-reward DIR"}
WEIGHTS = {"lpips": "lpips_weights", "clip": "clip", "image_reward": "image_reward"}


@dataclass(kw_only=True)
class MeasureOptions:
    """The networks that pictures are judged by, each by a file or folder that is there already.

    lpips_weights: see `load_lpips`; clip: see `load_clip`; image_reward: see `load_image_reward`.
    """

    lpips_weights: str | os.PathLike | None = option(None, "weights of torchvision's AlexNet (or VGG-16), for LPIPS")
    clip: str | os.PathLike | None = option(None, "folder of a CLIP model of transformers, for the CLIP score")
    image_reward: str | os.PathLike | None = option(None, "folder of ImageReward.pt and its med_config.json")


@dataclass
class Measures:
    """What can be measured. not_measured: name of a figure -> why there is none."""

    lpips: LPIPS | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)

    def pairs(self, images: Tensor, reference: Tensor) -> dict[str, list[float]]:
        """Figures of pictures of the same seeds, [N, 3, H, W] float in [0, 1] twice: name -> N floats, with "mse"."""
        errors = image_errors(images, reference)
        found: dict[str, list[float] | None] = {"mse": errors, "psnr": [psnr(error) for error in errors]}
        found["ssim"] = ssim(images, reference)
        if self.lpips is not None:
            found["lpips"] = self.lpips(images, reference)
        size = f"{images.shape[3]}x{images.shape[2]} pixels are too few"
        for name, least in (("ssim", SMALLEST_SSIM), ("lpips", SMALLEST_LPIPS)):
            if name in found and found[name] is None:
                self.not_measured[name] = f"{size}; it takes {least} a side"
        return {name: values for name, values in found.items() if values is not None}

    def prompted(self, images: Tensor, prompts: Sequence[str] | None) -> dict[str, list[float]]:
        """Scores of pictures [N, 3, H, W] for their N prompts: name -> N floats; none where there are no prompts."""
        if prompts is None:
            self.not_measured |= {name: "the pictures have no prompts" for name in self.scores}
            return {}
        return {name: score(images, prompts) for name, score in self.scores.items()}


def load_measures(options: MeasureOptions, device: torch.device | str = "cpu") -> Measures:
    """Load the networks that `options` name, onto a device. Raises UserError where one cannot be."""
    found = Measures(not_measured={name: FLAGS[name] for name in FLAGS if getattr(options, WEIGHTS[name]) is None})
    with not_while_loading():
        if options.lpips_weights is not None:
            found.lpips = load_lpips(options.lpips_weights, device)
        if options.clip is not None:
            found.scores["clip"] = load_clip(options.clip, device)
        if options.image_reward is not None:
            found.scores["image_reward"] = load_image_reward(options.image_reward, device)
    return found


def prompts_of(pipe: Any, seeds: Sequence[int], conditioning: dict | None, given: dict | None) -> list[str] | None:
    """The prompt of each seed, as `sample` gives them out; None for pipelines that are given none as text."""
    prompts = choose_conditioning(pipe, seeds, conditioning, given or ()).get("prompt")
    return prompts if isinstance(prompts, list) and all(isinstance(one, str) for one in prompts) else None


def summarized(values: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Name -> {"mean", "stderr", "interval"} of figures of pictures; see `mean_interval`."""
    return {name: mean_interval(found, *BOUNDS.get(name, ())) for name, found in values.items()}
