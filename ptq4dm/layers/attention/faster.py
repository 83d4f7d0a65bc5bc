"""Attention in 8 bits or in 16, by what took less time for operands of this size on this GPU.

The first call of a size races all on its own operands, in CUDA graphs; the quantization of queries, keys and values
is in the time. Codes are of the kind that was asked for, unless the other one takes less than CLEARLY of its time:
int8 has the smaller error. What was found stays for the process. Under a capture nothing can be timed: there 16 bits
serve a size that is not known yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...kernels.attention.layer8 import REFERENCE, attention_op, known_name, through
from ...kernels.attention.rotary import Rotary, joined
from ...kernels.formats.attention8 import TYPES
from ...kernels.tuning import stopwatch

ROUNDS, CLEARLY = 3, 0.95


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call by the kernel of 8 bits, with codes of each kind, and by torch's own in 16."""

    kernel: str
    eight: dict[str, float]
    sixteen: float

    def kind(self, asked: str) -> str | None:
        """Of the codes to be taken, where this one is asked for; None for 16 bits."""
        least = min(self.eight, key=self.eight.__getitem__)
        kind = least if self.eight[least] < CLEARLY * self.eight[asked] else asked
        return kind if self.eight[kind] < self.sixteen else None


MEASURED: dict[tuple, Times] = {}
"""(device, dtype, with a rotary embedding or not, B, H, queries, keys, width) -> what was measured."""


@attention_op
def attention_faster(q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str, rotary: Rotary | None) -> Tensor:
    """As kernels.attention.layer8.attention8, by that op or by torch's scaled_dot_product_attention."""
    name = known_name(q.device, q.shape[-1])
    times = measured(name, q, k, v, scale, rotary) if name != REFERENCE and q.numel() else None
    taken = None if times is None else times.kind(kind)
    if taken is not None:
        return through(name, q, k, v, scale, taken, rotary)
    return in_sixteen_bits(q, k, v, scale, rotary).transpose(1, 2).contiguous().transpose(1, 2)


def in_sixteen_bits(q: Tensor, k: Tensor, v: Tensor, scale: float, rotary: Rotary | None) -> Tensor:
    """By torch; what comes before attention compiled, as it is where a model's blocks are."""
    if rotary is not None:
        q, k, v = (_joined() if q.is_cuda else joined)(q, k, v, rotary)
    return scaled_dot_product_attention(q, k, v, scale=scale)


@functools.cache
def _joined() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(joined, dynamic=False)


def measured(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, rotary: Rotary | None) -> Times | None:
    """What such operands take, measured where that is not known; None where it cannot be."""
    words = 0 if rotary is None else rotary.tokens
    batch, heads, rows, width = q.shape
    sizes = batch, heads, rows + words, k.shape[2] + words, width
    size = (q.device, q.dtype, rotary is not None, *sizes)
    if size not in MEASURED:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        MEASURED[size] = times_of(name, q, k, v, scale, rotary)
    return MEASURED[size]


def times_of(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, rotary: Rotary | None) -> Times:
    """All raced on these operands, on a GPU."""
    calls: dict[str, list[Callable]] = {
        kind: [functools.partial(through, name, q, k, v, scale, kind, rotary)] for kind in TYPES
    }
    with torch.cuda.device(q.device):
        found = stopwatch.race(calls | {"16": [lambda: in_sixteen_bits(q, k, v, scale, rotary)]}, ROUNDS)
    return Times(name, {kind: found[kind] / 1e3 for kind in TYPES}, found["16"] / 1e3)


def lines_of(device: torch.device, asked: str) -> list[str]:
    """What was measured on a device, and what is taken where this kind is asked for, a line a size."""
    found = []
    for (where, _, is_turned, batch, heads, rows, tokens, width), times in MEASURED.items():
        if where == device:
            after, taken = ", norm and rotary embedding included" if is_turned else "", times.kind(asked)
            eight = ", ".join(f"{kind} {ms:.3f} ms" for kind, ms in times.eight.items())
            found.append(
                f"{batch} x {heads} heads of {width}, {rows} queries, {tokens} keys{after}: "
                f"in {'16 bits' if taken is None else f'8 bits, {taken}'} "
                f"({times.kernel} {eight}, 16 bits {times.sixteen:.3f} ms)"
            )
    return found
