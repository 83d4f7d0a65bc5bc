"""Find the kernel that serves a quantized layer, or attention on 4-bit keys and values, and the time it takes.

    find(Query("int8", "int8", device=torch.device("cuda")))        Kernel triton-int8
    report(Query("int4", "none", 64, branch=True, device=...))      {"rows <= 32": "triton-w4a16", "more": ...}
    time(Query("int8", "int8", rows=256), n=1152, k=1152)           microseconds

KERNELS is the list of all of them; what its entries ask stands in serving.py, what is asked in query.py, timing in
timing.py. The layers themselves ask `kernel_name` of their room, e.g. w8a8/layer.py, w4/layer.py, attention/layer.py,
which decides from format and device; so does `find`. The last of the list is the reference: it serves everything and
is the truth that the others are tested against. What no kernel serves is never called by another name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from . import timing
from .attention import layer as attention
from .attention import layer8 as attention8
from .cpu import lut as cpu_lut
from .cpu import w4a8 as cpu
from .cpu.w4_codes import W4A4
from .lut import layer as lut
from .query import ACTIVATIONS, WEIGHTS, Query
from .serving import (
    attention_on_eight_bits,
    attention_on_four_bits,
    branched,
    compiled,
    direct,
    either,
    few_floats,
    floats,
    in_blocks,
    looked_up,
    of_eight_bits,
    sign_planes,
    two_widths,
    two_widths_in_sums,
    unpacked,
    whole_numbers,
)
from .w4 import integer
from .w4 import layer as w4
from .w8a8 import layer as w8a8

__all__ = [
    "ACTIVATIONS", "CUBLAS", "CUDNN", "KERNELS", "WEIGHTS", "Kernel", "Query", "find", "report", "time", "tunable",
]  # fmt: skip

CUBLAS, CUDNN, UNPACK, COPY = (
    lut.CUBLAS, "unpack + cudnn", "unpack + triton-int8", "onednn-int8 on an int8 copy",
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """name: as reports have it. serves: whether it does. what: a line for tables.

    tuned: the name by which `ptq4dm bench tune` searches its settings, None where it has none of its own. mode: of a
    4-bit layer, the first part of their names in tuned/.
    """

    name: str
    what: str
    serves: Callable[[Query], bool] = field(repr=False)
    tuned: str | None = None
    mode: str | None = None


def find(query: Query) -> Kernel:
    """The kernel that serves it; the reference where no other does."""
    return next(kernel for kernel in KERNELS if kernel.serves(query))


def report(query: Query) -> dict[str, str]:
    """Names of the kernels that serve it: {"rows <= 32": name, "more": name}, or {"all rows": name} where one does.

    The query's rows do not count.
    """
    if query.weight == "bcq":
        return lut.kernel_names(query.device)
    few, many = (find(replace(query, rows=rows)).name for rows in (w4.SHORT, None))
    return {"all rows": few} if few == many else {f"rows <= {w4.SHORT}": few, "more": many}


def tunable() -> dict[str, str | None]:
    """Kernels with settings to search: {name for `ptq4dm bench tune`: mode of a 4-bit layer, or None}."""
    return {kernel.tuned: kernel.mode for kernel in KERNELS if kernel.tuned}


def time(query: Query, n: int, k: int) -> float:
    """Median microseconds of a Linear layer of n outputs and k inputs on query.rows rows, everything included.

    On a GPU in a CUDA graph on operands that no cache holds, in bf16; on a CPU wall time, in float32.

    Raises ValueError for a query without rows or with groups, or where k does not divide into groups of scales.
    """
    return timing.microseconds(query, find(query).name, n, k)


KERNELS: list[Kernel] = [
    Kernel(
        w4.FP8, "4-bit weights, e4m3 activations, low-rank branch: unpack, multiply", branched(w4.FP8),
        "w4a8-fp8", "fp8",
    ),
    Kernel(
        w4.INT8, "4-bit weights, int8 activations, with or without low-rank branch: unpack, multiply",
        either(branched(w4.INT8), direct), "w4a8-int8", "int8",
    ),
    Kernel(w4.INT4, "4-bit weights and activations, low-rank branch", branched(w4.INT4), "w4a4", "int4"),
    Kernel(
        w4.WEIGHT_ONLY, "4-bit weights, of a codebook too, unpacked in the product, few rows of inputs in 16 bits",
        either(branched(w4.WEIGHT_ONLY, False), few_floats), "w4a16", "none",
    ),
    Kernel(
        CUBLAS,
        "4-bit or binary-coded weights, or those in blocks, unpacked to 16 bits, many rows; without a branch to the "
        "inputs' type",
        either(branched(w4.WEIGHT_ONLY, True), floats(True), sign_planes(CUBLAS), in_blocks),
    ),
    Kernel(CUDNN, "4-bit weights of convolutions unpacked to the type of inputs that stay floats", floats(False)),
    Kernel(
        integer.PROGRESSIVE, "progressive 4-bit weights, widened in the product", whole_numbers(integer.PROGRESSIVE),
        "w4a8-progressive", "progressive",
    ),
    Kernel(
        integer.CHANNEL, "plain 4-bit weights, one scale a row, widened in the product",
        whole_numbers(integer.CHANNEL),
    ),
    Kernel(integer.CODEBOOK, "4-bit codes of 16 int8 levels, looked up in the product", looked_up),
    Kernel(
        integer.ROW_MIX, "rows of 4 bits and of 8, as two of 4, in groups: scales after the sums of a group",
        two_widths_in_sums,
    ),
    Kernel(
        integer.GROUPED, "plain 4-bit weights with zero points in groups, scales after the sums of a group",
        whole_numbers(integer.GROUPED), "w4a8-grouped", "grouped",
    ),
    Kernel(
        lut.TABLES, "binary-coded weights, one row: sums of four inputs with all signs, looked up",
        sign_planes(lut.TABLES), "bcq-look-up", "look-up",
    ),
    Kernel(
        lut.PLANES, "binary-coded weights, few rows: planes of signs on tensor cores", sign_planes(lut.PLANES),
        "bcq-planes", "planes",
    ),
    Kernel(w8a8.TRITON, "int8 weights and activations", of_eight_bits(w8a8.TRITON), "w8a8"),
    Kernel(w8a8.TRITON_FP8, "e4m3 weights and activations", of_eight_bits(w8a8.TRITON_FP8), "w8a8"),
    Kernel(w8a8.ONEDNN, "int8 weights and activations, x86 CPU with VNNI", of_eight_bits(w8a8.ONEDNN)),
    Kernel(
        UNPACK, "4-bit weights, of a codebook or among rows of 8 bits too, unpacked to int8 in every call",
        either(unpacked(w8a8.TRITON), two_widths(w8a8.TRITON)),
    ),
    Kernel(
        cpu.NAME, "4-bit weights, plain, progressive, or among rows of 8 bits, unpacked part by part; x86 CPU",
        either(compiled, branched(cpu.NAME)),
    ),
    Kernel(
        W4A4, "4-bit weights and activations in groups of 64, low-rank branch, unpacked part by part; x86 CPU",
        branched(W4A4),
    ),
    Kernel(
        COPY, "4-bit weights, progressive or one scale a row, of a codebook or mixed rows too; the copy is kept",
        either(unpacked(w8a8.ONEDNN), two_widths(w8a8.ONEDNN)),
    ),
    Kernel(
        cpu_lut.NAME, "binary-coded weights: sums of four inputs with all signs, looked up by byte shuffles; x86 CPU",
        sign_planes(cpu_lut.NAME),
    ),
    Kernel(attention.TRITON, "attention that unpacks 4-bit keys and values tile by tile", attention_on_four_bits),
    Kernel(
        attention8.GLUON, "attention on 8-bit operands, Hopper: loads and halves of queries in their own warps",
        attention_on_eight_bits(attention8.GLUON),
    ),
    Kernel(
        attention8.TRITON, "attention on 8-bit operands, where tensor cores know e4m3",
        attention_on_eight_bits(attention8.TRITON),
    ),
    Kernel(w8a8.REFERENCE, "the formula in torch, everywhere; all there is for power weights", lambda query: True),
]  # fmt: skip
"""The first that serves is used."""
