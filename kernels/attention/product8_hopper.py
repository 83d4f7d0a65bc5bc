"""Attention on 8-bit operands for Hopper in Gluon: loads, and two halves of 128 queries, in warps of their own.

    x[m, n] = a[m] b[block of n] sum_j qc[m, j] kc[n, j]      a holds scale * log2(e)
    P[m, n] = e4m3(2^(x[m, n] - peak_m + 8)),   l_m = sum_n 2^(x[m, n] - peak_m + 8)
    y[m, j] = c[j] sum_n P[m, n] vc[n, j] / l_m + mean[j]

As many programs as multiprocessors walk over tiles of 128 queries, each in three groups of warps:

    1 warp    loads by TMA: the queries of a tile, then blocks of 128 keys and values, each in a ring of STAGES
    4 warps   64 queries:  products | exponentials |  products | ...
    4 warps   64 queries:             products     | exponentials | ...

A half queues the products of its queries with the next keys, then those of its last P with their values, and lets the
other half do so (`order`); while the second ones run it makes the next P. P never leaves the registers: what a thread
has of the sums is what it must hold of an operand, if keys are counted in the order that codes8.py gives to the
values. Blocks are taken from the last one on, so that what lies past the end of the keys is seen in the first step
alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..formats.attention8 import Codes8, padded
from ..runtime.hopper import async_load
from ..runtime.integers import cdiv
from ..runtime.launch import Launch, planned
from ..runtime.settings import multiprocessors

REGISTERS, COMPUTE_REGISTERS, LOAD_REGISTERS = 168, 240, 24
TOP = gl.constexpr(8.0)
DEFAULT = {"BN": 128, "STAGES": 4, "AHEAD": True}
# Four values that a thread has side by side to four bytes of e4m3; Triton by itself would move each byte.
FOUR = gl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
    "mov.b32 $0, {a, b}; }"
)


@gluon.jit
def _load(ring, sizes, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr):
    q_desc, k_desc, v_desc, q_buffers, k_buffers, v_buffers, q_bars, full, empty = ring
    M, L, H, q_tiles, k_tiles, tiles = sizes
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        head = tile // q_tiles
        row = (head * q_tiles + tile % q_tiles) * 128
        mbarrier.wait(q_bars.index(1), phase)
        mbarrier.expect(q_bars.index(0), 2 * q_desc.block_type.nbytes)
        async_load(q_desc, [row, 0], q_bars.index(0), q_buffers.index(0))
        async_load(q_desc, [row + 64, 0], q_bars.index(0), q_buffers.index(1))
        phase ^= 1
        for i in range(k_tiles + 1):  # the keys of a block, and the values of the one before it
            stage = slot % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), slot // STAGES & 1 ^ 1)
            mbarrier.expect(bar, k_desc.block_type.nbytes, pred=i == 0)
            mbarrier.expect(bar, k_desc.block_type.nbytes + v_desc.block_type.nbytes, pred=(i > 0) & (i < k_tiles))
            mbarrier.expect(bar, v_desc.block_type.nbytes, pred=i == k_tiles)
            row = (head * k_tiles + k_tiles - 1 - i) * BN
            async_load(k_desc, [row, 0], bar, k_buffers.index(stage), pred=i < k_tiles)
            async_load(v_desc, [head * D, (k_tiles - i) * BN], bar, v_buffers.index(stage), pred=i > 0)
            slot += 1


@gluon.jit
def _operand(p, BN: gl.constexpr, layout: gl.constexpr):
    """P as the left operand in e4m3: no value leaves its thread, but keys change places within 16."""
    p = p.reshape((64, BN // 16, 2, 4, 2)).permute((0, 1, 3, 2, 4)).reshape((64, BN))
    p = gl.convert_layout(p, layout, assert_trivial=True)
    return gl.inline_asm_elementwise(FOUR, "=r,r,r,r,r", [p], gl.float8e4nv, True, 4)


@gluon.jit
def _halves(x):
    """The left and the right half of the columns, in the registers where they are."""
    return gl.split(x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)))


@gluon.jit
def _largest(x, rows: gl.constexpr):
    """Of each row. In one chain, as gl.max has it, every number would wait for the one before it."""
    for _ in gl.static_range(x.shape[1].bit_length() - 4):
        a, b = _halves(x)
        x = gl.maximum(a, b)
    return gl.convert_layout(gl.max(x, 1), rows, assert_trivial=True)


@gluon.jit
def _sums(x, rows: gl.constexpr):
    """Of each row."""
    for _ in gl.static_range(x.shape[1].bit_length() - 4):
        a, b = _halves(x)
        x = a + b
    return gl.convert_layout(gl.sum(x, 1), rows, assert_trivial=True)


@gluon.jit
def _step(
    q, ring, slot, more, x, y, scale, peak, total, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    MORE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """One block: x are its sums, y the sums of the blocks before it; both may still be under way.

    slot: of the next block's keys and of this one's values. Returns the next block's x, y, peak and total.
    """
    k_buffers, v_buffers, full, empty = ring
    x_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    y_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, y_layout, 4)
    x_rows: gl.constexpr = gl.SliceLayout(1, x_layout)
    y_rows: gl.constexpr = gl.SliceLayout(1, y_layout)
    sums: gl.constexpr = gl.int32 if q.dtype == gl.int8 else gl.float32
    stage = slot % STAGES
    if not AHEAD:
        mbarrier.wait(full.index(stage), slot // STAGES & 1)
    k = k_buffers.index(stage).permute((1, 0))
    v = v_buffers.index(stage).permute((1, 0))
    if MORE:
        next_x = hopper.warpgroup_mma(q, k, gl.zeros((64, BN), sums, x_layout), use_acc=False, is_async=True)
        x = hopper.warpgroup_mma_wait(2, deps=(x,))
    else:
        x = hopper.warpgroup_mma_wait(1, deps=(x,))
    above = _largest(x, x_rows).to(gl.float32) * scale
    above = gl.maximum(peak, above)
    p = gl.exp2(x.to(gl.float32) * scale[:, None] - (above - TOP)[:, None])
    lower = gl.exp2(peak - above)
    total = total * lower + _sums(p, x_rows)
    # Without a wait here ptxas would have the next one before all that is above.
    if MORE and AHEAD:
        mbarrier.wait(full.index((slot + 1) % STAGES), (slot + 1) // STAGES & 1, pred=more)
    else:
        mbarrier.wait(full.index(stage), slot // STAGES & 1)
    y = hopper.warpgroup_mma_wait(1 if MORE else 0, deps=(y,))
    lower = gl.convert_layout(lower, y_rows, assert_trivial=True)
    y = y * lower[:, None]
    y = hopper.warpgroup_mma(_operand(p, BN, p_layout), v, y, is_async=True)
    mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), count=1)
    if MORE:
        return next_x, y, above, total
    else:
        return y, above, total


@gluon.jit
def _attend(
    half: gl.constexpr, loads, ending, sizes, BN: gl.constexpr, D: gl.constexpr, OUT: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, q_buffers, k_buffers, v_buffers, q_bars, full, empty = loads
    y_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr = ending
    M, L, H, q_tiles, k_tiles, tiles = sizes
    x_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    y_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, y_layout, 4)
    x_rows: gl.constexpr = gl.SliceLayout(1, x_layout)
    y_rows: gl.constexpr = gl.SliceLayout(1, y_layout)
    sums: gl.constexpr = gl.int32 if q_desc.dtype == gl.int8 else gl.float32
    out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q = q_buffers.index(half)
    ring = (k_buffers, v_buffers, full, empty)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        head = tile // q_tiles
        top = tile % q_tiles * 128 + half * 64
        q_scale = gl.load(q_scale_ptr + head * q_tiles * 128 + top + gl.arange(0, 64, x_rows))
        k_scales = k_scale_ptr + head * k_tiles
        last = k_tiles - 1
        scale = q_scale * gl.load(k_scales + last)
        mbarrier.wait(q_bars.index(0), phase)
        mbarrier.wait(full.index(slot % STAGES), slot // STAGES & 1)
        k = k_buffers.index(slot % STAGES).permute((1, 0))
        x = hopper.warpgroup_mma(q, k, gl.zeros((64, BN), sums, x_layout), use_acc=False, is_async=True)
        slot += 1
        stage = slot % STAGES
        mbarrier.wait(full.index(stage), slot // STAGES & 1)
        k = k_buffers.index(stage).permute((1, 0))
        v = v_buffers.index(stage).permute((1, 0))  # of the only block, this is what lay there: it is not used
        x2 = hopper.warpgroup_mma(q, k, gl.zeros((64, BN), sums, x_layout), use_acc=False, is_async=True)
        first = hopper.warpgroup_mma_wait(1, deps=(x,)).to(gl.float32)
        past = last * BN + gl.arange(0, BN, gl.SliceLayout(0, x_layout)) >= L
        peak = _largest(gl.where(past[None, :], float("-inf"), first), x_rows) * scale
        p = gl.where(past[None, :], 0.0, gl.exp2(first * scale[:, None] - (peak - TOP)[:, None]))
        total = _sums(p, x_rows)
        y = gl.zeros((64, D), gl.float32, y_layout)
        y = hopper.warpgroup_mma(_operand(p, BN, p_layout), v, y, use_acc=False, is_async=True)
        mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), count=1)
        slot += 1
        if AHEAD:
            mbarrier.wait(full.index(slot % STAGES), slot // STAGES & 1, pred=last > 0)
        for i in range(1, last, 2):
            scale = q_scale * gl.load(k_scales + last - i)
            x, y, peak, total = _step(q, ring, slot, True, x2, y, scale, peak, total, BN, D, STAGES, True, AHEAD)
            scale = q_scale * gl.load(k_scales + last - i - 1)
            x2, y, peak, total = _step(
                q, ring, slot + 1, i + 1 < last, x, y, scale, peak, total, BN, D, STAGES, True, AHEAD
            )
            slot += 2
        if last % 2 == 1:
            scale = q_scale * gl.load(k_scales)
            y, peak, total = _step(q, ring, slot, False, x2, y, scale, peak, total, BN, D, STAGES, False, AHEAD)
            result = hopper.warpgroup_mma_wait(0, deps=(y,))
            slot += 1
        else:
            _, result = hopper.warpgroup_mma_wait(0, deps=(x2, y))
        mbarrier.arrive(q_bars.index(1), count=1)
        mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), count=1)
        phase ^= 1
        columns = gl.arange(0, D, gl.SliceLayout(0, y_layout))
        v_scale = gl.load(v_scale_ptr + head * D + columns)
        v_mean = gl.load(v_mean_ptr + head * D + columns)
        inverse = gl.convert_layout(1.0 / total, y_rows, assert_trivial=True)
        result = result * inverse[:, None] * v_scale[None, :] + v_mean[None, :]
        result = gl.convert_layout(result.to(y_ptr.dtype.element_ty), out)
        rows = top + gl.arange(0, 64, gl.SliceLayout(1, out))
        columns = gl.arange(0, D, gl.SliceLayout(0, out))
        where = ((head // H * M + rows).to(gl.int64) * H + head % H) * OUT
        gl.store(
            y_ptr + where[:, None] + columns[None, :], result, mask=(rows < M)[:, None] & (columns < OUT)[None, :]
        )


@gluon.jit(do_not_specialize=["M", "L", "k_tiles", "tiles"])
def _attention8_hopper_kernel(
    q_desc, k_desc, v_desc, y_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, M, L, H, q_tiles, k_tiles,
    tiles, BN: gl.constexpr, D: gl.constexpr, OUT: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    AHEAD: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    q_buffers = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_buffers = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_buffers = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bars.index(0), count=1)
    mbarrier.init(q_bars.index(1), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    hopper.fence_async_shared()
    loads = (q_desc, k_desc, v_desc, q_buffers, k_buffers, v_buffers, q_bars, full, empty)
    ending = (y_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr)
    sizes = (M, L, H, q_tiles, k_tiles, tiles)
    gl.warp_specialize(
        [
            (_attend, (gl.constexpr(0), loads, ending, sizes, BN, D, OUT, STAGES, PROGRAMS, AHEAD)),
            (_attend, (gl.constexpr(1), loads, ending, sizes, BN, D, OUT, STAGES, PROGRAMS, AHEAD)),
            (_load, (loads, sizes, BN, D, STAGES, PROGRAMS)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


def attention(codes: Codes8, y: Tensor, tokens: int, config: dict | None = None) -> None:
    """codes as codes8.py makes them -> y [B, M, H, d] 16-bit, which is written. config: BN, STAGES."""
    q, q_scales, k, k_scales, v, v_scales, v_means = codes
    batch, rows, heads, width = y.shape
    launch = _launch(config or DEFAULT, batch, heads, rows, tokens, width, q.dtype, y.device)
    launch(q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2), y, q_scales, k_scales, v_scales, v_means)


@planned
def _launch(
    config: dict, batch: int, heads: int, rows: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> Launch:
    bn, channels = config["BN"], padded(width)
    q_tiles, k_tiles = cdiv(rows, 128), cdiv(tokens, bn)
    tiles = batch * heads * q_tiles
    programs = multiprocessors(device)
    blocks = dict(q_desc=(64, channels), k_desc=(bn, channels), v_desc=(channels, bn))
    return Launch(
        _attention8_hopper_kernel, (min(programs, tiles),), blocks, M=rows, L=tokens, H=heads, q_tiles=q_tiles,
        k_tiles=k_tiles, tiles=tiles, D=channels, OUT=width, PROGRAMS=programs, **config,
        COMPUTE_REGISTERS=COMPUTE_REGISTERS, LOAD_REGISTERS=LOAD_REGISTERS, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
