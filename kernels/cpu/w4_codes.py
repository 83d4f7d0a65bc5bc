"""A 4-bit weight under inputs of 8 or 4 bits on a CPU, in two halves: codes of the inputs, and their product.

    v[m, k] = (x[m, k] + c) / s[k]                             smoothing: s, and a shift c or 0
    P[m, n, g] = sum_{k in g} q_x[m, k] q_w[n, k]
    "int8"    q_x = round(v / t[m]),         t[m] = max |v| / 127
              y[m, n] = t[m] sum_g w[n, g] P[m, n, g]  +  b[n]
    "int4"    q_x = round(v (1 / t[g, m])),  t[g, m] = max_{k in g} |v| / 7;  for c > 0 in 0..15, t = max v / 15
              y[m, n] = sum_g w[n, g] (t[g, m] P[m, n, g])  +  b[n]

P is a whole number, and exact. Codes and scales are those of w4/reference.py to the bit (w4_ends.cpp), where inputs
are finite. After P float32 rounds once for t of "int4", once a group, and once or twice for t of "int8" and b: y is
off by at most (G + 2) 2^-24 of sum_g |w t P| + |b|. Its bits are the same whatever the number of threads and rows,
and for all instructions that it is compiled for (w4a8.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.int4 import GROUP
from . import library
from .w4a8 import NAME as W4A8
from .w4a8 import SCALES, SIZES, at

W4A4 = "cpu-w4a4"
NAMES = {"int8": W4A8, "int4": W4A4}
"""The kernel's name by the format of the inputs."""


@torch.compiler.assume_constant_result  # the compiler cannot look into a library that is loaded, or build it
def available() -> bool:
    """Whether the kernels are compiled; the first who asks has them built."""
    return library.available()


def input_codes(x: Tensor, smooth: Tensor | None, shift: float, activation: str) -> tuple[Tensor, Tensor]:
    """x [M, K] float, smooth [K] -> codes int8 [M, K] and float32 scales, [M] of "int8", [K / 64, M] of "int4".

    shift above 0 gives codes of "int4" without sign. Raises ValueError where K does not divide into groups of 64 of
    "int4", MemoryError where there is none.
    """
    m, k = x.shape
    four = activation == "int4"
    if four and k % GROUP:
        raise ValueError(f"{k} columns do not divide into groups of {GROUP}.")
    codes = x.new_empty(m, k, dtype=torch.int8)
    scales = x.new_empty((k // GROUP, m) if four else (m,), dtype=torch.float32)
    if not codes.numel():
        return codes, scales.fill_(1)
    x, smooth = x.float().contiguous(), None if smooth is None else smooth.float().contiguous()
    size = GROUP if four else k
    if library.found().kernels.ptq4dm_inputs(
        at(x), at(smooth), shift, at(codes), at(scales), m, k, size, four, four and shift > 0
    ):  # fmt: skip
        raise MemoryError(f"no memory for a row of {k} inputs.")
    return codes, scales


def product(codes: Tensor, scales: Tensor, qweight: Tensor, wscales: Tensor, bias: Tensor | None) -> Tensor:
    """float32 [M, N] from what `input_codes` gives: scales [M], or [K / 64, M] for inputs in groups.

    qweight uint8 [N, K / 2] from `formats.int4.pack_int4(codes, 64)`; wscales float [N, G], G = 1 or K / 32, / 64 or
    / 128, K / 64 for inputs in groups; bias [N] float or None. Raises ValueError for sizes that do not belong
    together, MemoryError where there is none.
    """
    (m, k), n, groups, by_group = codes.shape, len(qweight), wscales.shape[1], scales.ndim == 2
    _check(k, groups, by_group, qweight, wscales, scales, m)
    y = codes.new_empty(m, n, dtype=torch.float32)
    if not (m and n and k):
        return y.zero_() if bias is None else y.copy_(bias)
    wscales = (wscales if wscales.dtype in SCALES else wscales.float()).contiguous()
    codes, scales, qweight = codes.contiguous(), scales.contiguous(), qweight.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    if library.found().kernels.ptq4dm_w4_of_codes(
        at(codes), at(scales), by_group, at(qweight), at(wscales), SCALES[wscales.dtype], at(bias), at(y),
        m, n, k, groups,
    ):  # fmt: skip
        raise MemoryError(f"no memory for the sums of {m} rows of {k} inputs.")
    return y


def gelu_tanh_(y: Tensor) -> Tensor:
    """GELU by tanh of y [M, N] float32, contiguous, in place: within 3e-7 of max(|GELU(y)|, 1), NaN where y is."""
    library.found().kernels.ptq4dm_gelu_tanh(at(y), y.numel())
    return y


def _check(k: int, groups: int, by_group: bool, qweight: Tensor, wscales: Tensor, scales: Tensor, m: int) -> None:
    n, size = len(qweight), k // max(groups, 1)
    right = size == GROUP if by_group else groups == 1 or size in SIZES
    if k % GROUP or groups * size != k or not right:
        raise ValueError(f"inputs of {k} columns and weights in {groups} groups are not multiplied here.")
    wanted = (groups, m) if by_group else (m,)
    if qweight.shape[1] != k // 2 or len(wscales) != n or tuple(scales.shape) != wanted:
        sizes = list(qweight.shape), list(wscales.shape), list(scales.shape)
        raise ValueError(f"packed codes and scales {sizes} are not those of {m} rows of {k} inputs.")
