"""What a pipeline's network is called with, for each image of a batch: a class label, or what the pipeline makes of
a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...pipelines.denoiser import TIMES, denoiser
from ..prompted import first_call

Predict = Callable[
    [Tensor, Tensor, Sequence[int]], Tensor
]  # (x_t [B, C, H, W], t [B], numbers of images) -> like x_t


def of_class(pipe, index: int) -> Predict:
    """Predictions of a class-conditional model for one class."""
    model = denoiser(pipe)

    def predict(x: Tensor, t: Tensor, images: Sequence[int]) -> Tensor:
        labels = torch.full((len(x),), index, device=x.device)
        return _sample(model(x.to(model.dtype), timestep=t, class_labels=labels), x)

    return predict


def of_prompts(pipe, prompts: Sequence[str]) -> Predict:
    """Predictions of a text model; image k has prompt k mod their number.

    The pipeline itself is called with the prompts, up to its first call of the network, which tells what that is
    conditioned on: embeddings, masks, sizes, whatever the pipeline has. Then the network is called so, on other
    images and timesteps. Without guidance, as a model is trained.
    """
    model = denoiser(pipe)
    known: list[bool] = []  # whether the network's time was looked at

    def predict(x: Tensor, t: Tensor, images: Sequence[int]) -> Tensor:
        chosen = [prompts[k % len(prompts)] for k in images]
        args, kwargs = first_call(pipe, chosen)
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        time = next((name for name in TIMES if name in given), None)
        if time is None or tuple(given[names[0]].shape) != tuple(x.shape):
            raise UserError(
                f"{type(model).__name__} is called with {list(given[names[0]].shape)} for {len(x)} images "
                f"{list(x.shape[1:])}; personalization is for pipelines that denoise the latents of their VAE as "
                "they are, without guidance at guidance_scale=1."
            )
        if not known:
            first, given_time = pipe.scheduler.timesteps[0], torch.as_tensor(given[time]).flatten()[0]
            known.append(float(first) == float(given_time))
        if not known[0]:
            # Such pipelines may also run time backwards, or change the sign of what is predicted.
            raise UserError(f"{type(pipe).__name__} tells its network other times than its scheduler has.")
        return _sample(model(**{**given, names[0]: x.to(given[names[0]].dtype), time: t}), x)

    return predict


def _sample(output: Any, x: Tensor) -> Tensor:
    """The prediction, float32; of a learned variance, the first half of the channels."""
    sample = output[0] if isinstance(output, tuple) else output.sample
    return sample[:, : x.shape[1]].float()
