"""GroupNorm and LayerNorm by the mean magnitude, on codes: in adaptive norms of diffusers their inner LayerNorm."""

from __future__ import annotations

import math

from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from .l1 import L1Norm


class ShiftGroupNorm(nn.GroupNorm):
    """L1 normalization in the place of a GroupNorm, whose parameters it takes."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        _adopt(self, norm)

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, ...] float -> the same shape and dtype."""
        last = input.movedim(1, -1)
        x = last.reshape(len(input), -1, self.num_channels)
        y = L1Norm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return y.reshape(last.shape).movedim(-1, 1)


class ShiftLayerNorm(nn.LayerNorm):
    """L1 normalization in the place of a LayerNorm, whose parameters it takes."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, norm.eps, elementwise_affine=False)
        _adopt(self, norm)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., *normalized_shape] float -> the same shape and dtype."""
        x = inputs.reshape(-1, 1, math.prod(self.normalized_shape))
        weight, bias = (None if one is None else one.flatten() for one in (self.weight, self.bias))
        return L1Norm.apply(x, weight, bias, 1, self.eps).reshape(inputs.shape)


def normalizes(module: nn.Module) -> bool:
    """Whether a module has a form by the mean magnitude: GroupNorm, LayerNorm, that in float32 of diffusers."""
    return type(module) in (nn.GroupNorm, nn.LayerNorm, FP32LayerNorm)


def _adopt(new: nn.Module, norm: nn.Module) -> None:
    for name in ("weight", "bias"):
        new.register_parameter(name, getattr(norm, name))
    new.train(norm.training)
