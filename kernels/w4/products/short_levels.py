"""Levels of a codebook in the place of uniform codes, for product_short.py in Triton.

    w[n, k] = s[n, g] t[q[n, k]]        t int8, exact in the 16 bits of the product's operands

A table of an output is its 16 levels as these floats: their low bytes in four registers, their high bytes in four.
PRMT takes four bytes by four nibbles, as words.py says, and so looks up low and high bytes of four codes with three
instructions each; one more sets two floats together. With the bytes of a word of codes in the order 0, 2, 1, 3 the
pairs are those in which uniform codes come out (short_operands.py): 23 instructions for eight codes, where those take
about 12 and a product of a constant, which levels do not need. PACKED: in PTX. Without, by shifts and selections,
which Triton's interpreter runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .short_operands import placed

WORDS = 8  # int32 of a table


def tables_of(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 levels [R, 16] -> int32 [R, 8]: low bytes, then high ones, of the levels as dtype, which has 16 bits."""
    halves = levels.to(dtype).contiguous().view(torch.uint8).view(len(levels), 16, 2)  # little-endian
    return halves.transpose(1, 2).contiguous().view(len(levels), 32).view(torch.int32)


@triton.jit
def read_tables(tables_ptr, rows, left, STRIDE: tl.constexpr):
    """The table of each read's row, as eight int32 [reads, 1]. STRIDE: 8, or 0 where all rows have the same."""
    words = ()
    for i in tl.static_range(8):
        if STRIDE == 0:
            one = tl.load(tables_ptr + i) + tl.zeros((1, 1), tl.int32)
        else:
            one = tl.load(tables_ptr + rows * STRIDE + i, mask=rows < left, other=0)[:, None]
        words += (one,)
    return words


INDEX = (
    "prmt.b32 w, $4, $4, 0x3120; and.b32 i, w, 0x77777777; shr.b32 p, w, 1; and.b32 p, p, 0x44444444; "
    "or.b32 p, p, 0x32103210;"
)
LOOK = (
    "prmt.b32 a, $5, $6, i; prmt.b32 b, $7, $8, i; prmt.b32 {0}l, a, b, p; "
    "prmt.b32 a, $9, $10, i; prmt.b32 b, $11, $12, i; prmt.b32 {0}h, a, b, p;"
)
NEXT = "shr.b32 i, i, 16; shr.b32 p, p, 16;"
PAIRS = (
    "prmt.b32 $0, cl, ch, 0x6240; prmt.b32 $1, cl, ch, 0x7351; "
    "prmt.b32 $2, dl, dh, 0x6240; prmt.b32 $3, dl, dh, 0x7351;"
)
_PAIRS = tl.constexpr(
    " ".join(
        ("{ .reg .b32 w, i, p, a, b, cl, ch, dl, dh;", INDEX, LOOK.format("c"), NEXT, LOOK.format("d"), PAIRS, "}")
    )
)


@triton.jit
def _half(nibbles, t0, t1, t2, t3):
    """The byte of each nibble, of a table's four words."""
    word = tl.where(nibbles < 8, tl.where(nibbles < 4, t0, t1), tl.where(nibbles < 12, t2, t3))
    return word >> (8 * (nibbles & 3)) & 255


@triton.jit
def _level(words, table, BYTE: tl.constexpr, HALF: tl.constexpr):
    """Bits of the levels of one nibble of each byte BYTE, in the low half of an int32."""
    nibbles = words >> (8 * BYTE + 4 * HALF) & 15
    low = _half(nibbles, table[0], table[1], table[2], table[3])
    return low | _half(nibbles, table[4], table[5], table[6], table[7]) << 8


@triton.jit
def levels(words, table, dtype: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr):
    """words [reads, 2] -> the levels of their low nibbles and of their high ones, each as `weights` has codes."""
    if PACKED:
        low02, high02, low13, high13 = tl.inline_asm_elementwise(
            _PAIRS, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [words, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]],
            (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
        )  # fmt: skip
    else:
        low02 = _level(words, table, 0, 0) | _level(words, table, 2, 0) << 16
        high02 = _level(words, table, 0, 1) | _level(words, table, 2, 1) << 16
        low13 = _level(words, table, 1, 0) | _level(words, table, 3, 0) << 16
        high13 = _level(words, table, 1, 1) | _level(words, table, 3, 1) << 16
    return placed(low02, low13, dtype, BN), placed(high02, high13, dtype, BN)
