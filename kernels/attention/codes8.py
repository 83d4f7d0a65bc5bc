"""Codes of 8 bits for attention, in Triton: a look at some keys and values, and one pass over all that is multiplied.

    means    mean_k[j], mean_v[j] over SAMPLES tokens, from sums over SOME of them each
    queries  a[m] = max_j |q[m, j]| / top * scale * log2(e),          codes of q[m, j] / (max / top)
    keys     b = max |k - mean_k| / top over the BLOCK tokens of one block, codes of (k[n, j] - mean_k[j]) / b
    values   c = max |v - mean_v| / 448 over the BLOCK tokens of one block, e4m3 of (v[n, j] - mean_v[j]) / c

Format and order of the codes: formats/attention8.py. Nothing is summed by atomics: the same tensors give the same
codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.attention8 import BLOCK, FLOOR, LOG2E, SAMPLES, Codes8, empty_codes, sizes, top
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch, planned
from ..runtime.rounding import ROUND

SOME = 64


@triton.jit
def _tile(x_ptr, n, row, end, j, D: tl.constexpr):
    mask = (n < end)[:, None] & (j < D)[None, :]
    return tl.load(x_ptr + n.to(tl.int64)[:, None] * row + j[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["L", "count", "chunks"])
def _means_kernel(
    k_ptr, v_ptr, parts_ptr, k_batch, k_head, k_row, v_batch, v_head, v_row, L, H, count, chunks,
    D: tl.constexpr, W: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """parts [B H, 2, chunks, d]: sums of k and of v over SOME of the `count` tokens that are looked at."""
    chunk, head, what = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    j, i = tl.arange(0, W), (chunk * SOME + tl.arange(0, SOME)).to(tl.int64)
    n = (i * L + (i * 40503 & 1023) * L // 1024) // count
    n = tl.where(i < count, n, L)
    if what == 0:
        x = _tile(k_ptr + head // H * k_batch + head % H * k_head, n, k_row, L, j, D)
    else:
        x = _tile(v_ptr + head // H * v_batch + head % H * v_head, n, v_row, L, j, D)
    tl.store(parts_ptr + ((head * 2 + what) * chunks + chunk) * D + j, tl.sum(x.to(tl.float32), 0), mask=j < D)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x, but for rounding within the codes' range, -> codes; NaN stays what it is in e4m3."""
    if dtype == tl.int8:
        return ((tl.clamp(x, -127.0, 127.0) + ROUND) - ROUND).to(tl.int8)
    else:
        return tl.where(x == x, tl.clamp(x, -448.0, 448.0), x).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["M", "L", "chunks", "q_blocks", "k_blocks"])
def _codes_kernel(
    q_ptr, k_ptr, v_ptr, parts_ptr, qc_ptr, qs_ptr, kc_ptr, ks_ptr, vc_ptr, vl_ptr, vm_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, M, L, H, chunks, q_blocks, k_blocks,
    q_factor, inverse_top, inverse_count, D: tl.constexpr, W: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """One program: a block of BLOCK values, keys or queries of a head. W: of a head in the codes, zeros from D on."""
    block, head, what = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    j, i = tl.arange(0, W), tl.arange(0, CHUNKS)
    place = tl.arange(0, BLOCK)
    n = block * BLOCK + place
    codes: tl.constexpr = qc_ptr.dtype.element_ty
    if what == 2:
        if block < q_blocks:
            q = _tile(q_ptr + head // H * q_batch + head % H * q_head, n, q_row, M, j, D).to(tl.float32)
            most = tl.max(tl.abs(q), 1) + tl.sum(q * 0.0, 1)  # NaN, or infinity, in a row is NaN in its scale
            scale = most * inverse_top
            q *= (1.0 / tl.where(scale == 0.0, 1.0, scale))[:, None]
            to = head * q_blocks * BLOCK + n
            tl.store(qc_ptr + to[:, None] * W + j[None, :], _rounded(q, codes))
            tl.store(qs_ptr + to, scale * q_factor)
    elif block < k_blocks:
        parts = parts_ptr + ((head * 2 + 1 - what) * chunks + i)[:, None] * D + j[None, :]
        there = (i < chunks)[:, None] & (j < D)[None, :]
        if what == 1:
            raw = _tile(k_ptr + head // H * k_batch + head % H * k_head, n, k_row, L, j, D)
            mean = tl.sum(tl.load(parts, mask=there, other=0.0), 0) * inverse_count
            k = tl.where((n < L)[:, None], raw.to(tl.float32) - mean[None, :], 0.0)
            k_scale = tl.max(tl.max(tl.abs(k), 1), 0) * inverse_top + tl.sum(tl.sum(k * 0.0, 1), 0)
            k *= 1.0 / tl.where(k_scale == 0.0, 1.0, k_scale)
            to = head * k_blocks * BLOCK + n
            tl.store(kc_ptr + to[:, None] * W + j[None, :], _rounded(k, codes))
            tl.store(ks_ptr + head * k_blocks + block, k_scale)
        else:  # bits 3 2 1 0 of a place are bits 2 1 3 0 of the token there
            n = block * BLOCK + (place & -16) + (place & 1) + ((place >> 1) & 1) * 8 + ((place >> 2) & 3) * 2
            raw_v = _tile(v_ptr + head // H * v_batch + head % H * v_head, n, v_row, L, j, D)
            mean_v = tl.sum(tl.load(parts, mask=there, other=0.0), 0) * inverse_count
            v = tl.where((n < L)[:, None], raw_v.to(tl.float32) - mean_v[None, :], 0.0)
            finite = tl.abs(v) < float("inf")
            most_v = tl.max(tl.max(tl.where(finite, tl.abs(v), 0.0), 1), 0)
            v_scale = tl.maximum(most_v * (1.0 / 448.0), FLOOR)
            v = tl.where(finite, v * (1.0 / v_scale), float("nan"))
            to_v = vc_ptr + (head * W + j)[:, None] * (k_blocks * BLOCK) + (block * BLOCK + place)[None, :]
            tl.store(to_v, tl.trans(_rounded(v, vc_ptr.dtype.element_ty)))
            tl.store(vl_ptr + head * k_blocks + block, tl.log2(v_scale))
            if block == 0:
                tl.store(vm_ptr + head * W + j, mean_v)


def quantize8(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype, config: dict | None = None
) -> Codes8:
    """As formats.attention8.quantize8. q [B, H, M, d], k and v [B, H, L, d], of any strides but 1 for the last."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, rows, width = q.shape
    tokens = k.shape[2]
    codes = empty_codes(q, tokens, dtype)
    parts = q.new_empty(batch * heads, 2, cdiv(min(tokens, SAMPLES), SOME), width, dtype=torch.float32)
    strides = tuple(x.stride()[:3] for x in (q, k, v))
    means, write = _plan(config or {}, batch, heads, rows, tokens, width, strides, scale, dtype)
    means(k, v, parts)
    write(q, k, v, parts, *codes)
    return codes


@planned
def _plan(
    config: dict, batch: int, heads: int, rows: int, tokens: int, width: int, strides: tuple, scale: float,
    dtype: torch.dtype,
) -> tuple[Launch, Launch]:  # fmt: skip
    count, (q_blocks, k_blocks, channels) = min(tokens, SAMPLES), sizes(rows, tokens, width)
    chunks = cdiv(count, SOME)
    names = [f"{which}_{what}" for which in "qkv" for what in ("batch", "head", "row")]
    steps = dict(zip(names, (step for of in strides for step in of), strict=True))
    common = dict(L=tokens, H=heads, chunks=chunks, D=width, W=channels)
    means = Launch(
        _means_kernel, (chunks, batch * heads, 2), **{name: steps[name] for name in names[3:]}, **common, count=count,
        SOME=SOME, num_warps=4,
    )  # fmt: skip
    write = Launch(
        _codes_kernel, (max(q_blocks, k_blocks), batch * heads, 3), **steps, **common, M=rows, q_blocks=q_blocks,
        k_blocks=k_blocks, q_factor=scale * LOG2E, inverse_top=1 / top(dtype), inverse_count=1 / count,
        CHUNKS=next_power_of_2(chunks), BLOCK=BLOCK, FLOOR=FLOOR, num_warps=config.get("warps", 8),
        maxnreg=config.get("maxnreg"),
    )  # fmt: skip
    return means, write
