"""W4A8 with rows of 4 bits and others of 8 in one layer, both in groups: the sums of grouped.py for either width.

    y[m, places[r]] = s_x[m] sum_g s[r, g] P[m, r, g]  +  b[places[r]],    P[m, r, g] = sum_{k in g} q_x[m, k] c[r, k]

Rows r are stored wide ones first: int8 codes c in [-127, 127] of those, c = q - z with codes q and zero points z in
[-8, 7] of the narrow ones. |P| <= 128 * 127 * 127 < 2^22 of both: whole numbers that float32 has. `places` is the
index of outputs; the kernel stores to them, so that nothing is put in order afterwards.

A wide code is stored as two nibbles, c = 16 h + (l + 8), in rows of 4 bits each (`formats.int4.paired`): the kernel
multiplies both, so that a row of 8 bits costs two of 4, and all rows go through one loop in one launch
(products/product_grouped.py).

"MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient System Design",
Zheng et al., arXiv:2412.14590, section 4.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..formats.int4 import GROUP, paired_rows, unpack_int4, unpaired
from ..runtime.ops import op
from . import int4_codes, integer
from .grouped import scaled_sums
from .tokens import token_codes


@op
def row_mix_grouped(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, places: Tensor, bias: Tensor | None, wide: int
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype, N = wide + n.

    qweight uint8 [16 ceil(wide / 8) + n, K' / 2], packed as in `grouped.grouped_linear`: wide rows in pairs, then the
    narrow ones. wscales [N, G], wide rows first, G = K / 32, / 64 or / 128; wzeros int8 [n, G] or None; places int32
    [N], each output once; bias [N] or None.

    Raises ValueError for sizes that do not belong together.
    """
    check(qweight.shape, wscales.shape, None if wzeros is None else wzeros.shape, places.shape, x.shape[-1], wide)
    rows = x.reshape(-1, x.shape[-1])
    kernel = integer.row_mix_through if integer.known_to_serve(x.device) and rows.numel() and wide else reference
    y = kernel(rows, qweight, wscales, wzeros, places, bias, wide)
    return y.to(x.dtype).view(*x.shape[:-1], len(places))


@row_mix_grouped.register_fake
def _(x, qweight, wscales, wzeros, places, bias, wide):
    return x.new_empty(*x.shape[:-1], len(places))


@functools.lru_cache(maxsize=4096)
def check(
    qweight: torch.Size, wscales: torch.Size, wzeros: torch.Size | None, places: torch.Size, inputs: int, wide: int
) -> None:
    """Raise ValueError for shapes that do not belong together; right ones are looked at once."""
    narrow = places[0] - wide
    if min(wide, narrow) < 0:
        raise ValueError(f"{wide} of {places[0]} outputs cannot have 8 bits.")
    if qweight[0] != paired_rows(wide) + narrow:
        rows = paired_rows(wide) + narrow
        raise ValueError(f"{wide} outputs of 8 bits and {narrow} of 4 have {rows} stored rows; got {qweight[0]}.")
    if wscales[0] != places[0]:
        raise ValueError(f"{places[0]} outputs have a row of scales each; got {list(wscales)}.")
    few = torch.Size((narrow, wscales[-1]))
    int4_codes.check(torch.Size((narrow, *qweight[1:])), few, wzeros, inputs)


def codes_of(qweight: Tensor, wide: int, inputs: int) -> tuple[Tensor, Tensor]:
    """(codes of the wide rows int8 [wide, K], of the narrow ones [n, K] in [-8, 7])."""
    codes, pairs = unpack_int4(qweight, GROUP)[:, :inputs], paired_rows(wide)
    return unpaired(codes[:pairs], wide), codes[pairs:]


def reference(x, qweight, wscales, wzeros, places, bias, wide: int) -> Tensor:
    """x [M, K] float -> float32 [M, N] by the formula, on any device: the truth."""
    codes, scale = token_codes(x)
    groups, inputs = wscales.shape[1], x.shape[1]
    wides, narrow = codes_of(qweight, wide, inputs)
    narrow = narrow if wzeros is None else narrow - wzeros.repeat_interleave(inputs // groups, 1)
    stored = scaled_sums(codes, torch.cat([wides, narrow]), wscales)
    y = torch.empty_like(stored).index_copy_(1, places.long(), stored) * scale.double()[:, None]
    return (y if bias is None else y + bias.double()).float()
