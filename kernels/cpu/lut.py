"""Binary-coded Linear on a CPU by look-up tables, without multiplications by weights and without a weight.

    X = round(x / s),  s = max|x| / 8191          whole numbers of 14 bits, s of each unit u: a group of inputs, or
                                                  256 inputs where a row has one group
    P[m, n, u, i] = sum_{k in u} b_i[n, k] X[m, k]
    y[m, n] = sum_u ( sum_i alpha[n, u, i] (s[m, u] P[m, n, u, i])  +  z[n, u] s[m, u] sum_{k in u} X[m, k] )  +  b[n]

P is exact: for each four inputs the sums with all 16 patterns of signs are in a table of the row, and four bits of a
code look one up. Units ascend and planes within them; every step is a multiply-add of float32. So y is off by at
most s / 2 sum_k |w| from rounding x, and by (units (q + 1) + 3) 2^-23 of sum_u (sum_i |alpha s P| + |z s sum X|)
+ |b|. Its bits are the same whatever the number of threads and rows, and for all instructions that it is compiled
for (lut.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library

NAME = "cpu-lut"
LIMIT, UNIT = 8191, 256


def serves(device: torch.device) -> bool:
    """Whether the compiled kernel runs there; on a CPU the first who asks has it built."""
    return device.type == "cpu" and library.available()


def linear(
    x: Tensor, qweight: Tensor, alphas: Tensor, offsets: Tensor | None, bias: Tensor | None, outputs: int
) -> Tensor:
    """x [M, K] float -> float32 [M, N], neither empty; operands as `lut.layer.bcq_linear` has checked them."""
    x, qweight = x.float().contiguous(), qweight.contiguous()
    kind = alphas.dtype if alphas.dtype.itemsize == 2 else torch.float16
    alphas = alphas.to(kind).contiguous()
    offsets = None if offsets is None else offsets.to(kind).contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = x.new_empty(len(x), outputs)
    if library.found().kernels.ptq4dm_lut(
        x.data_ptr(), qweight.data_ptr(), alphas.data_ptr(), None if offsets is None else offsets.data_ptr(),
        kind == torch.bfloat16, None if bias is None else bias.data_ptr(), y.data_ptr(),
        len(x), outputs, x.shape[1], alphas.shape[1], qweight.shape[2],
    ):  # fmt: skip
        raise MemoryError(f"no memory for the tables of {len(x)} rows of {x.shape[1]} inputs.")
    return y
