"""The W4A4 product of SVDQuant on Hopper, in Gluon: the formula of svdq_w4a4.py, sums and scaling at the same time.

    y[m, n] = sum_g a[g, m] s[g, n] sum_{k in g} qx[m, k] qw[n, k]  +  sum_j branch[m, j] U[n, j]  +  b[n]

A group of a 128 x 128 tile takes 256 clocks of a multiprocessor's tensor cores (e4m3), and its scaling, two
operations on every sum, 256 of its other cores: in Triton one waits for the other. Here a warp loads by TMA into a
ring of STAGES, each GROUPS groups with their scales, and each of WARPGROUPS others multiplies 64 rows by pieces of
PIECE outputs: while the tensor cores sum one piece, it scales the piece before. Two sets of sums take turns, so
GROUPS * BN / PIECE is even. The ring also carries one warpgroup on while another stores its rows.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .svdq_gemm import multiprocessors, tile_place

TYPES = {
    torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16,
    torch.float32: gl.float32,
}  # fmt: skip
# Gluon is experimental: later versions of Triton have the first names, earlier ones the second.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _load(
    a_desc, w_desc, a_scale_desc, w_scale_desc, branch_desc, up_desc, ring, sizes,
    WARPGROUPS: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, R: gl.constexpr, BAND: gl.constexpr,
    PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring for all tiles of this program; then the blocks of the low-rank branch of each."""
    a_ring, w_ring, a_scales, w_scales, branch_block, up_block, full, empty, low_full, low_empty = ring
    M, N, steps, tiles = sizes
    BM: gl.constexpr = 64 * WARPGROUPS
    slot = 0
    phase = 1
    low_phase = 1
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        top, left = tile_place(tile, M, N, BM, BN, BAND)
        for step in range(0, steps):
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(bar, (BM + BN) * GROUPS * 68)
            for c in gl.static_range(WARPGROUPS):
                place = slot * WARPGROUPS + c
                async_load(a_desc, [top + c * 64, step * GROUPS * 64], bar, a_ring.index(place))
                for u in gl.static_range(GROUPS):
                    first = (step * GROUPS + u) * M + top + c * 64
                    async_load(a_scale_desc, [first], bar, a_scales.index(place * GROUPS + u))
            async_load(w_desc, [left, step * GROUPS * 64], bar, w_ring.index(slot))
            for u in gl.static_range(GROUPS):
                first = (step * GROUPS + u) * N + left
                async_load(w_scale_desc, [first], bar, w_scales.index(slot * GROUPS + u))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        if R > 0:
            BLOCK: gl.constexpr = branch_desc.block_type.shape[1]
            for j in range(0, R, BLOCK):
                mbarrier.wait(low_empty, low_phase)
                mbarrier.expect(low_full, (BM + BN) * BLOCK * 2)
                for c in gl.static_range(WARPGROUPS):
                    async_load(branch_desc, [top + c * 64, j], low_full, branch_block.index(c))
                async_load(up_desc, [left, j], low_full, up_block)
                low_phase ^= 1


@gluon.jit
def _scaled(y, sums, a_scale, w_scale, layout: gl.constexpr):
    """y + sums * scales, the scales read from shared memory as they are needed."""
    columns = w_scale.load(gl.SliceLayout(0, layout))
    rows = a_scale.load(gl.SliceLayout(1, layout))
    return y + (sums * columns[None, :]) * rows[:, None]


@gluon.jit
def _multiply(
    y_desc, y_ptr, bias_ptr, ring, y_block, sizes, WARPGROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, R: gl.constexpr,
    BAND: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows of all tiles of this program."""
    a_ring, w_ring, a_scales, w_scales, branch_block, up_block, full, empty, low_full, low_empty = ring
    M, N, steps, tiles = sizes
    PIECES: gl.constexpr = BN // PIECE
    BUFFERS: gl.constexpr = 2 if PIECES > 1 else 1
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 32])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    zeros = gl.zeros([64, PIECE], gl.float32, layout)
    slot = 0
    phase = 0
    low_phase = 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        top, left = tile_place(tile, M, N, 64 * WARPGROUPS, BN, BAND)
        top += 64 * WARPGROUP
        ys = (zeros,)  # the next piece to be scaled stands first
        for _ in gl.static_range(PIECES - 1):
            ys = ys + (zeros,)
        sums = zeros
        for step in range(0, steps):
            mbarrier.wait(full.index(slot), phase)
            last = gl.where(step > 0, gl.where(slot > 0, slot, STAGES) - 1, slot)
            for u in gl.static_range(GROUPS):
                a = a_ring.index(slot * WARPGROUPS + WARPGROUP).slice(u * 64, 64, 1)
                for p in gl.static_range(PIECES):
                    w = w_ring.index(slot).slice(p * PIECE, PIECE, 0).slice(u * 64, 64, 1)
                    token = warpgroup_mma(a, w.permute((1, 0)), zeros, use_acc=False, is_async=True)
                    before = last if u + p == 0 else slot  # of the sums that are there; at the very first, zeros
                    group = (u - (p == 0)) % GROUPS
                    w_scale = w_scales.index(before * GROUPS + group).slice((p - 1) % PIECES * PIECE, PIECE)
                    a_scale = a_scales.index((before * WARPGROUPS + WARPGROUP) * GROUPS + group)
                    ys = ys[1:] + (_scaled(ys[0], sums, a_scale, w_scale, layout),)
                    if u + p == 0:
                        mbarrier.arrive(empty.index(last), pred=step > 0)
                    sums = warpgroup_mma_wait(0, deps=[token])
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        last = gl.where(slot > 0, slot, STAGES) - 1
        w_scale = w_scales.index(last * GROUPS + GROUPS - 1).slice((PIECES - 1) * PIECE, PIECE)
        a_scale = a_scales.index((last * WARPGROUPS + WARPGROUP + 1) * GROUPS - 1)
        ys = ys[1:] + (_scaled(ys[0], sums, a_scale, w_scale, layout),)
        mbarrier.arrive(empty.index(last))
        outs = ()
        for p in gl.static_range(PIECES):
            outs = outs + (gl.convert_layout(ys[p], wide, assert_trivial=True),)
        if R > 0:
            for _ in range(0, R, up_block.shape[1]):
                mbarrier.wait(low_full, low_phase)
                for p in gl.static_range(PIECES):
                    up = up_block.slice(p * PIECE, PIECE, 0).permute((1, 0))
                    outs = outs[1:] + (warpgroup_mma(branch_block.index(WARPGROUP), up, outs[0]),)
                mbarrier.arrive(low_empty)
                low_phase ^= 1
        for p in gl.static_range(PIECES):
            y = outs[p]
            columns = left + p * PIECE + gl.arange(0, PIECE, gl.SliceLayout(0, wide))
            if bias_ptr is not None:
                y += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
            if y_desc is None:
                rows = top + gl.arange(0, 64, gl.SliceLayout(1, wide))
                where = y_ptr + rows.to(gl.int64)[:, None] * N + columns[None, :]
                gl.store(where, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
            else:
                buffer = y_block.index(WARPGROUP * BUFFERS + p % BUFFERS)
                tma.store_wait(BUFFERS - 1)  # until what this buffer held is stored
                buffer.store(y.to(y_desc.dtype))
                fence_async_shared()
                async_store(y_desc, [top, left + p * PIECE], buffer)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "steps", "tiles"])  # a 1 among them would not fit the tuple of sizes
def _w4a4_hopper_kernel(
    a_desc, w_desc, a_scale_desc, w_scale_desc, branch_desc, up_desc, y_desc, y_ptr, bias_ptr, M, N, steps, tiles,
    WARPGROUPS: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr, R: gl.constexpr,
    BAND: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SLOTS: gl.constexpr = STAGES * WARPGROUPS
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [SLOTS, 64, 64 * GROUPS], a_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, 64 * GROUPS], w_desc.layout)
    a_scales = gl.allocate_shared_memory(gl.float32, [SLOTS * GROUPS, 64], a_scale_desc.layout)
    w_scales = gl.allocate_shared_memory(gl.float32, [STAGES * GROUPS, BN], w_scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    low_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    low_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    branch_block = a_ring
    up_block = w_ring
    if R > 0:
        shape: gl.constexpr = branch_desc.block_type.shape
        branch_block = gl.allocate_shared_memory(branch_desc.dtype, [WARPGROUPS, 64, shape[1]], branch_desc.layout)
        up_block = gl.allocate_shared_memory(up_desc.dtype, [BN, shape[1]], up_desc.layout)
    y_block = a_ring
    if y_desc is not None:
        buffers: gl.constexpr = WARPGROUPS * (2 if PIECE < BN else 1)
        y_block = gl.allocate_shared_memory(y_desc.dtype, [buffers, 64, PIECE], y_desc.layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    mbarrier.init(low_full, count=1)
    mbarrier.init(low_empty, count=WARPGROUPS)
    fence_async_shared()
    ring = (a_ring, w_ring, a_scales, w_scales, branch_block, up_block, full, empty, low_full, low_empty)
    sizes = (M, N, steps, tiles)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (y_desc, y_ptr, bias_ptr, ring, y_block, sizes, 0,
                             WARPGROUPS, GROUPS, BN, PIECE, R, BAND, PROGRAMS, STAGES)),
                (_multiply, (y_desc, y_ptr, bias_ptr, ring, y_block, sizes, 1,
                             WARPGROUPS, GROUPS, BN, PIECE, R, BAND, PROGRAMS, STAGES)),
                (_load, (a_desc, w_desc, a_scale_desc, w_scale_desc, branch_desc, up_desc, ring, sizes,
                         WARPGROUPS, GROUPS, BN, R, BAND, PROGRAMS, STAGES)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (y_desc, y_ptr, bias_ptr, ring, y_block, sizes, 0,
                             WARPGROUPS, GROUPS, BN, PIECE, R, BAND, PROGRAMS, STAGES)),
                (_multiply, (y_desc, y_ptr, bias_ptr, ring, y_block, sizes, 1,
                             WARPGROUPS, GROUPS, BN, PIECE, R, BAND, PROGRAMS, STAGES)),
                (_multiply, (y_desc, y_ptr, bias_ptr, ring, y_block, sizes, 2,
                             WARPGROUPS, GROUPS, BN, PIECE, R, BAND, PROGRAMS, STAGES)),
                (_load, (a_desc, w_desc, a_scale_desc, w_scale_desc, branch_desc, up_desc, ring, sizes,
                         WARPGROUPS, GROUPS, BN, R, BAND, PROGRAMS, STAGES)),
            ],
            [4, 4, 1], [160, 160, 24],
        )  # fmt: skip


def _blocks(tensor: Tensor | None, *size: int) -> TensorDescriptor | None:
    if tensor is None:
        return None
    layout = gl.NVMMASharedLayout.get_default_for(list(size), TYPES[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, list(size), layout)


def product(
    activation: tuple, weight: tuple, up: Tensor | None, bias: Tensor | None, out: Tensor, config: dict
) -> None:
    """As svdq_w4a4.product, for codes in e4m3.

    config: WARPGROUPS (2, 3), GROUPS (1, 2), BN, PIECE, BAND, STAGES.
    """
    (codes, a_scale, branch), (w, w_scale) = activation, weight
    (m, k), n, r = codes.shape, len(w), branch.shape[1]
    bn, piece, k_step = config["BN"], config["PIECE"], 64 * config["GROUPS"]
    if up is not None and (up.shape[1] % 8 or up.data_ptr() % 16):  # rows of a TMA operand begin at multiples of 16
        up = torch.nn.functional.pad(up, (0, -up.shape[1] % 8)).clone()
    tiles = triton.cdiv(m, 64 * config["WARPGROUPS"]) * triton.cdiv(n, bn)
    programs = multiprocessors(out.device)
    _w4a4_hopper_kernel[(min(programs, tiles),)](
        _blocks(codes, 64, k_step), _blocks(w, bn, k_step), _blocks(a_scale.view(-1), 64),
        _blocks(w_scale.view(-1), bn), _blocks(branch if r else None, 64, min(r, 32)), _blocks(up, bn, min(r, 32)),
        _blocks(out, 64, piece) if n % 8 == 0 else None,
        out, bias, m, n, triton.cdiv(k, k_step), tiles,
        R=r, PROGRAMS=programs, num_warps=4,
        **{name: config[name] for name in ("WARPGROUPS", "GROUPS", "BN", "PIECE", "BAND", "STAGES")},
    )  # fmt: skip
