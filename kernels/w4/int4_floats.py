"""4-bit weights as floats, in front of a product of floats: layers whose inputs stay as they are (W4A16).

    w[n, k] = s[n, g] (q[n, k] - z[n, g])        codes q in [-8, 7], scales s, whole zero points z or none; g of k
    w[n, k] = s[n, g] t[q[n, k]]                 levels t of a codebook

The product is float32's, rounded once to the type that is asked for. Bytes: N K / 2 read, 2 N K written in 16 bits;
nothing is kept beside the layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.late import late
from ..runtime.ops import op
from . import int4_codes

if TYPE_CHECKING:
    from . import int4_codes_triton
else:
    late(globals(), "int4_codes_triton")

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@op
def int4_floats(
    qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, inputs: int, dtype: torch.dtype,
    levels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """w [N, K] in dtype (bfloat16, float16 or float32), K = inputs; the tensors as in `int4_codes`.

    Raises ValueError for sizes that do not belong together, or another dtype.
    """
    int4_codes.check(qweight.shape, wscales.shape, None if wzeros is None else wzeros.shape, inputs)
    int4_codes.check_levels(qweight, wzeros, levels)
    if dtype not in FLOATS:
        raise ValueError(f"weights are unpacked to bfloat16, float16 or float32; got {dtype}.")
    if qweight.is_cuda and qweight.shape[0]:
        return int4_codes_triton.int4_floats(qweight, wscales, wzeros, inputs, dtype, levels)
    return reference(qweight, wscales, wzeros, inputs, levels).to(dtype)


@int4_floats.register_fake
def _(qweight, wscales, wzeros, inputs, dtype, levels=None):
    return qweight.new_empty(len(qweight), inputs, dtype=dtype)


def reference(
    qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, inputs: int, levels: Tensor | None = None
) -> Tensor:
    """w [N, K] float32 by the formula, on any device."""
    n, groups = wscales.shape
    steps = int4_codes.steps_of(qweight, wzeros, levels, inputs, groups)
    return (steps * wscales.float()[:, :, None]).reshape(n, inputs)
