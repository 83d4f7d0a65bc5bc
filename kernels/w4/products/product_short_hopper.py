"""Products of at most 16 rows with 4-bit weights for Hopper in Gluon: weights in whole lines, inputs read once.

    y[m, n] = sum_g s[n, g] (sum_{k in g} x[m, k] (q[n, k] + c)  -  c sum_{k in g} x[m, k])  +  b[n]

The formula, and c, are those of product_short.py; x and y are of 16 bits, groups of 64 inputs. As many programs as
fit the multiprocessors walk over blocks of 16 outputs. A warp has PER groups of every block, and holds their inputs,
and the sums of these, in registers: they are read once, where programs of one block each read them again.

Weights and scales come by asynchronous copies through a ring in shared memory, STAGES blocks ahead: so lines of
memory are asked for whole, and far ahead, at no register. A lane that loads its own codes asks for 8 bytes of each of
8 rows, a quarter of a line. Rows are swizzled by 32 bytes: a warp reads codes without conflicts, two words a lane.

The instruction of a product is written out, and so is unpacking. As in short_operands.py lane 4 r + t of a warp has
of each group inputs 8 t .. 8 t + 7 and 32 + 8 t .. 39 + 8 t, but outputs 2 r and 2 r + 1: it writes its sums by two.
Tensors between memory and memory are of one element a thread, [warps, 8, 4] (short_layouts.py). The sums of all
warps meet in shared memory, are added up in a fixed order, and leave as whole sectors. Stored each by itself, 256
requests for a block of 16 rows, they took an eighth of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ...runtime.hopper import barrier, copy_ahead
from ...runtime.integers import cdiv
from ...runtime.launch import Launch, planned
from ...runtime.settings import capability, multiprocessors, remembered
from .short_layouts import layouts
from .short_operands import MAGIC

ROWS = 16  # of x at most
OUTPUTS = 16  # of a block
WARPS = 16  # of a program at most
HELD = 6  # times 64 inputs of 8 rows that the registers of a warp hold
SHARED = 224 << 10  # bytes of a multiprocessor for its programs

_ASM = "mma.sync.aligned.m16n8k16.row.col.f32.%s.%s.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$0,$1,$2,$3};"
_MULTIPLY_BF16, _MULTIPLY_FP16 = (gl.constexpr(_ASM % (kind, kind)) for kind in ("bf16", "f16"))
_SET = "lop3.b32 $%d, %s, %s, $5, 0xEA;"  # and the one, or the other


def _unpacking(mask: str, moves: list[str]) -> gl.constexpr:
    """PTX that sets nibbles 0 to 3, and those 16 bits above them, into the mantissa of $5."""
    lines = [f"{move} {_SET % (i, 't' if move else '$4', mask)}" for i, move in enumerate(moves)]
    return gl.constexpr("{ .reg .b32 t; " + " ".join(lines) + " }")


_UNPACK_BF16 = _unpacking("0x000F000F", ["", *(f"shr.u32 t, $4, {bits};" for bits in (4, 8, 12))])
_UNPACK_FP16 = _unpacking("0x00F000F0", ["shl.b32 t, $4, 4;", "", "shr.u32 t, $4, 4;", "shr.u32 t, $4, 8;"])


@gluon.jit
def _multiply(a, b0, b1, sums, dtype: gl.constexpr):
    """sums + A B, of [16, 16] by [16, 8]: four, two and four registers."""
    asm: gl.constexpr = _MULTIPLY_BF16 if dtype == gl.bfloat16 else _MULTIPLY_FP16
    given = [a[0], a[1], a[2], a[3], b0, b1, sums[0], sums[1], sums[2], sums[3]]
    return gl.inline_asm_elementwise(
        asm, "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3", given,
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _codes(words, magic, dtype: gl.constexpr):
    """Words of 8 codes -> four pairs of q + c: codes 0 and 4, 1 and 5, 2 and 6, 3 and 7."""
    asm: gl.constexpr = _UNPACK_BF16 if dtype == gl.bfloat16 else _UNPACK_FP16
    return gl.inline_asm_elementwise(
        asm, "=&r,=&r,=&r,=&r,r,r", [words, magic], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _even_and_odd(a, b):
    """Pairs (x0, x1), (x2, x3) -> (x0, x2), (x1, x3), as the codes lie."""
    asm: gl.constexpr = "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;"
    return gl.inline_asm_elementwise(
        asm, "=&r,=&r,r,r", [a, b], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def _halves(x, ONE: gl.constexpr):
    """[..., 2] -> two of one element a thread."""
    first, second = gl.split(x)
    return gl.convert_layout(first, ONE, assert_trivial=True), gl.convert_layout(second, ONE, assert_trivial=True)


@gluon.jit
def _inputs(x, there, ONE: gl.constexpr):
    """Of each thread 8 inputs at x [warps, 8, 4, 4], in twos: registers of two products."""
    pairs = gl.load(x, mask=there, other=0)
    even, odd = gl.split(gl.reshape(pairs, [pairs.shape[0], 8, 4, 2, 2]))
    first, third = _halves(even, ONE)
    second, fourth = _halves(odd, ONE)
    a, b = _even_and_odd(first, second)
    c, d = _even_and_odd(third, fourth)
    return a, b, c, d


@gluon.jit
def _fill(q_ptr, wscales_ptr, words, scales, block, stage, N, GROUPS: gl.constexpr, SPREAD: gl.constexpr,
          THINLY: gl.constexpr):  # fmt: skip
    """Begin to copy a block's codes and scales into a stage; zeros for what is not there."""
    WARPS: gl.constexpr = words[0].shape[2] // 8
    first = block.to(gl.int64) * 16 * GROUPS
    n = gl.arange(0, 16, gl.SliceLayout(1, SPREAD))[:, None]
    word = gl.arange(0, WARPS * 8, gl.SliceLayout(0, SPREAD))[None, :]
    row = gl.arange(0, 16, gl.SliceLayout(1, THINLY))[:, None]
    group = gl.arange(0, WARPS, gl.SliceLayout(0, THINLY))[None, :]
    q = q_ptr + first * 8 + n * (GROUPS * 8) + word
    wscales = wscales_ptr + first + row * GROUPS + group
    left = N - block * 16
    for i in gl.static_range(len(words)):
        there = (n < left) & (word < (GROUPS - i * WARPS) * 8)
        copy_ahead(words[i].index(stage), q + i * WARPS * 8, mask=there)
        there = (row < left) & (group < GROUPS - i * WARPS)
        copy_ahead(scales[i].index(stage), wscales + i * WARPS, mask=there)
    async_copy.commit_group()


@gluon.jit
def _short_kernel(
    x_ptr, q_ptr, wscales_ptr, bias_ptr, y_ptr, M, N, stride_m, magic,
    GROUPS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr, PER: gl.constexpr, STAGES: gl.constexpr,
    SPREAD: gl.constexpr, THINLY: gl.constexpr, READ: gl.constexpr, ONE: gl.constexpr, TWO: gl.constexpr,
    FOUR: gl.constexpr, GATHER: gl.constexpr, MEET: gl.constexpr,
):  # fmt: skip
    """Blocks of 16 outputs in turn, for COLUMNS times 8 rows of x; PER groups of each warp."""
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    bf16: gl.constexpr = dtype == gl.bfloat16
    c: gl.constexpr = 136.0 if bf16 else 72.0
    BM: gl.constexpr = 8 * COLUMNS
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    words, scales = (), ()
    for _ in gl.static_range(PER):
        words += (gl.allocate_shared_memory(gl.int32, [STAGES, 16, WARPS * 8], swizzled),)
        scales += (gl.allocate_shared_memory(wscales_ptr.dtype.element_ty, [STAGES, 16, WARPS], plain),)
    crossed: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    meeting = gl.allocate_shared_memory(gl.float32, [WARPS * BM // 2, 32], crossed)
    first, step = gl.program_id(0), gl.num_programs(0)
    for i in gl.static_range(STAGES):
        _fill(q_ptr, wscales_ptr, words, scales, first + i * step, i, N, GROUPS, SPREAD, THINLY)
    each: gl.constexpr = gl.SliceLayout(3, FOUR)
    group = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, each)))[:, None, None]
    row = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, each)))[None, :, None]
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, each)))[None, None, :]
    pair = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, FOUR))))[None, None, None, :]
    zero = gl.zeros([WARPS, 8, 4], gl.float32, ONE)
    none = (zero, zero, zero, zero)
    minus = gl.full([WARPS, 8, 4], -0x407F4080 if bf16 else -0x43FF4400, gl.int32, ONE)  # -1, twice
    magic = gl.full([WARPS, 8, 4], magic, gl.int32, ONE)
    inputs, begin = (), ()
    for i in gl.static_range(PER):
        for j in gl.static_range(COLUMNS):
            there = gl.minimum(row + 8 * j, M - 1)  # past the last row it repeats, and is not stored
            x = x_ptr + ((there * stride_m + (group + i * WARPS) * 32 + t * 4)[:, :, :, None] + pair)
            there = (group + row * 0 + t * 0 < GROUPS - i * WARPS)[:, :, :, None] & (pair >= 0)
            low, high = _inputs(x, there, ONE), _inputs(x + 16, there, ONE)
            inputs += ((low, high),)
            sums = none
            for half in gl.static_range(2):
                part = inputs[i * COLUMNS + j][half]
                sums = _multiply((minus, minus, minus, minus), part[0], part[1], sums, dtype)
                sums = _multiply((minus, minus, minus, minus), part[2], part[3], sums, dtype)
            begin += ((sums[0] * c, sums[1] * c),)
    place = gl.arange(0, BM, gl.SliceLayout(1, gl.SliceLayout(0, MEET)))[:, None]
    m = (place & 8) + (place & 3) * 2 + (place >> 2 & 1)  # as `_side_by_side` has them
    stage = 0
    for block in range(first, (N + 15) // 16, step):
        async_copy.wait_group(STAGES - 1)
        barrier()
        n = block * 16 + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(0, MEET)))[None, :]
        bias = 0.0
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        total = (none,) * COLUMNS
        for i in gl.static_range(PER):
            codes = gl.permute(gl.reshape(words[i].index(stage).load(READ), [8, 2, WARPS, 4, 2]), [2, 0, 3, 1, 4])
            early, late = gl.split(codes)
            early, early8 = _halves(early, ONE)
            late, late8 = _halves(late, ONE)
            early, early8 = _codes(early, magic, dtype), _codes(early8, magic, dtype)
            late, late8 = _codes(late, magic, dtype), _codes(late8, magic, dtype)
            scale = scales[i].index(stage).reshape([8, 2, WARPS]).permute([2, 0, 1]).load(gl.SliceLayout(2, TWO))
            scale = gl.expand_dims(scale.to(gl.float32), 2) + gl.zeros([WARPS, 8, 4, 2], gl.float32, TWO)
            scale, scale8 = _halves(scale, ONE)
            after = ()
            for j in gl.static_range(COLUMNS):
                low, high = inputs[i * COLUMNS + j]
                s, s1 = begin[i * COLUMNS + j]
                fresh = _multiply((early[0], early8[0], early[2], early8[2]), low[0], low[1], (s, s1, s, s1), dtype)
                fresh = _multiply((late[0], late8[0], late[2], late8[2]), low[2], low[3], fresh, dtype)
                fresh = _multiply((early[1], early8[1], early[3], early8[3]), high[0], high[1], fresh, dtype)
                fresh = _multiply((late[1], late8[1], late[3], late8[3]), high[2], high[3], fresh, dtype)
                old = total[j]
                upper = old[0] + fresh[0] * scale, old[1] + fresh[1] * scale
                lower = old[2] + fresh[2] * scale8, old[3] + fresh[3] * scale8
                after += ((upper[0], upper[1], lower[0], lower[1]),)
            total = after
        meeting.store(_side_by_side(total, COLUMNS))
        barrier()  # all have read the stage, too
        _fill(q_ptr, wscales_ptr, words, scales, block + STAGES * step, stage, N, GROUPS, SPREAD, THINLY)
        y = gl.sum(_of_warps(meeting.load(GATHER), WARPS, BM, MEET), 0) + bias
        gl.store(y_ptr + m.to(gl.int64) * N + n, y.to(dtype), mask=(m < M) & (n < N))
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    async_copy.wait_group(0)


@gluon.jit
def _side_by_side(total, COLUMNS: gl.constexpr):
    """The sums of each warp in the order of shared memory: [columns, odd rows, warps, t / 2, (t % 2, outputs)]."""
    warps: gl.constexpr = total[0][0].shape[0]
    both = ()
    for j in gl.static_range(COLUMNS):
        sums = total[j]
        pairs = gl.join(gl.join(sums[0], sums[1]), gl.join(sums[2], sums[3]))  # warp, r, t, odd row, second output
        both += (gl.reshape(pairs, [warps, 8, 2, 2, 2, 2]),)
    if COLUMNS == 1:
        return gl.reshape(gl.permute(both[0], [4, 0, 2, 3, 1, 5]), [warps * 4, 32])
    else:
        return gl.reshape(gl.permute(gl.join(both[0], both[1]), [6, 4, 0, 2, 3, 1, 5]), [warps * 8, 32])


@gluon.jit
def _of_warps(sums, WARPS: gl.constexpr, BM: gl.constexpr, MEET: gl.constexpr):
    """What `_side_by_side` gave -> [warps, BM, 16]."""
    parts = gl.permute(gl.reshape(sums, [BM // 4, WARPS, 2, 2, 16]), [1, 0, 2, 3, 4])
    return gl.convert_layout(gl.reshape(parts, [WARPS, BM, 16]), MEET, assert_trivial=True)


def serves(m: int, groups: int) -> bool:
    """Whether there is a kernel for m rows of inputs in so many groups: scales are copied by two, or more."""
    return m <= ROWS and groups % 2 == 0 and cdiv(groups, WARPS) * cdiv(m, 8) <= HELD


def short_product(
    x: Tensor, qweight: Tensor, wscales: Tensor, bias: Tensor | None, out: Tensor, config: dict
) -> None:  # fmt: skip
    """Fill out [M, N] (bf16 or fp16) from x [M, K] of its dtype, where this `serves`, on a GPU of Hopper.

    The rest as in product_short.short_product. config: num_warps from 4 to 16, a power of two; STAGES; PER_SM,
    programs of a multiprocessor; maxnreg to limit registers.
    """
    (m, n), groups = out.shape, wscales.shape[1]
    check(out.device)
    if x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous() if x.stride(0) % 8 else x.clone()
    qweight, wscales = (one if one.data_ptr() % 16 == 0 else one.clone() for one in (qweight, wscales))
    launch = _launch(config, m, n, groups, x.stride(0) // 2, out.dtype, out.device)
    launch(x.view(torch.int32), qweight.view(torch.int32), wscales, bias, out)


@remembered
def check(device: torch.device) -> None:
    """Raises ValueError where the device is no GPU of compute capability 9. Asked once."""
    if capability(device)[0] != 9:
        raise ValueError(f"settings with GLUON are for Hopper, not for {device}.")


@planned
def _launch(
    config: dict, m: int, n: int, groups: int, stride: int, dtype: torch.dtype, device: torch.device
) -> Launch:  # fmt: skip
    columns, warps = cdiv(m, 8), config["num_warps"]
    while warps < WARPS and cdiv(groups, warps) * columns > HELD:  # settings of a shorter row
        warps *= 2
    per = cdiv(groups, warps)
    stage = per * OUTPUTS * warps * 34
    stages = min(config["STAGES"], max(1, (SHARED // config["PER_SM"] - warps * columns * 512) // stage))
    programs = min(config["PER_SM"] * multiprocessors(device), cdiv(n, OUTPUTS))
    return Launch(
        _short_kernel, (programs,), M=m, N=n, stride_m=stride, magic=MAGIC[dtype], GROUPS=groups, COLUMNS=columns,
        WARPS=warps, PER=per, STAGES=stages, **layouts(warps, columns, 8 if groups % 8 == 0 else 2),
        num_warps=warps, maxnreg=config.get("maxnreg"),
    )  # fmt: skip
