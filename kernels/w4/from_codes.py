"""An SVDQuant layer in two ops, for what comes before it to hand over codes (formulas: reference.py):

    svdq_codes     [norm ->] codes and x D^T            once for all layers that share an input, smoothing and D
    svdq_product   codes, x D^T -> y                    once for each of them

Nothing is rounded between the norm and the codes. Layers with 8- and 4-bit activations in groups of 64; on devices
without kernels for them the ops are the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import fp8
from ..formats.int4 import GROUP
from ..formats.nonlinearities import check
from ..formats.rotation import check_rotation
from ..runtime.late import late
from ..runtime.ops import op
from ..runtime.settings import best_config, remembered
from ..runtime.workspace import Workspace
from . import on_cpu, reference
from .layer import (
    MODES,
    REFERENCE,
    code_dtype,
    in_type,
    known_name,
    multiply,
    on_gpu,
    short_floats,
    steps,
)

if TYPE_CHECKING:
    from . import activation as activation_launches
    from . import unpack
else:
    late(globals(), "unpack", activation_launches="activation")


@op
def svdq_codes(
    x: Tensor,
    more: Tensor | None,
    smooth: Tensor | None,
    down: Tensor | None,
    activation: str,
    shift: float,
    norm_scale: Tensor | None,
    norm_shift: Tensor | None,
    eps: float,
    form: str = "adaptive",
    gate: str = "",
    rotation: int = 0,
    rotation_kind: str = "regular",
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] float -> codes [M, K] (e4m3 or int8), float32 scales [M] ("int4": [K / 64, M]), x D^T [M, R].

    more [..., K'] holds further columns of x, of which K is the sum then: nothing is concatenated in memory. With
    norm_scale and norm_shift [B, K] x [B, ..., K] is LayerNorm(x) (1 + norm_scale[b]) + norm_shift[b], with this eps,
    first; under the form "layer" LayerNorm(x) norm_scale[b] + norm_shift[b], under "rms" RMSNorm(x) in its place:
    then norm_shift may be None, and both may have one row for all samples. smooth [K], down [r, K]. R is r, padded
    where kernels want it so. activation: "fp8", "int8" or "int4". gate: "gelu", "gelu_tanh" or "silu"; then `more` is
    of x's shape, and x is multiplied by that function of it first. rotation: the group of inputs that is rotated
    before smoothing (formats/rotation.py), 0 for none; x D^T is of the input as it comes.

    Raises ValueError for sizes that do not fit.
    """
    _check_inputs(x, more, norm_scale, norm_shift, form, gate)
    if rotation:
        check_rotation(rotation, rotation_kind)
    name = known_name(x.device, activation, GROUP)
    x, more = _rows(x), None if more is None else _rows(more)
    norm = None if norm_scale is None else (norm_scale, norm_shift, eps, form)
    if not on_gpu(name):
        codes = reference.codes if name == REFERENCE else on_cpu.codes
        return codes(x, more, smooth, down, activation, shift, norm, gate, rotation, rotation_kind)
    return codes_through(name, x, more, smooth, down, shift, norm, gate, rotation, rotation_kind)


@svdq_codes.register_fake
def _(x, more, smooth, down, activation, shift, norm_scale, norm_shift, eps, form="adaptive", gate="", *_):
    _check_inputs(x, more, norm_scale, norm_shift, form, gate)
    name = known_name(x.device, activation, GROUP)
    x, more = _rows(x), None if more is None else _rows(more)
    k = x.shape[1] + (0 if more is None or gate else more.shape[1])
    shapes = _shapes(name, x.device, x.shape[0], k, 0 if down is None else down.shape[0], x.dtype, activation)
    return tuple(x.new_empty(shape, dtype=kind) for shape, kind in shapes)


def row_codes(
    x: Tensor, activation: str, norm: tuple | None, gate: tuple | None, rotation: tuple[int, str] = (0, "regular"),
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes [M, K] and scales [M] of x [..., K] for layers without smoothing or a branch.

    norm: (scale, shift, eps, form) and gate: (tensor like x, function of it) as `svdq_codes` has them, or None;
    rotation: (group, kind). more: further columns of x, where there is no gate.
    """
    gain, offset, eps, *form = norm or (None, None, 0.0)
    more, function = gate or (more, "")
    after = (gain, offset, eps, *(form or ["adaptive"]), function, *rotation)
    codes, scale, _ = svdq_codes(x, more, None, None, activation, 0.0, *after)
    return codes, scale


@op
def svdq_product(
    codes: Tensor,
    scales: Tensor,
    branch: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    activation: str,
    nonlinearity: str,
    dtype: torch.dtype,
    weight8: Tensor | None = None,
    scales8: Tensor | None = None,
) -> Tensor:
    """Outputs [M, N] of dtype from what `svdq_codes` gives; the nonlinearity is applied to float32.

    weight8, scales8: what `layer.unpacked` made of qweight and wscales, or None.
    """
    check(nonlinearity)
    name = known_name(codes.device, activation, GROUP)
    weight = (qweight, wscales, up, bias)
    if name == REFERENCE:
        y = reference.product(codes, scales, branch, *weight, activation, nonlinearity)
    elif not on_gpu(name):
        y = on_cpu.of_codes(codes, scales, branch, *weight, nonlinearity)
    else:
        eight = () if weight8 is None else (weight8, scales8)
        y = product_through(name, codes, scales, branch, *weight, nonlinearity, eight)
    return y if y.dtype == dtype else y.to(dtype)


@svdq_product.register_fake
def _(
    codes, scales, branch, qweight, wscales, up, bias, activation, nonlinearity, dtype, weight8=None, scales8=None
):  # fmt: skip
    return codes.new_empty(codes.shape[0], qweight.shape[0], dtype=dtype)


@remembered
def _codes_plan(
    name: str, device: torch.device, m: int, k: int, rank: int, dtype: torch.dtype, samples: int
) -> tuple:
    """(settings, what `_shapes` says); samples: those of a norm, or 0.

    Settings are those of "prepare", of the activation beside unpacking; with a norm, those of "norm", by rows of a
    sample, for a block of rows ends where it does.
    """
    mode, step, rows = MODES[name], steps(name, m)[0], m
    if samples and step == "prepare":
        step, rows = "norm", m // samples
    return best_config(f"{mode}.{step}", device, rows, None, k), _shapes(name, device, m, k, rank, dtype, mode)


def padded_branch(branch: Tensor, dtype: torch.dtype) -> Tensor:
    """x D^T [M, r] that was made apart as kernels take it: [M, R], in 16 bits."""
    wide = activation_launches.padded_rank(branch.shape[1])
    half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    return F.pad(branch, (0, wide - branch.shape[1])).to(half)


def codes_through(
    name: str, x: Tensor, more: Tensor | None, smooth, down, shift: float, norm, gate="", rotation=0, kind="regular"
) -> tuple:
    """`reference.codes` by the kernels called `name`; the branch in bf16 or fp16, its columns padded with zeros."""
    x = short_floats(x)
    dtype, (m, k) = x.dtype, x.shape
    if more is not None:
        more = short_floats(more if more.dtype == dtype else more.to(dtype))
        k += 0 if gate else more.shape[1]
    rank, samples = 0 if down is None else down.shape[0], 0 if norm is None else norm[0].shape[0]
    config, ((_, code), (scales, _), (branch, _)) = _codes_plan(name, x.device, m, k, rank, dtype, samples)
    out = x.new_empty(m, k, dtype=code), x.new_empty(scales, dtype=torch.float32), x.new_empty(branch)
    if m:
        down = None if down is None else in_type(down, dtype)
        turn = (rotation, kind) if rotation else None
        how = (MODES[name], shift, out, config, more, norm, gate, turn)
        activation_launches.quantize_activation(x, smooth, down, *how)
    return out


@remembered
def _product_plan(name: str, device: torch.device, m: int, n: int, k: int) -> tuple:
    """(launches, their settings, room for the weight); "prepare" has the settings of unpacking, too."""
    mode, launches = MODES[name], steps(name, m)
    settings = [best_config(f"{mode}.{step}", device, m, n, k) for step in launches]
    shapes = unpack.weight_shapes(n, k, code_dtype(name, device), mode)
    return launches, settings, Workspace(*shapes)


def product_through(
    name: str, codes, scales, branch, qweight, wscales, up, bias, nonlinearity: str, eight: tuple = ()
) -> Tensor:
    """`reference.product` by the kernels called `name`, in the branch's dtype; eight: what `unpacked` made, or ()."""
    (m, k), n = codes.shape, qweight.shape[0]
    out = branch.new_empty(m, n)
    if not (m and n):
        return out
    qweight, wscales = qweight.contiguous(), wscales.contiguous()
    up = None if up is None else in_type(up, out.dtype)
    launches, (first, second), room = _product_plan(name, codes.device, m, n, k)
    weight = eight if launches[1] == "product" else ()
    if launches[1] == "product" and not eight:
        weight = room.take(codes)
        unpack.unpack(qweight, wscales, weight, MODES[name], first)
    multiply(name, (codes, scales, branch), qweight, wscales, weight, up, bias, out, second, nonlinearity)
    return out


def _shapes(name: str, device: torch.device, m: int, k: int, rank: int, dtype: torch.dtype, activation: str) -> tuple:
    """(shape, type) of codes, scales and the branch, as the reference or the kernels make them of x [M, K]."""
    if on_gpu(name):
        half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        shapes = activation_launches.activation_shapes
        return shapes(m, k, half, activation, rank, code_dtype(name, device))
    code = fp8.DTYPE if activation == "fp8" else torch.int8
    scales = (k // GROUP, m) if activation == "int4" else (m,)
    return ((m, k), code), (scales, torch.float32), ((m, rank), torch.float32)


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _check_inputs(x, more, norm_scale, norm_shift, form, gate) -> None:
    check(gate)
    if gate and (more is None or more.shape != x.shape or norm_scale is not None):
        raise ValueError(f"a gate is of the inputs' shape {tuple(x.shape)}, and no norm is beside it.")
    if more is not None and more.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"inputs {tuple(x.shape)} and their further columns {tuple(more.shape)} differ in rows.")
    if norm_scale is None:
        return
    if form not in reference.NORMS:
        raise ValueError(f"a norm is one of {', '.join(reference.NORMS)}, not '{form}'.")
    wanted = x.shape[0], x.shape[-1] + (0 if more is None else more.shape[-1])
    one = form != "adaptive"  # row for all samples, and no shift: what norms with weights have
    fits = norm_scale.shape == wanted or (one and norm_scale.shape == (1, wanted[1]))
    if not fits or (norm_scale.shape != norm_shift.shape if norm_shift is not None else not one):
        sizes = tuple(norm_scale.shape), None if norm_shift is None else tuple(norm_shift.shape)
        raise ValueError(f"a norm's scale and shift {sizes} are not of {wanted[0]} samples and {wanted[1]} inputs.")
