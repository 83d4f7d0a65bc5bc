"""What one half of the arithmetic does in svdq_gluon.py: products of its tiles, their ending, their stores.

    y = a c^T * (qx w8^T)  +  branch U^T  +  b        the three terms on one accumulator, in this order

A step of K is queued before the one before it has ended, and releases that one's stage when it has. Scales come
under the last step; branch and U through the ring, as 16-bit operands in stages made for 8-bit ones.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Gluon's names in Triton 3.6, and what they have become since.
load_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_block = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def place(tile, M, N, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr):
    """(first row, first column), in the order of svdq_gemm.tile_place."""
    width = BAND * gl.cdiv(N, BN)
    first = tile // width * BAND
    height = gl.minimum(gl.cdiv(M, BM) - first, BAND)
    return (first + tile % width % height) * BM, tile % width // height * BN


@gluon.jit
def seen_as(buffers, index, desc):
    """One of the buffers as what this descriptor loads: the ring carries operands of 8 bits and of 16."""
    buffer = buffers.index(index)
    if RENAMED:
        return buffer.reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    else:
        return buffer._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def compute(
    half: gl.constexpr, ring, ending, sizes, R: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr,
    STAGES: gl.constexpr, PINGPONG: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    codes, branch, buffers, barriers = ring
    full, empty = barriers
    y_desc, y_buffers, order, y_ptr, row_scale_ptr, column_scale_ptr, bias_ptr = ending
    M, N, K, tiles = sizes
    PARTS: gl.constexpr = 1 if PINGPONG else 2
    ROWS: gl.constexpr = BM // PARTS
    BK: gl.constexpr = codes[0].block_type.shape[1]
    BRANCH_STEPS: gl.constexpr = 0 if R == 0 else R // branch[0].block_type.shape[1]
    part: gl.constexpr = 0 if PINGPONG else half  # of the rows of a stage
    turn: gl.constexpr = half if PINGPONG else 0  # among the tiles
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    layout16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # the same places
    steps = gl.cdiv(K, BK)
    slot = turn * (steps + BRANCH_STEPS)
    phase = 1 - half
    for tile in range(gl.program_id(0) + turn * PROGRAMS, tiles, 2 // PARTS * PROGRAMS):
        top, left = place(tile, M, N, BM, BN, BAND)
        top += part * ROWS
        rows = top + gl.arange(0, ROWS, gl.SliceLayout(1, layout16))
        columns = left + gl.arange(0, BN, gl.SliceLayout(0, layout16))
        if PINGPONG:
            mbarrier.wait(order.index(half), phase)
        sums = gl.zeros((ROWS, BN), gl.float32, layout)
        for k in range(steps):
            stage = slot % STAGES
            mbarrier.wait(full.index(stage), slot // STAGES & 1)
            w = buffers[1].index(stage).permute((1, 0))
            a = buffers[0].index(stage * PARTS + part)
            sums = hopper.warpgroup_mma(a, w, sums, use_acc=k > 0, is_async=True)
            sums = hopper.warpgroup_mma_wait(1, deps=(sums,))  # this step is under way, the one before has ended
            mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), count=1, pred=k > 0)
            slot += 1
        if BRANCH_STEPS == 1:  # more may need stages that are still to be emptied
            mbarrier.wait(full.index(slot % STAGES), slot // STAGES & 1)
        if PINGPONG and BRANCH_STEPS < 2:
            mbarrier.arrive(order.index(1 - half), count=1)
        row_scale = gl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)  # they come under the last step
        column_scale = gl.load(column_scale_ptr + columns, mask=columns < N, other=0.0)
        sums = hopper.warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), count=1)
        y = gl.convert_layout(sums, layout16, assert_trivial=True) * row_scale[:, None] * column_scale[None, :]
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        for _ in gl.static_range(BRANCH_STEPS):
            stage = slot % STAGES
            mbarrier.wait(full.index(stage), slot // STAGES & 1)
            up = seen_as(buffers[1], stage, branch[1]).permute((1, 0))
            y = hopper.warpgroup_mma(seen_as(buffers[0], stage * PARTS + part, branch[0]), up, y)
            mbarrier.arrive(empty.index(stage), count=1)
            slot += 1
        if PINGPONG and BRANCH_STEPS > 1:
            mbarrier.arrive(order.index(1 - half), count=1)
        if bias_ptr is not None:
            y += bias.to(gl.float32)[None, :]
        if y_desc is None:
            where = y_ptr + rows.to(gl.int64)[:, None] * N + columns[None, :]
            gl.store(where, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
        else:
            near, far = _halves(y)
            _store(near, y_desc, y_buffers, 2 * half, top, left)
            _store(far, y_desc, y_buffers, 2 * half, top, left + BN // 2)
        if PINGPONG:
            slot += steps + BRANCH_STEPS
            phase ^= 1
    tma.store_wait(0)


@gluon.jit
def _halves(y):
    """The left and the right half of the columns, in the registers where they are."""
    return gl.split(y.reshape((y.shape[0], 2, y.shape[1] // 2)).permute((0, 2, 1)))


@gluon.jit
def _store(y, y_desc, buffers, first: gl.constexpr, top, left):
    """In two pieces, from two buffers: the store of one is under way while the other is written."""
    pieces = _halves(y)
    for i in gl.static_range(2):
        tma.store_wait(1)  # the last store but one has read this buffer
        buffers.index(first + i).store(pieces[i].to(y_desc.dtype))
        hopper.fence_async_shared()
        store_block(y_desc, [top, left + i * pieces[i].shape[1]], buffers.index(first + i))
