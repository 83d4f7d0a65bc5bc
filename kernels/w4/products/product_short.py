"""Products of few rows with 4-bit weights in Triton: what counts is reading the weight once.

    y[m, n] = f(a[m] sum_g s[n, g] (sum_{k in g} x[m, k] (q[n, k] + c) - c sum_{k in g} x[m, k])
                + sum_j branch[m, j] U[n, j]  +  b[n])

over groups g of 64 inputs; a weight with zero points z adds -s[n, g] z[n, g] sum_{k in g} x[m, k]. f is one of
nonlinearity.py, or nothing. x are 16-bit floats with a = 1 (weight-only
layers: adaLN, time embedding), or codes in e4m3 or int8 with a scale per row (short inputs of layers with 8-bit
activations: nothing is unpacked to memory). x and q + c are exact in the 16 bits of the product's operands; sums and
scales in float32. Floor in bytes: N K / 2 + N K / 32 for the codes and their scales.

q + c is what unpacking gives soonest (short_operands.py); -c sum x comes from one more product, of a constant. What
that adds to rounding errors, of the order of 2^-24 c |x|, is far less than 16 bits of an output show. Zero points
take the same product, times s z / c in float32. Of a codebook the operand is its level t[q], as it is: there is no c
(short_levels.py).

A program has one block of outputs and few warps, which divide the groups and meet once, at the end. It keeps no part
of x: that comes from the L1 cache, which all programs of a multiprocessor share. So it needs few registers, and a
multiprocessor holds many programs, whose reads and products overlap. A warp reads groups and their scales in twos.
AHEAD of these are under way: as soon as it has multiplied two groups, it reads those that come AHEAD later, into the
same registers.

Tried on an H200 and left out: programs that read all they need at once; programs that keep x in registers and walk
over blocks of outputs, each lane with loads of its own (with loads in whole lines: product_short_hopper.py); codes
fetched into L2 before they are loaded (1.2 to 1.4 times as long); c subtracted from codes in registers, in place of
the product of a constant (2 to 4 % less time); launches that begin before the one before has ended (after a kernel
that does not allow for it, as torch's do not, 2 to 4 % slower).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ...runtime.integers import cdiv
from ...runtime.launch import Launch, planned
from .short_ends import finish, meet, read_ends, read_rows
from .short_levels import WORDS, levels, read_tables
from .short_operands import MAGIC, places, read_inputs, weights
from .words import packed


@triton.jit
def _read_words(q, row, groups, left, end, EVEN: tl.constexpr):
    """The words of a group of each warp; `left` rows and `end` groups are there.

    Even blocks are whole, and lie within their rows or past their end as a whole.
    """
    there = tl.full((1, 1), end, tl.int32) > 0 if EVEN else (row < left) & (groups < end)
    return tl.load(q, mask=there)


@triton.jit
def _read_pairs(wscales, rows, runs, left, end, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """Two scales of each row and warp in an int32, as `_read_words`."""
    there = tl.full((1,), end, tl.int32) > 0 if EVEN else (rows < left) & (runs < end)
    if GROUPS % 2 == 0:
        return tl.load(wscales.to(tl.pointer_type(tl.int32)), mask=there, other=0)
    halves = wscales.to(tl.pointer_type(tl.uint16))  # every other row begins amid an int32
    pairs = tl.load(halves, mask=there, other=0).to(tl.int32)
    return pairs | tl.load(halves + 1, mask=there & (runs + 1 < end), other=0).to(tl.int32) << 16


@triton.jit
def _read_zeros(wzeros, rows, runs, left, end, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """Two zero points of each row and warp in an int16, as `_read_pairs`."""
    there = tl.full((1,), end, tl.int32) > 0 if EVEN else (rows < left) & (runs < end)
    if GROUPS % 2 == 0:
        return tl.load(wzeros.to(tl.pointer_type(tl.int16)), mask=there, other=0).to(tl.int32)
    pairs = tl.load(wzeros, mask=there, other=0).to(tl.int32) & 255
    return pairs | tl.load(wzeros + 1, mask=there & (runs + 1 < end), other=0).to(tl.int32) << 8


@triton.jit
def _zeros(pairs, PLACE: tl.constexpr):
    """The first or second of each pair, float32."""
    return (pairs << (24 - 8 * PLACE) >> 24).to(tl.float32)


@triton.jit
def _scales(pairs, PLACE: tl.constexpr, dtype: tl.constexpr):
    """The first or second of each pair, float32."""
    if dtype == tl.bfloat16:  # by hand: compilers take four instructions where one does
        return (pairs & -0x10000 if PLACE else pairs << 16).to(tl.float32, bitcast=True)
    return (pairs >> 16 * PLACE).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _spread(values, WARPS: tl.constexpr, BN: tl.constexpr):
    """One of each read, [reads] -> [warps, BN / 8, 8, 1, 4, 1], as the sums lie."""
    return tl.permute(tl.reshape(values, (BN // 8, WARPS, 8, 4)), (1, 0, 2, 3))[:, :, :, None, :, None]


@triton.jit
def _product(
    words, scales, zeros, table, inputs, minus_c, magic, dtype: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr
):
    """A group's product of each warp, times its scales [warps, BN / 8, 8, BM / 8, 4, 2].

    zeros: None, or floats; table: (), or a codebook's.
    """
    WARPS: tl.constexpr = inputs[0].shape[0]
    BM: tl.constexpr = inputs[0].shape[2]
    if len(table) > 0:
        low, high = levels(words, table, dtype, BN, PACKED)
        part = tl.dot(high, inputs[1], tl.dot(low, inputs[0], tl.zeros((WARPS, BN, BM), tl.float32)))
        return tl.reshape(part, (WARPS, BN // 8, 8, BM // 8, 4, 2)) * _spread(scales, WARPS, BN)
    part = tl.zeros((WARPS, 16, BM), tl.float32)
    for half in tl.static_range(2):
        part = tl.dot(minus_c, inputs[half], part)
    part = tl.reshape(tl.broadcast_to(part[:, None, :, :], (WARPS, BN // 16, 16, BM)), (WARPS, BN, BM))
    shape: tl.constexpr = (WARPS, BN // 8, 8, BM // 8, 4, 2)
    sums = tl.reshape(part, shape)
    for half in tl.static_range(2):
        part = tl.dot(weights(words, magic, 4 * half, dtype, BN), inputs[half], part)
    part = tl.reshape(part, shape) * _spread(scales, WARPS, BN)
    if zeros is not None:
        c: tl.constexpr = 136 if dtype == tl.bfloat16 else 72
        part += sums * _spread(scales * (zeros / c), WARPS, BN)
    return part


@triton.jit
def _short_kernel(
    x_ptr, row_scale_ptr, q_ptr, wscales_ptr, wzeros_ptr, tables_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N,
    stride_m, magic, GROUPS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WARPS: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr, NONLINEARITY: tl.constexpr,
    STRIDE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Rows m of a block, outputs n of a block, two groups for each warp in turn."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    scale_dtype: tl.constexpr = wscales_ptr.dtype.element_ty
    step: tl.constexpr = 2 * WARPS
    block = tl.program_id(0)
    left = N - block * BN
    t, rows, warp = places(BN // 8, WARPS)
    runs = 2 * warp
    wscales = wscales_ptr + block * (BN * GROUPS) + rows * GROUPS + runs  # one for each t, as in the sums
    row, groups = rows[:, None], runs[:, None]
    q = q_ptr + block * (BN * GROUPS * 8) + row * (GROUPS * 8) + groups * 8
    q += t[:, None] * 2 + tl.arange(0, 2)[None, :]
    affine: tl.constexpr = wzeros_ptr is not None
    wzeros = wzeros_ptr + block * (BN * GROUPS) + rows * GROUPS + runs if affine else None
    table = read_tables(tables_ptr + block * BN * STRIDE, rows, left, STRIDE) if tables_ptr is not None else ()
    words, pairs, zeros = (), (), ()
    for i in tl.static_range(AHEAD):
        end = GROUPS - i * step
        for j in tl.static_range(2):
            words += (_read_words(q + (i * step + j) * 8, row, groups, left, end - j, EVEN),)
        pairs += (_read_pairs(wscales + i * step, rows, runs, left, end, GROUPS, EVEN),)
        if affine:
            zeros += (_read_zeros(wzeros + i * step, rows, runs, left, end, GROUPS, EVEN),)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = block * BN + tl.arange(0, BN)
    ends = read_ends(up_ptr, bias_ptr, n, N, RANK, R)
    t, row_x, columns = places(BM // 8, WARPS)
    columns = 2 * columns[:, None]
    row_x = tl.minimum(tl.program_id(1) * BM + row_x, M - 1)  # past the last row it repeats, and is not stored
    x = x_ptr + row_x.to(tl.int64)[:, None] * stride_m + columns * 64 + t[:, None] * 8 + tl.arange(0, 8)[None, :]
    # N >> 30 is 0, but compilers do not know: they would set the registers of a constant anew for every product
    unlike = tl.arange(0, 16)[None, :, None] * 8 + tl.arange(0, 16)[None, None, :] % 8 & N >> 30
    minus_c = (magic.to(tl.int16) | (-0x7FF8 if dtype == tl.bfloat16 else -0x7F80)) + unlike.to(tl.int16)
    minus_c = tl.broadcast_to(minus_c.to(dtype, bitcast=True), (WARPS, 16, 16))
    minus_c = tl.reshape(tl.join(minus_c, minus_c), (WARPS, 16, 32))  # joined as weights are
    sums = tl.zeros((WARPS, BN // 8, 8, BM // 8, 4, 2), tl.float32)
    for first in tl.range(0, GROUPS, AHEAD * step, num_stages=1):
        q += AHEAD * step * 8
        wscales += AHEAD * step
        if affine:
            wzeros += AHEAD * step
        for i in tl.static_range(AHEAD):
            end = GROUPS - first - i * step
            later = end - AHEAD * step
            for j in tl.static_range(2):
                inputs = read_inputs(x + (i * step + j) * 64, columns, end - j, dtype, BM, EVEN)
                scales = _scales(pairs[0], j, scale_dtype)
                points = _zeros(zeros[0], j) if affine else None
                sums += _product(words[0], scales, points, table, inputs, minus_c, magic, dtype, BN, PACKED)
                words = words[1:] + (_read_words(q + (i * step + j) * 8, row, groups, left, later - j, EVEN),)
            pairs = pairs[1:] + (_read_pairs(wscales + i * step, rows, runs, left, later, GROUPS, EVEN),)
            if affine:
                zeros = zeros[1:] + (_read_zeros(wzeros + i * step, rows, runs, left, later, GROUPS, EVEN),)
        x += AHEAD * step * 64
    rows = read_rows(row_scale_ptr, branch_ptr, m, M, R)
    finish(meet(sums, BN, BM), m, n, rows, ends, y_ptr, M, N, R, bias_ptr is not None, NONLINEARITY)


_USUAL = dict(BN=16, AHEAD=1, num_warps=4, maxnreg=None)  # of the kernel here, where it was not measured


def short_product(
    x: Tensor, row_scale: Tensor | None, qweight: Tensor, wscales: Tensor, branch: Tensor | None, up: Tensor | None,
    bias: Tensor | None, out: Tensor, config: dict, nonlinearity: str = "", wzeros: Tensor | None = None,
    tables: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill out [M, N] (bf16 or fp16) from x [M, K] of its dtype, or of codes with row_scale float32 [M].

    qweight uint8 [N, K/2], wscales [N, K/64] and wzeros int8 [N, K/64] or None, contiguous, N K below 2^34; branch
    [M, padded rank] and up [N, r] of out's dtype. tables: int32 [1, 8] or [N, 8] of a codebook (`tables_of`), without
    zero points, or None. config: BM from 8, BN from 16 on and num_warps, powers of two;
    AHEAD; maxnreg to limit registers. Settings with GLUON are of product_short_hopper, for float inputs of few rows
    on Hopper, without zero points, codebook, branch and nonlinearity; what it does not serve is multiplied here.
    """
    (m, n), groups = out.shape, wscales.shape[1]
    if config.get("GLUON"):
        from . import product_short_hopper as hopper  # a Triton without Gluon serves all other settings

        plain = row_scale is None and wzeros is tables is None and up is None and not nonlinearity
        if plain and hopper.serves(m, groups):
            hopper.short_product(x, qweight, wscales, bias, out, config)
            return
        config = _USUAL | dict(BM=8 if m <= 8 else 16)
    rank, padded = (0, 0) if up is None else (up.shape[1], branch.shape[1])
    stride = 0 if tables is None or len(tables) == 1 else WORDS
    launch = _launch(config, m, n, groups, x.stride(0), rank, padded, nonlinearity, out.dtype, stride)
    if wscales.data_ptr() % 4 or wscales.numel() % 2:  # they are read in twos
        wscales = F.pad(wscales.flatten(), (0, 1))
    if wzeros is not None and (wzeros.data_ptr() % 2 or wzeros.numel() % 2):
        wzeros = F.pad(wzeros.flatten(), (0, 1))
    branch, up = (out if half is None else half for half in (branch, up))
    launch(x, row_scale, qweight.view(torch.int32), wscales, wzeros, tables, branch, up, bias, out)


@planned
def _launch(
    config: dict, m: int, n: int, groups: int, stride: int, rank: int, padded: int, nonlinearity: str,
    dtype: torch.dtype, table_stride: int,
) -> Launch:  # fmt: skip
    bm, bn, warps, ahead = (config[name] for name in ("BM", "BN", "num_warps", "AHEAD"))
    return Launch(
        _short_kernel, (cdiv(n, bn), cdiv(m, bm)), M=m, N=n, stride_m=stride, magic=MAGIC[dtype], GROUPS=groups,
        RANK=rank, R=padded, BM=bm, BN=bn, WARPS=warps, EVEN=n % bn == 0 and groups % (2 * warps * ahead) == 0,
        AHEAD=ahead, NONLINEARITY=nonlinearity, STRIDE=table_stride,
        PACKED=packed(config, _short_kernel),
        num_warps=warps, maxnreg=config.get("maxnreg"),
    )  # fmt: skip
