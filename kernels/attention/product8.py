"""Attention on 8-bit codes in Triton; the formula is reference8.py's. For GPUs that multiply e4m3 (from 8.9 on).

    x[m, n] = a[m] b[n] sum_j qc[m, j] kc[n, j]
    p[m, n] = 2^(x[m, n] + log2 c[n] - peak_m + TOP),    l_m = sum_n p[m, n] / c[n]
    y[m, j] = sum_n e4m3(p[m, n]) vc[n, j] / l_m + mean[j]

Keys are loaded in the order in which values lie (formats/attention8.py). Each block's part of y is summed by itself
and then added in float32: in e4m3 a tensor core keeps few bits of a long sum. On Hopper product8_hopper.py is faster.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..formats.attention8 import BLOCK, Codes8
from ..runtime.integers import cdiv
from ..runtime.launch import Launch, planned
from .reference8 import TOP


@triton.jit
def _attention8_kernel(
    q_ptr, qs_ptr, k_ptr, ks_ptr, v_ptr, vl_ptr, vm_ptr, y_ptr, M, L, H, q_blocks, k_blocks, TOP: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head."""
    first, head = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    j = tl.arange(0, W)
    m = first + tl.arange(0, BM)
    place = head * q_blocks * BN + m
    q = tl.load(q_ptr + place[:, None] * W + j[None, :])
    q_scale = tl.load(qs_ptr + place)
    p_place = tl.arange(0, BN)
    n = (p_place & -16) + (p_place & 1) + ((p_place >> 1) & 1) * 8 + ((p_place >> 2) & 3) * 2
    k_ptrs = k_ptr + (head * k_blocks * BN + n)[None, :] * W + j[:, None]
    v_ptrs = v_ptr + (head * W + j)[None, :] * (k_blocks * BN) + p_place[:, None]
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    y = tl.zeros((BM, W), tl.float32)
    for i in range(k_blocks):
        block = k_blocks - 1 - i
        if q.dtype == tl.int8:
            x = tl.dot(q, tl.load(k_ptrs + block * BN * W), out_dtype=tl.int32).to(tl.float32)
        else:
            x = tl.dot(q, tl.load(k_ptrs + block * BN * W), out_dtype=tl.float32)
        v_log = tl.load(vl_ptr + head * k_blocks + block)
        x = x * (q_scale * tl.load(ks_ptr + head * k_blocks + block))[:, None] + v_log
        x = tl.where((block * BN + n < L)[None, :], x, float("-inf"))
        above = tl.maximum(peak, tl.max(x, 1))
        p = tl.exp2(x - above[:, None] + TOP)
        correction = tl.exp2(peak - above)
        total = total * correction + tl.sum(p, 1) * tl.exp2(-v_log)
        part = tl.dot(p.to(v_ptr.dtype.element_ty), tl.load(v_ptrs + block * BN), out_dtype=tl.float32)
        y = y * correction[:, None] + part
        peak = above
    y = y / total[:, None] + tl.load(vm_ptr + head * W + j)[None, :]
    y_ptrs = y_ptr + ((head // H * M + m) * H + head % H)[:, None] * D + j[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (j < D)[None, :])


def attention(codes: Codes8, y: Tensor, tokens: int, config: dict | None = None) -> None:
    """Write y [B, M, H, d], of 16 bits or float32. config: BM, num_warps, num_stages."""
    batch, rows, heads, width = y.shape
    blocks = codes.q.shape[2] // BLOCK, codes.k.shape[2] // BLOCK, codes.q.shape[3]
    _plan(config or {}, batch, heads, rows, tokens, width, *blocks)(*codes, y)


@planned
def _plan(
    config: dict, batch: int, heads: int, rows: int, tokens: int, width: int, q_blocks: int, k_blocks: int,
    channels: int,
) -> Launch:  # fmt: skip
    config = {"BM": 128 if channels <= 128 else 64, "num_warps": 8, "num_stages": 3} | config
    return Launch(
        _attention8_kernel, (cdiv(rows, config["BM"]), batch * heads), M=rows, L=tokens, H=heads, q_blocks=q_blocks,
        k_blocks=k_blocks, TOP=TOP, D=width, W=channels, BN=BLOCK, **config,
    )  # fmt: skip
