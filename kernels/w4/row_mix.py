"""W4A8 with rows of 4 bits and others of 8 in one layer, both in groups: the sums of grouped.py for either width.

    y[m, places[r]] = s_x[m] sum_g s[r, g] P[m, r, g]  +  b[places[r]],    P[m, r, g] = sum_{k in g} q_x[m, k] c[r, k]

Rows r are stored narrow ones first: c = q - z with codes q and zero points z in [-8, 7] for those, int8 codes in
[-127, 127] for the wide ones. |P| <= 128 * 127 * 127 < 2^22 of both: whole numbers that float32 has. `places` is the
index of outputs; the kernel stores to them, so that nothing is put in order afterwards.

A wide code is stored as two nibbles, c = 16 h + (l + 8), in rows of 4 bits each: the kernel multiplies both, so that
a row of 8 bits costs two of 4, and all rows go through one loop in one launch (products/product_grouped.py).

"MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient System Design",
Zheng et al., arXiv:2412.14590, section 4.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..formats.int4 import GROUP, joined, unpack_int4
from ..runtime.ops import op
from . import int4_codes, integer
from .grouped import scaled_sums
from .tokens import token_codes


@op
def row_mix_grouped(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, places: Tensor, bias: Tensor | None
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype, N = n + w.

    qweight uint8 [n + 2 w, K' / 2], packed as in `grouped.grouped_linear`: the n narrow rows, high halves of the w
    wide ones, then their low halves (`formats.int4.halves`). wscales [N, G], G = K / 32, / 64 or / 128; wzeros int8
    [n, G] or None; places int32 [N], each output once; bias [N] or None.

    Raises ValueError for sizes that do not belong together.
    """
    check(qweight.shape, wscales.shape, None if wzeros is None else wzeros.shape, places.shape, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    filled = rows.numel() and len(qweight) > len(places)
    kernel = integer.row_mix_through if integer.known_to_serve(x.device) and filled else reference
    y = kernel(rows, qweight, wscales, wzeros, places, bias)
    return y.to(x.dtype).view(*x.shape[:-1], len(places))


@row_mix_grouped.register_fake
def _(x, qweight, wscales, wzeros, places, bias):
    return x.new_empty(*x.shape[:-1], len(places))


@functools.lru_cache(maxsize=4096)
def check(
    qweight: torch.Size, wscales: torch.Size, wzeros: torch.Size | None, places: torch.Size, inputs: int
) -> None:
    """Raise ValueError for shapes that do not belong together; right ones are looked at once."""
    wide = qweight[0] - places[0]
    narrow = places[0] - wide
    if min(wide, narrow) < 0:
        raise ValueError(
            f"{places[0]} outputs have from {places[0]} to {2 * places[0]} stored rows; got {qweight[0]}."
        )
    if wscales[0] != places[0]:
        raise ValueError(f"{places[0]} outputs have a row of scales each; got {list(wscales)}.")
    few = torch.Size((narrow, wscales[-1]))
    int4_codes.check(torch.Size((narrow, *qweight[1:])), few, wzeros, inputs)


def codes_of(qweight: Tensor, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """(codes of the narrow rows [n, K] in [-8, 7], of the wide ones [w, K]), int8."""
    wide = len(qweight) - outputs
    narrow, high, low = unpack_int4(qweight, GROUP)[:, :inputs].split([outputs - wide, wide, wide])
    return narrow, joined(high, low)


def reference(x, qweight, wscales, wzeros, places, bias) -> Tensor:
    """x [M, K] float -> float32 [M, N] by the formula, on any device: the truth."""
    codes, scale = token_codes(x)
    groups, inputs = wscales.shape[1], x.shape[1]
    narrow, wide = codes_of(qweight, len(places), inputs)
    narrow = narrow if wzeros is None else narrow - wzeros.repeat_interleave(inputs // groups, 1)
    stored = scaled_sums(codes, torch.cat([narrow, wide]), wscales)
    y = torch.empty_like(stored).index_copy_(1, places.long(), stored) * scale.double()[:, None]
    return (y if bias is None else y + bias.double()).float()
