"""W4A8 with rows of 4 bits and others of 8 in one layer, both in groups: the sums of grouped.py for either width.

    y[m, n] = s_x[m] sum_g s[n, g] P[m, n, g]  +  b[n],    P[m, n, g] = sum_{k in g} q_x[m, k] c[n, k]

int8 codes c in [-127, 127] of wide rows, c = q - z with codes q and zero points z in [-8, 7] of the narrow ones.
|P| <= 128 * 127 * 127 < 2^22 of both: whole numbers that float32 has.

A wide code is stored as two nibbles, c = 16 h + (l + 8), in rows of 4 bits each (`formats.int4.halved`): low halves
are where the row is, high ones in rows before all others. So all outputs keep their order, a row of 8 bits costs two
of 4, and all rows go through one loop in one launch (products/product_grouped.py).

"MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient System Design",
Zheng et al., arXiv:2412.14590, section 4.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..formats.int4 import GROUP, high_rows, unpack_int4, whole
from ..runtime.ops import op
from . import int4_codes, integer
from .grouped import scaled_sums
from .tokens import token_codes


@op
def row_mix_grouped(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, wide: Tensor, bias: Tensor | None
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    wide int32 [w]: the outputs of 8 bits, rising. qweight uint8 [16 ceil(w / 16) + N, K' / 2], packed as in
    `grouped.grouped_linear`: high halves of these, then all rows. wscales [N, G], G = K / 32, / 64 or / 128; wzeros
    int8 [N - w, G], of the narrow rows in their order, or None; bias [N] or None.

    Raises ValueError for sizes that do not belong together.
    """
    check(qweight.shape, wscales.shape, None if wzeros is None else wzeros.shape, x.shape[-1], len(wide))
    rows = x.reshape(-1, x.shape[-1])
    served = integer.known_to_serve(x.device) and rows.numel() and len(wide)
    kernel = integer.row_mix_through if served else reference
    y = kernel(rows, qweight, wscales, wzeros, wide, bias)
    return y.to(x.dtype).view(*x.shape[:-1], len(wscales))


@row_mix_grouped.register_fake
def _(x, qweight, wscales, wzeros, wide, bias):
    return x.new_empty(*x.shape[:-1], len(wscales))


@functools.lru_cache(maxsize=4096)
def check(qweight: torch.Size, wscales: torch.Size, wzeros: torch.Size | None, inputs: int, wide: int) -> None:
    """Raise ValueError for shapes that do not belong together; right ones are looked at once."""
    outputs, groups = wscales
    if wide > outputs:
        raise ValueError(f"{wide} of {outputs} outputs cannot have 8 bits.")
    rows = high_rows(wide) + outputs
    if qweight[0] != rows:
        raise ValueError(f"{outputs} outputs, {wide} of 8 bits, have {rows} stored rows; got {qweight[0]}.")
    few = outputs - wide
    int4_codes.check(torch.Size((few, *qweight[1:])), torch.Size((few, groups)), wzeros, inputs)


def codes_of(qweight: Tensor, wide: Tensor, inputs: int) -> Tensor:
    """Codes int8 [N, K], those of narrow rows in [-8, 7]."""
    return whole(unpack_int4(qweight, GROUP)[:, :inputs], wide.long())


def zeros_of(wzeros: Tensor, wide: Tensor) -> Tensor:
    """Zero points of all rows, [N, G]: those of wide ones are 0."""
    zeros = wzeros.new_zeros(len(wzeros) + len(wide), wzeros.shape[1])
    narrow = torch.ones(len(zeros), dtype=torch.bool, device=zeros.device).index_fill_(0, wide.long(), False)
    zeros[narrow] = wzeros
    return zeros


def reference(x, qweight, wscales, wzeros, wide, bias) -> Tensor:
    """x [M, K] float -> float32 [M, N] by the formula, on any device: the truth."""
    codes, scale = token_codes(x)
    groups, inputs = wscales.shape[1], x.shape[1]
    steps = codes_of(qweight, wide, inputs)
    if wzeros is not None:
        steps = steps - zeros_of(wzeros, wide).repeat_interleave(inputs // groups, 1)
    y = scaled_sums(codes, steps, wscales) * scale.double()[:, None]
    return (y if bias is None else y + bias.double()).float()
