"""The time that a Linear layer takes with the kernel that serves it, on this machine."""

from __future__ import annotations

from .cpu import w4a8 as cpu
from .formats.int4 import GROUP
from .lut import layer as lut
from .query import Query
from .tuning import latency
from .w4 import integer
from .w4 import layer as w4
from .w8a8 import layer as w8a8

RANK = 32  # of the branch of a layer that is timed


def microseconds(query: Query, name: str, n: int, k: int) -> float:
    """Median microseconds of a Linear layer of n outputs and k inputs on query.rows rows, everything included.

    name: of the kernel that serves it.

    On a GPU in a CUDA graph on operands that no cache holds, in bf16; on a CPU wall time, in float32.

    Raises ValueError for a query without rows or with groups, or where k does not divide into groups of scales.
    """
    if query.rows is None or query.groups != 1:
        raise ValueError("what is timed is a Linear layer on so many rows: give `rows`, and no groups.")
    if query.group_size and k % query.group_size:
        raise ValueError(f"{k} inputs do not divide into groups of {query.group_size}.")
    sizes = (query.rows, n, k, query.device)
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
    elif name in (integer.CHANNEL, integer.GROUPED, integer.CODEBOOK):
        make, arguments = latency.grouped_linear, (query.group_size, query.zeros, name == integer.CODEBOOK)
    elif query.weight == "codebook":
        raise ValueError(f"a codebook is timed in {integer.CODEBOOK} alone.")
    elif query.weight == "int4" and name in (lut.CUBLAS, w4.WEIGHT_ONLY):
        make, arguments = latency.float_linear, (query.group_size, query.zeros, name == w4.WEIGHT_ONLY)
    elif query.weight == "int4":
        make, arguments = latency.int4_linear, (query.group_size, query.zeros, query.static)
        if name == w8a8.REFERENCE:
            make, arguments = latency.int4_reference, (*arguments[:2], query.activation, query.static)
    elif query.weight == query.activation:
        make, arguments = latency.w8a8_linear, (query.weight, query.static)
    else:
        raise ValueError(f"no layer of {query.weight} weights and {query.activation} activations is timed here.")
    bits = {"int4": 4, "codebook": 4, "bcq": query.planes}.get(query.weight, 8)
    moved = 2 * query.rows * (n + k) + n * k * bits // 8
    return latency.microseconds(lambda seed: make(*sizes, *arguments, seed), moved, query.device)
