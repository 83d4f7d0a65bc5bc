"""Codes of an SVDQuant layer's input: the launches of the activation kernel (activation_triton.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.int4 import GROUP
from ..formats.nonlinearities import NONLINEARITIES
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch, planned
from ..runtime.prepared import prepared
from ..runtime.rotation import RUN, matrices
from .activation_triton import activation_kernel
from .reference import NORMS

SETTINGS = ("BM", "BK", "STAGES", "ROWS", "STEP", "num_warps")


def padded_rank(rank: int) -> int:
    """Ranks come in 16, 32, 64, ...: what a tensor core's step takes. 0 stays 0."""
    return max(16, next_power_of_2(rank)) if rank else 0


def limits(mode: str, shifted: bool) -> dict:
    """The first and last code of "fp8", "int8" or "int4", as the kernel takes them."""
    low, high = {"fp8": (-448.0, 448.0), "int8": (-127.0, 127.0), "int4": (-7.0, 7.0)}[mode]
    return dict(LOW=0.0, HIGH=15.0) if mode == "int4" and shifted else dict(LOW=low, HIGH=high)


def empty_activation(
    x: Tensor, mode: str, rank: int, code_dtype: torch.dtype, more: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `activation_shapes` says of x [M, K], or of (x | more)."""
    m, k = x.shape
    k += 0 if more is None else more.shape[1]
    return tuple(
        x.new_empty(shape, dtype=kind) for shape, kind in activation_shapes(m, k, x.dtype, mode, rank, code_dtype)
    )


def activation_shapes(m: int, k: int, dtype: torch.dtype, mode: str, rank: int, code_dtype: torch.dtype) -> tuple:
    """(shape, type) of codes [M, K], scales float32 [M] or [K/64, M], branch [M, padded rank] of the input's type."""
    scales = (k // GROUP, m) if mode == "int4" else (m,)
    return ((m, k), code_dtype), (scales, torch.float32), ((m, padded_rank(rank)), dtype)


def reciprocals(smooth: Tensor) -> Tensor:
    """1 / smooth [K] in float32, kept with it: a division in the kernel costs more than all else per value."""
    return prepared(smooth, "reciprocals", lambda: 1.0 / smooth.float())


def activation_sizes(x: Tensor, smooth: Tensor | None, down: Tensor | None, mode: str, shift: float) -> tuple:
    """Numbers that decide about the launch for x [M, K]: the arguments of `activation_launch` after config."""
    return mode, *x.shape, x.stride(0), 0 if down is None else down.shape[0], shift, smooth is not None


def activation_launch(
    config: dict, mode: str, m: int, k: int, stride: int, rank: int, shift: float, smoothed: bool, samples: int = 1
) -> tuple[int, dict]:
    """(number of programs, numbers and constants) of `activation_program`; config has SETTINGS.

    samples: B of the norm. A block of rows belongs to one of them.
    """
    rows = m // samples
    programs = samples * (cdiv(rows, config["ROWS"]) + (cdiv(rows, config["BM"]) if rank else 0))
    fixed = dict(
        shift=shift, M=m, K=k, stride_m=stride,
        RANK=rank, R=padded_rank(rank), GROUPED=mode == "int4", SHIFTED=shift != 0, SMOOTHED=smoothed,
        STEPS=cdiv(k, config["STEP"]), **limits(mode, shift != 0),
        **{name: config[name] for name in SETTINGS}, maxnreg=config.get("maxnreg"),
    )  # fmt: skip
    return programs, fixed


def activation_tensors(x: Tensor, smooth: Tensor | None, down: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors that `activation_program` reads."""
    return x, x if smooth is None else reciprocals(smooth), x if down is None else down


@planned
def _launch(
    config: dict, k: int, samples: int, joined: tuple, modulated: tuple, gate: str, rotated: bool, mode, m, _, *sizes
) -> Launch:  # fmt: skip
    """k: of (x | more); joined: columns of x, stride of more; modulated: strides of the norm's vectors, rows, eps."""
    if rotated:  # by runs
        config = config | {"STEP": max(config["STEP"], RUN), "maxnreg": None}  # v of float32 take more registers
    programs, fixed = activation_launch(config, mode, m, k, *sizes, samples)
    fixed |= dict(zip(("x_columns", "stride_more"), joined, strict=True))
    fixed |= dict(
        zip(("stride_gain", "stride_offset", "sample_rows", "eps", "ONE", "CENTRED"), modulated, strict=True)
    )
    return Launch(activation_kernel, (programs,), GATE=gate, **fixed)


def quantize_activation(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, mode: str, shift: float, out: tuple, config: dict,
    more: Tensor | None = None, norm: tuple | None = None, gate: str = "", rotation: tuple[int, str] | None = None,
) -> None:  # fmt: skip
    """Fill `out`, made by `empty_activation`, from x [M, K] (bf16 or fp16, columns contiguous).

    smooth [K] divisors, down [r, K] contiguous; mode "fp8", "int8" or "int4"; config has SETTINGS, those of
    "<mode>.prepare" too. more [M, K2], like x: its columns follow those of x, and K is their sum. norm
    (scale [B, K], shift [B, K] or None, eps, one of NORMS): x and more are normalised over K, scaled and shifted
    first, M / B rows with each row of scale and shift; see norm.py. Without the last it is "adaptive". gate: one of
    NONLINEARITIES: x is multiplied by that of `more` [M, K] first. rotation: (group, kind) of codes, or None.

    Raises ValueError for a `more` or a `norm` of other sizes or types, and for a norm beside a gate.
    """
    m, k = x.shape
    joined, samples, modulated = (None, None), 1, (None,) * 6
    gain = offset = None
    if more is not None:
        _check_more(x, more, gate)
        joined = k, more.stride(0)
        k += 0 if gate else more.shape[1]
    if norm is not None:
        gain, offset, eps, *form = norm
        form = form[0] if form else "adaptive"
        if gate:
            raise ValueError("an input is normalised or multiplied by a gate, not both.")
        _check_norm(gain, offset, form, m, k)
        samples, one, centred = len(gain), form == "adaptive", form != "rms"
        modulated = gain.stride(0), 0 if offset is None else offset.stride(0), m // samples, eps, one, centred
    turn = None if rotation is None else matrices(*rotation, x.device)
    sizes = activation_sizes(x, smooth, down, mode, shift)
    launch = _launch(config, k, samples, joined, modulated, gate, turn is not None, *sizes)
    launch(*activation_tensors(x, smooth, down), *out, more, gain, offset, turn)


def _check_more(x: Tensor, more: Tensor, gate: str) -> None:
    if gate not in NONLINEARITIES:
        raise ValueError(f"a gate is one of {', '.join(filter(None, NONLINEARITIES))}, not '{gate}'.")
    if gate and (more.dtype != x.dtype or more.shape != x.shape):
        raise ValueError(f"x is {x.dtype} {list(x.shape)} and its gate {more.dtype} {list(more.shape)}.")
    if not gate and (more.dtype != x.dtype or len(more) != len(x) or x.shape[1] % GROUP or more.shape[1] % GROUP):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} and more {more.dtype} {list(more.shape)}; "
            f"give both the same dtype and rows, and numbers of columns that are multiples of {GROUP}."
        )
    if more.stride(1) != 1:
        raise ValueError("the columns of more are not contiguous; call .contiguous() on it first.")


def _check_norm(scale: Tensor, shift: Tensor | None, form: str, m: int, k: int) -> None:
    if form not in NORMS:
        raise ValueError(f"a norm is one of {', '.join(NORMS)}, not '{form}'.")
    shift = scale if shift is None else shift
    if scale.shape != shift.shape or scale.ndim != 2 or scale.shape[1] != k or not len(scale) or m % len(scale):
        raise ValueError(
            f"scale {list(scale.shape)} and shift {list(shift.shape)} of the norm do not fit {m} rows of {k}; "
            f"give both [B, {k}], where B divides {m}."
        )
    if scale.stride(1) != 1 or shift.stride(1) != 1:
        raise ValueError("the columns of the norm's scale and shift are not contiguous; call .contiguous() on them.")
