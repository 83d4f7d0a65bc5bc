"""Codes of 8 bits for attention, in Triton: two passes over keys and values, one over queries.

    means    mean_k[j], mean_v[j], min_v[j], max_v[j] over the tokens, from sums over CHUNK tokens each
    queries  a[m] = max_j |q[m, j]| / top * scale * log2(e),          codes of q[m, j] / (max / top)
    keys     b = max |k - mean_k| / top over the BLOCK tokens of one block, codes of (k[n, j] - mean_k[j]) / b
    values   c[j] = max_n |v[n, j] - mean_v[j]| / 448,                e4m3 of (v[n, j] - mean_v[j]) / c[j]

top is 127 for int8, 448 for e4m3. Codes of queries and keys are [B, H, tokens, d], those of values [B, H, d, tokens],
as the products read them; tokens are filled up to whole blocks with zeros. Within 16, values are in the order of
ORDER: the products make P so, without a move between threads (product8_hopper.py). Nothing is summed by atomics: the
same tensors give the same codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.attention8 import BLOCK, LOG2E, Codes8, empty_codes, sizes, top
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch, planned
from ..runtime.rounding import ROUND

CHUNK, CHUNKS = 256, 16  # tokens of a partial sum, at least; partial sums, at most


@triton.jit
def _tile(x_ptr, n, row, end, j, D: tl.constexpr):
    mask = (n < end)[:, None] & (j < D)[None, :]
    return tl.load(x_ptr + n.to(tl.int64)[:, None] * row + j[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["L", "chunks"])
def _means_kernel(
    k_ptr, v_ptr, parts_ptr, k_batch, k_head, k_row, v_batch, v_head, v_row, L, H, chunks,
    D: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """parts [B H, chunks, 4, d]: sums of k; sums, least and largest values of v, over CHUNK tokens."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j, n = tl.arange(0, W), chunk * CHUNK + tl.arange(0, STEP)
    end = tl.minimum(L, (chunk + 1) * CHUNK)
    out = parts_ptr + (head * chunks + chunk) * 4 * D + j
    sums = tl.zeros((STEP, W), tl.float32)
    if tl.program_id(2) == 0:
        k_ptr += head // H * k_batch + head % H * k_head
        ahead = _tile(k_ptr, n, k_row, end, j, D)
        for first in range(STEP, CHUNK + STEP, STEP):
            now = ahead
            ahead = _tile(k_ptr, n + first, k_row, end, j, D)  # under way while this one is summed
            sums += now.to(tl.float32)
        tl.store(out, tl.sum(sums, 0), mask=j < D)
    else:
        v_ptr += head // H * v_batch + head % H * v_head
        least, largest = sums + float("inf"), sums - float("inf")
        ahead_v = _tile(v_ptr, n, v_row, end, j, D)
        for first in range(0, CHUNK, STEP):
            now_v = ahead_v.to(tl.float32)
            ahead_v = _tile(v_ptr, n + first + STEP, v_row, end, j, D)
            there = (n + first < end)[:, None]
            sums += now_v
            least = tl.minimum(least, tl.where(there, now_v, float("inf")))
            largest = tl.maximum(largest, tl.where(there, now_v, float("-inf")))
        tl.store(out + D, tl.sum(sums, 0), mask=j < D)
        tl.store(out + 2 * D, tl.min(least, 0), mask=j < D)
        tl.store(out + 3 * D, tl.max(largest, 0), mask=j < D)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x within the codes' range -> codes."""
    if dtype == tl.int8:
        return ((tl.clamp(x, -127.0, 127.0) + ROUND) - ROUND).to(tl.int8)
    else:
        return tl.clamp(x, -448.0, 448.0).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["M", "L", "chunks", "q_blocks", "k_blocks"])
def _codes_kernel(
    q_ptr, k_ptr, v_ptr, parts_ptr, qc_ptr, qs_ptr, kc_ptr, ks_ptr, vc_ptr, vs_ptr, vm_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, M, L, H, chunks, q_blocks, k_blocks,
    q_factor, inverse_top, inverse_tokens, D: tl.constexpr, W: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a block of BLOCK values, keys or queries of a head. W: of a head in the codes, zeros from D on.

    Values come first, then keys: they were read last by what found their means, and may be near still.
    """
    block, head, what = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    j, i = tl.arange(0, W), tl.arange(0, CHUNKS)
    place = tl.arange(0, BLOCK)
    n = block * BLOCK + place
    parts = parts_ptr + (head * chunks + i)[:, None] * 4 * D + j[None, :]
    there = (i < chunks)[:, None] & (j < D)[None, :]
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
        if what == 1:
            raw = _tile(k_ptr + head // H * k_batch + head % H * k_head, n, k_row, L, j, D)
            mean = tl.sum(tl.load(parts, mask=there, other=0.0), 0) * inverse_tokens
            k = tl.where((n < L)[:, None], raw.to(tl.float32) - mean[None, :], 0.0)
            block_scale = tl.max(tl.max(tl.abs(k), 1), 0) * inverse_top + tl.sum(mean * 0.0, 0)
            k *= 1.0 / tl.where(block_scale == 0.0, 1.0, block_scale)
            to = head * k_blocks * BLOCK + n
            tl.store(kc_ptr + to[:, None] * W + j[None, :], _rounded(k, codes))
            tl.store(ks_ptr + head * k_blocks + block, block_scale)
        else:  # bits 3 2 1 0 of a place are bits 2 1 3 0 of the token there
            n = block * BLOCK + (place & -16) + (place & 1) + ((place >> 1) & 1) * 8 + ((place >> 2) & 3) * 2
            raw_v = _tile(v_ptr + head // H * v_batch + head % H * v_head, n, v_row, L, j, D)
            mean_v = tl.sum(tl.load(parts + D, mask=there, other=0.0), 0) * inverse_tokens
            least = tl.min(tl.load(parts + 2 * D, mask=there, other=float("inf")), 0)
            largest = tl.max(tl.load(parts + 3 * D, mask=there, other=float("-inf")), 0)
            channel_scale = tl.where(j < D, tl.maximum(largest - mean_v, mean_v - least) * (1.0 / 448.0), 0.0)
            steps = 1.0 / tl.where(channel_scale == 0.0, 1.0, channel_scale)
            v = tl.where((n < L)[:, None], raw_v.to(tl.float32) - mean_v[None, :], 0.0) * steps[None, :]
            to_v = vc_ptr + (head * W + j)[:, None] * (k_blocks * BLOCK) + (block * BLOCK + place)[None, :]
            tl.store(to_v, tl.trans(_rounded(v, vc_ptr.dtype.element_ty)))
            if block == 0:
                tl.store(vs_ptr + head * W + j, channel_scale)
                tl.store(vm_ptr + head * W + j, mean_v)


def quantize8(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype, config: dict | None = None
) -> Codes8:
    """As formats.attention8.quantize8. q [B, H, M, d], k and v [B, H, L, d], of any strides but 1 for the last."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, rows, width = q.shape
    tokens = k.shape[2]
    codes = empty_codes(q, tokens, dtype)
    parts = q.new_empty(batch * heads, cdiv(tokens, _chunk(tokens)), 4, width, dtype=torch.float32)
    strides = tuple(x.stride()[:3] for x in (q, k, v))
    means, write = _plan(config or {}, batch, heads, rows, tokens, width, strides, scale, dtype)
    means(k, v, parts)
    write(q, k, v, parts, *codes)
    return codes


def _chunk(tokens: int) -> int:
    return max(CHUNK, next_power_of_2(cdiv(tokens, CHUNKS)))


@planned
def _plan(
    config: dict, batch: int, heads: int, rows: int, tokens: int, width: int, strides: tuple, scale: float,
    dtype: torch.dtype,
) -> tuple[Launch, Launch]:  # fmt: skip
    chunks, (q_blocks, k_blocks, channels) = cdiv(tokens, _chunk(tokens)), sizes(rows, tokens, width)
    names = [f"{which}_{what}" for which in "qkv" for what in ("batch", "head", "row")]
    steps = dict(zip(names, (step for of in strides for step in of), strict=True))
    common = dict(L=tokens, H=heads, chunks=chunks, D=width, W=channels)
    means = Launch(
        _means_kernel, (chunks, batch * heads, 2), **{name: steps[name] for name in names[3:]}, **common,
        CHUNK=_chunk(tokens), STEP=config.get("step", 32), num_warps=config.get("means_warps", 4),
    )  # fmt: skip
    write = Launch(
        _codes_kernel, (max(q_blocks, k_blocks), batch * heads, 3), **steps, **common, M=rows, q_blocks=q_blocks,
        k_blocks=k_blocks, q_factor=scale * LOG2E, inverse_top=1 / top(dtype), inverse_tokens=1 / tokens,
        CHUNKS=next_power_of_2(chunks), BLOCK=BLOCK, num_warps=config.get("warps", 8),
        maxnreg=config.get("maxnreg"),
    )  # fmt: skip
    return means, write
