"""What a pipeline's denoiser is trained to say, and on what: pixels or latents, by class, by text or alone."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers.base import holds_quantized
from ..pipelines.denoiser import class_count, denoiser, foreign_inputs
from .pictures import as_denoised, image_size
from .prompted import Prompted
from .schedule import schedule_of


def seed_of(*key: Any) -> int:
    """A seed that its key alone decides; those of neighbouring keys have nothing to do with each other."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")


@dataclass
class Batch:
    """x0 [B, C, H, W] float32 in [-1, 1] (latents: as scaled), noise alike, t [B] int64, labels [B], of classes or of
    texts, or None."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor | None

    def copy(self) -> Batch:
        return Batch(*(None if one is None else one.clone() for one in vars(self).values()))

    def rows(self, rows: slice) -> Batch:
        return Batch(
            self.x0[rows], self.noise[rows], self.t[rows], None if self.labels is None else self.labels[rows]
        )


class Task:
    """The loss of DDPM (Ho et al. 2020, eq. 14) for what a pipeline's scheduler says that its model predicts, or of
    flow matching (Lipman et al. 2022, arXiv:2210.02747, eq. 23), at uniform times.

    Raises UserError for a pipeline that cannot be trained so.
    """

    def __init__(self, pipe: Any) -> None:
        net = denoiser(pipe)
        self.classes, self.vae = class_count(pipe), getattr(pipe, "vae", None)
        if holds_quantized(net):
            raise UserError("the model is quantized; train it in full precision, then quantize it.")
        if net.dtype != torch.float32:
            raise UserError(f"the model is loaded in {net.dtype}; load it in float32, and choose precision 'bf16'.")
        foreign = foreign_inputs(pipe)
        self.of_text = bool(foreign) and "prompt" in inspect.signature(type(pipe).__call__).parameters
        self.prompted: Prompted | None = None
        if foreign and not self.of_text:
            raise UserError(
                f"{type(net).__name__} needs {', '.join(foreign)}; training is for models of text, of classes, and "
                "of neither."
            )
        self.schedule = schedule_of(pipe, net.device)
        self.channels = 3 if self.vae is not None else net.config.in_channels
        self.picture_size = image_size(pipe)
        if self.channels not in (1, 3):
            raise UserError(f"{type(net).__name__} works on {self.channels} channels, and pictures have 1 or 3.")

    def learn(self, pipe: Any, texts: list[str]) -> None:
        """Work out what the network is given for each text. Raises UserError."""
        net = denoiser(pipe)
        size = net.config.sample_size
        self.prompted = Prompted(
            pipe, texts, (net.config.in_channels, *((size, size) if isinstance(size, int) else size))
        )

    @property
    def times(self) -> int:
        return len(self.schedule.alpha)

    def data(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What the denoiser works on, of images uint8 [B, C, H, W]: these in [-1, 1], or their latents."""
        x = images.to(self.schedule.alpha.device).float() / 127.5 - 1
        if self.vae is None:
            return x
        with torch.no_grad():
            return as_denoised(self.vae, self.vae.encode(x.to(self.vae.dtype)).latent_dist.sample(generator))

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error for each sample, float32 [B]."""
        target = self.schedule.target(batch.x0, batch.noise, batch.t)
        return (self.prediction(net, batch) - target).square().flatten(1).mean(1)

    def prediction(self, net: nn.Module, batch: Batch) -> Tensor:
        """What the network says of noisy data, float32; of a learned variance nothing."""
        x = self.schedule.noisy(batch.x0, batch.noise, batch.t)
        extra = {} if batch.labels is None else {"class_labels": batch.labels}
        extra = extra if self.prompted is None else self.prompted(batch.labels)
        return net(x, self.schedule.told[batch.t], return_dict=False, **extra)[0][:, : x.shape[1]].float()
