"""Attention in 8 bits or in 16, by what took less time for operands of this size on this GPU.

The first call of a size races both on its own operands, in CUDA graphs; the quantization of queries, keys and values
is in the time. What was found stays for the process. Under a capture nothing can be timed: there 16 bits serve a size
that is not known yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...kernels.attention.layer8 import REFERENCE, check, known_name, through
from ...kernels.runtime.ops import op
from ...kernels.tuning import stopwatch

ROUNDS = 3


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call by the kernel of 8 bits, and by torch's own in 16."""

    kernel: str
    eight: float
    sixteen: float

    @property
    def faster(self) -> bool:
        """Whether 8 bits are."""
        return self.eight < self.sixteen


MEASURED: dict[tuple, Times] = {}
"""(device, dtype, kind, B, H, queries, keys, width) -> what was measured."""


@op
def attention_faster(q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str) -> Tensor:
    """As kernels.attention.layer8.attention8, by that op or by torch's scaled_dot_product_attention.

    q [B, H, M, d], k and v [B, H, L, d] float -> [B, H, M, d] in q's dtype, laid out as [B, M, H, d].
    """
    check(q, k, v, kind)
    name = known_name(q.device, q.shape[-1])
    if name != REFERENCE and q.numel() and in_eight_bits(name, q, k, v, scale, kind):
        return through(name, q, k, v, scale, kind)
    y = scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    return y.contiguous().transpose(1, 2)


@attention_faster.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str) -> Tensor:
    batch, heads, rows, width = q.shape
    return q.new_empty(batch, rows, heads, width).transpose(1, 2)


def in_eight_bits(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str) -> bool:
    """Whether 8 bits are faster for such operands; measured where that is not known."""
    size = (q.device, q.dtype, kind, *q.shape[:3], k.shape[2], q.shape[3])
    if size not in MEASURED:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        MEASURED[size] = times_of(name, q, k, v, scale, kind)
    return MEASURED[size].faster


def times_of(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str) -> Times:
    """Both raced on these operands, on a GPU."""
    with torch.cuda.device(q.device):
        found = stopwatch.race(
            {
                "8": [lambda: through(name, q, k, v, scale, kind)],
                "16": [lambda: scaled_dot_product_attention(q, k, v, scale=scale)],
            },
            ROUNDS,
        )
    return Times(name, found["8"] / 1e3, found["16"] / 1e3)


def lines_of(device: torch.device, kind: str) -> list[str]:
    """What was measured on a device, a line a size."""
    found = []
    for (where, _, of, batch, heads, rows, tokens, width), times in MEASURED.items():
        if where == device and of == kind:
            bits = 8 if times.faster else 16
            found.append(
                f"{batch} x {heads} heads of {width}, {rows} queries, {tokens} keys: in {bits} bits "
                f"({times.kernel} {times.eight:.3f} ms, 16 bits {times.sixteen:.3f} ms)"
            )
    return found
