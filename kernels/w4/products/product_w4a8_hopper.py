"""The product of 8-bit codes for Hopper in Gluon: loads, and two halves of the arithmetic, in warps of their own.

    y[m, n] = f(a[m] c[n] (sum_k qx[m, k] w8[n, k] - z s[n])  +  sum_j branch[m, j] U[n, j]  +  b[n])

qx and w8 are e4m3 (sums float32) or int8 (sums int32, exact). SVDQuant's W4A8 has a branch, and the rest as in
product_w4a8.py; W8A8 has none, but may have one scale a[0] for all rows, and in int8 a zero point z, with
s[n] = sum_k w8[n, k]. As many programs as multiprocessors walk over the tiles, each in three groups of warps, of
which two have every second tile:

    1 warp    loads by TMA through a ring of STAGES pairs (rows, columns): K in steps of BK, then branch and U
    4 warps   | tile 0: products | scale, store |     wait     | tile 2: products | ...
    4 warps   |       wait       | tile 1: products            | scale, store     | ...

so that the tensor cores never wait for a tile to be scaled, finished and stored. A step of K is queued before the one
before it has ended, and releases that one's stage when it has. The three terms meet on one accumulator; branch and U
come through the ring as well, as 16-bit operands in stages made for 8-bit ones.

A stage is `full` when its bytes have come, `empty` when it has been read. A half begins (`order`) when the other has
seen all its stages full. That is more than a courtesy: a barrier knows only whether the number of its phases is even,
so nobody may wait for what comes next into a stage before what is to come first has come.

Tried on an H200 and left out, for they were slower: both halves on one tile of twice the size, smaller tiles.
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

# Of a thread: at the launch, of three groups of four warps; then the loads hand theirs to the arithmetic.
REGISTERS, COMPUTE_REGISTERS, LOAD_REGISTERS = 168, 240, 24
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _seen_as(buffers, index, desc):
    """One of the buffers as what this descriptor loads: the ring carries operands of 8 bits and of 16."""
    buffer = buffers.index(index)
    if RENAMED:
        return buffer.reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    else:
        return buffer._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def _fill(operands, buffers, barriers, slot, top, left, k, STAGES: gl.constexpr):
    """Load rows from `top` and columns from `left`, both at k, into the stage of the slot-th pair."""
    stage = slot % STAGES
    full = barriers[0].index(stage)
    mbarrier.wait(barriers[1].index(stage), slot // STAGES & 1 ^ 1)
    mbarrier.expect(full, operands[0].block_type.nbytes + operands[1].block_type.nbytes)
    async_load(operands[1], [left, k], full, _seen_as(buffers[1], stage, operands[1]))
    async_load(operands[0], [top, k], full, _seen_as(buffers[0], stage, operands[0]))


@gluon.jit
def _load(
    ring, sizes, R: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
):  # fmt: skip
    codes, branch, buffers, barriers = ring
    M, N, K, tiles = sizes
    slot = 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        top, left = tile_place(tile, M, N, BM, BN, BAND)
        for k in range(0, K, codes[0].block_type.shape[1]):
            _fill(codes, buffers, barriers, slot, top, left, k, STAGES)
            slot += 1
        if R > 0:
            STEP: gl.constexpr = branch[0].block_type.shape[1]
            for j in gl.static_range(0, R, STEP):
                _fill(branch, buffers, barriers, slot, top, left, j, STAGES)
                slot += 1


@gluon.jit
def _multiply(
    half: gl.constexpr, ring, ending, sizes, R: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, NONLINEARITY: gl.constexpr, ONE_SCALE: gl.constexpr,
):  # fmt: skip
    """Every second tile of a program: the products, then what is left of it while the other half multiplies."""
    codes, branch, buffers, barriers = ring
    full, empty = barriers
    y_desc, y_buffers, order, y_ptr, row_scale_ptr, column_scale_ptr, bias_ptr, zero_ptr, column_sum_ptr = ending
    SUM: gl.constexpr = gl.int32 if codes[0].dtype == gl.int8 else gl.float32
    M, N, K, tiles = sizes
    BRANCH_STEPS: gl.constexpr = 0 if R == 0 else R // branch[0].block_type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    layout16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # the same places
    steps = gl.cdiv(K, codes[0].block_type.shape[1])
    slot = half * (steps + BRANCH_STEPS)
    phase = 1 - half
    for tile in range(gl.program_id(0) + half * PROGRAMS, tiles, 2 * PROGRAMS):
        top, left = tile_place(tile, M, N, BM, BN, BAND)
        rows = top + gl.arange(0, BM, gl.SliceLayout(1, layout16))
        columns = left + gl.arange(0, BN, gl.SliceLayout(0, layout16))
        mbarrier.wait(order.index(half), phase)
        sums = gl.zeros((BM, BN), SUM, layout)
        for k in range(steps):
            stage = slot % STAGES
            mbarrier.wait(full.index(stage), slot // STAGES & 1)
            w = buffers[1].index(stage).permute((1, 0))
            sums = hopper.warpgroup_mma(buffers[0].index(stage), w, sums, use_acc=k > 0, is_async=True)
            sums = hopper.warpgroup_mma_wait(1, deps=(sums,))  # this step is under way, the one before has ended
            mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), count=1, pred=k > 0)
            slot += 1
        if BRANCH_STEPS == 1:  # more may need stages that are still to be emptied
            mbarrier.wait(full.index(slot % STAGES), slot // STAGES & 1)
        if BRANCH_STEPS < 2:
            mbarrier.arrive(order.index(1 - half), count=1)
        if ONE_SCALE:  # they come under the last step
            row_scale = gl.load(row_scale_ptr)
        else:
            row_scale = gl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
        column_scale = gl.load(column_scale_ptr + columns, mask=columns < N, other=0.0)[None, :]
        if zero_ptr is not None:
            offset = gl.load(zero_ptr) * gl.load(column_sum_ptr + columns, mask=columns < N, other=0)
        sums = hopper.warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), count=1)
        sums = gl.convert_layout(sums, layout16, assert_trivial=True)
        if zero_ptr is not None:
            sums -= offset[None, :]
        if R > 0:
            y = sums.to(gl.float32) * row_scale * column_scale
        else:  # the order of w8a8/product.py, and its bits
            y = sums.to(gl.float32) * (column_scale * row_scale)
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        for _ in gl.static_range(BRANCH_STEPS):
            stage = slot % STAGES
            mbarrier.wait(full.index(stage), slot // STAGES & 1)
            up = _seen_as(buffers[1], stage, branch[1]).permute((1, 0))
            y = hopper.warpgroup_mma(_seen_as(buffers[0], stage, branch[0]), up, y)
            mbarrier.arrive(empty.index(stage), count=1)
            slot += 1
        if BRANCH_STEPS > 1:
            mbarrier.arrive(order.index(1 - half), count=1)
        if bias_ptr is not None:
            y += bias.to(gl.float32)[None, :]
        y = nonlinear(y, NONLINEARITY)
        if y_desc is None:
            where = y_ptr + rows.to(gl.int64)[:, None] * N + columns[None, :]
            gl.store(where, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
        else:
            near, far = _halves(y)
            _store(near, y_desc, y_buffers, 2 * half, top, left)
            _store(far, y_desc, y_buffers, 2 * half, top, left + BN // 2)
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
        async_store(y_desc, [top, left + i * pieces[i].shape[1]], buffers.index(first + i))


@gluon.jit(do_not_specialize=["M", "tiles"])
def _product_hopper_kernel(
    a_desc, w_desc, branch_desc, up_desc, y_desc, y_ptr, row_scale_ptr, column_scale_ptr, bias_ptr, zero_ptr,
    column_sum_ptr, M, N, K, tiles, R: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, NONLINEARITY: gl.constexpr, ONE_SCALE: gl.constexpr,
    COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    rows = gl.allocate_shared_memory(a_desc.dtype, [STAGES] + a_desc.block_type.shape, a_desc.layout)
    columns = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    if y_desc is None:
        y_buffers: gl.constexpr = None
    else:
        y_buffers = gl.allocate_shared_memory(y_desc.dtype, [4] + y_desc.block_type.shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for half in gl.static_range(2):
        mbarrier.init(order.index(half), count=1)
    hopper.fence_async_shared()  # the barriers are there for TMA, too
    ring = ((a_desc, w_desc), (branch_desc, up_desc), (rows, columns), (full, empty))
    ending = (
        y_desc, y_buffers, order, y_ptr, row_scale_ptr, column_scale_ptr, bias_ptr, zero_ptr, column_sum_ptr,
    )  # fmt: skip
    sizes = (M, N, K, tiles)
    gl.warp_specialize(
        [
            (
                _multiply,
                (gl.constexpr(0), ring, ending, sizes, R, BM, BN, BAND, STAGES, PROGRAMS, NONLINEARITY, ONE_SCALE),
            ),
            (
                _multiply,
                (gl.constexpr(1), ring, ending, sizes, R, BM, BN, BAND, STAGES, PROGRAMS, NONLINEARITY, ONE_SCALE),
            ),
            (_load, (ring, sizes, R, BM, BN, BAND, STAGES, PROGRAMS)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


def product(
    activation: tuple, weight: tuple, up: Tensor | None, bias: Tensor | None, out: Tensor, config: dict,
    nonlinearity: str = "", one_scale: bool = False, zero: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:  # fmt: skip
    """Do what product_w4a8.product does, on Hopper; the branch may be None.

    one_scale: that of all rows is row_scale[0]. zero: (z [1], s [N]), int32, of int8 codes. config: BM, BN, BK, BAND,
    STAGES. Raises ValueError for other GPUs and other types of codes.
    """
    (codes, row_scale, branch), (w8, column_scale) = activation, weight
    (m, k), n, r = codes.shape, out.shape[1], 0 if branch is None else branch.shape[1]
    launch = _launch(config, m, n, k, r, nonlinearity, one_scale, codes.dtype, out.device)
    launch(
        codes, w8, branch if r else None, aligned(up), out if n % 8 == 0 and out.element_size() == 2 else None,
        out, row_scale, column_scale, bias, *zero,
    )  # fmt: skip


@planned
def _launch(
    config: dict, m: int, n: int, k: int, r: int, nonlinearity: str, one_scale: bool, dtype: torch.dtype,
    device: torch.device,
) -> Launch:  # fmt: skip
    check(dtype, device, (torch.float8_e4m3fn, torch.int8))
    bm, bn, bk = (config[name] for name in ("BM", "BN", "BK"))
    step = min(r, bk // 2)  # a stage has room for so many columns of 16 bits
    blocks = dict(a_desc=(bm, bk), w_desc=(bn, bk), branch_desc=(bm, step), up_desc=(bn, step), y_desc=(bm, bn // 4))
    tiles = cdiv(m, bm) * cdiv(n, bn)
    programs = multiprocessors(device)
    return Launch(
        _product_hopper_kernel, (min(programs, tiles),), blocks, M=m, N=n, K=k, tiles=tiles, R=r, PROGRAMS=programs,
        NONLINEARITY=nonlinearity, ONE_SCALE=one_scale, BM=bm, BN=bn, BAND=config["BAND"], STAGES=config["STAGES"],
        COMPUTE_REGISTERS=COMPUTE_REGISTERS, LOAD_REGISTERS=LOAD_REGISTERS, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
