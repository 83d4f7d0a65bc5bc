"""The W4A4 product of SVDQuant on Hopper, in Gluon: the formula of product_w4a4.py, scaling under the next product.

    y[m, n] = f(sum_g a[g, m] s[g, n] sum_{k in g} qx[m, k] qw[n, k]  +  sum_j branch[m, j] U[n, j]  +  b[n])

As many programs as multiprocessors walk over tiles of 128 x BN, each in three groups of warps:

    1 warp    loads by TMA through a ring of STAGES, each two groups of inputs with their scales
    4 warps   multiply 64 rows; while the tensor cores sum one group, they scale the sums of the group before
    4 warps   the same with the other 64 rows; the ring carries them on while the first ones store theirs

Two groups a stage, so that two sets of sums take turns in registers without a move.

A group of a 128 x 128 tile takes 425 ns of an H200's multiprocessor (4608 x 9216 x 3072): 214 without scaling, 271
without products, 333 with scales that need no loading, 258 with one addition for the two operations. So products and
what issues beside them add up, where they should overlap, and no order of them changed that (one barrier more, the
halves in turns, three groups of 64 rows: 398 to 462 ns). For each 32 inputs the tensor cores read and write every sum
in the registers, which probably leaves others no turn.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ...runtime.hopper import async_load, async_store, check
from ...runtime.integers import cdiv
from ...runtime.launch import Launch, planned
from ...runtime.settings import multiprocessors
from .nonlinearity import nonlinear
from .tiles import aligned, tile_place


@gluon.jit
def _load(
    a_desc, w_desc, a_scale_desc, w_scale_desc, branch_desc, up_desc, ring, sizes, strides,
    BN: gl.constexpr, R: gl.constexpr, BAND: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring for all tiles of this program; then the blocks of the low-rank branch of each."""
    a_ring, w_ring, a_scales, w_scales, branch_block, up_block, full, empty = ring
    M, N, steps, tiles = sizes
    a_stride, w_stride = strides
    slot = 0
    phase = 1
    low_phase = 1
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        top, left = tile_place(tile, M, N, 128, BN, BAND)
        for step in range(0, steps):
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(bar, (128 + BN) * 2 * 68)  # of each group 64 codes of 1 byte, a scale of 4
            async_load(a_desc, [top, step * 128], bar, a_ring.index(slot))
            async_load(w_desc, [left, step * 128], bar, w_ring.index(slot))
            for u in gl.static_range(2):
                group = step * 2 + u
                async_load(a_scale_desc, [group * a_stride + top], bar, a_scales.index(slot * 2 + u))
                async_load(w_scale_desc, [group * w_stride + left], bar, w_scales.index(slot * 2 + u))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        if R > 0:
            BLOCK: gl.constexpr = branch_desc.block_type.shape[1]
            for j in range(0, R, BLOCK):
                bar = full.index(STAGES)
                mbarrier.wait(empty.index(STAGES), low_phase)
                mbarrier.expect(bar, (128 + BN) * BLOCK * 2)
                async_load(branch_desc, [top, j], bar, branch_block)
                async_load(up_desc, [left, j], bar, up_block)
                low_phase ^= 1


@gluon.jit
def _scaled(y, sums, a_scale, w_scale, layout: gl.constexpr):
    """y + sums * scales, the scales read from shared memory as they are needed."""
    columns = w_scale.load(gl.SliceLayout(0, layout))
    rows = a_scale.load(gl.SliceLayout(1, layout))
    return y + (sums * columns[None, :]) * rows[:, None]


@gluon.jit
def _multiply(
    y_desc, y_ptr, bias_ptr, ring, y_block, sizes, HALF: gl.constexpr,
    BN: gl.constexpr, R: gl.constexpr, BAND: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    NONLINEARITY: gl.constexpr,
):  # fmt: skip
    """The upper or the lower 64 rows of all tiles of this program."""
    a_ring, w_ring, a_scales, w_scales, branch_block, up_block, full, empty = ring
    M, N, steps, tiles = sizes
    FIRST: gl.constexpr = 64 * HALF
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # the same places
    zeros = gl.zeros([64, BN], gl.float32, layout)
    slot = 0
    phase = 0
    low_phase = 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        top, left = tile_place(tile, M, N, 128, BN, BAND)
        top += FIRST
        y = zeros
        sums = zeros  # what the first step scales, by scales of its own
        for step in range(0, steps):
            mbarrier.wait(full.index(slot), phase)
            last = gl.where(step > 0, gl.where(slot > 0, slot, STAGES) - 1, slot)
            for u in gl.static_range(2):
                a = a_ring.index(slot).slice(FIRST, 64, 0).slice(u * 64, 64, 1)
                w = w_ring.index(slot).slice(u * 64, 64, 1)
                token = hopper.warpgroup_mma(a, w.permute((1, 0)), zeros, use_acc=False, is_async=True)
                before = (last if u == 0 else slot) * 2 + 1 - u
                y = _scaled(y, sums, a_scales.index(before).slice(FIRST, 64), w_scales.index(before), layout)
                if u == 0:
                    mbarrier.arrive(empty.index(last), pred=step > 0)
                sums = hopper.warpgroup_mma_wait(0, deps=[token])
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        last = gl.where(slot > 0, slot, STAGES) - 1
        y = _scaled(y, sums, a_scales.index(last * 2 + 1).slice(FIRST, 64), w_scales.index(last * 2 + 1), layout)
        mbarrier.arrive(empty.index(last))
        y = gl.convert_layout(y, wide, assert_trivial=True)
        if R > 0:
            for _ in range(0, R, up_block.shape[1]):
                mbarrier.wait(full.index(STAGES), low_phase)
                y = hopper.warpgroup_mma(branch_block.slice(FIRST, 64, 0), up_block.permute((1, 0)), y)
                mbarrier.arrive(empty.index(STAGES))
                low_phase ^= 1
        columns = left + gl.arange(0, BN, gl.SliceLayout(0, wide))
        if bias_ptr is not None:
            y += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
        y = nonlinear(y, NONLINEARITY)
        if y_desc is None:
            rows = top + gl.arange(0, 64, gl.SliceLayout(1, wide))
            where = y_ptr + rows.to(gl.int64)[:, None] * N + columns[None, :]
            gl.store(where, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
        else:
            tma.store_wait(0)  # until the rows of the tile before have left the buffer
            y_block.index(HALF).store(y.to(y_desc.dtype))
            hopper.fence_async_shared()
            async_store(y_desc, [top, left], y_block.index(HALF))
    tma.store_wait(0)


# A 1 among sizes would not fit their tuple; and no size is worth a kernel of its own.
@gluon.jit(do_not_specialize=["M", "N", "steps", "tiles", "a_stride", "w_stride"])
def _w4a4_hopper_kernel(
    a_desc, w_desc, a_scale_desc, w_scale_desc, branch_desc, up_desc, y_desc, y_ptr, bias_ptr,
    M, N, steps, tiles, a_stride, w_stride,
    BN: gl.constexpr, R: gl.constexpr, BAND: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    NONLINEARITY: gl.constexpr,
):  # fmt: skip
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 128, 128], a_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, 128], w_desc.layout)
    a_scales = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 128], a_scale_desc.layout)
    w_scales = gl.allocate_shared_memory(gl.float32, [STAGES * 2, BN], w_scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], barrier)  # the last is for the low-rank branch
    empty = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], barrier)
    branch_block = a_ring
    up_block = w_ring
    if R > 0:
        branch_block = gl.allocate_shared_memory(branch_desc.dtype, branch_desc.block_type.shape, branch_desc.layout)
        up_block = gl.allocate_shared_memory(up_desc.dtype, up_desc.block_type.shape, up_desc.layout)
    y_block = a_ring
    if y_desc is not None:
        y_block = gl.allocate_shared_memory(y_desc.dtype, [2, 64, BN], y_desc.layout)
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    hopper.fence_async_shared()
    ring = (a_ring, w_ring, a_scales, w_scales, branch_block, up_block, full, empty)
    sizes = (M, N, steps, tiles)
    gl.warp_specialize(
        [
            (_multiply, (y_desc, y_ptr, bias_ptr, ring, y_block, sizes, 0, BN, R, BAND, PROGRAMS, STAGES,
                         NONLINEARITY)),
            (_multiply, (y_desc, y_ptr, bias_ptr, ring, y_block, sizes, 1, BN, R, BAND, PROGRAMS, STAGES,
                         NONLINEARITY)),
            (_load, (a_desc, w_desc, a_scale_desc, w_scale_desc, branch_desc, up_desc, ring, sizes,
                     (a_stride, w_stride), BN, R, BAND, PROGRAMS, STAGES)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def product(
    activation: tuple, weight: tuple, up: Tensor | None, bias: Tensor | None, out: Tensor, config: dict,
    nonlinearity: str = "",
) -> None:  # fmt: skip
    """Do what product_w4a4.product does, for e4m3 codes on Hopper; ValueError for others.

    config: BN, BAND, STAGES.
    """
    (codes, a_scale, branch), (w, w_scale) = activation, weight
    (m, k), n, r = codes.shape, out.shape[1], branch.shape[1]
    a_scale, w_scale = aligned(a_scale), aligned(w_scale)
    strides = a_scale.shape[1], w_scale.shape[1]
    launch = _launch(config, m, n, k, r, *strides, nonlinearity, codes.dtype, out.device)
    launch(
        codes, w, a_scale.flatten(), w_scale.flatten(), branch if r else None, aligned(up),
        out if n % 8 == 0 else None, out, bias,
    )  # fmt: skip


@planned
def _launch(
    config: dict, m: int, n: int, k: int, r: int, a_stride: int, w_stride: int, nonlinearity: str,
    dtype: torch.dtype, device: torch.device,
) -> Launch:  # fmt: skip
    check(dtype, device)
    bn, step = config["BN"], min(r, 32)
    blocks = dict(
        a_desc=(128, 128), w_desc=(bn, 128), a_scale_desc=(128,), w_scale_desc=(bn,),
        branch_desc=(128, step), up_desc=(bn, step), y_desc=(64, bn),
    )  # fmt: skip
    tiles = cdiv(m, 128) * cdiv(n, bn)
    programs = multiprocessors(device)
    return Launch(
        _w4a4_hopper_kernel, (min(programs, tiles),), blocks,
        M=m, N=n, steps=cdiv(k, 128), tiles=tiles, a_stride=a_stride, w_stride=w_stride,
        BN=bn, R=r, BAND=config["BAND"], PROGRAMS=programs, STAGES=config["STAGES"],
        NONLINEARITY=nonlinearity, num_warps=4,
    )  # fmt: skip
