"""Norms that hand on what they read: the layers after them normalise, modulate and quantize it in one launch.

    nn.LayerNorm, FP32LayerNorm            LayerNorm(x) weight + bias
    nn.RMSNorm, RMSNorm (of diffusers)     RMSNorm(x) weight [+ bias]

Those whose formula the kernels have, by their own classes: a class derived from one may compute anything.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import normalization
from torch import Tensor, nn

from .notes import Notes
from .value import Handed, plain


def hands_on(module: nn.Module, x: Tensor) -> bool:
    """Whether a value on its way into quantized layers may be handed on as it is."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    return not module.training and on_kernels(x) and not wanted and not torch.is_autocast_enabled(x.device.type)


def on_kernels(x: Tensor) -> bool:
    return x.is_cuda


class _Handing:
    """What the norms share; `form` as kernels/w4/from_codes.py has it."""

    form = "layer"
    notes: Notes
    weight: Tensor | None
    eps: float

    def forward(self, x: Any) -> Any:
        x = plain(x)
        own = self.weight is None or self.any_weight or self.weight.dtype == x.dtype
        if not (own and x.ndim > 1 and hands_on(self, x) and self.notes.open()):
            return self.computed(x)
        norm = (self.computed, self.weight, getattr(self, "bias", None), self.eps, self.form)
        return Handed(x, norm, notes=self.notes, slot="norm")

    any_weight = False  # whether x keeps its type whatever that of the weight is

    def computed(self, x: Tensor) -> Tensor:
        """What the norm gives unfused."""
        return super().forward(x)  # type: ignore[misc]  # of the norm, which comes after this class


class HandingLayerNorm(_Handing, nn.LayerNorm):
    """nn.LayerNorm."""


class HandingFP32LayerNorm(_Handing, normalization.FP32LayerNorm):
    """FP32LayerNorm of diffusers."""

    any_weight = True


class HandingRMSNorm(_Handing, nn.RMSNorm):
    """nn.RMSNorm."""

    form = "rms"


class HandingDiffusersRMSNorm(_Handing, normalization.RMSNorm):
    """RMSNorm of diffusers."""

    form = "rms"


NORMS: dict[type, type] = {
    nn.LayerNorm: HandingLayerNorm,
    normalization.FP32LayerNorm: HandingFP32LayerNorm,
    nn.RMSNorm: HandingRMSNorm,
    normalization.RMSNorm: HandingDiffusersRMSNorm,
}


def width(norm: nn.Module) -> int | None:
    """K of a norm over the last axis, None of any other."""
    shape: Any = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", ())
    return shape[0] if len(shape) == 1 and isinstance(norm.eps, float) else None
