"""Attention on 8-bit operands for Hopper in Gluon: loads, and two halves of 128 queries, in warps of their own.

    x[m, n] = a[m] b[block of n] sum_j qc[m, j] kc[n, j]      a holds scale * log2(e);  sums exact in int32, or float32
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
DEFAULT = {"BN": 128, "STAGES": 4, "TURNS": True, "APART": True}
# Four values that a thread has side by side as four bytes of e4m3, and the bytes as an operand. In between they are
# one number: what a loop carries as bytes is moved byte by byte.
PACK = gl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $5, $4; cvt.rn.satfinite.e4m3x2.f32 b, $7, $6; "
    "mov.b32 $0, {a, b}; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
)
SEEN = gl.constexpr("mov.b32 $0, $1;")


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
def _packed(p, BN: gl.constexpr, layout: gl.constexpr):
    """P as the left operand in e4m3, four to a number: no value leaves its thread, but keys change places in 16."""
    p = p.reshape((64, BN // 16, 2, 4, 2)).permute((0, 1, 3, 2, 4)).reshape((64, BN))
    p = gl.convert_layout(p, layout, assert_trivial=True)
    p = gl.inline_asm_elementwise(PACK, "=r,=r,=r,=r,r,r,r,r", [p], gl.int32, True, 4)
    p, _ = gl.split(p.reshape((64, BN // 4, 2, 2)))
    p, _ = gl.split(p)
    return p


@gluon.jit
def _operand(packed, BN: gl.constexpr, layout: gl.constexpr):
    p = gl.join(packed, packed)
    p = gl.join(p, p).reshape((64, BN))
    p = gl.convert_layout(p, layout, assert_trivial=True)
    return gl.inline_asm_elementwise(SEEN, "=r,r,r,r,r", [p], gl.float8e4nv, True, 4)


def _powers(of_four: int) -> gl.constexpr:
    """2^x of four numbers, `of_four` of them by arithmetic."""
    lines = []
    for i in range(4):
        if i < of_four:
            lines.append(
                f"max.f32 t, ${4 + i}, 0fC2FC0000; add.rn.f32 n, t, 0f4B400000; sub.rn.f32 r, n, 0f4B400000; "
                "sub.rn.f32 r, t, r; fma.rn.f32 t, r, 0f3E75FDF0, 0f3F31A30C; fma.rn.f32 t, t, r, 0f3F800000; "
                f"mov.b32 a, n; mov.b32 b, t; shl.b32 a, a, 23; add.s32 a, a, b; mov.b32 ${i}, a;"
            )
        else:
            lines.append(f"ex2.approx.ftz.f32 ${i}, ${4 + i};")
    return gl.constexpr("{ .reg .f32 t, n, r; .reg .b32 a, b; " + " ".join(lines) + " }")


POWERS1, POWERS2 = _powers(1), _powers(2)


@gluon.jit
def _power(x, POLY: gl.constexpr):
    if POLY == 1:
        return gl.inline_asm_elementwise(POWERS1, "=f,=f,=f,=f,f,f,f,f", [x], gl.float32, True, 4)
    elif POLY == 2:
        return gl.inline_asm_elementwise(POWERS2, "=f,=f,=f,=f,f,f,f,f", [x], gl.float32, True, 4)
    else:
        return gl.exp2(x)


@gluon.jit
def _halves(x):
    """The left and the right half of the columns, in the registers where they are."""
    return gl.split(x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)))


@gluon.jit
def _largest(x, TREE: gl.constexpr, rows: gl.constexpr):
    """Of each row. In one chain, as gl.max has it, every number would wait for the one before it."""
    if TREE:
        STEPS: gl.constexpr = x.shape[1].bit_length() - 4
        for _ in gl.static_range(STEPS):
            a, b = _halves(x)
            x = gl.maximum(a, b)
        return gl.convert_layout(gl.max(x, 1), rows, assert_trivial=True)
    else:
        return gl.max(x, 1)


@gluon.jit
def _sums(x, TREE: gl.constexpr, rows: gl.constexpr):
    if TREE:
        STEPS: gl.constexpr = x.shape[1].bit_length() - 4
        for _ in gl.static_range(STEPS):
            a, b = _halves(x)
            x = a + b
        return gl.convert_layout(gl.sum(x, 1), rows, assert_trivial=True)
    else:
        return gl.sum(x, 1)


@gluon.jit
def _step(
    half: gl.constexpr, q, k_buffers, v_buffers, full, empty, order, slot, turn, scale, y, p, peak, total, correction,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, APART: gl.constexpr,
    LAZY: gl.constexpr, POLY: gl.constexpr, TREE: gl.constexpr, EARLY: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """One block of keys, and the values of the block before it."""
    x_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    y_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, y_layout, 4)
    x_rows: gl.constexpr = gl.SliceLayout(1, x_layout)
    y_rows: gl.constexpr = gl.SliceLayout(1, y_layout)
    sums: gl.constexpr = gl.int32 if q.dtype == gl.int8 else gl.float32
    stage = slot % STAGES
    phase = slot // STAGES & 1
    mbarrier.wait(full.index(stage), phase)
    if TURNS:
        mbarrier.wait(order.index(half), turn)
    k = k_buffers.index(stage).permute((1, 0))
    v = v_buffers.index(stage).permute((1, 0))
    x = hopper.warpgroup_mma(q, k, gl.zeros((64, BN), sums, x_layout), use_acc=False, is_async=True)
    if LATE:  # under way are the products with the keys
        y = y * correction[:, None]
        p = _packed(p, BN, p_layout)
    if APART:
        part = gl.zeros((64, D), gl.float32, y_layout)
        part = hopper.warpgroup_mma(_operand(p, BN, p_layout), v, part, use_acc=False, is_async=True)
    else:
        part = hopper.warpgroup_mma(_operand(p, BN, p_layout), v, y, is_async=True)
    if TURNS:
        mbarrier.arrive(order.index(1 - half), count=1)
    x = hopper.warpgroup_mma_wait(1, deps=(x,))
    above = _largest(x, TREE, x_rows).to(gl.float32) * scale
    if LAZY > 0:
        above = gl.where(above > peak + LAZY, above, peak)
        moved = gl.max((above > peak).to(gl.int32), 0)
    else:
        above = gl.maximum(peak, above)
    next_p = _power(x.to(gl.float32) * scale[:, None] - (above - (TOP - LAZY))[:, None], POLY)
    lower = gl.exp2(peak - above)
    total = total * lower + _sums(next_p, TREE, x_rows)
    if LATE:
        packed = next_p
    elif EARLY:
        packed = _packed(next_p, BN, p_layout)
    # This wait has nothing to wait for. But ptxas would have the next one before all that is above.
    mbarrier.wait(full.index(stage), phase)
    part = hopper.warpgroup_mma_wait(0, deps=(part,))
    if APART:
        y = y * correction[:, None] + part
    else:
        y = part
    correction = gl.convert_layout(lower, y_rows, assert_trivial=True)
    if LATE:
        pass
    elif LAZY > 0:
        if moved > 0:
            y = y * correction[:, None]
    elif not APART:
        y = y * correction[:, None]
    mbarrier.arrive(empty.index(stage), count=1)
    if not LATE and not EARLY:
        packed = _packed(next_p, BN, p_layout)
    return y, packed, above, total, correction


@gluon.jit
def _attend(
    half: gl.constexpr, ring, ending, sizes, BN: gl.constexpr, D: gl.constexpr, OUT: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, TURNS: gl.constexpr, APART: gl.constexpr, LAZY: gl.constexpr, POLY: gl.constexpr, TREE: gl.constexpr, PAIR: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, q_buffers, k_buffers, v_buffers, q_bars, full, empty = ring
    y_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, order = ending
    M, L, H, q_tiles, k_tiles, tiles = sizes
    x_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    y_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, y_layout, 4)
    x_rows: gl.constexpr = gl.SliceLayout(1, x_layout)
    y_rows: gl.constexpr = gl.SliceLayout(1, y_layout)
    exact: gl.constexpr = q_desc.dtype == gl.int8
    sums: gl.constexpr = gl.int32 if exact else gl.float32
    out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q = q_buffers.index(half)
    slot = 0
    turn = 1 - half
    phase = 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        head = tile // q_tiles
        top = tile % q_tiles * 128 + half * 64
        q_scale = gl.load(q_scale_ptr + head * q_tiles * 128 + top + gl.arange(0, 64, x_rows))
        k_scales = k_scale_ptr + head * k_tiles
        k_scale = gl.load(k_scales + k_tiles - 1)
        mbarrier.wait(q_bars.index(0), phase)
        mbarrier.wait(full.index(slot % STAGES), slot // STAGES & 1)
        if TURNS:
            mbarrier.wait(order.index(half), turn)
            turn ^= 1
        x = gl.zeros((64, BN), sums, x_layout)
        k = k_buffers.index(slot % STAGES).permute((1, 0))
        x = hopper.warpgroup_mma(q, k, x, use_acc=False, is_async=True)
        if TURNS:
            mbarrier.arrive(order.index(1 - half), count=1)
        x = hopper.warpgroup_mma_wait(0, deps=(x,))
        mbarrier.arrive(empty.index(slot % STAGES), count=1)
        slot += 1
        past = (k_tiles - 1) * BN + gl.arange(0, BN, gl.SliceLayout(0, x_layout)) >= L
        logits = x.to(gl.float32)
        scale = q_scale * k_scale
        peak = gl.max(gl.where(past[None, :], float("-inf"), logits), 1) * scale
        first_p = gl.where(past[None, :], 0.0, gl.exp2(logits * scale[:, None] - (peak - (TOP - LAZY))[:, None]))
        total = gl.sum(first_p, 1)
        if LATE:
            p = first_p
        else:
            p = _packed(first_p, BN, p_layout)
        correction = gl.full((64,), 0.0, gl.float32, y_rows)
        y = gl.zeros((64, D), gl.float32, y_layout)
        last = k_tiles - 1
        if PAIR:
            for i in range(1, last, 2):
                scale = q_scale * gl.load(k_scales + last - i)
                y, p2, peak, total, correction = _step(
                    half,
                    q,
                    k_buffers,
                    v_buffers,
                    full,
                    empty,
                    order,
                    slot,
                    turn,
                    scale,
                    y,
                    p,
                    peak,
                    total,
                    correction,
                    BN,
                    D,
                    STAGES,
                    TURNS,
                    APART,
                    LAZY,
                    POLY,
                    TREE,
                    True,
                    LATE,
                )
                slot += 1
                turn ^= 1
                scale = q_scale * gl.load(k_scales + last - i - 1)
                y, p, peak, total, correction = _step(
                    half,
                    q,
                    k_buffers,
                    v_buffers,
                    full,
                    empty,
                    order,
                    slot,
                    turn,
                    scale,
                    y,
                    p2,
                    peak,
                    total,
                    correction,
                    BN,
                    D,
                    STAGES,
                    TURNS,
                    APART,
                    LAZY,
                    POLY,
                    TREE,
                    True,
                    LATE,
                )
                slot += 1
                turn ^= 1
            if last % 2 == 1:
                scale = q_scale * gl.load(k_scales)
                y, p, peak, total, correction = _step(
                    half,
                    q,
                    k_buffers,
                    v_buffers,
                    full,
                    empty,
                    order,
                    slot,
                    turn,
                    scale,
                    y,
                    p,
                    peak,
                    total,
                    correction,
                    BN,
                    D,
                    STAGES,
                    TURNS,
                    APART,
                    LAZY,
                    POLY,
                    TREE,
                    False,
                    LATE,
                )
                slot += 1
                turn ^= 1
        else:
            for i in range(1, k_tiles):
                scale = q_scale * gl.load(k_scales + last - i)
                y, p, peak, total, correction = _step(
                    half,
                    q,
                    k_buffers,
                    v_buffers,
                    full,
                    empty,
                    order,
                    slot,
                    turn,
                    scale,
                    y,
                    p,
                    peak,
                    total,
                    correction,
                    BN,
                    D,
                    STAGES,
                    TURNS,
                    APART,
                    LAZY,
                    POLY,
                    TREE,
                    False,
                    LATE,
                )
                slot += 1
                turn ^= 1
        mbarrier.arrive(q_bars.index(1), count=1)
        mbarrier.wait(full.index(slot % STAGES), slot // STAGES & 1)
        v = v_buffers.index(slot % STAGES).permute((1, 0))
        if APART or LATE:
            y = y * correction[:, None]
        if LATE:
            last_p = _packed(p, BN, p_layout)
        else:
            last_p = p
        y = hopper.warpgroup_mma(_operand(last_p, BN, p_layout), v, y)
        mbarrier.arrive(empty.index(slot % STAGES), count=1)
        slot += 1
        phase ^= 1
        columns = gl.arange(0, D, gl.SliceLayout(0, y_layout))
        v_scale = gl.load(v_scale_ptr + head * D + columns)
        v_mean = gl.load(v_mean_ptr + head * D + columns)
        inverse = gl.convert_layout(1.0 / total, y_rows, assert_trivial=True)
        y = y * inverse[:, None] * v_scale[None, :] + v_mean[None, :]
        y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), out)
        rows = top + gl.arange(0, 64, gl.SliceLayout(1, out))
        columns = gl.arange(0, D, gl.SliceLayout(0, out))
        where = ((head // H * M + rows).to(gl.int64) * H + head % H) * OUT
        gl.store(y_ptr + where[:, None] + columns[None, :], y, mask=(rows < M)[:, None] & (columns < OUT)[None, :])


@gluon.jit(do_not_specialize=["M", "L", "tiles"])
def _attention8_hopper_kernel(
    q_desc, k_desc, v_desc, y_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, M, L, H, q_tiles, k_tiles, tiles,
    BN: gl.constexpr, D: gl.constexpr, OUT: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, TURNS: gl.constexpr,
    APART: gl.constexpr, LAZY: gl.constexpr, POLY: gl.constexpr, TREE: gl.constexpr, PAIR: gl.constexpr, LATE: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    q_buffers = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_buffers = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_buffers = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bars.index(0), count=1)
    mbarrier.init(q_bars.index(1), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for half in gl.static_range(2):
        mbarrier.init(order.index(half), count=1)
    hopper.fence_async_shared()
    ring = (q_desc, k_desc, v_desc, q_buffers, k_buffers, v_buffers, q_bars, full, empty)
    ending = (y_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, order)
    sizes = (M, L, H, q_tiles, k_tiles, tiles)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    gl.constexpr(0),
                    ring,
                    ending,
                    sizes,
                    BN,
                    D,
                    OUT,
                    STAGES,
                    PROGRAMS,
                    TURNS,
                    APART,
                    LAZY,
                    POLY,
                    TREE,
                    PAIR,
                    LATE,
                ),
            ),
            (
                _attend,
                (
                    gl.constexpr(1),
                    ring,
                    ending,
                    sizes,
                    BN,
                    D,
                    OUT,
                    STAGES,
                    PROGRAMS,
                    TURNS,
                    APART,
                    LAZY,
                    POLY,
                    TREE,
                    PAIR,
                    LATE,
                ),
            ),
            (_load, (ring, sizes, BN, D, STAGES, PROGRAMS)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


def attention(codes: Codes8, y: Tensor, tokens: int, config: dict | None = None) -> None:
    """codes as codes8.py makes them -> y [B, M, H, d] 16-bit, which is written. config: BN, STAGES, TURNS, APART."""
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
        k_tiles=k_tiles, tiles=tiles, D=channels, OUT=width, PROGRAMS=programs, **{"LAZY": 0, "POLY": 0, "TREE": True, "PAIR": False, "LATE": False} | config,
        COMPUTE_REGISTERS=COMPUTE_REGISTERS, LOAD_REGISTERS=LOAD_REGISTERS, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
