"""Time of a Linear layer: calls of its op on random operands, everything included, timed by the stopwatch.

Static scales are one for all rows, dynamic ones are found in the call. A 4-bit weight that goes to an 8-bit product
is unpacked in every call on a GPU; on a CPU its int8 copy is made once, before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu.w4a8 import cpu_w4a8_linear
from ..formats import fp8, int4, int8
from ..lut import layer as lut
from ..lut import reference as lut_reference
from ..w4 import layer as w4
from ..w4 import progressive
from ..w4 import reference as w4_reference
from ..w4.grouped import grouped_linear as grouped
from ..w4.int4_codes import int4_codes
from ..w4.int4_floats import int4_floats
from ..w8a8 import layer as w8a8
from ..w8a8 import reference as w8a8_reference
from . import launches_lut, stopwatch

MOST = 64  # sets of operands
CODES = {"int8": torch.int8, "fp8": fp8.DTYPE}

Call = Callable[[], Tensor]


def microseconds(make: Callable[[int], Call], moved: int, device: torch.device) -> float:
    """Median microseconds of the calls that make(seed) gives, each on operands of its own.

    moved: bytes that one call reads and writes; together the calls, of which there are at most MOST, move more than
    any cache of a GPU holds.
    """
    if device.type != "cuda":
        return stopwatch.on_cpu([make(0)])
    with torch.cuda.device(device):
        return stopwatch.microseconds([make(seed) for seed in range(min(MOST, math.ceil(stopwatch.COLD / moved)))])


def w8a8_linear(m: int, n: int, k: int, device: torch.device, form: str, static: bool, seed: int) -> Call:
    """form: "int8" or "fp8", of weight and activations."""
    x, weight, bias = _float_layer(m, n, k, device, seed)
    if form == "int8":
        scale = weight.abs().amax(1) / int8.weight_limit(8)
        codes = int8.quantize_weight(weight, scale)
    else:
        scale = fp8.scale_of(weight, (1,))
        codes, scale = fp8.quantize(weight, scale), scale.flatten()
    grid = _grid(x, form) if static else (None, None)
    return functools.partial(w8a8.w8a8_linear, x, codes, scale, bias, *grid, 8)


def int4_linear(
    m: int, n: int, k: int, device: torch.device, group_size: int | None, zeros: bool, static: bool, seed: int
) -> Call:
    """A plain 4-bit weight as the int8 operand of an 8-bit product."""
    x, weight, bias = _float_layer(m, n, k, device, seed)
    qweight, wscales, wzeros = _packed(weight, group_size, zeros)
    grid = _grid(x, "int8") if static else (None, None)

    def call() -> Tensor:
        codes, scale = int4_codes(qweight, wscales, wzeros, k)
        return w8a8.w8a8_linear(x, codes, scale, bias, *grid, 8)

    if device.type == "cuda":
        return call
    return functools.partial(w8a8.w8a8_linear, x, *int4_codes(qweight, wscales, wzeros, k), bias, *grid, 8)


def float_linear(
    m: int, n: int, k: int, device: torch.device, group_size: int | None, zeros: bool, few: bool, seed: int
) -> Call:  # fmt: skip
    """A plain 4-bit weight made floats of the inputs' type, then their product; few: multiplied as it is packed."""
    x, weight, bias = _float_layer(m, n, k, device, seed)
    packed = _packed(weight, group_size, zeros)
    if few:
        return functools.partial(w4.few_rows, x, *packed, bias)
    return lambda: F.linear(x, int4_floats(*packed, k, x.dtype), bias)


def compiled_linear(
    m: int, n: int, k: int, device: torch.device, group_size: int | None, zeros: bool, steps: bool, static: bool,
    seed: int,
) -> Call:  # fmt: skip
    """A 4-bit weight, plain or with whole steps, in the kernel that is compiled for this CPU."""
    x, weight, bias = _float_layer(m, n, k, device, seed)
    grid = _grid(x, "int8") if static else (None, None)
    qweight, wscales, wzeros = _packed(weight, group_size, zeros)
    wscales, wsteps = _stepped(wscales) if steps else (wscales, None)
    return functools.partial(cpu_w4a8_linear, x, qweight, wscales, wzeros, wsteps, bias, *grid, 8)


def bcq_linear(
    m: int, n: int, k: int, device: torch.device, planes: int, group_size: int | None, offsets: bool, formula: bool,
    seed: int,
) -> Call:  # fmt: skip
    """A binary-coded weight; formula: in the reference."""
    operands = launches_lut.operands(m, n, k, planes, group_size, offsets, device, seed)
    return functools.partial(lut_reference.reference if formula else lut.bcq_linear, *operands)


def grouped_linear(
    m: int, n: int, k: int, device: torch.device, group_size: int | None, zeros: bool, levels: bool, seed: int
) -> Call:  # fmt: skip
    """A plain 4-bit weight, its scales after the sums of groups, or of rows; levels: each output has a codebook."""
    x, weight, bias = _float_layer(m, n, k, device, seed)
    book = torch.arange(-120, 121, 16, dtype=torch.int8, device=device).repeat(n, 1) if levels else None
    return functools.partial(grouped, x, *_packed(weight, group_size, zeros), bias, book)


def progressive_linear(
    m: int, n: int, k: int, device: torch.device, group_size: int | None, zeros: bool, static: bool, widened: bool,
    seed: int,
) -> Call:  # fmt: skip
    """A progressive weight; widened: to int8 in the product, else before it, on a GPU in every call."""
    x, weight, bias = _float_layer(m, n, k, device, seed)
    qweight, wscales, wzeros = _packed(weight, group_size, zeros)
    step, wsteps = _stepped(wscales)
    if widened:
        return functools.partial(progressive.progressive_linear, x, qweight, wsteps, wzeros, step, bias)
    grid = _grid(x, "int8") if static else (None, None)
    operands = qweight, wsteps, wzeros, k
    copy = progressive.progressive_codes(*operands)

    def call() -> Tensor:
        codes = progressive.progressive_codes(*operands) if device.type == "cuda" else copy
        return w8a8.w8a8_linear(x, codes, step, bias, *grid, 8)

    return call


def int4_reference(
    m: int, n: int, k: int, device: torch.device, group_size: int | None, zeros: bool, activation: str, static: bool,
    seed: int,
) -> Call:  # fmt: skip
    """The formula: a plain 4-bit weight and rounded activations multiplied as floats."""
    x, weight, bias = _float_layer(m, n, k, device, seed)
    qweight, wscales, wzeros = _packed(weight, group_size, zeros)
    grid = _grid(x, activation) if static else (None, None)

    def rounded() -> Tensor:
        if activation in CODES:
            steps, scale = w8a8_reference.centred_codes(x, CODES[activation], *grid, 8, dims=(1,))
            return steps * scale
        return w4_reference.round_activation(x.float(), activation, group_size or k, False)

    def call() -> Tensor:
        steps = int4.unpack_int4(qweight, int4.GROUP)[:, :k].float().unflatten(1, (wscales.shape[1], -1))
        steps = steps if wzeros is None else steps - wzeros[:, :, None]
        return F.linear(rounded(), int4.dequantize_groups(steps.flatten(1), wscales), bias.float()).to(x.dtype)

    return call


def svdq_linear(
    m: int, n: int, k: int, device: torch.device, activation: str, group_size: int, rank: int, kernel: bool, seed: int
) -> Call:
    """A 4-bit layer with a low-rank branch; kernel: whether Triton serves it, or the reference."""
    x, weight, bias = _float_layer(m, n, k, device, seed)
    codes, wscales = int4.quantize_groups(weight, group_size, x.dtype)
    down, up = (torch.randn(size, device=device).to(x.dtype) * k**-0.5 for size in ((rank, k), (n, rank)))
    down, up = (down, up) if rank else (None, None)
    op = w4.svdq_linear if kernel else w4_reference.svdq_linear
    operands = (int4.pack_int4(codes, group_size), wscales, None, down, up, bias, activation, 0.0)
    return functools.partial(op, x, *operands)


def _float_layer(m: int, n: int, k: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x [M, K], weight [N, K] in float32, bias [N]); bf16 on a GPU, float32 on a CPU."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, weight, bias = (torch.randn(size, generator=generator, device=device) for size in ((m, k), (n, k), (n,)))
    return x.to(dtype), weight * k**-0.5, bias.to(dtype)


def _grid(x: Tensor, form: str) -> tuple[Tensor, Tensor | None]:
    low, high = (float(end) for end in torch.aminmax(x.float()))
    if form == "fp8":
        return torch.tensor(max(-low, high) / fp8.LIMIT, device=x.device), None
    scale, zero = int8.affine_parameters(low, high)
    return torch.tensor(scale, device=x.device), torch.tensor(zero, dtype=torch.int32, device=x.device)


def _stepped(wscales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of rows [N] and whole steps of groups [N, G], about as good as those that a search finds."""
    step = wscales.float().amax(1) / 16
    return step, (wscales / step[:, None]).round().clamp(1, 16).to(torch.int8)


def _packed(weight: Tensor, group_size: int | None, zeros: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(qweight, wscales, wzeros) as `int4_codes` takes them; zero points are 0: they take no less time for it."""
    k = weight.shape[1]
    codes, wscales = int4.quantize_groups(weight, group_size or k, torch.bfloat16 if group_size else torch.float32)
    wzeros = torch.zeros_like(wscales, dtype=torch.int8) if zeros else None
    return int4.pack_int4(F.pad(codes, (0, -k % int4.GROUP)), int4.GROUP), wscales, wzeros
