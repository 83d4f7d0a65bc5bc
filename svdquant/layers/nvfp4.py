"""NVFP4 linear layers with a low-rank branch: 4-bit floats (e2m1) in groups of 16, on both sides.

    y = o * (Q_a(x / s) Q_w^T) + (x D^T) U^T + b

    Q_w   e2m1 code * e4m3 scale of its group; o [N] the outer scale, so that w = Q_w * o
    Q_a   e2m1 code * e4m3(scale), scale = min(max|x / s| / 6, 448) of its group, code = e2m1(x / s * (1 / scale))

Both products of code and scale are exact in bfloat16 (2 + 4 significant bits), so any GPU or CPU runs such a layer as
it was meant; here they are multiplied in float32. s, D, U and b are as in kernels.svdq.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError
from ...kernels.formats.int4 import dequantize_e2m1, pack_int4, quantize_e2m1, unpack_int4
from ...kernels.runtime.gradient import without_gradient
from ...layers.base import QuantizedLayer, frozen
from ...layers.choices import check_groups
from ...layers.registry import register_format
from .svdq import HALVES, check_divisors

GROUP = 16
E2M1_MAX, E4M3_MAX = 6.0, 448.0


@dataclass
class NVFP4Plan:
    """Plan of one Linear that is kept in NVFP4. rank: of the low-rank branch, 0 for none."""

    format: str = "nvfp4"
    rank: int = 32

    simulated = False

    def check(self) -> None:
        """Raises ValueError where the rank is out of range."""
        if self.rank < 0:
            raise ValueError(f"rank is 0 or more, not {self.rank}")

    def check_layer(self, layer: nn.Module) -> None:
        """Raises ValueError where a layer's inputs do not divide into groups."""
        check_groups(layer, GROUP)

    def __str__(self) -> str:
        return "W4A4 nvfp4" + (f" r{self.rank}" if self.rank else "")


class NVFP4Linear(QuantizedLayer, nn.Linear):
    """x [..., K] float -> [..., N] in x's dtype; K is a multiple of 16.

    bias     [N] in the model's dtype, or None
    qweight  [N, K/2] uint8: e2m1 codes in the nibbles, in the order of kernels.int4.pack_int4 with groups of 16
    wscales  [N, K/16] float8_e4m3fn
    outer    [N] float32
    smooth   [K], down [r, K], up [N, r]: 16-bit floats; without a branch down and up are None
    """

    plan: NVFP4Plan

    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        return HALVES if name in ("smooth", "down", "up") else super().stored_dtypes(name)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Groups of zeros may have a scale of zero; none is below."""
        check_divisors(tensors, "smooth")
        for name in ("wscales", "outer"):
            if bool((tensors[name].float() < 0).any()):
                raise ValueError(f"'{name}' holds a scale below zero")

    def __init__(self, linear: nn.Linear, plan: NVFP4Plan, device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.plan = linear.in_features, linear.out_features, plan
        inputs, outputs = self.in_features, self.out_features

        def new(*size: int, dtype: torch.dtype = torch.float16) -> nn.Parameter:
            return frozen(*size, dtype=dtype, device=device)

        self._allocate_bias(linear, linear.bias is not None, device)
        self.qweight = new(outputs, inputs // 2, dtype=torch.uint8)
        self.wscales = new(outputs, inputs // GROUP, dtype=torch.float8_e4m3fn)
        self.outer = new(outputs, dtype=torch.float32)
        self.smooth = new(inputs)
        self.down = new(plan.rank, inputs) if plan.rank else None
        self.up = new(outputs, plan.rank) if plan.rank else None

    @property
    def kept(self) -> tuple[str, ...]:
        return ("wscales", "outer", "smooth", *(("down", "up") if self.plan.rank else ()))

    def residual(self) -> Tensor:
        """Q_w [N, K] float32, for smoothed inputs and without the outer scale; exact."""
        values = dequantize_e2m1(unpack_e2m1(self.qweight)).unflatten(-1, (-1, GROUP))
        return (values * self.wscales.float().unsqueeze(-1)).flatten(-2)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, K] that codes, scales, smoothing and branch stand for."""
        weight = self.residual() * self.outer[:, None] / self.smooth.float()
        return weight if self.down is None else weight + self.up.float() @ self.down.float()

    def forward(self, input: Tensor) -> Tensor:
        return nvfp4_linear(input, self.residual(), self.outer, self.smooth, self.down, self.up, self.bias)

    def pack(self, weight: Tensor, name: str, evidence=None) -> None:
        raise UserError(f"layer '{name}' of the plan was read from a checkpoint: its codes cannot be made anew.")

    def kernel_name(self) -> str:
        return "reference"

    def _float_layer(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.plan}"


@without_gradient
def nvfp4_linear(
    x: Tensor, residual: Tensor, outer: Tensor, smooth: Tensor, down: Tensor | None, up: Tensor | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The formula above: x [..., K] float, residual [N, K] float32 -> [..., N] in x's dtype. RuntimeError in a
    backward pass."""
    exact = x.float()
    y = F.linear(round_e2m1(exact / smooth.float()), residual) * outer
    if down is not None and up is not None:
        y = y + F.linear(F.linear(exact, down.float()), up.float())
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def round_e2m1(x: Tensor) -> Tensor:
    """x [..., K] float32 -> the values its codes stand for, float32. A group with NaN or infinity becomes NaN."""
    groups = x.unflatten(-1, (-1, GROUP))
    peaks = groups.abs().amax(-1, keepdim=True)
    scales = (peaks / E2M1_MAX).clamp(max=E4M3_MAX)
    stored = torch.where(peaks.isfinite(), scales.to(torch.float8_e4m3fn).float(), torch.nan)
    codes = quantize_e2m1(groups * (1.0 / scales))  # of zeros alone, NaN: code 0
    return (dequantize_e2m1(codes) * stored).flatten(-2)


def pack_e2m1(codes: Tensor) -> Tensor:
    """codes uint8 [N, K] in [0, 15] -> uint8 [N, K/2]."""
    return pack_int4(codes.to(torch.int8) - 8, GROUP)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """The inverse of `pack_e2m1`."""
    return (unpack_int4(packed, GROUP) + 8).to(torch.uint8)


register_format("nvfp4", plan=NVFP4Plan, layers={nn.Linear: NVFP4Linear})
