"""Attention on 8-bit operands for Hopper in Gluon: loads, and two halves of 128 queries, in warps of their own.

    x[m, n] = a[m] b[n] sum_j qc[m, j] kc[n, j]
    p[m, n] = 2^(x[m, n] + log2 c[n] - peak_m + TOP),    l_m = sum_n p[m, n] / c[n]
    y[m, j] = sum_n e4m3(p[m, n]) vc[n, j] / l_m + mean[j]

As many programs as multiprocessors walk over tiles of 128 queries, each in three groups of warps:

    1 warp    loads by TMA: the queries of a tile, then blocks of 128 keys and values through a ring of STAGES
    4 warps   64 queries   | products with keys of block 2, values of block 0 | ... of 3 and 1       | ...
                           | exponentials of block 1                           | exponentials of 2    | ...
    4 warps   64 queries, the same

A half queues the products with the next block's keys, makes P of this block while these run, then queues those of P
with this block's values, and has no product to wait for that was not queued a whole block before. That takes two
sets of registers for x: the loop has two steps. P never leaves the registers: what a thread has of the sums is what
it must hold of an operand, if keys are counted in the order that codes8.py gives to the values. Blocks are taken from
the last one on, so that what lies past the end of the keys is seen in the first step alone.

With SPLIT the tiles of a last round that is not full are shared by all programs, by blocks of keys; their sums are
joined by a second kernel (join8.py). On an H200, 4608 tokens and 24 heads, that takes 0.90 of the time for codes in
e4m3 and changes nothing for int8: it is the default of e4m3.

With HAND the sums of so many blocks are handed over to float32 in shared memory, which takes a stage of the ring. A
tensor core keeps some 14 bits of a sum of e4m3 products: left to it alone, the sums over 256 blocks (a video's keys)
have 2.4 times the error of the formula; over 36, 1.01 times. On an H200 HAND = 32 has the formula's error there, in
1.06 (int8) and 1.13 (e4m3) of the time; 64 has 1.11 times that error in 1.02. It is the default above 64 blocks.

A stage of the ring holds the keys of a block and the values of the block before it: it is read in one step.

Tried on an H200 and left out: P's products on sums of their own, added in float32 in registers at every block
(slower), turns of the two halves, correcting y only where a peak rose by 2^3 (no faster), a quarter of the
exponentials by arithmetic (slower). The parts of HAND blocks are items of their own for the sake of registers: as a
loop within a tile, with peak and total in registers, some spilled in the innermost loop (1.3 times as long).
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
from .join8 import joining
from .tiles8 import count, item

REGISTERS, COMPUTE_REGISTERS, LOAD_REGISTERS = 168, 240, 24
TOP = gl.constexpr(8.0)
DEFAULT = {
    torch.int8: {"BN": 128, "STAGES": 4, "HAND": 0, "SPLIT": False},
    torch.float8_e4m3fn: {"BN": 128, "STAGES": 4, "HAND": 0, "SPLIT": True},
}
LONG = {"BN": 128, "STAGES": 3, "HAND": 32, "SPLIT": False}
MOST = 64  # blocks of keys that follow one another in the tensor cores' own sums
FEWEST = 6  # blocks of keys that sharing a tile must save
# Four values that a thread has side by side to four bytes of e4m3; Triton by itself would move each byte.
FOUR = gl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
    "mov.b32 $0, {a, b}; }"
)


@gluon.jit
def _load(
    loads, sizes, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HAND: gl.constexpr, PROGRAMS: gl.constexpr
):  # fmt: skip
    q_desc, k_desc, v_desc, q_buffers, k_buffers, v_buffers, q_full, q_empty, full, empty = loads
    M, L, H, q_tiles, k_tiles, tiles, whole, share = sizes
    slot = 0
    for step in range(count(sizes, HAND, PROGRAMS)):
        nth, tile, low, high = item(step, sizes, HAND, PROGRAMS)
        head = tile // q_tiles
        row = tile * 128
        side = nth & 1
        new = True if HAND == 0 else high == k_tiles
        mbarrier.wait(q_empty.index(side), nth >> 1 & 1 ^ 1, pred=new)
        mbarrier.expect(q_full.index(side), 2 * q_desc.block_type.nbytes, pred=new)
        async_load(q_desc, [row, 0], q_full.index(side), q_buffers.index(2 * side), pred=new)
        async_load(q_desc, [row + 64, 0], q_full.index(side), q_buffers.index(2 * side + 1), pred=new)
        for i in range(high - low + 1):  # the keys of a block, and the values of the one before it
            stage = slot % STAGES
            bar = full.index(stage)
            keys, values = i < high - low, i > 0
            mbarrier.wait(empty.index(stage), slot // STAGES & 1 ^ 1)
            mbarrier.expect(bar, k_desc.block_type.nbytes, pred=i == 0)
            mbarrier.expect(bar, k_desc.block_type.nbytes + v_desc.block_type.nbytes, pred=keys & values)
            mbarrier.expect(bar, v_desc.block_type.nbytes, pred=i == high - low)
            async_load(k_desc, [(head * k_tiles + high - 1 - i) * BN, 0], bar, k_buffers.index(stage), pred=keys)
            async_load(v_desc, [head * D, (high - i) * BN], bar, v_buffers.index(stage), pred=values)
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
    q, ring, slot, more, x, y, scale, v_log, peak, total, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    MORE: gl.constexpr,
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
    k = k_buffers.index(stage).permute((1, 0))
    v = v_buffers.index(stage).permute((1, 0))
    if MORE:
        next_x = hopper.warpgroup_mma(q, k, gl.zeros((64, BN), sums, x_layout), use_acc=False, is_async=True)
        x = hopper.warpgroup_mma_wait(2, deps=(x,))
    else:
        x = hopper.warpgroup_mma_wait(1, deps=(x,))
    above = gl.maximum(peak, _largest(x, x_rows).to(gl.float32) * scale + v_log)
    p = gl.exp2(x.to(gl.float32) * scale[:, None] - (above - (v_log + TOP))[:, None])
    lower = gl.exp2(peak - above)
    total = total * lower + _sums(p, x_rows) * gl.exp2(-v_log)
    # Without a wait here ptxas would have the next one before all that is above.
    if MORE:
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
def _joined(half: gl.constexpr, held, first, y, peak, total):
    """The sums of a part and of those before it, which lie in shared memory; from then on these do."""
    ys, peaks, totals = held
    ys, peaks, totals = ys.index(half), peaks.index(half), totals.index(half)
    before = gl.where(first, float("-inf"), peaks.load(peak.type.layout))
    above = gl.maximum(peak, before)
    old, new = gl.exp2(before - above), gl.exp2(peak - above)
    total = total * new + gl.where(first, 0.0, totals.load(peak.type.layout)) * old
    rows: gl.constexpr = gl.SliceLayout(1, y.type.layout)
    old, new = (gl.convert_layout(old, rows, assert_trivial=True), gl.convert_layout(new, rows, assert_trivial=True))
    y = y * new[:, None] + gl.where(first, 0.0, ys.load(y.type.layout)) * old[:, None]
    ys.store(y)
    peaks.store(above)
    totals.store(total)
    return y, above, total


@gluon.jit
def _attend(
    half: gl.constexpr, loads, held, ending, sizes, BN: gl.constexpr, D: gl.constexpr, OUT: gl.constexpr,
    STAGES: gl.constexpr, HAND: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, q_buffers, k_buffers, v_buffers, q_full, q_empty, full, empty = loads
    y_ptr, part_ptr, q_scale_ptr, k_scale_ptr, v_log_ptr, v_mean_ptr = ending
    M, L, H, q_tiles, k_tiles, tiles, whole, share = sizes
    x_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    y_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, y_layout, 4)
    x_rows: gl.constexpr = gl.SliceLayout(1, x_layout)
    y_rows: gl.constexpr = gl.SliceLayout(1, y_layout)
    sums: gl.constexpr = gl.int32 if q_desc.dtype == gl.int8 else gl.float32
    out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ring = (k_buffers, v_buffers, full, empty)
    slot = 0
    for step in range(count(sizes, HAND, PROGRAMS)):
        nth, tile, low, high = item(step, sizes, HAND, PROGRAMS)
        head = tile // q_tiles
        top = tile % q_tiles * 128 + half * 64
        last = high - low - 1
        q_scale = gl.load(q_scale_ptr + head * q_tiles * 128 + top + gl.arange(0, 64, x_rows))
        k_scales, v_logs = k_scale_ptr + head * k_tiles + low, v_log_ptr + head * k_tiles + low
        k_scale, v_log = gl.load(k_scales + last), gl.load(v_logs + last)
        side = nth & 1
        q = q_buffers.index(2 * side + half)
        mbarrier.wait(q_full.index(side), nth >> 1 & 1)
        mbarrier.wait(full.index(slot % STAGES), slot // STAGES & 1)
        k = k_buffers.index(slot % STAGES).permute((1, 0))
        x = hopper.warpgroup_mma(q, k, gl.zeros((64, BN), sums, x_layout), use_acc=False, is_async=True)
        slot += 1
        stage = slot % STAGES
        mbarrier.wait(full.index(stage), slot // STAGES & 1)
        k = k_buffers.index(stage).permute((1, 0))  # of the only block, this is what lay there: it is not used
        v = v_buffers.index(stage).permute((1, 0))
        x2 = hopper.warpgroup_mma(q, k, gl.zeros((64, BN), sums, x_layout), use_acc=False, is_async=True)
        first = hopper.warpgroup_mma_wait(1, deps=(x,)).to(gl.float32)
        past = (high - 1) * BN + gl.arange(0, BN, gl.SliceLayout(0, x_layout)) >= L
        scale = q_scale * k_scale
        peak = _largest(gl.where(past[None, :], float("-inf"), first), x_rows) * scale + v_log
        p = gl.where(past[None, :], 0.0, gl.exp2(first * scale[:, None] - (peak - (v_log + TOP))[:, None]))
        total = _sums(p, x_rows) * gl.exp2(-v_log)
        before = gl.maximum(last - 1, 0)
        k_scale, v_log = gl.load(k_scales + before), gl.load(v_logs + before)
        y = gl.zeros((64, D), gl.float32, y_layout)
        y = hopper.warpgroup_mma(_operand(p, BN, p_layout), v, y, use_acc=False, is_async=True)
        mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), count=1)
        slot += 1
        mbarrier.wait(full.index(slot % STAGES), slot // STAGES & 1, pred=last > 0)
        for i in range(1, last, 2):  # scales are loaded a step before they are used
            k_scale2, v_log2 = gl.load(k_scales + last - i - 1), gl.load(v_logs + last - i - 1)
            scale = q_scale * k_scale
            x, y, peak, total = _step(q, ring, slot, True, x2, y, scale, v_log, peak, total, BN, D, STAGES, True)
            before = gl.maximum(last - i - 2, 0)
            k_scale, v_log = gl.load(k_scales + before), gl.load(v_logs + before)
            scale = q_scale * k_scale2
            more = i + 1 < last
            x2, y, peak, total = _step(q, ring, slot + 1, more, x, y, scale, v_log2, peak, total, BN, D, STAGES, True)
            slot += 2
        if last % 2 == 1:
            scale = q_scale * k_scale
            y, peak, total = _step(q, ring, slot, False, x2, y, scale, v_log, peak, total, BN, D, STAGES, False)
            result = hopper.warpgroup_mma_wait(0, deps=(y,))
            slot += 1
        else:
            _, result = hopper.warpgroup_mma_wait(0, deps=(x2, y))
        mbarrier.arrive(q_empty.index(side), count=1, pred=True if HAND == 0 else low == 0)
        mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), count=1)
        if HAND > 0:
            result, peak, total = _joined(half, held, high == k_tiles, result, peak, total)
        if HAND > 0 and low > 0:
            pass
        elif part_ptr is not None and step >= whole:
            piece = part_ptr + ((gl.program_id(0) * 2 + step - whole) * 128 + half * 64) * (D + 2)
            rows = gl.arange(0, 64, x_rows)
            gl.store(piece + rows * (D + 2) + D, peak)
            gl.store(piece + rows * (D + 2) + D + 1, total)
            rows = gl.arange(0, 64, y_rows)
            columns = gl.arange(0, D, gl.SliceLayout(0, y_layout))
            gl.store(piece + rows[:, None] * (D + 2) + columns[None, :], result)
        else:
            columns = gl.arange(0, D, gl.SliceLayout(0, y_layout))
            v_mean = gl.load(v_mean_ptr + head * D + columns)
            inverse = gl.convert_layout(1.0 / total, y_rows, assert_trivial=True)
            ended = result * inverse[:, None] + v_mean[None, :]
            ended = gl.convert_layout(ended.to(y_ptr.dtype.element_ty), out)
            rows_out = top + gl.arange(0, 64, gl.SliceLayout(1, out))
            columns_out = gl.arange(0, D, gl.SliceLayout(0, out))
            where = ((head // H * M + rows_out).to(gl.int64) * H + head % H) * OUT
            inside = (rows_out < M)[:, None] & (columns_out < OUT)[None, :]
            gl.store(y_ptr + where[:, None] + columns_out[None, :], ended, mask=inside)


@gluon.jit(do_not_specialize=["M", "L", "q_tiles", "k_tiles", "tiles", "whole", "share"])
def _attention8_hopper_kernel(
    q_desc, k_desc, v_desc, y_ptr, part_ptr, q_scale_ptr, k_scale_ptr, v_log_ptr, v_mean_ptr, M, L, H, q_tiles,
    k_tiles, tiles, whole, share, BN: gl.constexpr, D: gl.constexpr, OUT: gl.constexpr, STAGES: gl.constexpr,
    HAND: gl.constexpr, PROGRAMS: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    q_buffers = gl.allocate_shared_memory(q_desc.dtype, [4] + q_desc.block_type.shape, q_desc.layout)
    k_buffers = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_buffers = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if HAND > 0:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        held = (
            gl.allocate_shared_memory(gl.float32, [2, 64, D], gl.SwizzledSharedLayout(2, 1, 4, [1, 0])),
            gl.allocate_shared_memory(gl.float32, [2, 64], plain),
            gl.allocate_shared_memory(gl.float32, [2, 64], plain),
        )
    else:
        held = ()
    for side in gl.static_range(2):
        mbarrier.init(q_full.index(side), count=1)
        mbarrier.init(q_empty.index(side), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    hopper.fence_async_shared()
    loads = (q_desc, k_desc, v_desc, q_buffers, k_buffers, v_buffers, q_full, q_empty, full, empty)
    ending = (y_ptr, part_ptr, q_scale_ptr, k_scale_ptr, v_log_ptr, v_mean_ptr)
    sizes = (M, L, H, q_tiles, k_tiles, tiles, whole, share)
    gl.warp_specialize(
        [
            (_attend, (gl.constexpr(0), loads, held, ending, sizes, BN, D, OUT, STAGES, HAND, PROGRAMS)),
            (_attend, (gl.constexpr(1), loads, held, ending, sizes, BN, D, OUT, STAGES, HAND, PROGRAMS)),
            (_load, (loads, sizes, BN, D, STAGES, HAND, PROGRAMS)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


def attention(codes: Codes8, y: Tensor, tokens: int, config: dict | None = None) -> None:
    """codes as codes8.py makes them -> y [B, M, H, d], which is written. config: BN, STAGES, HAND, SPLIT."""
    q, q_scales, k, k_scales, v, v_logs, v_means = codes
    batch, rows, heads, width = y.shape
    config = config or (LONG if cdiv(tokens, LONG["BN"]) > MOST else DEFAULT[q.dtype])
    launch, join, pieces = _plan(config, batch, heads, rows, tokens, width, q.dtype, y.device)
    parts = y.new_empty(pieces, dtype=torch.float32) if pieces else None
    launch(q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2), y, parts, q_scales, k_scales, v_logs, v_means)
    if join is not None:
        join(parts, v_means, y)


@planned
def _plan(
    config: dict, batch: int, heads: int, rows: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Launch, Launch | None, tuple[int, ...]]:
    """(the products, what joins tiles that were shared, the shape of what is handed over, () for nothing)."""
    bn, stages, hand, channels = config["BN"], config["STAGES"], config["HAND"], padded(width)
    if stages < 3:  # a step reads one stage, has not yet given back the one before, and waits for the one after
        raise ValueError(f"attention in 8 bits takes 3 stages or more; {stages} would wait for ever.")
    q_tiles, k_tiles = cdiv(rows, 128), cdiv(tokens, bn)
    tiles, programs = batch * heads * q_tiles, multiprocessors(device)
    whole, left = divmod(tiles, programs)
    share = cdiv(left * k_tiles, programs) if config["SPLIT"] and not hand else 0
    if share + FEWEST > k_tiles:  # the last round is nearly full, or there are few keys: it stays as it is
        share = 0
    blocks = dict(q_desc=(64, channels), k_desc=(bn, channels), v_desc=(channels, bn))
    launch = Launch(
        _attention8_hopper_kernel, (programs if share else min(programs, tiles),), blocks, M=rows, L=tokens, H=heads,
        q_tiles=q_tiles, k_tiles=k_tiles, tiles=tiles, whole=whole, share=share, BN=bn, D=channels, OUT=width,
        STAGES=stages, HAND=hand, PROGRAMS=programs, COMPUTE_REGISTERS=COMPUTE_REGISTERS,
        LOAD_REGISTERS=LOAD_REGISTERS, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    if not share:
        return launch, None, ()
    join = joining(left, whole * programs, share, rows, heads, q_tiles, k_tiles, channels, width)
    return launch, join, (programs * 2, 128, channels + 2)
