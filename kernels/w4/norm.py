"""Steps that the activation kernel takes over from layers before it: a second tensor, a gate, a norm.

    x = (x | more)                                     the columns of `more` follow those of x
    x = x f(more)                                      or more is a gate (GEGLU, SwiGLU: arXiv:2002.05202)
    v = (x - mean) rstd g[b] + shift[b]                mean and rstd = 1 / sqrt(variance + eps) of a row of sample b
    v D^T = rstd (x D'^T - mean sum_k D'[:, k]) + shift[b] D^T,    D'[j, k] = g[b, k] D[j, k]

    "adaptive"  g = 1 + scale: adaLN-Zero of DiT (arXiv:2212.09748, section 3.2), in FLUX's order
    "layer"     g = scale: LayerNorm with weight and bias, and any modulation of them
    "rms"       g = scale, mean = 0: RMSNorm (arXiv:1910.07467)

f(more) and x f(more) are rounded to x's type, as two operations of a model round them. The rest is in float32 from
end to end: neither the norm's output nor v is rounded, as kernels of their own would round them. The tensor cores
take 16 bits, x as it is and D' rounded to them; the sum over D' is of what they took, so that a mean far from zero
cancels. Thus x streams through once, for the statistics too. A block of rows belongs to one sample.

`norm` is (scale, shift, strides of their samples, rows of a sample, eps); without a shift any pointer stands in its
place. What the code depends on goes beside it: Triton 3.6 takes constants and None of a tuple for values of the run.
ONE: 1 is added to scale; CENTRED: a mean is taken off; OFFSET: there is a shift.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products.nonlinearity import nonlinear


@triton.jit
def rows_of(block, M, norm, BLOCK: tl.constexpr):
    """(rows of a block, which of them there are, their sample). A block ends where a sample does."""
    if norm is None:
        m = block * BLOCK + tl.arange(0, BLOCK)
        return m, m < M, 0
    else:
        blocks = tl.cdiv(norm[4], BLOCK)
        row = block % blocks * BLOCK + tl.arange(0, BLOCK)
        return block // blocks * norm[4] + row, row < norm[4], block // blocks


@triton.jit
def blocks_of(M, norm, BLOCK: tl.constexpr):
    if norm is None:
        return tl.cdiv(M, BLOCK)
    else:
        return M // norm[4] * tl.cdiv(norm[4], BLOCK)


@triton.jit
def starts_of(x_ptr, stride_m, more, m):
    """Offsets at which rows m begin: (in x, in `more`)."""
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_m
    if more is None:
        return x_rows, x_rows
    else:
        return x_rows, more[0] + m.to(tl.int64)[:, None] * more[2]


@triton.jit
def columns_of(x_rows, more_rows, more, k):
    """Offsets of columns k of (x | more); x has more[1] of them."""
    if more is None:
        return x_rows + k[None, :]
    else:
        return tl.where((k < more[1])[None, :], x_rows + k[None, :], more_rows + (k - more[1])[None, :])


@triton.jit
def values_of(x_rows, more_rows, more, k, mask, GATE: tl.constexpr):
    """The input's columns k, 0 where there are none."""
    if GATE == "":
        return tl.load(columns_of(x_rows, more_rows, more, k), mask=mask, other=0.0)
    else:
        x = tl.load(x_rows + k[None, :], mask=mask, other=0.0)
        gate = tl.load(more_rows + k[None, :], mask=mask, other=0.0)
        gate = nonlinear(gate.to(tl.float32), GATE).to(x.dtype)
        return (x.to(tl.float32) * gate.to(tl.float32)).to(x.dtype)


@triton.jit
def modulation(norm, sample, k, K, like, OFFSET: tl.constexpr):
    """(scale, shift) of columns k in the shape of `like`; 0 beyond K."""
    mask = (k < K)[None, :]
    scale = tl.load(tl.broadcast_to(norm[0] + sample * norm[2] + k[None, :], like.shape), mask=mask, other=0.0)
    if OFFSET:
        where = tl.broadcast_to(norm[1] + sample * norm[3] + k[None, :], like.shape)
        return scale, tl.load(where, mask=mask, other=0.0)
    else:
        return scale, scale


@triton.jit
def normed(
    x, mean, rstd, inverse_ptr, c, norm, sample, k, K,
    SHIFTED: tl.constexpr, SMOOTHED: tl.constexpr, ONE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """(v + c) / s; without a c, 0 beyond K. What belongs to columns is made once for all rows."""
    mask = (k < K)[None, :]
    gain = tl.load(norm[0] + sample * norm[2] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    if ONE:
        gain = tl.where(mask, 1.0 + gain, 0.0)
    offset = tl.zeros(gain.shape, tl.float32)
    if OFFSET:
        offset = tl.load(norm[1] + sample * norm[3] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    if SHIFTED:
        offset += c
    if SMOOTHED:
        inverse = tl.load(inverse_ptr + k[None, :], mask=mask, other=1.0)
        gain *= inverse
        offset *= inverse
    return (x.to(tl.float32) - mean) * rstd * gain + offset


@triton.jit
def by_eight(d, first, K):
    """d [A, B] -> its sums over 8 columns, [A, B/8], of those before K: eight values lie in one thread."""
    EIGHTHS: tl.constexpr = d.shape[1] // 8
    sums = tl.sum(tl.reshape(d, (d.shape[0], EIGHTHS, 8)), 2)
    return tl.where((first + 8 * tl.arange(0, EIGHTHS) < K)[None, :], sums, 0.0)


@triton.jit
def row_statistics(rows, columns, K, eps, CENTRED: tl.constexpr):
    """(mean, rstd), [ROWS, 1], of whole rows held as a tuple of [ROWS, STEP]: two passes over registers."""
    STEP: tl.constexpr = rows[0].shape[1]
    total = tl.zeros(rows[0].shape, tl.float32)
    if CENTRED:
        for i in tl.static_range(len(rows)):
            total += rows[i].to(tl.float32)
    mean = (tl.sum(total, 1) / K)[:, None]
    squares = tl.zeros(rows[0].shape, tl.float32)
    for i in tl.static_range(len(rows)):
        d = rows[i].to(tl.float32) - mean
        if i == len(rows) - 1:
            d = tl.where((columns + i * STEP < K)[None, :], d, 0.0)
        squares += d * d
    return mean, tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]


@triton.jit
def normed_branch(
    block, x_ptr, down_ptr, M, K, stride_m, more, norm,
    RANK: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ONE: tl.constexpr, CENTRED: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """v D^T of a block of rows, float32 [BM, R].

    Sums are of differences from the first value of a row: none is further from the mean than sqrt(K - 1) standard
    deviations, whatever the mean is, so that the variance keeps its digits.
    """
    m, inside, sample = rows_of(block, M, norm, BM)
    ranks, columns = tl.arange(0, R), tl.arange(0, BK)
    x_rows, more_rows = starts_of(x_ptr, stride_m, more, m)
    down_rows = down_ptr + ranks[:, None] * K
    first = tl.zeros((BM, 1), tl.float32)
    if CENTRED:
        first = tl.load(x_rows, mask=inside[:, None], other=0.0).to(tl.float32)
    sums, squares = tl.zeros((BM, BK // 8), tl.float32), tl.zeros((BM, BK // 8), tl.float32)
    down_sums, offsets = tl.zeros((R, BK // 8), tl.float32), tl.zeros((R, BK // 8), tl.float32)
    product = tl.zeros((BM, R), tl.float32)
    like = tl.broadcast_to(down_rows, (R, BK))
    gain, offset = modulation(norm, sample, columns, K, like, OFFSET)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + columns
        # a step ahead, in registers: the pipeline's shared memory would cost the programs that quantize theirs
        next_gain, next_offset = modulation(norm, sample, k + BK, K, like, OFFSET)
        x = tl.load(columns_of(x_rows, more_rows, more, k), mask=inside[:, None] & (k < K)[None, :], other=0.0)
        down = tl.load(down_rows + k[None, :], mask=(ranks < RANK)[:, None] & (k < K)[None, :], other=0.0)
        down = down.to(tl.float32)
        scaled = down * gain.to(tl.float32)
        if ONE:
            scaled += down
        scaled = scaled.to(x.dtype)
        product = tl.dot(x, scaled.T, product)
        if OFFSET:
            offsets += by_eight(down * offset.to(tl.float32), start, K)
        d = x.to(tl.float32) - first
        if CENTRED:
            down_sums += by_eight(scaled.to(tl.float32), start, K)
            sums += by_eight(d, start, K)
        squares += by_eight(d * d, start, K)
        gain, offset = next_gain, next_offset
    away = (tl.sum(sums, 1) / K)[:, None]
    rstd = tl.rsqrt(tl.sum(squares, 1)[:, None] / K - away * away + norm[5])
    return rstd * (product - (first + away) * tl.sum(down_sums, 1)[None, :]) + tl.sum(offsets, 1)[None, :]
