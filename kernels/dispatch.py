"""Find the kernel that serves a quantized layer, or attention on 4-bit keys and values, and the time it takes.

    find(Query("int8", "int8", device=torch.device("cuda")))        Kernel triton-int8
    report(Query("int4", "none", 64, branch=True, device=...))      {"rows <= 32": "triton-w4a16", "more": ...}
    time(Query("int8", "int8", rows=256), n=1152, k=1152)           microseconds

KERNELS is the list of all of them. The layers themselves ask `kernel_name` of their room, w8a8/layer.py, w4/layer.py
or attention/layer.py, which decides from format and device; so does `find`. The last of the list is the reference: it
serves everything and is the truth that the others are tested against. What no kernel serves is never called by
another name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from .attention import layer as attention
from .cpu import lut as cpu_lut
from .cpu import w4a8 as cpu
from .formats.fp8 import DTYPE
from .formats.int4 import GROUP
from .lut import layer as lut
from .tuning import latency
from .w4 import integer
from .w4 import layer as w4
from .w8a8 import layer as w8a8

WEIGHTS, ACTIVATIONS = ("int8", "fp8", "int4", "row-mix", "power", "kv4", "bcq"), ("int8", "fp8", "int4", "none")
CUBLAS, CUDNN, UNPACK, COPY = (
    lut.CUBLAS, "unpack + cudnn", "unpack + triton-int8", "onednn-int8 on an int8 copy",
)  # fmt: skip
RANK = 32  # of the branch of a layer that is timed
LARGE_WINDOWS = 2048  # inputs of an output, between 1152 and 2304: scripts/results/cpu-w4-conv.jsonl


@dataclass(frozen=True)
class Query:
    """A quantized layer in a few words.

    weight: "int8", "fp8" or "int4"; "row-mix", rows of int8 among plain rows of int4, with zero points in these or
        not; "power", levels of a codebook; "bcq", sums of `planes` sign planes; or "kv4", keys and values of
        attention, which stand in a weight's place.
    activation: "int8", "fp8", "int4", or "none" for 16-bit inputs.
    group_size: inputs under one scale of the weight; None for one scale a row.
    groups: of a convolution. rows: of the inputs in one call (tokens or pixels); None for many.
    linear: a Linear layer, or a convolution of one pixel; inputs: K of it, None for a multiple of 64.
    static: one activation scale for all rows, known before. zeros: the 4-bit weight has zero points, or the
        binary-coded one offsets.
    progressive: the scales of a 4-bit weight's groups are whole steps of one scale a row (w4/progressive.py).
    branch: a 4-bit layer with a low-rank branch in 16 bits and smoothing (w4/layer.py), of any rank, 0 too; without
        it a 4-bit weight is plain (w4/int4_codes.py).

    Raises ValueError for other words.
    """

    weight: str
    activation: str
    group_size: int | None = None
    groups: int = 1
    rows: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    static: bool = False
    zeros: bool = False
    progressive: bool = False
    branch: bool = False
    linear: bool = True
    inputs: int | None = None
    planes: int = 3

    def __post_init__(self):
        for name, given, known in (
            ("weight", self.weight, WEIGHTS),
            ("activation", self.activation, ACTIVATIONS),
        ):
            if given not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not '{given}'.")
        if self.weight == "bcq" and not (self.progressive or self.branch):
            return
        parts = self.group_size is not None and self.weight != "row-mix"
        if self.weight != "int4" and (parts or self.zeros or self.progressive or self.branch):
            raise ValueError(f"only int4 weights have groups of scales, zero points or a branch, not {self.weight}.")
        if self.progressive and self.branch:
            raise ValueError("progressive weights have no branch.")


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
    if query.rows is None or query.groups != 1:
        raise ValueError("what is timed is a Linear layer on so many rows: give `rows`, and no groups.")
    if query.group_size and k % query.group_size:
        raise ValueError(f"{k} inputs do not divide into groups of {query.group_size}.")
    sizes, name = (query.rows, n, k, query.device), find(query).name
    if query.branch:
        kernel = name != w4.REFERENCE
        arguments = (query.activation, query.group_size or k, RANK if query.activation != "none" else 0, kernel)
        make = latency.svdq_linear
    elif query.weight == "bcq":
        make, arguments = latency.bcq_linear, (query.planes, query.group_size, query.zeros, name == lut.REFERENCE)
    elif name == w4.INT8:
        make, arguments = latency.svdq_linear, (query.activation, GROUP, 0, True)
    elif name == cpu.NAME:
        make, arguments = latency.compiled_linear, (query.group_size, query.zeros, query.progressive, query.static)
    elif query.progressive:
        if query.activation != "int8":
            raise ValueError(f"no layer has progressive weights and {query.activation} activations.")
        widened = name == integer.PROGRESSIVE
        make, arguments = latency.progressive_linear, (query.group_size, query.zeros, query.static, widened)
    elif name in (integer.CHANNEL, integer.GROUPED):
        make, arguments = latency.grouped_linear, (query.group_size, query.zeros)
    elif name in (CUBLAS, w4.WEIGHT_ONLY):
        make, arguments = latency.float_linear, (query.group_size, query.zeros, name == w4.WEIGHT_ONLY)
    elif query.weight == "int4":
        make, arguments = latency.int4_linear, (query.group_size, query.zeros, query.static)
        if name == w8a8.REFERENCE:
            make, arguments = latency.int4_reference, (*arguments[:2], query.activation, query.static)
    elif query.weight == query.activation:
        make, arguments = latency.w8a8_linear, (query.weight, query.static)
    else:
        raise ValueError(f"no layer of {query.weight} weights and {query.activation} activations is timed here.")
    bits = {"int4": 4, "bcq": query.planes}.get(query.weight, 8)
    moved = 2 * query.rows * (n + k) + n * k * bits // 8
    return latency.microseconds(lambda seed: make(*sizes, *arguments, seed), moved, query.device)


def _eight_bit(query: Query) -> str:
    """Name of the kernel for the product of 8-bit codes in the layer that is asked about."""
    dtype = DTYPE if query.activation == "fp8" else torch.int8
    return w8a8.kernel_name(query.device, 8, query.groups, dtype)


def _w8a8(name: str) -> Callable[[Query], bool]:
    return lambda query: query.weight == query.activation in ("int8", "fp8") and _eight_bit(query) == name


def _branched(name: str, many: bool | None = None) -> Callable[[Query], bool]:
    """many: serves above SHORT rows, or up to them; None: both."""

    def serves(query: Query) -> bool:
        if not query.branch or query.groups != 1 or query.zeros or query.static:
            return False
        right = many in (None, query.rows is None or query.rows > w4.SHORT)
        return right and w4.kernel_name(query.device, query.activation, query.group_size) == name

    return serves


def _mixed(product: str) -> Callable[[Query], bool]:
    """Rows of two widths: all of them are int8 operands of one product, groups folded into them on a GPU."""

    def serves(query: Query) -> bool:
        held = query.device.type == "cuda" or not query.group_size
        asked = (query.weight, query.activation) == ("row-mix", "int8")
        return asked and held and _eight_bit(query) == product

    return serves


def _mixed_sums(query: Query) -> bool:
    """Whether sums of groups of rows of both widths are whole numbers, and scaled after."""
    asked = (query.weight, query.activation) == ("row-mix", "int8") and query.group_size
    fits = query.linear and query.groups == 1 and not query.static
    return bool(asked and fits and integer.serves(query.device))


def _plain(query: Query) -> bool:
    return query.weight == "int4" and query.activation == "int8" and not query.branch


def _unpacked(product: str) -> Callable[[Query], bool]:
    def serves(query: Query) -> bool:
        held = query.device.type == "cuda" or query.progressive or not query.group_size
        return _plain(query) and held and _eight_bit(query) == product

    return serves


def _direct(query: Query) -> bool:
    """Whether the kernels of branched layers serve a plain weight, as one without a branch: 16-bit scales of whole
    groups, activation scales per token. They round float32 inputs and outputs to bf16."""
    fits = query.linear and query.groups == 1 and not query.static and not query.zeros
    whole = (query.inputs or GROUP) % GROUP == 0 and query.group_size is not None and query.group_size % GROUP == 0
    plain = _plain(query) and not query.progressive
    return plain and fits and whole and w4.kernel_name(query.device, "int8", GROUP) == w4.INT8


def _integer(name: str) -> Callable[[Query], bool]:
    """Whether sums are of whole numbers: dynamic inputs of a Linear layer; scales of groups under zero points alone,
    for symmetric ones have `_direct`."""

    def serves(query: Query) -> bool:
        fits = _plain(query) and query.linear and query.groups == 1 and not query.static
        if query.progressive:
            right = name == integer.PROGRESSIVE
        elif query.group_size is None:
            right = name == integer.CHANNEL
        else:
            right = name == integer.GROUPED and query.zeros
        return right and fits and integer.serves(query.device)

    return serves


def _few_floats(query: Query) -> bool:
    """Whether few rows of 16-bit inputs are multiplied by a plain weight as it is packed: in groups of whole runs."""
    size, inputs = query.group_size or 1, query.inputs or GROUP
    whole = size % GROUP == 0 and inputs % GROUP == 0 and query.groups == 1
    few = query.rows is not None and query.rows <= w4.SHORT
    return few and whole and _floats(True)(query) and w4.kernel_name(query.device, "none", GROUP) == w4.WEIGHT_ONLY


def _floats(linear: bool) -> Callable[[Query], bool]:
    """Whether inputs stay floats, and a plain weight is made floats of their type for the product after it."""

    def serves(query: Query) -> bool:
        plain = (query.weight, query.activation) == ("int4", "none") and not (query.branch or query.progressive)
        return plain and query.linear == linear and integer.serves(query.device)

    return serves


def _compiled(query: Query) -> bool:
    """Whether the kernel that is compiled on this machine serves it. Of progressive convolutions with large windows
    oneDNN's copy, where there is one, takes less time."""
    inputs = query.inputs or 0
    fits = query.groups == 1 and inputs <= cpu.MOST
    large = query.progressive and not query.linear and inputs >= LARGE_WINDOWS
    slower = large and _eight_bit(query) == w8a8.ONEDNN
    return _plain(query) and fits and not slower and cpu.serves(query.device)


def _kv4(query: Query) -> bool:
    served = query.weight == "kv4" and query.activation == "none"
    return served and attention.kernel_name(query.device) == attention.TRITON


def _bcq(name: str) -> Callable[[Query], bool]:
    def serves(query: Query) -> bool:
        served = query.weight == "bcq" and query.activation == "none" and query.linear
        return served and lut.kernel_name(query.device, query.rows) == name

    return serves


def _either(*serve: Callable[[Query], bool]) -> Callable[[Query], bool]:
    return lambda query: any(one(query) for one in serve)


KERNELS: list[Kernel] = [
    Kernel(
        w4.FP8, "4-bit weights, e4m3 activations, low-rank branch: unpack, multiply", _branched(w4.FP8),
        "w4a8-fp8", "fp8",
    ),
    Kernel(
        w4.INT8, "4-bit weights, int8 activations, with or without low-rank branch: unpack, multiply",
        _either(_branched(w4.INT8), _direct), "w4a8-int8", "int8",
    ),
    Kernel(w4.INT4, "4-bit weights and activations, low-rank branch", _branched(w4.INT4), "w4a4", "int4"),
    Kernel(
        w4.WEIGHT_ONLY, "4-bit weights unpacked in the product, few rows of inputs in 16 bits",
        _either(_branched(w4.WEIGHT_ONLY, False), _few_floats), "w4a16", "none",
    ),
    Kernel(
        CUBLAS, "4-bit or binary-coded weights unpacked to 16 bits, many rows; without a branch to the inputs' type",
        _either(_branched(w4.WEIGHT_ONLY, True), _floats(True), _bcq(CUBLAS)),
    ),
    Kernel(CUDNN, "4-bit weights of convolutions unpacked to the type of inputs that stay floats", _floats(False)),
    Kernel(
        integer.PROGRESSIVE, "progressive 4-bit weights, widened in the product", _integer(integer.PROGRESSIVE),
        "w4a8-progressive", "progressive",
    ),
    Kernel(
        integer.CHANNEL, "plain 4-bit weights, one scale a row, widened in the product",
        _integer(integer.CHANNEL),
    ),
    Kernel(
        integer.ROW_MIX, "rows of 4 bits and of 8, as two of 4, in groups: scales after the sums of a group",
        _mixed_sums,
    ),
    Kernel(
        integer.GROUPED, "plain 4-bit weights with zero points in groups, scales after the sums of a group",
        _integer(integer.GROUPED), "w4a8-grouped", "grouped",
    ),
    Kernel(
        lut.TABLES, "binary-coded weights, one row: sums of four inputs with all signs, looked up", _bcq(lut.TABLES),
        "bcq-look-up", "look-up",
    ),
    Kernel(
        lut.PLANES, "binary-coded weights, few rows: planes of signs on tensor cores", _bcq(lut.PLANES),
        "bcq-planes", "planes",
    ),
    Kernel(w8a8.TRITON, "int8 weights and activations", _w8a8(w8a8.TRITON), "w8a8"),
    Kernel(w8a8.TRITON_FP8, "e4m3 weights and activations", _w8a8(w8a8.TRITON_FP8), "w8a8"),
    Kernel(w8a8.ONEDNN, "int8 weights and activations, x86 CPU with VNNI", _w8a8(w8a8.ONEDNN)),
    Kernel(
        UNPACK, "4-bit weights, also among rows of 8 bits, unpacked to int8 in every call",
        _either(_unpacked(w8a8.TRITON), _mixed(w8a8.TRITON)),
    ),
    Kernel(
        cpu.NAME, "4-bit weights, plain or progressive, unpacked part by part in the product; x86 CPU",
        _compiled,
    ),
    Kernel(
        COPY, "4-bit weights, progressive or one scale a row, also among rows of 8 bits; the copy is kept in memory",
        _either(_unpacked(w8a8.ONEDNN), _mixed(w8a8.ONEDNN)),
    ),
    Kernel(
        cpu_lut.NAME, "binary-coded weights: sums of four inputs with all signs, looked up by byte shuffles; x86 CPU",
        _bcq(cpu_lut.NAME),
    ),
    Kernel(attention.TRITON, "attention that unpacks 4-bit keys and values tile by tile", _kv4),
    Kernel(w8a8.REFERENCE, "the formula in torch, everywhere; all there is for power weights", lambda query: True),
]  # fmt: skip
"""The first that serves is used."""
