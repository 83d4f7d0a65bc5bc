"""Attention in 8 bits or in 16, by what took less time for operands of this size on this GPU.

The first call of a size races both on its own operands, in CUDA graphs; the quantization of queries, keys and values
is in the time. What was found stays for the process. Under a capture nothing can be timed: there 16 bits serve a size
that is not known yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...kernels.attention.layer8 import REFERENCE, attention_op, known_name, through
from ...kernels.attention.rotary import Rotary, joined
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
"""(device, dtype, kind, with a rotary embedding or not, B, H, queries, keys, width) -> what was measured."""


@attention_op
def attention_faster(q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str, rotary: Rotary | None) -> Tensor:
    """As kernels.attention.layer8.attention8, by that op or by torch's scaled_dot_product_attention."""
    name = known_name(q.device, q.shape[-1])
    given = q, k, v, scale, kind, rotary
    if name != REFERENCE and q.numel() and in_eight_bits(name, *given):
        return through(name, *given)
    return in_sixteen_bits(*given).transpose(1, 2).contiguous().transpose(1, 2)


def in_sixteen_bits(q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str, rotary: Rotary | None) -> Tensor:
    """By torch; what comes before attention compiled, as it is where a model's blocks are."""
    if rotary is not None:
        q, k, v = (_joined() if q.is_cuda else joined)(q, k, v, rotary)
    return scaled_dot_product_attention(q, k, v, scale=scale)


@functools.cache
def _joined() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(joined, dynamic=False)


def in_eight_bits(
    name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str, rotary: Rotary | None
) -> bool:  # fmt: skip
    """Whether 8 bits are faster for such operands; measured where that is not known."""
    words = 0 if rotary is None else rotary.tokens
    batch, heads, rows, width = q.shape
    sizes = batch, heads, rows + words, k.shape[2] + words, width
    size = (q.device, q.dtype, kind, rotary is not None, *sizes)
    if size not in MEASURED:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        MEASURED[size] = times_of(name, q, k, v, scale, kind, rotary)
    return MEASURED[size].faster


def times_of(name: str, *given: Any) -> Times:
    """Both raced on these operands, on a GPU."""
    with torch.cuda.device(given[0].device):
        found = stopwatch.race(
            {"8": [lambda: through(name, *given)], "16": [lambda: in_sixteen_bits(*given)]}, ROUNDS
        )
    return Times(name, found["8"] / 1e3, found["16"] / 1e3)


def lines_of(device: torch.device, kind: str) -> list[str]:
    """What was measured on a device, a line a size."""
    found = []
    for (where, _, of, is_turned, batch, heads, rows, tokens, width), times in MEASURED.items():
        if where == device and of == kind:
            bits, after = 8 if times.faster else 16, ", norm and rotary embedding included" if is_turned else ""
            found.append(
                f"{batch} x {heads} heads of {width}, {rows} queries, {tokens} keys{after}: in {bits} bits "
                f"({times.kernel} {times.eight:.3f} ms, 16 bits {times.sixteen:.3f} ms)"
            )
    return found
