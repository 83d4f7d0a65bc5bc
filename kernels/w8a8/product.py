"""W8A8 Conv2d and Linear in Triton: one implicit-GEMM kernel on 8-bit tensor cores, int8 or e4m3.

    y[m, n] = f(s_x[m] * s_w[n] * (sum_{tap, c} q_x[row(m) + shift(tap), c] q_w[n, tap, c] - z sum q_w[n])
                + bias[n] + shift[image(m), n]) + residual[m, n]

f is one of w4/products/nonlinearity.py, or nothing.

A row m is an output pixel; its window is read straight from the codes in the flat layout of `window`, where padding
holds q_x = z, so that the correction by z is the same for every row and no load has a mask. Linear is the case of
one-pixel images. Sums are int32 and exact, or float32 as the tensor cores round them. Three ways to the operands,
and a kernel of its own for Linear on Hopper:

    tma       rows of the flat layout in blocks through the bulk copy engine (Hopper and later; stride 1): outputs are
              computed at padding positions too and not stored, (W+1)(H+1)/(WH) of the work at 3x3
    gather    each output's row by its own address: any stride, any device
    on-load   1x1 windows that read each pixel once: floats, quantized as they arrive; no codes in memory
    gluon     1x1 windows of codes with one scale or one a row, and nothing to add but a bias: w4/products/
              product_w4a8_hopper.py, where loads and two halves of the arithmetic have warps of their own

A tile of BM x BN outputs does 2 BM BN operations for each (BM + BN) bytes it asks of L2: 128 for 128 x 128, 170 for
256 x 128. 3x3 layers are bound by L2 and the tensor cores alike, 1x1 layers by device memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.integers import cdiv
from ..runtime.launch import Launch
from ..runtime.settings import multiprocessors, remembered
from ..w4.products.nonlinearity import nonlinear
from .configs import Config, choose
from .quantize import encode
from .window import Window


@triton.jit
def _store(
    total, n, scale, m, image, inside, N, y_ptr, weight_scale_ptr, bias_ptr, shift_ptr, residual_ptr,
    HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NONLINEARITY: tl.constexpr,
):  # fmt: skip
    """Finish the sums in float32 and store them, on columns n and on rows m where `inside`."""
    valid = n < N
    y = total.to(tl.float32) * (tl.load(weight_scale_ptr + n, mask=valid, other=0.0)[None, :] * scale)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=valid, other=0.0).to(tl.float32)[None, :]
    mask = inside[:, None] & valid[None, :]
    if HAS_SHIFT:
        y += tl.load(shift_ptr + image[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)
    y = nonlinear(y, NONLINEARITY)
    where = m.to(tl.int64)[:, None] * N + n[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=mask)


SIZES = ["M", "HP", "WP", "OH", "OW", "rows_per_scale", "tiles", "steps"]  # one compilation for all of them


@triton.jit(do_not_specialize=SIZES)
def _conv_kernel(
    x_ptr, w_ptr, y_ptr, scale_ptr, zero_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, shift_ptr, residual_ptr,
    M, N, HP, WP, OH, OW, rows_per_scale, tiles, steps,
    C: tl.constexpr, CP: tl.constexpr, TAPS: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PER_ROW: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MODE: tl.constexpr, PERSISTENT: tl.constexpr,
    NONLINEARITY: tl.constexpr,
):  # fmt: skip
    """C: channels of a pixel in memory; CP: of the weight, a multiple of BK (the same unless MODE is "on-load")."""
    n_blocks = tl.cdiv(N, BN)
    k = tl.arange(0, BK)
    zero = tl.load(zero_ptr) if HAS_ZERO else 0
    scale = tl.load(scale_ptr)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        m0, n0 = tile // n_blocks * BM, tile % n_blocks * BN
        if MODE != "tma":
            m = tl.minimum(m0 + tl.arange(0, BM), M - 1)  # rows past the end repeat the last and are not stored
            first = (m // (OH * OW) * HP + m // OW % OH * SH) * WP + m % OW * SW
            x_ptrs = x_ptr + first.to(tl.int64)[:, None] * C + k[None, :]
            n = tl.minimum(n0 + tl.arange(0, BN), N - 1)
            w_ptrs = w_ptr + n.to(tl.int64)[None, :] * (TAPS * CP) + k[:, None]

        total = tl.zeros((BM, BN), dtype=tl.float32 if FP8 else tl.int32)
        if HAS_ZERO:
            n = n0 + tl.arange(0, BN)
            total -= (zero * tl.load(weight_sum_ptr + n, mask=n < N, other=0))[None, :]
        for step in range(steps):
            tap, c = step % TAPS, step // TAPS * BK  # taps of the same channels one after another: they share pixels
            shift = tap // KW * DH * WP + tap % KW * DW
            if MODE == "tma":
                x = x_ptr.load([m0 + shift, c])
                w = w_ptr.load([n0, tap * CP + c]).T
            elif MODE == "gather":
                x = tl.load(x_ptrs + shift * C + c)
                w = tl.load(w_ptrs + tap * CP + c)
            else:
                x = tl.load(x_ptrs + shift * C + c, mask=(c + k < C)[None, :], other=0.0).to(tl.float32)
                x = encode(x * tl.div_rn(1.0, scale), zero.to(tl.float32) if HAS_ZERO else 0.0, LOW, HIGH, FP8)
                w = tl.load(w_ptrs + tap * CP + c)
            total = tl.dot(x, w, total, out_dtype=total.dtype)

        m = m0 + tl.arange(0, BM)
        if MODE == "tma":  # rows are positions of the padded images
            image, oy, ox = m // (HP * WP), m // WP % HP, m % WP
            inside = (m < M) & (oy < OH) & (ox < OW)
            m = (image * OH + oy) * OW + ox
        else:
            image = m // (OH * OW)
            inside = m < M
        s = tl.load(scale_ptr + m // rows_per_scale, mask=inside, other=0.0)[:, None] if PER_ROW else scale
        # The columns in parts: half the registers for what is loaded per column, half the memory of the transpose.
        low, high = total.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        n = n0 + tl.arange(0, BN // 2)
        _store(
            low, n, s, m, image, inside, N, y_ptr, weight_scale_ptr, bias_ptr, shift_ptr, residual_ptr,
            HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, NONLINEARITY,
        )  # fmt: skip
        _store(
            high, n + BN // 2, s, m, image, inside, N, y_ptr, weight_scale_ptr, bias_ptr, shift_ptr, residual_ptr,
            HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, NONLINEARITY,
        )  # fmt: skip


def conv2d(
    x: Tensor, window: Window, weight: Tensor, scale: Tensor, zero_point: Tensor | None, weight_scale: Tensor,
    weight_sum: Tensor | None, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None, out: Tensor,
    bits: int = 8, config: Config | None = None, nonlinearity: str = "",
) -> Tensor:  # fmt: skip
    """Fill out [B, OH, OW, N] (contiguous) and return it.

    x: codes [rows, C'] as `quantize.quantize` leaves them; for mode "on-load", floats [B, H, W, C], contiguous.
    weight: [N, taps * C'] of the codes' type. scale: one float32, or one per image.
    shift: [B, N]; residual: as out. nonlinearity: of formats/nonlinearities.py.
    """
    alone = window.rows_of_pixels and shift is None and residual is None
    alone = alone and (scale.numel() == 1 or window.h == window.w == 1)
    if alone and (setting := _on_hopper(config, window, x.dtype, *weight.shape, weight.dtype, x.device)):
        from ..w4.products import product_w4a8_hopper  # a Triton without Gluon serves all other settings

        zero = zero_point, None if zero_point is None else weight_sum
        operands = (x, scale, None), (weight, weight_scale), None, bias, out.view(-1, out.shape[-1])
        product_w4a8_hopper.product(*operands, setting, nonlinearity, scale.numel() == 1, zero)
        return out
    launch = _plan(
        config, window, x.shape, x.dtype, *weight.shape, weight.dtype, zero_point is not None, bias is not None,
        shift is not None, residual is not None, scale.numel() > 1, bits, x.device, alone, nonlinearity,
    )  # fmt: skip
    launch(x, weight, out, scale, zero_point, weight_scale, weight_sum, bias, shift, residual)
    return out


@remembered
def _on_hopper(
    config: Config | None, window: Window, x_type: torch.dtype, n: int, k: int, dtype: torch.dtype,
    device: torch.device,
) -> dict | None:  # fmt: skip
    """The settings of Gluon's kernel where that is what serves, or None."""
    config = config or choose(dtype, window, k, n, device, _on_load(x_type))
    names = {"BM": config.bm, "BN": config.bn, "BK": config.bk, "BAND": config.band, "STAGES": config.stages}
    return names if config.mode == "gluon" else None


def _on_load(x_type: torch.dtype) -> bool:
    return x_type.is_floating_point and x_type.itemsize > 1


@remembered
def _plan(
    config: Config | None, window: Window, shape: torch.Size, x_type: torch.dtype, n: int, k: int,
    dtype: torch.dtype, has_zero: bool, has_bias: bool, has_shift: bool, has_residual: bool, per_row: bool, bits: int,
    device: torch.device, alone: bool, nonlinearity: str,
) -> Launch:  # fmt: skip
    wide = k // window.taps
    config = config or choose(dtype, window, wide, n, device, _on_load(x_type), alone)
    (oh, ow), (hp, wp) = window.output, window.padded
    rows = window.batch * (hp * wp if config.mode == "tma" else oh * ow)
    tiles = cdiv(rows, config.bm) * cdiv(n, config.bn)
    blocks = dict(x_ptr=(config.bm, config.bk), w_ptr=(config.bn, config.bk)) if config.mode == "tma" else None
    limit = 2 ** (bits - 1)
    options = {"maxnreg": config.registers} if config.registers else {}
    return Launch(
        _conv_kernel, (_programs(config, tiles, device),), blocks,
        M=rows, N=n, HP=hp, WP=wp, OH=oh, OW=ow, rows_per_scale=oh * ow, tiles=tiles, steps=k // config.bk,
        C=shape[-1], CP=wide, TAPS=window.taps, KW=window.kernel[1], SH=window.stride[0], SW=window.stride[1],
        DH=window.dilation[0], DW=window.dilation[1], HAS_ZERO=has_zero, HAS_BIAS=has_bias, HAS_SHIFT=has_shift,
        HAS_RESIDUAL=has_residual, PER_ROW=per_row, LOW=-limit, HIGH=limit - 1, FP8=dtype != torch.int8,
        BM=config.bm, BN=config.bn, BK=config.bk, MODE=config.mode, PERSISTENT=config.programs > 0,
        NONLINEARITY=nonlinearity, num_warps=config.warps, num_stages=config.stages, **options,
    )  # fmt: skip


def _programs(config: Config, tiles: int, device: torch.device) -> int:
    if not config.programs or device.type != "cuda":
        return tiles
    return min(tiles, config.programs * multiprocessors(device))
