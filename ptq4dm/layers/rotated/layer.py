"""Layers of any format whose input is rotated in every call.

    y = Q_a(x H) Q_w(W H)^T + b,    H = diag of Hadamard matrices, H H = I

The weight is rotated while it is packed, the input while it is quantized: nothing is rounded in between. A pixel of a
convolution is rotated over its channels; zeros that surround an image stay zeros. Rounders and range objectives see
the rotated weight and the rotated input; `dequantized_weight` is that of the input as it comes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ...evidence import LayerEvidence
from ...handed.value import Handed, plain
from ...kernels.formats.rotation import rotate
from ..rounded import RoundedLayer


class RotatedLayer(RoundedLayer):
    """What rotated layers add to those of a format, from which they inherit next. They have the same tensors."""

    plan: Any

    def matrix(self, weight: Tensor) -> Tensor:
        return super().matrix(self.rotated(weight))

    def columns(self, weight: Tensor) -> Tensor:
        return super().matrix(weight)

    def shaped(self, matrix: Tensor) -> Tensor:
        return self.rotated(super().shaped(matrix))

    def fed(self, evidence: LayerEvidence) -> LayerEvidence:
        """The inputs after their rotation; of their peaks nothing is known then."""
        rows = cast(Tensor, evidence.rows)
        shape = self.weight_shape[1:]
        places = torch.arange(rows.shape[1], device=rows.device).view(1, *shape)
        order = self.columns(places)[0]
        channels = rows[:, order.argsort()].view(len(rows), *shape)
        return super().fed(LayerEvidence(self.columns(self.rotated(channels))))

    def rotated(self, x: Tensor) -> Tensor:
        """x [M, C, ...], a weight or an image, with its channels rotated."""
        return rotate(x.movedim(1, -1), self.plan.hadamard_group, self.plan.hadamard_kind).movedim(-1, 1)

    def why_not_fused(self) -> str:
        return "has a rotated input, which fused kernels do not make"

    def kernels(self) -> dict[str, str]:
        """The kernels that serve this layer; a rotation apart from the codes is a product of torch before them."""
        if self.rotates_in_codes:
            return super().kernels()
        return {rows: f"rotation + {name}" for rows, name in super().kernels().items()}

    rotates_in_codes = False  # whether one kernel rotates and quantizes: tokens.py

    def codes_key(self) -> Any:
        return None

    def forward(self, input: Tensor | Handed) -> Tensor:
        x = plain(input)
        if isinstance(self, nn.Conv2d):
            return super().forward(self.rotated(x.float())).to(x.dtype)  # type: ignore[misc]
        return super().forward(rotate(x.float(), *self.rotation)).to(x.dtype)  # type: ignore[misc]

    @property
    def rotation(self) -> tuple[int, str]:
        """Group and kind, as `rotate` takes them."""
        return self.plan.hadamard_group, self.plan.hadamard_kind
