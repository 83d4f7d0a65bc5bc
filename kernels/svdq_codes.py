"""An SVDQuant layer in two ops, for what comes before it to hand over codes (formulas: svdq.py):

    svdq_codes     [layer norm ->] codes and x D^T      once for all layers that share an input, smoothing and D
    svdq_product   codes, x D^T -> y                    once for each of them

Nothing is rounded between the norm and the codes. Layers with 8- and 4-bit activations in groups of 64; on devices
without kernels for them the ops are the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fp8, svdq
from .ops import op
from .svdq_linear import INT4, MODES, REFERENCE, SHORT, check, code_dtype, kernel_name, short_floats
from .tuning import best_config


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
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] float -> codes [M, K] (e4m3 or int8), float32 scales [M] ("int4": [K / 64, M]), x D^T [M, R].

    more [..., K'] holds further columns of x, of which K is the sum then: nothing is concatenated in memory. With
    norm_scale and norm_shift [B, K] x [B, ..., K] is LayerNorm(x) (1 + norm_scale[b]) + norm_shift[b], with this eps,
    first. smooth [K], down [r, K]. R is r, padded where kernels want it so. activation: "fp8", "int8" or "int4".

    Raises ValueError for sizes that do not fit.
    """
    _check_inputs(x, more, norm_scale, norm_shift)
    name = kernel_name(x.device, activation, 64)
    x, more = _rows(x), None if more is None else _rows(more)
    norm = None if norm_scale is None else (norm_scale, norm_shift, eps)
    if name == REFERENCE:
        return svdq.codes(x, more, smooth, down, activation, shift, norm)
    return codes_through(name, x, more, smooth, down, shift, norm)


@svdq_codes.register_fake
def _(x, more, smooth, down, activation, shift, norm_scale, norm_shift, eps):
    _check_inputs(x, more, norm_scale, norm_shift)
    name = kernel_name(x.device, activation, 64)
    x, more = _rows(x), None if more is None else _rows(more)
    return _empty(name, x, more, 0 if down is None else down.shape[0], activation)


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
) -> Tensor:
    """What `svdq_codes` gives -> the layer's outputs [M, N] of dtype, with the nonlinearity applied to float32."""
    check(nonlinearity)
    name = kernel_name(codes.device, activation, 64)
    if name == REFERENCE:
        y = svdq.product(codes, scales, branch, qweight, wscales, up, bias, activation, nonlinearity)
    else:
        y = product_through(name, codes, scales, branch, qweight, wscales, up, bias, nonlinearity)
    return y.to(dtype)


@svdq_product.register_fake
def _(codes, scales, branch, qweight, wscales, up, bias, activation, nonlinearity, dtype):
    return codes.new_empty(codes.shape[0], qweight.shape[0], dtype=dtype)


def codes_through(name: str, x: Tensor, more: Tensor | None, smooth, down, shift: float, norm) -> tuple:
    """`svdq.codes` by the kernels called `name`; the branch in bf16 or fp16, its columns padded with zeros."""
    from .svdq_activation import quantize_activation

    x, mode = short_floats(x), MODES[name]
    more = None if more is None else short_floats(more.to(x.dtype))
    out = _empty(name, x, more, 0 if down is None else down.shape[0], mode)
    m, k = out[0].shape
    if m:
        down = None if down is None else down.to(x.dtype).contiguous()
        config = best_config(f"{mode}.{_first_step(name, m)}", x.device, m, None, k)
        quantize_activation(x, smooth, down, mode, shift, out, config, more=more, norm=norm)
    return out


def product_through(name: str, codes, scales, branch, qweight, wscales, up, bias, nonlinearity: str) -> Tensor:
    """`svdq.product` by the kernels called `name`, in the branch's dtype."""
    from . import svdq_gemm, svdq_unpack, svdq_w4a4, w4a16

    mode, (m, k), n = MODES[name], codes.shape, len(qweight)
    out = branch.new_empty(m, n)
    if not out.numel():
        return out
    qweight, wscales = qweight.contiguous(), wscales.contiguous()
    up = None if up is None else up.to(out.dtype).contiguous()
    sizes = (codes.device, m, n, k)
    if _first_step(name, m) == "activation":
        config = best_config(f"{mode}.short", *sizes)
        w4a16.short_product(codes, scales, qweight, wscales, branch, up, bias, out, config, nonlinearity)
        return out
    weight = svdq_unpack.empty_weight(qweight, codes.dtype, mode)
    svdq_unpack.unpack(qweight, wscales, weight, mode, best_config(f"{mode}.prepare", *sizes))
    product = svdq_w4a4.product if name == INT4 else svdq_gemm.product
    config = best_config(f"{mode}.product", *sizes)
    product((codes, scales, branch), weight, up, bias, out, config, nonlinearity)
    return out


def _first_step(name: str, rows: int) -> str:
    """As in svdq_linear.steps; "prepare" has the settings of the activation and of unpacking, side by side."""
    return "activation" if name != INT4 and rows <= SHORT else "prepare"


def _empty(name: str, x: Tensor, more: Tensor | None, rank: int, activation: str) -> tuple:
    """Room for codes, scales and the branch, as the reference or the kernels make them."""
    if name == REFERENCE:
        code, half = fp8.DTYPE if activation == "fp8" else torch.int8, torch.float32
    else:
        from .svdq_activation import padded_rank

        rank, code = padded_rank(rank), code_dtype(name, x.device)
        half = x.dtype if x.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    m, k = x.shape[0], x.shape[1] + (0 if more is None else more.shape[1])
    scales = (k // 64, m) if activation == "int4" else (m,)
    return (
        x.new_empty(m, k, dtype=code),
        x.new_empty(scales, dtype=torch.float32),
        x.new_empty(m, rank, dtype=half),
    )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _check_inputs(x, more, norm_scale, norm_shift) -> None:
    if more is not None and more.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"inputs {tuple(x.shape)} and their further columns {tuple(more.shape)} differ in rows.")
    wanted = (len(x), x.shape[-1] + (0 if more is None else more.shape[-1]))
    if norm_scale is not None and not norm_scale.shape == norm_shift.shape == wanted:
        sizes = tuple(norm_scale.shape), tuple(norm_shift.shape)
        raise ValueError(f"a norm's scale and shift {sizes} are not of {wanted[0]} samples and {wanted[1]} inputs.")
