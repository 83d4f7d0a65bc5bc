"""Codes of 8 bits for attention, in Triton: a look at some keys and values, and one pass over all that is multiplied.

    means    mean_k[j], mean_v[j] over SAMPLES tokens, from sums over SOME of them each
    queries  a[m] = max_j |q[m, j]| / top * scale * log2(e),          codes of q[m, j] / (max / top)
    keys     b = max |k - mean_k| / top over the BLOCK tokens of one block, codes of (k[n, j] - mean_k[j]) / b
    values   c = max |v - mean_v| / 448 over the BLOCK tokens of one block, e4m3 of (v[n, j] - mean_v[j]) / c

With a `Rotary` (rotary.py) queries and keys go through their norm and are turned by the places of their tokens
first, and those of a text, in tensors of its own, come before the image's; nothing normed or joined is in memory.

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
from .rotary import Rotary
from .turned8 import tokens_tile, turned

SOME = 64


@triton.jit(do_not_specialize=["L", "T", "count", "chunks", "eps"])
def _means_kernel(
    k_ptr, v_ptr, words_k_ptr, words_v_ptr, norm_ptr, words_norm_ptr, cos_ptr, sin_ptr, parts_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row, t_batch, t_head, t_row, L, T, H, count, chunks, eps,
    D: tl.constexpr, W: tl.constexpr, SOME: tl.constexpr, TURNED: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """parts [B H, 2, chunks, d]: sums of k and of v over SOME of the `count` tokens that are looked at."""
    chunk, head, what = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    j, i = tl.arange(0, W), (chunk * SOME + tl.arange(0, SOME)).to(tl.int64)
    n = (i * L + (i * 40503 & 1023) * L // 1024) // count
    n = tl.where(i < count, n, L)
    words = head // H * t_batch + head % H * t_head
    if what == 0:
        k = k_ptr + head // H * k_batch + head % H * k_head
        x = tokens_tile(k, words_k_ptr, words, n, k_row, t_row, T, L, j, D, JOINT).to(tl.float32)
        if TURNED:
            x = turned(x, n, norm_ptr, words_norm_ptr, cos_ptr, sin_ptr, T, L, j, eps, D, JOINT)
    else:
        v = v_ptr + head // H * v_batch + head % H * v_head
        x = tokens_tile(v, words_v_ptr, words, n, v_row, t_row, T, L, j, D, JOINT).to(tl.float32)
    tl.store(parts_ptr + ((head * 2 + what) * chunks + chunk) * D + j, tl.sum(x, 0), mask=j < D)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x, but for rounding within the codes' range, -> codes; NaN stays what it is in e4m3."""
    if dtype == tl.int8:
        return ((tl.clamp(x, -127.0, 127.0) + ROUND) - ROUND).to(tl.int8)
    else:
        return tl.where(x == x, tl.clamp(x, -448.0, 448.0), x).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["M", "L", "T", "chunks", "q_blocks", "k_blocks", "eps"])
def _codes_kernel(
    q_ptr, k_ptr, v_ptr, words_q_ptr, words_k_ptr, words_v_ptr, q_norm_ptr, k_norm_ptr, words_q_norm_ptr,
    words_k_norm_ptr, cos_ptr, sin_ptr, parts_ptr, qc_ptr, qs_ptr, kc_ptr, ks_ptr, vc_ptr, vl_ptr, vm_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, t_batch, t_head, t_row, M, L, T, H,
    chunks, q_blocks, k_blocks, q_factor, inverse_top, inverse_count, eps, D: tl.constexpr, W: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, FLOOR: tl.constexpr, TURNED: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """One program: a block of BLOCK values, keys or queries of a head. W: of a head in the codes, zeros from D on."""
    block, head, what = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    j, i = tl.arange(0, W), tl.arange(0, CHUNKS)
    place = tl.arange(0, BLOCK)
    n = block * BLOCK + place
    words = head // H * t_batch + head % H * t_head
    codes: tl.constexpr = qc_ptr.dtype.element_ty
    if what == 2:
        if block < q_blocks:
            q = q_ptr + head // H * q_batch + head % H * q_head
            q = tokens_tile(q, words_q_ptr, words, n, q_row, t_row, T, M, j, D, JOINT).to(tl.float32)
            if TURNED:
                q = turned(q, n, q_norm_ptr, words_q_norm_ptr, cos_ptr, sin_ptr, T, M, j, eps, D, JOINT)
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
            k = k_ptr + head // H * k_batch + head % H * k_head
            k = tokens_tile(k, words_k_ptr, words, n, k_row, t_row, T, L, j, D, JOINT).to(tl.float32)
            if TURNED:
                k = turned(k, n, k_norm_ptr, words_k_norm_ptr, cos_ptr, sin_ptr, T, L, j, eps, D, JOINT)
            mean = tl.sum(tl.load(parts, mask=there, other=0.0), 0) * inverse_count
            k = tl.where((n < L)[:, None], k - mean[None, :], 0.0)
            k_scale = tl.max(tl.max(tl.abs(k), 1), 0) * inverse_top + tl.sum(tl.sum(k * 0.0, 1), 0)
            k *= 1.0 / tl.where(k_scale == 0.0, 1.0, k_scale)
            to = head * k_blocks * BLOCK + n
            tl.store(kc_ptr + to[:, None] * W + j[None, :], _rounded(k, codes))
            tl.store(ks_ptr + head * k_blocks + block, k_scale)
        else:  # bits 3 2 1 0 of a place are bits 2 1 3 0 of the token there
            n = block * BLOCK + (place & -16) + (place & 1) + ((place >> 1) & 1) * 8 + ((place >> 2) & 3) * 2
            v_from = v_ptr + head // H * v_batch + head % H * v_head
            raw_v = tokens_tile(v_from, words_v_ptr, words, n, v_row, t_row, T, L, j, D, JOINT)
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
    q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype, config: dict | None = None,
    rotary: Rotary | None = None,
) -> Codes8:  # fmt: skip
    """As formats.attention8.quantize8. q [B, H, M, d], k and v [B, H, L, d], of any strides but 1 for the last.

    With `rotary` L is M, and its text's tokens are M + T of the codes together: the formula of `rotary.joined`.
    """
    q, k, v = (_close(x) for x in (q, k, v))
    batch, heads, rows, width = q.shape
    words, norms, places, extra, eps = None, (None,) * 4, (None, None), 0, 0.0
    if rotary is not None:
        words, norms, places, extra, eps = rotary.parts()
        words = None if words is None else _alike(words)
    tokens = k.shape[2] + extra
    codes = empty_codes(q, rows + extra, tokens, dtype)
    parts = q.new_empty(batch * heads, 2, cdiv(min(tokens, SAMPLES), SOME), width, dtype=torch.float32)
    strides = tuple(x.stride()[:3] for x in (q, k, v, q if words is None else words[0]))
    forms = rotary is not None, extra, eps
    means, write = _plan(config or {}, batch, heads, rows + extra, tokens, width, strides, scale, dtype, *forms)
    words = words or (None,) * 3
    means(k, v, *words[1:], norms[1], norms[3], *places, parts)
    write(q, k, v, *words, *norms, *places, parts, *codes)
    return codes


def _close(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _alike(words: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The three of the text with the same strides, the last 1."""
    words = tuple(map(_close, words))
    return words if len({x.stride() for x in words}) == 1 else tuple(x.contiguous() for x in words)


@planned
def _plan(
    config: dict, batch: int, heads: int, rows: int, tokens: int, width: int, strides: tuple, scale: float,
    dtype: torch.dtype, is_turned: bool, words: int, eps: float,
) -> tuple[Launch, Launch]:  # fmt: skip
    count, (q_blocks, k_blocks, channels) = min(tokens, SAMPLES), sizes(rows, tokens, width)
    chunks = cdiv(count, SOME)
    names = [f"{which}_{what}" for which in "qkvt" for what in ("batch", "head", "row")]
    steps = dict(zip(names, (step for of in strides for step in of), strict=True))
    forms = dict(TURNED=is_turned, JOINT=words > 0, T=words, eps=eps)
    common = dict(L=tokens, H=heads, chunks=chunks, D=width, W=channels, **forms)
    means = Launch(
        _means_kernel, (chunks, batch * heads, 2), **{name: steps[name] for name in names[3:]}, **common, count=count,
        SOME=SOME, num_warps=8 if is_turned else 4,
    )  # fmt: skip
    write = Launch(
        _codes_kernel, (max(q_blocks, k_blocks), batch * heads, 3), **steps, **common, M=rows, q_blocks=q_blocks,
        k_blocks=k_blocks, q_factor=scale * LOG2E, inverse_top=1 / top(dtype), inverse_count=1 / count,
        CHUNKS=next_power_of_2(chunks), BLOCK=BLOCK, FLOOR=FLOOR, num_warps=config.get("warps", 8),
        maxnreg=config.get("maxnreg"),
    )  # fmt: skip
    return means, write
