"""Whether a kernel serves a query: what the entries of dispatch.KERNELS ask.

The rooms of the layers decide by device and format, in `kernel_name` of w8a8/layer.py, w4/layer.py, lut/layer.py and
attention/layer.py; here they are asked as layers ask them. Functions with an argument give the question.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .attention import layer as attention
from .attention import layer8 as attention8
from .blocks import layer as blocks
from .cpu import w4a8 as cpu
from .formats.fp8 import DTYPE
from .formats.int4 import GROUP
from .lut import layer as lut
from .query import Query
from .runtime.settings import served
from .w4 import integer
from .w4 import layer as w4
from .w8a8 import layer as w8a8

LARGE_WINDOWS = 2048  # inputs of an output, between 1152 and 2304: scripts/results/cpu-w4-conv.jsonl


def _eight_bit(query: Query) -> str:
    """Name of the kernel for the product of 8-bit codes in the layer that is asked about."""
    dtype = DTYPE if query.activation == "fp8" else torch.int8
    return w8a8.kernel_name(query.device, 8, query.groups, dtype)


def of_eight_bits(name: str) -> Callable[[Query], bool]:
    """Whether weight and inputs are 8-bit codes of one type."""
    return lambda query: query.weight == query.activation in ("int8", "fp8") and _eight_bit(query) == name


def branched(name: str, many: bool | None = None) -> Callable[[Query], bool]:
    """Whether a 4-bit weight has a low-rank branch. many: serves above SHORT rows, or up to them; None: both."""

    def serves(query: Query) -> bool:
        if not query.branch or query.groups != 1 or query.zeros or query.static:
            return False
        right = many in (None, query.rows is None or query.rows > w4.SHORT)
        return right and w4.kernel_name(query.device, query.activation, query.group_size) == name

    return serves


def two_widths(product: str) -> Callable[[Query], bool]:
    """Rows of two widths: all of them are int8 operands of one product, groups folded into them on a GPU."""

    def serves(query: Query) -> bool:
        held = query.device.type == "cuda" or not query.group_size
        asked = (query.weight, query.activation) == ("row-mix", "int8")
        return asked and held and _eight_bit(query) == product

    return serves


def looked_up(query: Query) -> bool:
    """Whether levels of a codebook are looked up in the product: dynamic inputs of a Linear layer."""
    asked = (query.weight, query.activation) == ("codebook", "int8")
    return asked and query.linear and query.groups == 1 and not query.static and served(query.device)


def two_widths_in_sums(query: Query) -> bool:
    """Whether sums of groups of rows of both widths are whole numbers, and scaled after."""
    asked = (query.weight, query.activation) == ("row-mix", "int8") and query.group_size
    fits = query.linear and query.groups == 1 and not query.static
    return bool(asked and fits and served(query.device))


def _plain(query: Query) -> bool:
    return query.weight == "int4" and query.activation == "int8" and not query.branch


def unpacked(product: str) -> Callable[[Query], bool]:
    """Whether a plain 4-bit weight, or one of a codebook, becomes the int8 operand of a product of 8-bit codes."""

    def serves(query: Query) -> bool:
        held = query.device.type == "cuda" or query.progressive or not query.group_size
        plain = _plain(query) or (query.weight, query.activation) == ("codebook", "int8")
        return plain and held and _eight_bit(query) == product

    return serves


def direct(query: Query) -> bool:
    """Whether the kernels of branched layers serve a plain weight, as one without a branch: 16-bit scales of whole
    groups, activation scales per token. They round float32 inputs and outputs to bf16."""
    fits = query.linear and query.groups == 1 and not query.static and not query.zeros
    whole = (query.inputs or GROUP) % GROUP == 0 and query.group_size is not None and query.group_size % GROUP == 0
    plain = _plain(query) and not query.progressive
    return plain and fits and whole and w4.kernel_name(query.device, "int8", GROUP) == w4.INT8


def whole_numbers(name: str) -> Callable[[Query], bool]:
    """Whether sums are of whole numbers: dynamic inputs of a Linear layer; scales of groups under zero points alone,
    for symmetric ones have `direct`."""

    def serves(query: Query) -> bool:
        fits = _plain(query) and query.linear and query.groups == 1 and not query.static
        if query.progressive:
            right = name == integer.PROGRESSIVE
        elif query.group_size is None:
            right = name == integer.CHANNEL
        else:
            right = name == integer.GROUPED and query.zeros
        return right and fits and served(query.device)

    return serves


def few_floats(query: Query) -> bool:
    """Whether few rows of 16-bit inputs are multiplied by a plain weight, or one of a codebook, as it is packed: in
    groups of whole runs."""
    size, inputs = query.group_size or 1, query.inputs or GROUP
    whole = size % GROUP == 0 and inputs % GROUP == 0 and query.groups == 1
    few = query.rows is not None and query.rows <= w4.SHORT and query.weight in ("int4", "codebook")
    return few and whole and floats(True)(query) and w4.kernel_name(query.device, "none", GROUP) == w4.WEIGHT_ONLY


def floats(linear: bool) -> Callable[[Query], bool]:
    """Whether inputs stay floats, and a plain weight, or one of a codebook, is made floats of their type for the
    product after it."""

    def serves(query: Query) -> bool:
        asked = query.weight in ("int4", "codebook") and query.activation == "none"
        plain = asked and not (query.branch or query.progressive)
        return plain and query.linear == linear and served(query.device)

    return serves


def compiled(query: Query) -> bool:
    """Whether the kernel that is compiled on this machine serves it. Of progressive convolutions with large windows
    oneDNN's copy, where there is one, takes less time."""
    inputs = query.inputs or 0
    fits = query.groups == 1 and inputs <= cpu.MOST
    if (query.weight, query.activation) == ("row-mix", "int8"):  # under one scale a row gives what W8A8 layers give
        return fits and bool(query.group_size) and cpu.serves(query.device)
    large = query.progressive and not query.linear and inputs >= LARGE_WINDOWS
    slower = large and _eight_bit(query) == w8a8.ONEDNN
    return _plain(query) and fits and not slower and cpu.serves(query.device)


def attention_on_four_bits(query: Query) -> bool:
    """Whether the kernel of attention serves keys and values in 4 bits."""
    asked = query.weight == "kv4" and query.activation == "none"
    return asked and attention.kernel_name(query.device) == attention.TRITON


def attention_on_eight_bits(name: str) -> Callable[[Query], bool]:
    """Whether the kernel of this name serves attention whose operands have 8 bits."""

    def serves(query: Query) -> bool:
        asked = query.weight == "attention8" and query.activation in ("int8", "fp8")
        return asked and attention8.kernel_name(query.device, query.inputs or 128) == name

    return serves


def sign_planes(name: str) -> Callable[[Query], bool]:
    """Whether a Linear layer has a weight of sign planes, under inputs that stay floats."""

    def serves(query: Query) -> bool:
        asked = query.weight == "bcq" and query.activation == "none" and query.linear
        return asked and lut.kernel_name(query.device, query.rows) == name

    return serves


def in_blocks(query: Query) -> bool:
    """Whether a weight in blocks is made floats for the product after it."""
    asked = query.weight == "blocks" and query.activation == "none" and query.linear
    return asked and blocks.kernel_name(query.device) == blocks.CUBLAS


def either(*serve: Callable[[Query], bool]) -> Callable[[Query], bool]:
    """Whether one of them serves."""
    return lambda query: any(one(query) for one in serve)
