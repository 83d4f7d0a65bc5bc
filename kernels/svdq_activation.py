"""The activation kernel of SVDQuant in Triton: smooth, quantize and multiply by the branch's first half at once.

    v = (x + c) / s
    token    scale[m] = max_k |v[m, k]| / 448 (e4m3) or / 127 (int8),       q = round(v / scale)
    group    scale[g, m] = max |v| / 7 over 64 inputs, or max v / 15 where c > 0,   q = round(v / scale)
    branch[m, j] = sum_k x[m, k] D[j, k]

Divisions are products with reciprocals taken once per column and row, so that a value within 2^-22 of a tie may get
the other neighbour than in `svdq.round_activation`. Nothing that is not finite has a code: its scale is NaN.

Floor in bytes: x once, the codes once. D is read again by every block of BM rows: r / BM times the size of x, from
L2. A scale per token is known only at the row's end: then the row is read backwards, newest bytes of L2 first
(KEEP 0), or kept in registers in KEEP chunks of BK. Codes stay one byte each, even of 4 bits: they are operands of
8-bit tensor cores, and packing would cost the product its unpacking in every tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 64
SETTINGS = ("BM", "BK", "KEEP", "STAGES", "num_warps")
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |v| < 2^22 to nearest even
INFINITY = tl.constexpr(0x7F800000)  # as bits; |v| as bits orders finite < infinity < NaN


@triton.jit
def to_codes(v, dtype: tl.constexpr):
    """v float32 -> the nearest e4m3, or the nearest whole number as int8 (the low byte of a float of 2^23's ulp)."""
    if dtype == tl.int8:
        return (v + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    return v.to(dtype)


@triton.jit
def _rounded(v, dtype: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """v in units of the scale -> codes; those of 4 bits are whole numbers in e4m3 too."""
    if HIGH < 16:
        v = tl.minimum(tl.maximum(v, LOW), HIGH) + ROUND - ROUND
    return to_codes(v, dtype)


@triton.jit
def _scale(bits, HIGH: tl.constexpr):
    """The bits of a maximum of |v| -> its scale: 1 for zeros, NaN for what is not finite."""
    scale = bits.to(tl.float32, bitcast=True) / HIGH
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    return tl.where(bits >= INFINITY, float("nan"), scale)


@triton.jit
def _magnitude(v, UNSIGNED: tl.constexpr):
    if UNSIGNED:
        v = tl.where(v < 0, 0.0, v)
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _smoothed(x, smooth_ptr, k, K, shift, SHIFTED: tl.constexpr, SMOOTHED: tl.constexpr):
    v = x.to(tl.float32)
    if SHIFTED:
        v += shift
    if SMOOTHED:
        v = v * (1.0 / tl.load(smooth_ptr + k, mask=k < K, other=1.0).to(tl.float32))[None, :]
    return v


@triton.jit
def _times_down(x, down_ptr, branch, k, K, RANK: tl.constexpr, R: tl.constexpr):
    if R > 0:
        ranks = tl.arange(0, R)
        there = (ranks < RANK)[:, None] & (k < K)[None, :]
        down = tl.load(down_ptr + ranks[:, None] * K + k[None, :], mask=there, other=0.0)
        branch = tl.dot(x, down.to(x.dtype).T, branch)
    return branch


@triton.jit
def activation_rows(
    block, x_ptr, smooth_ptr, down_ptr, codes_ptr, scales_ptr, branch_ptr, shift, M, K, stride_m,
    RANK: tl.constexpr, R: tl.constexpr, GROUPED: tl.constexpr, SHIFTED: tl.constexpr, SMOOTHED: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, KEEP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows block * BM .. + BM. R: the rank padded for the tensor cores, 0 without a branch."""
    m = block * BM + tl.arange(0, BM)
    columns = tl.max_contiguous(tl.arange(0, BK), 8)  # 16 bytes of x a thread; 16 codes would take every other 16
    inside = (m < M)[:, None]
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_m
    code_rows = codes_ptr + m.to(tl.int64)[:, None] * K
    branch = tl.zeros((BM, R if R > 0 else 16), tl.float32)
    code_type: tl.constexpr = codes_ptr.dtype.element_ty
    if GROUPED:
        for first in tl.range(0, K, BK, num_stages=STAGES):
            k = first + columns
            mask = inside & (k < K)[None, :]
            x = tl.load(x_rows + k[None, :], mask=mask, other=0.0)
            branch = _times_down(x, down_ptr, branch, k, K, RANK, R)
            v = tl.reshape(_smoothed(x, smooth_ptr, k, K, shift, SHIFTED, SMOOTHED), (BM, BK // 64, 64))
            scale = _scale(tl.max(_magnitude(v, SHIFTED), 2), HIGH)
            codes = _rounded(v * (1.0 / scale)[:, :, None], code_type, LOW, HIGH)
            tl.store(code_rows + k[None, :], tl.reshape(codes, (BM, BK)), mask=mask)
            g = first // 64 + tl.arange(0, BK // 64)
            tl.store(scales_ptr + g[None, :] * M + m[:, None], scale, mask=inside & (g * 64 < K)[None, :])
    else:
        peak = tl.zeros((BM, BK), tl.int32)
        kept = ()
        if KEEP > 0:
            for i in tl.static_range(KEEP):
                k = i * BK + columns
                kept = kept + (tl.load(x_rows + k[None, :], mask=inside & (k < K)[None, :], other=0.0),)
            for i in tl.static_range(KEEP):
                k = i * BK + columns
                branch = _times_down(kept[i], down_ptr, branch, k, K, RANK, R)
                v = _smoothed(kept[i], smooth_ptr, k, K, shift, SHIFTED, SMOOTHED)
                peak = tl.maximum(peak, tl.where((k < K)[None, :], _magnitude(v, False), 0))
        else:
            for first in tl.range(0, K, BK, num_stages=STAGES):
                k = first + columns
                x = tl.load(x_rows + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
                branch = _times_down(x, down_ptr, branch, k, K, RANK, R)
                v = _smoothed(x, smooth_ptr, k, K, shift, SHIFTED, SMOOTHED)
                peak = tl.maximum(peak, tl.where((k < K)[None, :], _magnitude(v, False), 0))
        scale = _scale(tl.max(peak, 1), HIGH)
        tl.store(scales_ptr + m, scale, mask=m < M)
        inverse = (1.0 / scale)[:, None]
        if KEEP > 0:
            for i in tl.static_range(KEEP):
                k = i * BK + columns
                v = _smoothed(kept[i], smooth_ptr, k, K, shift, SHIFTED, SMOOTHED) * inverse
                tl.store(code_rows + k[None, :], _rounded(v, code_type, LOW, HIGH), mask=inside & (k < K)[None, :])
        else:
            last = (K - 1) // BK * BK
            for first in tl.range(0, K, BK, num_stages=STAGES):
                k = last - first + columns
                mask = inside & (k < K)[None, :]
                x = tl.load(x_rows + k[None, :], mask=mask, other=0.0)
                v = _smoothed(x, smooth_ptr, k, K, shift, SHIFTED, SMOOTHED) * inverse
                tl.store(code_rows + k[None, :], _rounded(v, code_type, LOW, HIGH), mask=mask)
    if R > 0:
        where = branch_ptr + m[:, None] * R + tl.arange(0, R)[None, :]
        tl.store(where, branch.to(branch_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation_kernel(
    x_ptr, smooth_ptr, down_ptr, codes_ptr, scales_ptr, branch_ptr, shift, M, K, stride_m,
    RANK: tl.constexpr, R: tl.constexpr, GROUPED: tl.constexpr, SHIFTED: tl.constexpr, SMOOTHED: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, KEEP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    activation_rows(
        tl.program_id(0), x_ptr, smooth_ptr, down_ptr, codes_ptr, scales_ptr, branch_ptr, shift, M, K, stride_m,
        RANK, R, GROUPED, SHIFTED, SMOOTHED, LOW, HIGH, BM, BK, KEEP, STAGES,
    )  # fmt: skip


def padded_rank(rank: int) -> int:
    """Ranks come in 16, 32, 64, ...: what a tensor core's step takes. 0 stays 0."""
    return max(16, triton.next_power_of_2(rank)) if rank else 0


def limits(mode: str, shifted: bool) -> dict:
    """The first and last code of "fp8", "int8" or "int4", as the kernel takes them."""
    low, high = {"fp8": (-448.0, 448.0), "int8": (-127.0, 127.0), "int4": (-7.0, 7.0)}[mode]
    return dict(LOW=0.0, HIGH=15.0) if mode == "int4" and shifted else dict(LOW=low, HIGH=high)


def empty_activation(x: Tensor, mode: str, rank: int, code_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Room for (codes [M, K], scales float32 [M] or [K/64, M], branch [M, padded rank] of x's dtype)."""
    m, k = x.shape
    scales = (k // GROUP, m) if mode == "int4" else (m,)
    return (
        x.new_empty(m, k, dtype=code_dtype),
        x.new_empty(scales, dtype=torch.float32),
        x.new_empty(m, padded_rank(rank)),
    )


def quantize_activation(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, mode: str, shift: float, out: tuple, config: dict
) -> None:
    """Fill `out`, made by `empty_activation`, from x [M, K] (bf16 or fp16, columns contiguous), M > 0.

    smooth [K] divisors, down [r, K]; mode "fp8", "int8" or "int4"; config has SETTINGS.
    """
    (m, k), (codes, scales, branch) = x.shape, out
    rank = 0 if down is None else len(down)
    _activation_kernel[(triton.cdiv(m, config["BM"]),)](
        x, x if smooth is None else smooth, x if down is None else down,
        codes, scales, branch, shift, m, k, x.stride(0),
        RANK=rank, R=padded_rank(rank), GROUPED=mode == "int4", SHIFTED=shift != 0, SMOOTHED=smooth is not None,
        **limits(mode, shift != 0), **{name: config[name] for name in SETTINGS},
    )  # fmt: skip
