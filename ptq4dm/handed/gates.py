"""Gated activations that hand on their two halves: the layer after them multiplies and quantizes in one launch.

    GEGLU         hidden gelu(gate)     a projection, hidden before gate in what it gives
    SwiGLU        hidden silu(gate)     the same
    Flux2SwiGLU   silu(gate) hidden     gate first; the projection is the module before

(Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.) By their own classes, as norms are.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.transformers.transformer_flux2 import Flux2SwiGLU
from torch import Tensor
from torch.nn import functional as F

from .norms import hands_on
from .notes import Notes
from .value import Handed, plain


class _Gated:
    """What the gated activations share; `function` as kernels/w4/from_codes.py has it."""

    function = "silu"
    notes: Notes

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not (hands_on(self, x) and self.notes.open()):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # of the class that comes after this one
        hidden, gate = self.halves(x)
        return Handed(hidden, gate=(gate, self.function, self.product), notes=self.notes, slot="gate")

    def halves(self, x: Any) -> tuple[Tensor, Tensor]:
        """(hidden, gate) [..., K]."""
        hidden, gate = self.proj(x).chunk(2, -1)  # type: ignore[attr-defined]
        return hidden, gate

    def product(self, hidden: Tensor, gate: Tensor) -> Tensor:
        """What the activation gives unfused."""
        return hidden * (F.gelu(gate) if self.function == "gelu" else F.silu(gate))


class HandingGEGLU(_Gated, GEGLU):
    """GEGLU of diffusers."""

    function = "gelu"


class HandingSwiGLU(_Gated, SwiGLU):
    """SwiGLU of diffusers."""


class HandingFlux2SwiGLU(_Gated, Flux2SwiGLU):
    """Flux2SwiGLU of diffusers."""

    def halves(self, x: Any) -> tuple[Tensor, Tensor]:
        gate, hidden = plain(x).chunk(2, -1)
        return hidden, gate


GATES: dict[type, type] = {GEGLU: HandingGEGLU, SwiGLU: HandingSwiGLU, Flux2SwiGLU: HandingFlux2SwiGLU}


def gated_width(module: Any) -> int | None:
    """K of what a gated activation gives, None where its own layers do not say."""
    return module.proj.out_features // 2 if hasattr(module, "proj") else None
