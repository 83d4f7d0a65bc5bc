"""Attention on 4-bit keys and values in Triton. Codes are operands as they are; their grids are applied to results:

    S[m, n] = scale * (s_n sum_j q[m, j] c[n, j] + low_n sum_j q[m, j]) + mask[m, n]
    P[m, n] = exp(S[m, n] - peak_m),    l_m = sum_n P[m, n]
    y[m, j] = (sum_n (P[m, n] s'_n) c'[n, j] + sum_n P[m, n] low'_n) / l_m

k = low + s c, v = low' + s' c' (formats/kv4.py). Codes 0..15 are exact in 16 bits, and neither keys nor values ever
are 16-bit numbers, not even in a tile. The lower nibbles of a head are its first half of channels, the upper ones the
second: each half is a product of its own, so that nothing is put in another order. P s' is rounded to q's dtype, all
else is float32; peak_m is the largest S so far, and what was summed before is corrected where it rises.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from ..formats.kv4 import KV4
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch, planned
from ..runtime.settings import best_config

LOG2E = tl.constexpr(1.4426950408889634)


def _asm(high: bool, kind: str, above: int, one: int, less: int) -> tl.constexpr:
    """PTX from four bytes to four values: a nibble is the last bits of 128 + c in bf16, of 1024 + c in fp16."""
    lines = ["shr.b32 t, $2, 4;" if high else "mov.b32 t, $2;", f"mov.b32 one, {one}; mov.b32 less, {less};"]
    for register, (pair, places) in enumerate((("u", 0x4140), ("t", 0x4342))):
        lines += [f"prmt.b32 {pair}, t, 0, {places};", f"lop3.b32 {pair}, {pair}, 0x000F000F, {above}, 0xEA;"]
        lines += [f"fma.rn.{kind} ${register}, {pair}, one, less;"]
    return tl.constexpr("{ .reg .b32 t, u, one, less; " + " ".join(lines) + " }")


_BF16 = "bf16x2", 0x43004300, 0x3F803F80, 0xC300C300
_FP16 = "f16x2", 0x64006400, 0x3C003C00, 0xE400E400
_LOW_BF16, _HIGH_BF16, _LOW_FP16, _HIGH_FP16 = (
    _asm(high, *numbers) for numbers in (_BF16, _FP16) for high in (False, True)
)


@triton.jit
def _nibbles(codes_ptr, n, j, L, HALF: tl.constexpr, dtype: tl.constexpr, PACKED: tl.constexpr):
    """Codes of tokens n [BN], bytes j [W] of a head -> (lower, upper) [BN, W] as values; 0 outside.

    PACKED: four by each 32-bit operation, in PTX, for values of 16 bits.
    """
    mask = (n < L)[:, None] & (j < HALF)[None, :]
    raw = tl.load(codes_ptr + n[:, None] * HALF + j[None, :], mask=mask, other=0)
    if PACKED:
        if dtype == tl.bfloat16:
            lower = tl.inline_asm_elementwise(_LOW_BF16, "=r,=r,r", [raw], tl.bfloat16, True, 4)
            upper = tl.inline_asm_elementwise(_HIGH_BF16, "=r,=r,r", [raw], tl.bfloat16, True, 4)
        else:
            lower = tl.inline_asm_elementwise(_LOW_FP16, "=r,=r,r", [raw], tl.float16, True, 4)
            upper = tl.inline_asm_elementwise(_HIGH_FP16, "=r,=r,r", [raw], tl.float16, True, 4)
    else:
        lower, upper = (raw & 15).to(tl.float32).to(dtype), (raw >> 4).to(tl.float32).to(dtype)
    return lower, upper


@triton.jit
def _kv4_attention_kernel(
    q_ptr, kcodes_ptr, kscales_ptr, klows_ptr, vcodes_ptr, vscales_ptr, vlows_ptr, mask_ptr, y_ptr,
    q_batch, q_head, q_row, mask_batch, mask_head, mask_row, mask_token, M, L, scale,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head. scale: times log2(e). W: HALF bytes of a head, to a power of 2 from 16."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1).to(tl.int64)
    batch, h = head // H, head % H
    j = tl.arange(0, W)
    in_lower, in_upper = (m < M)[:, None] & (j < HALF)[None, :], (m < M)[:, None] & (HALF + j < D)[None, :]
    q_ptr += batch * q_batch + h * q_head
    q_ptrs = q_ptr + m.to(tl.int64)[:, None] * q_row + j[None, :]
    lower = tl.load(q_ptrs, mask=in_lower, other=0.0)
    upper = tl.load(q_ptrs + HALF, mask=in_upper, other=0.0)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    q_sum = tl.sum(lower.to(tl.float32), 1) + tl.sum(upper.to(tl.float32), 1)

    kcodes_ptr += head * L * HALF
    vcodes_ptr += head * L * HALF
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total, low_sum = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    y_lower, y_upper = tl.zeros((BM, W), tl.float32), tl.zeros((BM, W), tl.float32)
    for first in range(0, L, BN):
        n = first + tl.arange(0, BN)
        inside = n < L
        grid = head * L + n
        k_lower, k_upper = _nibbles(kcodes_ptr, n, j, L, HALF, dtype, PACKED)
        k_scale = tl.load(kscales_ptr + grid, mask=inside, other=0.0).to(tl.float32)
        k_low = tl.load(klows_ptr + grid, mask=inside, other=0.0).to(tl.float32)
        product = tl.dot(lower, k_lower.T, input_precision="ieee")
        product = tl.dot(upper, k_upper.T, product, input_precision="ieee")
        logits = (product * k_scale[None, :] + q_sum[:, None] * k_low[None, :]) * scale
        if mask_ptr is not None:
            where = batch * mask_batch + h * mask_head + m.to(tl.int64)[:, None] * mask_row + n[None, :] * mask_token
            bias = tl.load(mask_ptr + where, mask=(m < M)[:, None] & inside[None, :], other=0.0)
            logits += bias.to(tl.float32) * LOG2E
        logits = tl.where(inside[None, :], logits, float("-inf"))
        above = tl.maximum(peak, tl.max(logits, 1))
        zero = tl.where(above == float("-inf"), 0.0, above)  # where nothing is kept so far
        p = tl.exp2(logits - zero[:, None])
        correction = tl.exp2(peak - zero)
        peak = above

        v_lower, v_upper = _nibbles(vcodes_ptr, n, j, L, HALF, dtype, PACKED)
        v_scale = tl.load(vscales_ptr + grid, mask=inside, other=0.0).to(tl.float32)
        v_low = tl.load(vlows_ptr + grid, mask=inside, other=0.0).to(tl.float32)
        total = total * correction + tl.sum(p, 1)
        low_sum = low_sum * correction + tl.sum(p * v_low[None, :], 1)
        weights = (p * v_scale[None, :]).to(dtype)
        y_lower = tl.dot(weights, v_lower, y_lower * correction[:, None], input_precision="ieee")
        y_upper = tl.dot(weights, v_upper, y_upper * correction[:, None], input_precision="ieee")

    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    y_ptrs = y_ptr + ((batch * M + m.to(tl.int64)[:, None]) * H + h) * D + j[None, :]
    tl.store(y_ptrs, ((y_lower + low_sum[:, None]) * inverse[:, None]).to(dtype), mask=in_lower)
    tl.store(y_ptrs + HALF, ((y_upper + low_sum[:, None]) * inverse[:, None]).to(dtype), mask=in_upper)


def attention(
    q: Tensor, key: KV4, value: KV4, mask: Tensor | None, scale: float, config: dict | None = None
) -> Tensor:
    """As the op of layer.py, whose checks were made; a mask is float here. config: not the usual settings."""
    batch, heads, rows, width = q.shape
    if q.stride(-1) != 1:
        q = q.contiguous()
    y = q.new_empty(batch, rows, heads, width)
    if y.numel():
        strides = (0, 0, 0, 0)
        if mask is not None:
            strides = tuple(0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))
        tokens = key.codes.shape[-2]
        config = config or best_config("kv4.attention", q.device, rows, tokens, width)
        launch = _plan(config, q.dtype.itemsize, batch, heads, rows, tokens, width, q.stride()[:3], strides, scale)
        launch(q, *(part.contiguous() for part in (*key, *value)), mask, y)
    return y.transpose(1, 2)


@planned
def _plan(
    config: dict, itemsize: int, batch: int, heads: int, rows: int, tokens: int, width: int, q_strides: tuple,
    mask_strides: tuple, scale: float,
) -> Launch:  # fmt: skip
    half = (width + 1) // 2
    padded = max(16, next_power_of_2(half))
    bm, bn = config["BM"], config["BN"]
    if itemsize > 2:  # products of float32 are sums in registers, not on tensor cores
        bm, bn = 16, 32
    elif padded > 64:
        bm = bm // 2
    bm, bn = (min(size, max(16, next_power_of_2(there))) for size, there in ((bm, rows), (bn, tokens)))
    names = ("q_batch", "q_head", "q_row", "mask_batch", "mask_head", "mask_row", "mask_token")
    return Launch(
        _kv4_attention_kernel, (cdiv(rows, bm), batch * heads),
        **dict(zip(names, (*q_strides, *mask_strides), strict=True)), M=rows, L=tokens, scale=scale * LOG2E.value,
        H=heads, D=width, HALF=half, W=padded, BM=bm, BN=bn,
        PACKED=config.get("PACKED", True) and itemsize == 2 and isinstance(_kv4_attention_kernel, JITFunction),
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
