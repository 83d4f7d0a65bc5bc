"""Packed 4-bit codes to int8 operands of a product in Triton, four by each 32-bit operation.

    w8 = s1 (q - z) = s1 q' + a - 128,    q' = q + 8 as it is stored,    a = 128 - s1 (z + 8)

A word holds the low, or the high, nibbles of four bytes: q' of each in a byte of its own. One multiply-add by s1 and
a * 0x01010101 makes of it the sum of 256^i (s1 q'_i + a), modulo 2^32. Each term s1 q'_i + a = w8 + 128 lies in
0..255, for w8 lies in -128..127: none carries into the next, and the bytes of the sum are they, although `a` alone
may lie below 0. With the highest bit of each turned by one exclusive or, they are the w8 in two's complement. So four
codes cost a mask, a multiply-add and an exclusive or, and high nibbles a shift.

Triton has no operation on four elements at once. PACKED: PTX does it, on four bytes of a row in a register. Without,
it goes element by element: so Triton's interpreter runs it, and so the other is tested.

Levels of a codebook (formats/codebook.py) are looked up: 16 bytes in four registers. PRMT takes four bytes by four
nibbles, of eight that lie in two registers: once of the lower levels, once of the upper ones by the same three bits,
and once more of the two by the fourth. It does so with the nibbles as they lie in a word, low and high in turn, and
two more part them: 13 instructions for eight codes, where a multiply-add takes 7.

A byte j of a packed run of 32 holds inputs j and j + 32 of its 64: the halves are joined as registers that stand side
by side anyway, so the order of inputs is the natural one and nothing moves. Nor would weights in another order in
memory save anything: the bytes come through shared memory by ldmatrix, two of them for each 128 inputs of 64 outputs.
Stored tile by tile they take 0.98 to 1.02 of the time (scripts/benchmarks/bench_weight_order.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOW, HIGH = "and.b32 t, $1, 0x0F0F0F0F;", "shr.b32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F;"
ADD, MULTIPLY, SIGN = "add.s32 t, t, $2;", "mad.lo.s32 t, t, $2, $6;", "xor.b32 $0, t, 0x80808080;"
_LOW_ADDED, _HIGH_ADDED, _LOW_WIDENED, _HIGH_WIDENED, _LOW_ALONE, _HIGH_ALONE = (
    tl.constexpr("{ .reg .b32 t; " + " ".join(lines) + " }")
    for lines in (
        (LOW, ADD, SIGN), (HIGH, ADD, SIGN), (LOW, MULTIPLY, SIGN), (HIGH, MULTIPLY, SIGN),
        (LOW, "mov.b32 $0, t;"), (HIGH, "mov.b32 $0, t;"),
    )
)  # fmt: skip


def packed(config: dict, kernel) -> bool:
    """Whether four codes go by each operation; Triton's interpreter runs no PTX."""
    return config.get("PACKED", True) and isinstance(kernel, triton.runtime.JITFunction)


@triton.jit
def whole(raw, step, offset, HALF: tl.constexpr, PACKED: tl.constexpr):
    """raw int8 [N, RUNS, 32] -> w8 of its low (HALF 0) or high nibbles.

    step s1, None for 1, and offset a: int32 [N, RUNS, 1] or [N, 1, 1]. With PACKED, 4 elements that a thread has in a
    row must be of one row: operands of products are loaded so. ($2 to $5 are s1, or a, of these 4, $6 to $9 are a.)
    """
    if PACKED:
        offsets = offset * 0x01010101
        if step is None:
            added: tl.constexpr = _HIGH_ADDED if HALF else _LOW_ADDED
            codes = tl.inline_asm_elementwise(added, "=r,r,r,r,r,r", [raw, offsets], tl.int8, True, 4)
        else:
            widened: tl.constexpr = _HIGH_WIDENED if HALF else _LOW_WIDENED
            codes = tl.inline_asm_elementwise(widened, "=r,r,r,r,r,r,r,r,r,r", [raw, step, offsets], tl.int8, True, 4)
    else:
        nibbles = ((raw >> (4 * HALF)) & 15).to(tl.int32)
        if step is not None:
            nibbles *= step
        codes = (nibbles + (offset - 128)).to(tl.int8)
    return codes


@triton.jit
def as_stored(raw, HALF: tl.constexpr, PACKED: tl.constexpr):
    """raw int8 [N, RUNS, 32] -> q' = q + 8, the low or high nibbles as they are."""
    if PACKED:
        asm: tl.constexpr = _HIGH_ALONE if HALF else _LOW_ALONE
        codes = tl.inline_asm_elementwise(asm, "=r,r", [raw], tl.int8, True, 4)
    else:
        codes = (raw >> (4 * HALF)) & 15
    return codes


PLACE, PICK = "and.b32 i, $2, 0x77777777;", "shr.b32 p, $2, 1; and.b32 p, p, 0x44444444; or.b32 p, p, 0x32103210;"
LOOK = "prmt.b32 a, $3, $7, i; prmt.b32 b, $11, $15, i; prmt.b32 {}, a, b, p;"
NEXT, APART = "shr.b32 i, i, 16; shr.b32 p, p, 16;", "prmt.b32 $0, c, d, 0x6420; prmt.b32 $1, c, d, 0x7531;"
_LOOKED_UP = tl.constexpr(
    " ".join(("{ .reg .b32 i, p, a, b, c, d;", PLACE, PICK, LOOK.format("c"), NEXT, LOOK.format("d"), APART, "}"))
)


@triton.jit
def codebook(levels_ptr, columns, N, STRIDE: tl.constexpr):
    """The 16 levels of outputs `columns` [BN] in four words, int32 [BN, 1, 1]: level i is byte i % 4 of word i / 4.

    levels_ptr: to int32; STRIDE: words from one output to the next, 0 where all have the same.
    """
    if STRIDE == 0:
        none = tl.zeros((columns.shape[0], 1, 1), tl.int32)
        first, second = tl.load(levels_ptr) + none, tl.load(levels_ptr + 1) + none
        third, fourth = tl.load(levels_ptr + 2) + none, tl.load(levels_ptr + 3) + none
    else:
        own, there = levels_ptr + columns * STRIDE, columns < N
        first = tl.load(own, mask=there, other=0)[:, None, None]
        second = tl.load(own + 1, mask=there, other=0)[:, None, None]
        third = tl.load(own + 2, mask=there, other=0)[:, None, None]
        fourth = tl.load(own + 3, mask=there, other=0)[:, None, None]
    return first, second, third, fourth


@triton.jit
def _level(nibble, first, second, third, fourth):
    word = tl.where(nibble < 8, tl.where(nibble < 4, first, second), tl.where(nibble < 12, third, fourth))
    return (word >> (8 * (nibble & 3))).to(tl.int8)


@triton.jit
def looked_up(raw, levels, PACKED: tl.constexpr):
    """raw int8 [N, RUNS, 32] -> (t[q] of its low nibbles, of its high ones), int8; levels as `codebook` has them.

    With PACKED as in `whole`. ($3 to $6 are the first words of these 4, $7 to $10 the second ones, and so on.)
    """
    first, second, third, fourth = levels
    if PACKED:
        low, high = tl.inline_asm_elementwise(
            _LOOKED_UP, "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [raw, first, second, third, fourth],
            (tl.int8, tl.int8), True, 4,
        )  # fmt: skip
    else:
        low = _level((raw & 15).to(tl.int32), first, second, third, fourth)
        high = _level(((raw >> 4) & 15).to(tl.int32), first, second, third, fourth)
    return low, high


@triton.jit
def together(low, high):
    """Both halves [N, RUNS, 32] -> [N, 64 RUNS] in the order of inputs."""
    joined = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    return tl.reshape(joined, (low.shape[0], low.shape[1] * 64))


@triton.jit
def packed_rows(w, left, first, N, BYTES, BN: tl.constexpr, RUNS: tl.constexpr, TMA: tl.constexpr):
    """Runs first .. + RUNS of rows left .. + BN, int8 [BN, RUNS, 32]; w points to int8 or is a descriptor."""
    if TMA:
        raw = w.load([left, first * 32])
    else:
        n = left + tl.arange(0, BN)
        byte = first * 32 + tl.arange(0, 32 * RUNS)
        where = w + n.to(tl.int64)[:, None] * BYTES + byte[None, :]
        raw = tl.load(where, mask=(n < N)[:, None] & (byte < BYTES)[None, :], other=0)
    return tl.reshape(raw, (BN, RUNS, 32))


@triton.jit
def token_rows(x, top, first, M, K, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """Codes of rows top .. + BM, inputs first .. + BK, transposed: int8 [BK, BM]; x as `w` in `packed_rows`."""
    if TMA:
        codes = x.load([top, first])
    else:
        m = top + tl.arange(0, BM)
        k = first + tl.arange(0, BK)
        where = x + m.to(tl.int64)[:, None] * K + k[None, :]
        codes = tl.load(where, mask=(m < M)[:, None] & (k < K)[None, :], other=0)
    return codes.T
