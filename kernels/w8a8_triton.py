"""W8A8 Linear and Conv2d in Triton: one implicit-GEMM kernel on int8 tensor cores, and the kernel that quantizes.

    q_x = clamp(round(x / s) + z)
    y[m, n] = s_x[m] * s_w[n] * (sum_{ky, kx, c} q_x[pixel(m, ky, kx), c] q_w[n, ky, kx, c] - z sum q_w[n]) + b[n]

A row m is an output pixel (b, oy, ox); the window around it is read straight from NHWC codes, positions outside the
image as q_x = z, so that the correction by z is the same for every row. Linear is the case of a 1x1 window. Sums are
int32 and exact; scales and bias are applied in float32 in the epilogue, in one store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |v| < 2^22 to nearest even


@triton.jit
def _quantize_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, n_elements, per_scale, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """q = clamp(round(x / scale[i // per_scale]) + zero, LOW, HIGH) over a flat tensor."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n_elements
    x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + i // per_scale, mask=inside, other=1.0)
    v = x * (1.0 / scale)
    v = tl.minimum(tl.maximum(v, -1024.0), 1024.0)  # beyond any code; keeps the rounding trick in range
    code = (v + ROUND) - ROUND + tl.load(zero_ptr).to(tl.float32)
    code = tl.minimum(tl.maximum(code, LOW), HIGH)
    tl.store(q_ptr + i, code.to(tl.int8), mask=inside)


@triton.jit
def _conv_kernel(
    q_ptr, w_ptr, y_ptr, scale_ptr, zero_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr,
    M, N, C, H, W, OH, OW, per_scale,
    KW: tl.constexpr, TAPS: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    m = (pid // n_blocks).to(tl.int64) * BM + tl.arange(0, BM)
    n = (pid % n_blocks) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    ox = m % OW
    oy = (m // OW) % OH
    image = m // (OW * OH)
    zero = tl.load(zero_ptr)

    total = tl.zeros((BM, BN), dtype=tl.int32)
    for tap in range(TAPS):
        iy = oy * SH - PH + (tap // KW) * DH
        ix = ox * SW - PW + (tap % KW) * DW
        inside = (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W) & (m < M)
        pixel = ((image * H + iy) * W + ix) * C
        for c0 in range(0, C, BK):
            c = c0 + k
            q = tl.load(q_ptr + pixel[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0)
            q = tl.where(inside[:, None], q, zero.to(tl.int8))
            w = tl.load(
                w_ptr + n[None, :].to(tl.int64) * (TAPS * C) + tap * C + c[:, None],
                mask=(n < N)[None, :] & (c < C)[:, None],
                other=0,
            )
            total = tl.dot(q, w, total, out_dtype=tl.int32)

    weight_sum = tl.load(weight_sum_ptr + n, mask=n < N, other=0)
    total -= zero.to(tl.int32) * weight_sum[None, :]
    scale = tl.load(scale_ptr + m // per_scale, mask=m < M, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)
    y = total.to(tl.float32) * (scale[:, None] * weight_scale[None, :])
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    where = y_ptr + m[:, None] * N + n[None, :]
    tl.store(where, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """int8 codes of a dense tensor, in its own memory order.

    scale holds one value, or one for each equal consecutive part of the memory (a token, a sample).
    """
    codes = torch.empty_like(x, dtype=torch.int8)
    count, limit = x.numel(), 2 ** (bits - 1)
    grid = (triton.cdiv(count, 1024),)
    _quantize_kernel[grid](
        x, codes, scale, zero_point, count, count // scale.numel(), LOW=-limit, HIGH=limit - 1, BLOCK=1024
    )
    return codes


def conv2d(
    codes: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, weight_scale: Tensor,
    weight_sum: Tensor, bias: Tensor | None, out: Tensor, stride, padding, dilation,
) -> Tensor:  # fmt: skip
    """Fill out [B, OH, OW, N] (contiguous) from codes [B, H, W, C] and weight [N, kh, kw, C], both int8.

    scale: one float32, or one per equal run of rows (b, oy, ox); zero_point: one integer on the device, 0 where
    scales are per row.
    """
    batch, h, w, channels = codes.shape
    n, kh, kw, _ = weight.shape
    oh, ow = out.shape[1:3]
    rows = batch * oh * ow
    bm = 128 if rows >= 128 else 32
    bn = min(128, max(16, triton.next_power_of_2(n)))
    bk = min(128, max(32, triton.next_power_of_2(channels)))
    _conv_kernel[(triton.cdiv(rows, bm) * triton.cdiv(n, bn),)](
        codes, weight, out, scale, zero_point, weight_scale, weight_sum, bias if bias is not None else out,
        rows, n, channels, h, w, oh, ow, rows // scale.numel(),
        KW=kw, TAPS=kh * kw, SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[1],
        DH=dilation[0], DW=dilation[1], HAS_BIAS=bias is not None,
        BM=bm, BN=bn, BK=bk, num_warps=8 if bm * bn >= 128 * 128 else 4, num_stages=3,
    )  # fmt: skip
    return out
