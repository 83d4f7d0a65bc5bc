"""W4A8 with rows of 4 bits and others of 8 in one layer, both in groups: the sums of grouped.py for either width.

    y[m, places[r]] = s_x[m] sum_g s[r, g] P[m, r, g]  +  b[places[r]],    P[m, r, g] = sum_{k in g} q_x[m, k] c[r, k]

Rows r are stored narrow ones first: c = q - z with codes q and zero points z in [-8, 7] for those, int8 codes in
[-127, 127] for the wide ones. |P| <= 128 * 127 * 127 < 2^22 of both: whole numbers that float32 has. `places` is the
index of outputs; the kernel stores to them, so that nothing is put in order afterwards.

"MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient System Design",
Zheng et al., arXiv:2412.14590, section 4.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..formats.int4 import GROUP, unpack_int4
from ..runtime.ops import op
from . import int4_codes, integer
from .grouped import scaled_sums
from .tokens import token_codes


@op
def row_mix_grouped(
    x: Tensor,
    qweight: Tensor,
    qweight8: Tensor,
    wscales: Tensor,
    wzeros: Tensor | None,
    wscales8: Tensor,
    places: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype, N = n + w.

    qweight uint8 [n, K' / 2], wscales [n, G] and wzeros as in `grouped.grouped_linear`, G = K / 32, / 64 or / 128;
    qweight8 int8 [w, K], contiguous, wscales8 [w, G] float; places int32 [N], each output once; bias [N] or None.

    Raises ValueError for sizes that do not belong together.
    """
    check(qweight.shape, wscales.shape, None if wzeros is None else wzeros.shape, qweight8.shape, wscales8.shape,
          places.shape, x.shape[-1])  # fmt: skip
    rows = x.reshape(-1, x.shape[-1])
    filled = rows.numel() and len(qweight) and len(qweight8)
    kernel = integer.row_mix_through if integer.known_to_serve(x.device) and filled else reference
    y = kernel(rows, qweight, qweight8, wscales, wzeros, wscales8, places, bias)
    return y.to(x.dtype).view(*x.shape[:-1], len(places))


@row_mix_grouped.register_fake
def _(x, qweight, qweight8, wscales, wzeros, wscales8, places, bias):
    return x.new_empty(*x.shape[:-1], len(places))


@functools.lru_cache(maxsize=4096)
def check(
    qweight: torch.Size, wscales: torch.Size, wzeros: torch.Size | None, qweight8: torch.Size, wscales8: torch.Size,
    places: torch.Size, inputs: int,
) -> None:  # fmt: skip
    """Raise ValueError for shapes that do not belong together; right ones are looked at once."""
    int4_codes.check(qweight, wscales, wzeros, inputs)
    wide = qweight8[0]
    if tuple(qweight8) != (wide, inputs) or tuple(wscales8) != (wide, wscales[1]):
        raise ValueError(
            f"rows of 8 bits are [w, {inputs}] with scales [w, {wscales[1]}]; got {list(qweight8)} and "
            f"{list(wscales8)}."
        )
    if tuple(places) != (qweight[0] + wide,):
        raise ValueError(f"{qweight[0]} and {wide} rows have a place each; got {list(places)}.")


def reference(x, qweight, qweight8, wscales, wzeros, wscales8, places, bias) -> Tensor:
    """x [M, K] float -> float32 [M, N] by the formula, on any device: the truth."""
    codes, scale = token_codes(x)
    groups, inputs = wscales.shape[1], x.shape[1]
    narrow = unpack_int4(qweight, GROUP)[:, :inputs]
    narrow = narrow if wzeros is None else narrow - wzeros.repeat_interleave(inputs // groups, 1)
    stored = torch.cat([scaled_sums(codes, narrow, wscales), scaled_sums(codes, qweight8, wscales8)], 1)
    y = torch.empty_like(stored).index_copy_(1, places.long(), stored) * scale.double()[:, None]
    return (y if bias is None else y + bias.double()).float()
