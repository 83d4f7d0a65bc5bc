"""The W4A8 product of SVDQuant for Hopper in Gluon: loads, and two halves of the arithmetic, in warps of their own.

    y[m, n] = a[m] c[n] sum_k qx[m, k] w8[n, k]  +  sum_j branch[m, j] U[n, j]  +  b[n]

qx and w8 are e4m3, sums float32, the rest as in svdq_gemm.py. As many programs as multiprocessors walk over the
tiles, each in three groups of warps:

    1 warp    loads by TMA through a ring of STAGES pairs (rows, columns): K in steps of BK, then branch and U
    4 warps   multiply, scale, add branch and bias, store by TMA (svdq_gluon_tile.py)
    4 warps   the same

With PINGPONG each half of the arithmetic has every second tile, and multiplies while the other scales and stores:

    first    | tile 0: products | scale, store |     wait     | tile 2: products | ...
    second   |       wait       | tile 1: products            | scale, store     | ...

Without, each has half of the rows of every tile: room for tiles of twice the size, so fewer bytes from L2, but only
the loads of the next tile go on while this one is scaled and stored.

A stage is `full` when its bytes have come, `empty` when all that read it have. In ping-pong a half begins (`order`)
when the other has seen all its stages full. That is more than a courtesy: a barrier knows only whether the number of
its phases is even, so nobody may wait for what comes next into a stage before what is to come first has come.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import svdq_gemm, tuning
from .svdq_gluon_tile import compute, load_block, place, seen_as

# Of a thread: at the launch, of three groups of four warps; then the loads hand theirs to the arithmetic.
REGISTERS, COMPUTE_REGISTERS, LOAD_REGISTERS = 168, 240, 24
TYPES = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _fill(operands, buffers, barriers, slot, top, left, k, STAGES: gl.constexpr, PARTS: gl.constexpr):
    """Load rows from `top` and columns from `left`, both at k, into the stage of the slot-th pair."""
    stage = slot % STAGES
    full = barriers[0].index(stage)
    mbarrier.wait(barriers[1].index(stage), slot // STAGES & 1 ^ 1)
    mbarrier.expect(full, PARTS * operands[0].block_type.nbytes + operands[1].block_type.nbytes)
    load_block(operands[1], [left, k], full, seen_as(buffers[1], stage, operands[1]))
    for part in gl.static_range(PARTS):
        rows = seen_as(buffers[0], stage * PARTS + part, operands[0])
        load_block(operands[0], [top + part * rows.shape[0], k], full, rows)


@gluon.jit
def _load(
    ring, sizes, R: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    PINGPONG: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    codes, branch, buffers, barriers = ring
    M, N, K, tiles = sizes
    PARTS: gl.constexpr = 1 if PINGPONG else 2
    BK: gl.constexpr = codes[0].block_type.shape[1]
    slot = 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        top, left = place(tile, M, N, BM, BN, BAND)
        for k in range(0, K, BK):
            _fill(codes, buffers, barriers, slot, top, left, k, STAGES, PARTS)
            slot += 1
        if R > 0:
            STEP: gl.constexpr = branch[0].block_type.shape[1]
            for j in gl.static_range(0, R, STEP):
                _fill(branch, buffers, barriers, slot, top, left, j, STAGES, PARTS)
                slot += 1


@gluon.jit(do_not_specialize=["M", "tiles"])
def _specialized_kernel(
    a_desc, w_desc, branch_desc, up_desc, y_desc, y_ptr, row_scale_ptr, column_scale_ptr, bias_ptr, M, N, K, tiles,
    R: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    PINGPONG: gl.constexpr, PROGRAMS: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 1 if PINGPONG else 2
    rows = gl.allocate_shared_memory(a_desc.dtype, [STAGES * PARTS] + a_desc.block_type.shape, a_desc.layout)
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
        mbarrier.init(empty.index(stage), count=PARTS)
    for half in gl.static_range(2):
        mbarrier.init(order.index(half), count=1)
    fence_async_shared()  # the barriers are there for TMA, too
    ring = ((a_desc, w_desc), (branch_desc, up_desc), (rows, columns), (full, empty))
    ending = (y_desc, y_buffers, order, y_ptr, row_scale_ptr, column_scale_ptr, bias_ptr)
    sizes = (M, N, K, tiles)
    gl.warp_specialize(
        [
            (compute, (gl.constexpr(0), ring, ending, sizes, R, BM, BN, BAND, STAGES, PINGPONG, PROGRAMS)),
            (compute, (gl.constexpr(1), ring, ending, sizes, R, BM, BN, BAND, STAGES, PINGPONG, PROGRAMS)),
            (_load, (ring, sizes, R, BM, BN, BAND, STAGES, PINGPONG, PROGRAMS)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


def product(
    activation: tuple, weight: tuple, up: Tensor | None, bias: Tensor | None, out: Tensor, config: dict
) -> None:
    """What svdq_gemm.product does, for e4m3 codes on Hopper; ValueError for others.

    config: BM, BN, BK, BAND, STAGES, PINGPONG.
    """
    (codes, row_scale, branch), (w8, column_scale) = activation, weight
    if codes.dtype != torch.float8_e4m3fn or tuning.capability(out.device)[0] != 9:
        raise ValueError(f"settings with GLUON are for e4m3 on Hopper, not for {codes.dtype} on {out.device}.")
    (m, k), n, r = codes.shape, len(w8), branch.shape[1]
    bm, bn, bk = (config[name] for name in ("BM", "BN", "BK"))
    rows = bm if config["PINGPONG"] else bm // 2
    step = min(r, bk // 2)  # a stage has room for so many columns of 16 bits
    if up is not None and (up.shape[1] % 8 or up.data_ptr() % 16):  # rows of a TMA operand begin at multiples of 16
        up = torch.nn.functional.pad(up, (0, -up.shape[1] % 8)).clone()

    def blocks(tensor, *size):
        layout = gl.NVMMASharedLayout.get_default_for(list(size), TYPES[tensor.dtype])
        return TensorDescriptor.from_tensor(tensor, list(size), layout)

    tiles = triton.cdiv(m, bm) * triton.cdiv(n, bn)
    programs = svdq_gemm.multiprocessors(out.device)
    _specialized_kernel[(min(programs, tiles),)](
        blocks(codes, rows, bk), blocks(w8, bn, bk),
        blocks(branch, rows, step) if r else None, blocks(up, bn, step) if r else None,
        blocks(out, rows, bn // 4) if n % 8 == 0 else None,
        out, row_scale, column_scale, bias, m, n, k, tiles, R=r, PROGRAMS=programs,
        **{name: config[name] for name in ("BM", "BN", "BAND", "STAGES", "PINGPONG")},
        COMPUTE_REGISTERS=COMPUTE_REGISTERS, LOAD_REGISTERS=LOAD_REGISTERS, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
