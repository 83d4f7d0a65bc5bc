"""What the networks of a pipeline are for: denoisers, encoders of texts and pictures, autoencoders."""

from __future__ import annotations

from typing import Any

from torch import nn

from .denoiser import denoiser_names

DENOISER, ENCODER, AUTOENCODER = "denoiser", "encoder", "autoencoder"


def of_transformers(network: nn.Module) -> bool:
    """Whether a network is a model of transformers, which saves and loads it; the others diffusers does."""
    return any(base.__module__.startswith("transformers.") for base in type(network).__mro__)


def kind_of(pipe: Any, name: str) -> str:
    """What a pipeline's network of this name is for: DENOISER, ENCODER or AUTOENCODER.

    What steers a denoiser (a ControlNet) runs at every step and counts as one. An encoder is any model of
    transformers; an autoencoder decodes.
    """
    network = getattr(pipe, name)
    if of_transformers(network):
        return ENCODER
    if name not in denoiser_names(pipe) and hasattr(network, "decode"):
        return AUTOENCODER
    return DENOISER
