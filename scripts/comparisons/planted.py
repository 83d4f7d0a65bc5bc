"""Outlier channels as large models have them, planted into an embedded one: a rescaling that keeps its function.

    u = norm(h) (1 + scale) + shift,    W u        u_j -> c u_j,  W[:, j] -> W[:, j] / c

In each block of a DiT, CHANNELS inputs of attention and of the feed-forward layer are made FACTOR times larger: rows
of the layer that makes scales and shifts, 1 + scale -> c (1 + scale), and columns of the layers that read u. In
floats the model gives what it gave; inputs get the few channels, far above the rest, that 10 million weights have
not grown. Channels differ from block to block, and are the same in every run.
"""

from __future__ import annotations

import torch
from torch import nn

import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.pipelines.denoiser import denoiser

SUFFIX = "-outliers"
CHANNELS, FACTOR = 4, 24.0
PARTS = {"attention": (0, 1), "feed-forward": (3, 4)}
"""Where a block's modulation has the shift and the scale of its two inputs, of six."""


def pipeline(model: str, device: str):
    """The embedded pipeline of a name; "<name>-outliers" is that with planted outliers.

    Raises UserError where outliers are asked for of another model than a DiT.
    """
    pipe = ptq4dm.load_reference(model.removesuffix(SUFFIX), device=device)
    if model.endswith(SUFFIX):
        plant(denoiser(pipe))
    return pipe


@torch.no_grad()
def plant(model: nn.Module, channels: int = CHANNELS, factor: float = FACTOR) -> None:
    """Plant outliers into a DiT, in place."""
    blocks = getattr(model, "transformer_blocks", [])
    if not blocks or any(not hasattr(block.norm1, "linear") for block in blocks):
        raise UserError("outliers are planted where a layer makes scales and shifts: take a DiT.")
    for number, block in enumerate(blocks):
        generator = torch.Generator().manual_seed(number)
        readers = {
            "attention": (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v),
            "feed-forward": (block.ff.net[0].proj,),
        }
        width = block.attn1.to_q.in_features
        modulation = block.norm1.linear
        for name, (shift, scale) in PARTS.items():
            chosen = torch.randperm(width, generator=generator)[:channels]
            for part in (shift, scale):
                rows = chosen + part * width
                modulation.weight[rows] *= factor
                modulation.bias[rows] *= factor
            modulation.bias[chosen + scale * width] += factor - 1  # of the 1 that scales are added to
            for reader in readers[name]:
                reader.weight[:, chosen] /= factor
