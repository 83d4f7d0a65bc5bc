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

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import attention8 as formats
from ..formats.attention8 import BLOCK, LOG2E, Codes8, empty_codes, sizes, top
from ..runtime.integers import cdiv
from ..runtime.launch import Launch, planned
from ..runtime.rounding import to_codes
from .rotary import Rotary
from .turned8 import places_tile, tokens_tile, turned

SOME, ROWS = 256, 64  # tokens whose sum one program takes, and at a time
SAMPLES = tl.constexpr(formats.SAMPLES)
FLOOR, LEAST = tl.constexpr(formats.FLOOR), tl.constexpr(2.0**-120)  # the least scale of values, and divisor


@triton.jit(do_not_specialize=["L", "T", "chunks", "eps"])
def _means_kernel(
    k_ptr, v_ptr, words_k_ptr, words_v_ptr, norm_ptr, words_norm_ptr, cos_ptr, sin_ptr, parts_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row, t_batch, t_head, t_row, L, T, H, chunks, eps,
    D: tl.constexpr, W: tl.constexpr, SOME: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr,
    JOINT: tl.constexpr,
):  # fmt: skip
    """parts [B H, 2, chunks, d]: sums of k and of v over SOME of the tokens that are looked at, ROWS at a time."""
    chunk, head, what = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    j = tl.arange(0, W)
    k, v = (k_ptr, words_k_ptr, k_batch, k_head, k_row), (v_ptr, words_v_ptr, v_batch, v_head, v_row)
    text = t_batch, t_head, t_row, T
    total = tl.zeros((ROWS, W), tl.float32)
    for part in tl.static_range(SOME // ROWS):
        i = (chunk * SOME + part * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        n = i
        if L > SAMPLES:
            n = tl.where(i < SAMPLES, (i * L + (i * 40503 & 1023) * L // 1024) // SAMPLES, L)
        if what == 0:
            x = tokens_tile(k, text, head, H, n, 0, L, j, D, JOINT).to(tl.float32)
            if TURNED:
                cos, sin = places_tile(cos_ptr, sin_ptr, n, L, j, D)
                x, length = turned(x, n, 0, norm_ptr, words_norm_ptr, cos, sin, T, j, eps, D, JOINT)
                x *= length[:, None]
        else:
            x = tokens_tile(v, text, head, H, n, 0, L, j, D, JOINT).to(tl.float32)
        total += x
    tl.store(parts_ptr + ((head * 2 + what) * chunks + chunk) * D + j, tl.sum(total, 0), mask=j < D)


@triton.jit
def _or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _most(x, axis: tl.constexpr):
    """The largest along an axis; NaN where one is NaN or infinite."""
    most = tl.reduce(x, axis, _or_nan)
    return most + most * 0.0


@triton.jit
def _inverse(scale):
    """Of a divisor; codes of what is nothing are 0."""
    return 1.0 / tl.maximum(scale, LEAST)


@triton.jit
def _mean(parts_ptr, inverse_count, j, D: tl.constexpr, CHUNKS: tl.constexpr):
    mean = tl.zeros((j.shape[0],), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        mean += tl.load(parts_ptr + chunk * D + j, mask=j < D, other=0.0)
    return mean * inverse_count


@triton.jit(do_not_specialize=["M", "L", "T", "q_blocks", "k_blocks", "eps"])
def _codes_kernel(
    q_ptr, k_ptr, v_ptr, words_q_ptr, words_k_ptr, words_v_ptr, q_norm_ptr, k_norm_ptr, words_q_norm_ptr,
    words_k_norm_ptr, cos_ptr, sin_ptr, parts_ptr, qc_ptr, qs_ptr, kc_ptr, ks_ptr, vc_ptr, vl_ptr, vm_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, t_batch, t_head, t_row, M, L, T, H,
    q_blocks, k_blocks, q_factor, inverse_top, inverse_count, eps, D: tl.constexpr, W: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, TURNED: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """One program: a block of BLOCK values, keys or queries of HEADS heads, which share cosines and sines.

    W: of a head in the codes, zeros from D on. The next head's tokens are under way while those of one are coded.
    """
    block, first, what = tl.program_id(0), tl.program_id(1).to(tl.int64) * HEADS, tl.program_id(2)
    j, place, start, last = tl.arange(0, W), tl.arange(0, BLOCK), block * BLOCK, first + HEADS - 1
    n, text = start + place, (t_batch, t_head, t_row, T)
    inside = tl.where(n < L, 1.0, 0.0)
    codes: tl.constexpr = qc_ptr.dtype.element_ty
    if what == 2:
        if block < q_blocks:
            q = q_ptr, words_q_ptr, q_batch, q_head, q_row
            following = tokens_tile(q, text, first, H, n, start, M, j, D, JOINT)
            if TURNED:
                cos, sin = places_tile(cos_ptr, sin_ptr, n, M, j, D)
            for head in range(first, last + 1):
                x = following.to(tl.float32)
                following = tokens_tile(q, text, head + 1, H, n, start, tl.where(head < last, M, 0), j, D, JOINT)
                if TURNED:
                    x, length = turned(x, n, start, q_norm_ptr, words_q_norm_ptr, cos, sin, T, j, eps, D, JOINT)
                scale = _most(tl.abs(x), 1) * inverse_top
                to = head * q_blocks * BLOCK + n
                tl.store(qc_ptr + to[:, None] * W + j[None, :], to_codes(x * _inverse(scale)[:, None], codes))
                if TURNED:
                    scale *= length
                tl.store(qs_ptr + to, scale * q_factor)
    elif what == 1:
        if block < k_blocks:
            k = k_ptr, words_k_ptr, k_batch, k_head, k_row
            following = tokens_tile(k, text, first, H, n, start, L, j, D, JOINT)
            if TURNED:
                cos, sin = places_tile(cos_ptr, sin_ptr, n, L, j, D)
            for head in range(first, last + 1):
                x = following.to(tl.float32)
                following = tokens_tile(k, text, head + 1, H, n, start, tl.where(head < last, L, 0), j, D, JOINT)
                mean = _mean(parts_ptr + head * 2 * CHUNKS * D, inverse_count, j, D, CHUNKS)
                if TURNED:
                    x, length = turned(x, n, start, k_norm_ptr, words_k_norm_ptr, cos, sin, T, j, eps, D, JOINT)
                    x *= length[:, None]
                x -= mean[None, :]
                scale = _most(tl.reduce(tl.abs(x), 1, _or_nan) * inside, 0) * inverse_top
                to = head * k_blocks * BLOCK + n
                inverse = (_inverse(scale) * inside)[:, None]
                tl.store(kc_ptr + to[:, None] * W + j[None, :], to_codes(x * inverse, codes))
                tl.store(ks_ptr + head * k_blocks + block, scale)
    elif block < k_blocks:  # bits 3 2 1 0 of a place are bits 2 1 3 0 of the token there
        n = start + (place & -16) + (place & 1) + ((place >> 1) & 1) * 8 + ((place >> 2) & 3) * 2
        inside = tl.where(n < L, 1.0, 0.0)
        v = v_ptr, words_v_ptr, v_batch, v_head, v_row
        following = tokens_tile(v, text, first, H, n, start, L, j, D, JOINT)
        for head in range(first, last + 1):
            x = following.to(tl.float32)
            following = tokens_tile(v, text, head + 1, H, n, start, tl.where(head < last, L, 0), j, D, JOINT)
            mean = _mean(parts_ptr + (head * 2 + 1) * CHUNKS * D, inverse_count, j, D, CHUNKS)
            x -= mean[None, :]
            x += x * 0.0  # infinity becomes NaN, which no maximum sees
            scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1) * inside, 0) * (1.0 / 448.0), FLOOR)
            coded = to_codes(x * (1.0 / scale * inside)[:, None], vc_ptr.dtype.element_ty)
            to = vc_ptr + (head * W + j)[:, None] * (k_blocks * BLOCK) + (start + place)[None, :]
            tl.store(to, tl.trans(coded))
            tl.store(vl_ptr + head * k_blocks + block, tl.log2(scale))
            if block == 0:
                tl.store(vm_ptr + head * W + j, mean)


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
    parts = q.new_empty(batch * heads, 2, cdiv(min(tokens, formats.SAMPLES), SOME), width, dtype=torch.float32)
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
    count, (q_blocks, k_blocks, channels) = min(tokens, formats.SAMPLES), sizes(rows, tokens, width)
    chunks, shared = cdiv(count, SOME), math.gcd(batch * heads, config.get("heads", 4 if is_turned else 1))
    joint = int(words > 0) + int(words > 0 and words % BLOCK == 0)  # 2: the text ends where a block does
    names = [f"{which}_{what}" for which in "qkvt" for what in ("batch", "head", "row")]
    steps = dict(zip(names, (step for of in strides for step in of), strict=True))
    forms = dict(TURNED=is_turned, T=words, eps=eps)
    common = dict(L=tokens, H=heads, D=width, W=channels, **forms)
    means = Launch(
        _means_kernel, (chunks, batch * heads, 2), **{name: steps[name] for name in names[3:]}, **common,
        chunks=chunks, SOME=SOME, ROWS=ROWS, JOINT=int(words > 0), num_warps=8,
    )  # fmt: skip
    write = Launch(
        _codes_kernel, (max(q_blocks, k_blocks), batch * heads // shared, 3), **steps, **common, M=rows,
        q_blocks=q_blocks, k_blocks=k_blocks, q_factor=scale * LOG2E, inverse_top=1 / top(dtype),
        inverse_count=1 / count, CHUNKS=chunks, BLOCK=BLOCK, HEADS=shared, JOINT=joint,
        num_warps=config.get("warps", 8),
    )  # fmt: skip
    return means, write
