"""The op behind SVDQuant's layers: which kernels serve a layer, and running them.

    triton-w4a8-fp8     fp8 activations, where tensor cores know e4m3 (compute capability 8.9 and later)
    triton-w4a8-int8    int8 activations; fp8 ones too on GPUs before that
    triton-w4a4         int4 activations, scales per group on both sides
    triton-w4a16        weight-only layers, also plain ones with zero points or a codebook; of many rows, weights
                        unpacked to 16 bits and multiplied by cuBLAS
    cpu-w4a8, cpu-w4a4  on a CPU, int8 and int4 activations, where the kernels are compiled (on_cpu.py)
    reference           everything else: the formula in float32 (reference.py); the truth

On a GPU up to SHORT rows nothing is unpacked to memory (product_short.py), but for int4 activations, and inputs of
float32 or float64 are rounded to bf16 first. Every sum has a fixed order: the same bits in every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.int4 import GROUP
from ..formats.nonlinearities import check
from ..runtime.late import late
from ..runtime.ops import op
from ..runtime.prepared import prepared
from ..runtime.settings import best_config, capability, remembered, served
from ..runtime.workspace import Workspace
from . import on_cpu
from .int4_codes import check_levels
from .reference import nonlinear

if TYPE_CHECKING:
    from . import activation as activation_launches
    from . import unpack
    from .products import product_short, product_w4a4, product_w4a8, short_levels
else:
    late(
        globals(), "unpack", activation_launches="activation", product_short="products.product_short",
        product_w4a4="products.product_w4a4", product_w4a8="products.product_w4a8",
        short_levels="products.short_levels",
    )  # fmt: skip

REFERENCE, FP8, INT8, INT4, WEIGHT_ONLY = (
    "reference", "triton-w4a8-fp8", "triton-w4a8-int8", "triton-w4a4", "triton-w4a16",
)  # fmt: skip
MODES = {FP8: "fp8", INT8: "int8", INT4: "int4", WEIGHT_ONLY: "none"}
SHORT = 32  # with 64, on an H200, unpacking and a product of whole tiles take less time


def kernel_name(device: torch.device, activation: str, group_size: int) -> str:
    """Name of the kernel for a layer of this activation format ("fp8", "int8", "int4", "none") on this device."""
    if device.type == "cpu":
        return on_cpu.kernel_name(activation, group_size) or REFERENCE
    if group_size != GROUP or not served(device):
        return REFERENCE
    fp8 = FP8 if capability(device) >= (8, 9) else INT8
    return {"fp8": fp8, "int8": INT8, "int4": INT4, "none": WEIGHT_ONLY}[activation]


_known_name = remembered(kernel_name)


def known_name(device: torch.device, activation: str, group_size: int) -> str:
    """`kernel_name`, remembered for a GPU; not where torch.compile traces: it warns of what is cached."""
    find = kernel_name if device.type == "cpu" or torch.compiler.is_compiling() else _known_name
    return find(device, activation, group_size)


def on_gpu(name: str) -> bool:
    """Whether a kernel of this name takes operands as GPUs have them: a padded branch, weights in 8 bits."""
    return name in MODES


@op
def svdq_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    activation: str,
    shift: float,
    nonlinearity: str = "",
    weight8: Tensor | None = None,
    scales8: Tensor | None = None,
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype; the arguments of `svdq.svdq_linear`, groups of 64.

    weight8, scales8: what `unpacked` made of qweight and wscales; then calls of many rows do not unpack them again.

    Raises ValueError where no kernel serves them (`kernel_name` says), or for an unknown nonlinearity.
    """
    check(nonlinearity)
    name = known_name(x.device, activation, 2 * qweight.shape[1] // wscales.shape[1])
    if name == REFERENCE:
        raise ValueError(f"no kernel for {activation} activations on {x.device}; call svdq.svdq_linear instead.")
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if not on_gpu(name):
        y = on_cpu.linear(rows, qweight, wscales, smooth, down, up, bias, activation, shift, nonlinearity)
        return y.to(x.dtype).view(*x.shape[:-1], qweight.shape[0])
    eight = () if weight8 is None else (weight8, scales8)
    y = rows_through(name, rows, qweight, wscales, smooth, down, up, bias, shift, nonlinearity, eight)
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], qweight.shape[0])


@svdq_linear.register_fake
def _(
    x, qweight, wscales, smooth, down, up, bias, activation, shift, nonlinearity="", weight8=None, scales8=None
):  # fmt: skip
    return x.new_empty(*x.shape[:-1], len(qweight))


def steps(name: str, rows: int) -> tuple[str, ...]:
    """The launches of one call; each has settings "<mode>.<step>" in tuned/ but for "cublas"."""
    if name == WEIGHT_ONLY:
        return ("short",) if rows <= SHORT else ("unpack", "cublas")
    return ("activation", "short") if name != INT4 and rows <= SHORT else ("prepare", "product")


def unpacked(qweight: Tensor, wscales: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(weight8 [N, K] of 8 bits, float32 scales8) as a call on many rows makes them of a weight on a GPU.

    Raises ValueError where no kernel of that activation unpacks to 8 bits.
    """
    name = known_name(qweight.device, activation, 2 * qweight.shape[1] // wscales.shape[1])
    if not on_gpu(name) or name == WEIGHT_ONLY:
        raise ValueError(f"no kernel for {activation} activations on {qweight.device} unpacks to 8 bits.")
    made = unpack.empty_weight(qweight, code_dtype(name, qweight.device), MODES[name])
    config = best_config(f"{MODES[name]}.prepare", qweight.device, SHORT + 1, len(qweight), 2 * qweight.shape[1])
    unpack.unpack(qweight.contiguous(), wscales.contiguous(), made, MODES[name], config)
    return made


def code_dtype(name: str, device: torch.device) -> torch.dtype:
    """Type of the product's operands: 4-bit codes are exact in e4m3 too, which Hopper multiplies faster than int8."""
    fp8 = name == FP8 or (name == INT4 and capability(device) >= (8, 9))
    return torch.float8_e4m3fn if fp8 else torch.int8


@remembered
def _plan(
    name: str, device: torch.device, m: int, n: int, k: int, rank: int, dtype: torch.dtype, is_unpacked: bool
) -> tuple:
    """(launches, their settings, room for what the first leaves to the second)."""
    mode, launches = MODES[name], steps(name, m)
    settings = [best_config(f"{mode}.{step}", device, m, n, k) for step in launches if step != "cublas"]
    codes = code_dtype(name, device)
    rows = () if mode == "none" else activation_launches.activation_shapes(m, k, dtype, mode, rank, codes)
    weight = unpack.weight_shapes(n, k, codes, mode) if launches[0] == "prepare" and not is_unpacked else ()
    return launches, settings, Workspace(*rows, *weight)


def short_floats(x: Tensor) -> Tensor:
    """x [M, K] in 16 bits, its columns contiguous."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        x = x.bfloat16()
    return x if x.stride(-1) == 1 else x.contiguous()


def rows_through(
    name: str, x, qweight, wscales, smooth, down, up, bias, shift: float, nonlinearity: str = "", eight: tuple = ()
) -> Tensor:
    """x [M, K] -> [M, N] in bf16 or fp16 by the kernels called `name`; eight: what `unpacked` made, or ()."""
    x = short_floats(x)
    (m, k), n = x.shape, qweight.shape[0]
    out = x.new_empty(m, n)
    if not (m and n):
        return out
    if down is not None:
        down, up = in_type(down, x.dtype), in_type(up, x.dtype)
    qweight, wscales = qweight.contiguous(), wscales.contiguous()
    plan = _plan(name, x.device, m, n, k, 0 if down is None else down.shape[0], x.dtype, bool(eight))
    if name == WEIGHT_ONLY:
        return _weight_only(plan, x, qweight, wscales, down, up, bias, out, nonlinearity)
    _quantized(name, plan, x, qweight, wscales, smooth, down, up, bias, shift, out, nonlinearity, eight)
    return out


def few_rows(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, bias: Tensor | None,
    levels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [M, K] in bf16 or fp16, M from 1 to SHORT, times a plain weight (int4_codes.py) -> [M, N], on a GPU.

    K a multiple of 64, scales of 16 bits for groups of 64 inputs or of 128; levels int8 [1, 16] or [N, 16] of a
    codebook, which has no zero points, or None. Raises ValueError for others.
    """
    check_levels(qweight, wzeros, levels)
    if wscales.dtype not in (torch.bfloat16, torch.float16) or x.shape[1] % (GROUP * wscales.shape[1]):
        raise ValueError(f"scales {list(wscales.shape)} of {wscales.dtype} are not of 16 bits for whole runs of 64.")
    x = short_floats(x)
    (m, k), n, runs = x.shape, len(qweight), x.shape[1] // GROUP
    wscales, wzeros = (None if one is None else _by_run(one, runs) for one in (wscales, wzeros))
    out = x.new_empty(m, n)
    config, tables = best_config("none.short", x.device, m, n, k), None
    if levels is not None:
        tables = prepared(levels, ("tables", x.dtype), lambda: short_levels.tables_of(levels, x.dtype))
    product_short.short_product(
        x, None, qweight.contiguous(), wscales, None, None, bias, out, config, wzeros=wzeros, tables=tables
    )  # fmt: skip
    return out


def _by_run(values: Tensor, runs: int) -> Tensor:
    """Numbers of groups [N, G] for each run of 64 inputs [N, runs]; those that reach farther are made once."""
    if values.shape[1] == runs:
        return values.contiguous()
    wide = runs // values.shape[1]
    return prepared(values, ("runs", runs), lambda: values.repeat_interleave(wide, 1).contiguous())


def in_type(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A branch's projection, contiguous and of this type: mostly as it is, else made once."""
    if weight.dtype == dtype and weight.is_contiguous():
        return weight
    return prepared(weight, ("in type", dtype), lambda: weight.to(dtype).contiguous())


def _quantized(name, plan, x, qweight, wscales, smooth, down, up, bias, shift, out, nonlinearity, eight) -> None:
    mode, (launches, (first, second), room) = MODES[name], plan
    pieces = room.take(x)
    codes, weight = pieces[:3], pieces[3:]
    if eight and launches[1] == "product":
        weight = eight
    if launches[0] == "activation" or weight is eight:
        activation_launches.quantize_activation(x, smooth, down, mode, shift, codes, first)
    else:
        unpack.prepare(x, smooth, down, mode, shift, codes, qweight, wscales, weight, first)
    multiply(name, codes, qweight, wscales, weight, up, bias, out, second, nonlinearity)


def multiply(name, codes, qweight, wscales, weight, up, bias, out, config, nonlinearity) -> None:
    """The last launch of a call: on the unpacked weight, or where there is none on the packed one."""
    if not weight:
        product_short.short_product(*codes[:2], qweight, wscales, codes[2], up, bias, out, config, nonlinearity)
        return
    product = product_w4a4.product if name == INT4 else product_w4a8.product
    product(codes, weight, up, bias, out, config, nonlinearity)


def _weight_only(plan, x, qweight, wscales, down, up, bias, out, nonlinearity) -> Tensor:
    launches, (config,), _ = plan
    branch = None if down is None else F.linear(x, down)
    if launches[0] == "short":
        if down is not None:
            branch = F.pad(branch, (0, activation_launches.padded_rank(len(down)) - len(down)))
        product_short.short_product(x, None, qweight, wscales, branch, up, bias, out, config, nonlinearity)
        return out
    weight = unpack.empty_weight(qweight, x.dtype, "none")
    unpack.unpack(qweight, wscales, weight, "none", config)
    y = F.linear(x, weight[0], None if bias is None else bias.to(x.dtype))
    y = y if branch is None else y.addmm_(branch, up.T)
    return nonlinear(y, nonlinearity)  # after cuBLAS it reads what is rounded to 16 bits
