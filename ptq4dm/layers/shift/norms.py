"""GroupNorm and LayerNorm by the mean magnitude, on codes: in adaptive norms of diffusers their inner LayerNorm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from ...hooks import hooked, input_of
from ..base import replace_module
from .l1 import RATIO, L1Norm


class ShiftGroupNorm(nn.GroupNorm):
    """L1 normalization in the place of a GroupNorm, whose parameters it takes."""

    def __init__(self, norm: nn.GroupNorm, ratio: float = RATIO) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        _adopt(self, norm)
        self.ratio = ratio

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, ...] float -> the same shape, dtype and memory layout."""
        last = input.movedim(1, -1)
        x = last.reshape(len(input), -1, self.num_channels)
        y = L1Norm.apply(x, self.weight, self.bias, self.num_groups, self.eps, self.ratio)
        y = y.reshape(last.shape).movedim(-1, 1)
        return y if last.is_contiguous() else y.contiguous()


class ShiftLayerNorm(nn.LayerNorm):
    """L1 normalization in the place of a LayerNorm, whose parameters it takes."""

    def __init__(self, norm: nn.LayerNorm, ratio: float = RATIO) -> None:
        super().__init__(norm.normalized_shape, norm.eps, elementwise_affine=False)
        _adopt(self, norm)
        self.ratio = ratio

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., *normalized_shape] float -> the same shape and dtype."""
        x = inputs.reshape(-1, 1, math.prod(self.normalized_shape))
        weight, bias = (None if one is None else one.flatten() for one in (self.weight, self.bias))
        return L1Norm.apply(x, weight, bias, 1, self.eps, self.ratio).reshape(inputs.shape)


def normalizes(module: nn.Module) -> bool:
    """Whether a module has a form by the mean magnitude: GroupNorm, LayerNorm, that in float32 of diffusers."""
    return type(module) in (nn.GroupNorm, nn.LayerNorm, FP32LayerNorm)


def is_norm(module: nn.Module | None) -> bool:
    """Whether a module is such a norm, or has a form as one."""
    return module is not None and (normalizes(module) or isinstance(module, (ShiftGroupNorm, ShiftLayerNorm)))


def norms_of(model: nn.Module) -> dict[str, float]:
    """The ratio of each norm by the mean magnitude in a model, by name."""
    kinds = (ShiftGroupNorm, ShiftLayerNorm)
    return {name: module.ratio for name, module in model.named_modules() if isinstance(module, kinds)}


def put_norms(model: nn.Module, chosen: Mapping[str, float]) -> None:
    """Put norms by the mean magnitude with these ratios in the place of a model's own, whose parameters they take."""
    for name, ratio in chosen.items():
        norm = model.get_submodule(name)
        if normalizes(norm):
            kind = ShiftGroupNorm if isinstance(norm, nn.GroupNorm) else ShiftLayerNorm
            replace_module(model, name, kind(norm, ratio))


@torch.no_grad()
def ratios(model: nn.Module, call: Callable[[], object]) -> dict[str, float]:
    """The mean of standard deviation over mean magnitude in each norm of a model, by name, over what call() makes the
    model see: pi / 2's root of Gaussian values, and more where a few are far out."""
    sums: dict[str, list[float]] = {}

    def look(name: str) -> Callable:
        def hook(norm: nn.Module, args: tuple, kwargs: dict) -> None:
            x = input_of(args, kwargs).float()
            shape = (
                (len(x), norm.num_groups, -1)
                if isinstance(norm, nn.GroupNorm)
                else (-1, math.prod(norm.normalized_shape))
            )
            x = x.reshape(shape)
            x = x - x.mean(-1, keepdim=True)
            ratio = x.square().mean(-1).sqrt() / x.abs().mean(-1)
            ratio = ratio[ratio.isfinite()]
            if len(ratio):
                sums.setdefault(name, []).append(ratio.mean().item())

        return hook

    names = [name for name, module in model.named_modules() if normalizes(module)]
    with hooked(model, before={name: look(name) for name in names}):
        call()
    return {name: sum(found) / len(found) for name, found in sums.items()}


def _adopt(new: nn.Module, norm: nn.Module) -> None:
    for name in ("weight", "bias"):
        new.register_parameter(name, getattr(norm, name))
    new.train(norm.training)
