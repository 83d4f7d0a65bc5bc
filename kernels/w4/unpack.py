"""4-bit weights to operands of a matrix product, in Triton; FOLD says what becomes of the scales s of the groups.

"channel": folded into 8-bit codes, so that the product needs none of its own for a group:

    channel[n] = max_g s[n, g] / P over the groups that hold a nonzero code,    P = 32 (e4m3), 15 (int8)
    w8[n, k] = round(q[n, k] * s[n, k // 64] / channel[n]) in e4m3 or int8,    W ~ channel[n] * w8[n, k]

The group of largest scale is exact: 32 q in e4m3 and 15 q in int8 are, for q in [-8, 7]; others are rounded to the
nearest. A group of zeros has scale 1 by the format and does not count. "apart": the codes q as they are, in e4m3 or
int8, and s transposed to float32 [K/64, N]. "weight": s q in bf16 or fp16. Floor in bytes: N K / 2 read, N K written,
2 N K in 16 bits. Nothing is stored beside the layer: this lives until the product that follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.int4 import GROUP
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch, planned
from .activation import activation_launch, activation_sizes, activation_tensors
from .activation_triton import activation_program

ZEROS = tl.constexpr(0x88888888 - (1 << 32))  # eight codes 0, as int32
PEAK = {torch.float8_e4m3fn: 32.0, torch.int8: 15.0}


@triton.jit
def nibble_pairs(words, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """int32 words of 8 codes -> the two codes at bits SHIFT and SHIFT + 16, as values in bf16 or fp16.

    A code is set into the mantissa of 128 (bf16) or 1024 (fp16) by bit operations that serve two codes at once, where
    integers to floats would take a conversion each.
    """
    magic: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    bits = (words >> SHIFT) & 0x000F000F | magic
    eight = tl.full((), 136.0 if dtype == tl.bfloat16 else 1032.0, dtype)
    first = bits.to(tl.int16).to(dtype, bitcast=True)
    second = (bits >> 16).to(tl.int16).to(dtype, bitcast=True)
    return first - eight, second - eight


@triton.jit
def _run(words, factor, HALF: tl.constexpr, dtype: tl.constexpr):
    """One half of each group: words [R, G, 8] int32, factor [R, G, 1] -> [R, G, 32] in the order of inputs."""
    byte0, byte2 = nibble_pairs(words, 4 * HALF, factor.dtype)
    byte1, byte3 = nibble_pairs(words, 4 * HALF + 8, factor.dtype)
    even = tl.join(byte0 * factor, byte2 * factor)
    odd = tl.join(byte1 * factor, byte3 * factor)
    value = tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1], 32))
    if dtype == tl.int8:  # 1536 has an ulp of 1, and its low byte is 0
        return (value + tl.full((), 1536.0, tl.float16)).to(tl.int16, bitcast=True).to(tl.int8)
    return value.to(dtype)


@triton.jit
def unpack_rows(
    block, q_ptr, wscales_ptr, w_ptr, scales_ptr, N, GROUPS,
    FOLD: tl.constexpr, PEAK: tl.constexpr, UNPACK_ROWS: tl.constexpr, PADDED_GROUPS: tl.constexpr,
):  # fmt: skip
    """Rows block * UNPACK_ROWS .. + UNPACK_ROWS, whole; q_ptr points to int32."""
    n = block * UNPACK_ROWS + tl.arange(0, UNPACK_ROWS)
    g = tl.arange(0, PADDED_GROUPS)
    mask = (n < N)[:, None] & (g < GROUPS)[None, :]
    rows = n.to(tl.int64)[:, None] * GROUPS + g[None, :]
    words = tl.load(q_ptr + rows[:, :, None] * 8 + tl.arange(0, 8)[None, None, :], mask=mask[:, :, None], other=0)
    scale = tl.load(wscales_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    if FOLD == "channel":
        used = tl.max((words != ZEROS).to(tl.int32), 2) != 0
        peak = tl.max(tl.where(used, scale, 0.0), 1)
        channel = tl.where(peak > 0, peak / PEAK, 1.0)
        tl.store(scales_ptr + n, channel, mask=n < N)
        factor = (tl.where(used, scale, 0.0) / channel[:, None]).to(tl.float16)
    elif FOLD == "apart":
        tl.store(scales_ptr + g[None, :] * N + n[:, None], scale, mask=mask)
        factor = tl.full((UNPACK_ROWS, PADDED_GROUPS), 1.0, tl.float16)
    else:
        factor = scale.to(w_ptr.dtype.element_ty)
    where = w_ptr + rows[:, :, None] * 64 + tl.arange(0, 32)[None, None, :]
    for half in tl.static_range(2):
        codes = _run(words, factor[:, :, None], half, w_ptr.dtype.element_ty)
        tl.store(where + 32 * half, codes, mask=mask[:, :, None])


@triton.jit
def _unpack_kernel(
    q_ptr, wscales_ptr, w_ptr, scales_ptr, N, GROUPS,
    FOLD: tl.constexpr, PEAK: tl.constexpr, UNPACK_ROWS: tl.constexpr, PADDED_GROUPS: tl.constexpr,
):  # fmt: skip
    unpack_rows(
        tl.program_id(0), q_ptr, wscales_ptr, w_ptr, scales_ptr, N, GROUPS, FOLD, PEAK, UNPACK_ROWS, PADDED_GROUPS
    )


@triton.jit
def _prepare_kernel(
    x_ptr, inverse_ptr, down_ptr, codes_ptr, scales_ptr, branch_ptr, shift, M, K, stride_m,
    q_ptr, wscales_ptr, w_ptr, weight_scales_ptr, N, GROUPS, row_programs,
    RANK: tl.constexpr, R: tl.constexpr, GROUPED: tl.constexpr, SHIFTED: tl.constexpr, SMOOTHED: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, FOLD: tl.constexpr, PEAK: tl.constexpr,
    UNPACK_ROWS: tl.constexpr, PADDED_GROUPS: tl.constexpr,
):  # fmt: skip
    """The activation's programs first, for they run longest; the unpacking ones fill what bandwidth they leave."""
    program = tl.program_id(0)
    if program < row_programs:
        activation_program(
            program, x_ptr, inverse_ptr, down_ptr, codes_ptr, scales_ptr, branch_ptr, shift, M, K, stride_m,
            None, None, RANK, R, GROUPED, SHIFTED, SMOOTHED, LOW, HIGH, BM, BK, STAGES, ROWS, STEP, STEPS, "",
            None, False, False, False,
        )  # fmt: skip
    else:
        unpack_rows(
            program - row_programs, q_ptr, wscales_ptr, w_ptr, weight_scales_ptr, N, GROUPS, FOLD, PEAK, UNPACK_ROWS,
            PADDED_GROUPS,
        )  # fmt: skip


FOLDS = {"fp8": "channel", "int8": "channel", "int4": "apart", "none": "weight"}


def empty_weight(qweight: Tensor, dtype: torch.dtype, mode: str) -> tuple[Tensor, Tensor]:
    """Room for what `weight_shapes` says of qweight [N, K/2]."""
    n, half = qweight.shape
    return tuple(qweight.new_empty(shape, dtype=kind) for shape, kind in weight_shapes(n, 2 * half, dtype, mode))


def weight_shapes(n: int, k: int, dtype: torch.dtype, mode: str) -> tuple:
    """(shape, type) of w [N, K] and its float32 scales, for activations of this mode: [N], [K/64, N] or [0]."""
    scales = {"channel": (n,), "apart": (k // GROUP, n), "weight": (0,)}[FOLDS[mode]]
    return ((n, k), dtype), (scales, torch.float32)


def _unpack_fixed(config: dict, mode: str, dtype: torch.dtype, n: int, groups: int) -> tuple[int, dict]:
    """(number of programs, numbers and constants): whole rows, as many as make config["UNPACK_BYTES"] of codes."""
    padded = next_power_of_2(groups)
    rows = max(1, config["UNPACK_BYTES"] // (padded * GROUP // 2))
    sizes = dict(N=n, GROUPS=groups, UNPACK_ROWS=rows, PADDED_GROUPS=padded)
    return cdiv(n, rows), dict(FOLD=FOLDS[mode], PEAK=PEAK.get(dtype, 1.0), **sizes)


@planned
def _unpack(config: dict, mode: str, dtype: torch.dtype, n: int, groups: int) -> Launch:
    programs, fixed = _unpack_fixed(config, mode, dtype, n, groups)
    return Launch(_unpack_kernel, (programs,), **fixed, num_warps=config["num_warps"])


def unpack(qweight: Tensor, wscales: Tensor, out: tuple, mode: str, config: dict) -> None:
    """Fill `out`, made by `empty_weight`, from qweight uint8 [N, K/2] and wscales [N, K/64], both contiguous."""
    launch = _unpack(config, mode, out[0].dtype, *wscales.shape)
    launch(qweight.view(torch.int32), wscales, *out)


@planned
def _prepare(config: dict, dtype: torch.dtype, n: int, groups: int, mode: str, *sizes) -> Launch:
    row_programs, fixed = activation_launch(config, mode, *sizes)
    programs, unpack_fixed = _unpack_fixed(config, mode, dtype, n, groups)
    return Launch(_prepare_kernel, (row_programs + programs,), **fixed, **unpack_fixed, row_programs=row_programs)


def prepare(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, mode: str, shift: float, activation: tuple,
    qweight: Tensor, wscales: Tensor, weight: tuple, config: dict,
) -> None:  # fmt: skip
    """Run `activation.quantize_activation` and `unpack` in one launch, side by side."""
    sizes = activation_sizes(x, smooth, down, mode, shift)
    launch = _prepare(config, weight[0].dtype, *wscales.shape, *sizes)
    launch(*activation_tensors(x, smooth, down), *activation, qweight.view(torch.int32), wscales, *weight)
