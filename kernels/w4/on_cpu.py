"""SVDQuant's layer by the kernels that are compiled for this CPU (formulas: reference.py, cpu/w4_codes.py).

    cpu-w4a8    int8 activations        cpu-w4a4    int4 activations, scales of groups on both sides

Whole numbers are multiplied straight from the packed codes; the branch, of float32, is added to their sums in place.
"fp8" activations have no whole numbers, and weight-only layers no codes of inputs: the reference serves these.
"""

from __future__ import annotations

from torch import Tensor

from ..cpu.w4_codes import NAMES, available, gelu_tanh_, input_codes, product
from ..formats.int4 import GROUP
from . import reference


def kernel_name(activation: str, group_size: int) -> str | None:
    """The kernel on a CPU for this activation format and these groups; None where only the reference serves them."""
    return NAMES[activation] if activation in NAMES and group_size == GROUP and available() else None


def codes(
    x: Tensor, more: Tensor | None, smooth: Tensor | None, down: Tensor | None, activation: str, shift: float,
    norm: tuple | None, gate: str = "", rotation: int = 0, rotation_kind: str = "regular",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.codes` for "int8" and "int4": the same codes and scales, and x D^T float32."""
    inputs, branch = reference.before_smoothing(x, more, down, norm, gate, rotation, rotation_kind)
    return *input_codes(inputs, smooth, shift, activation), branch


def of_codes(
    codes: Tensor, scales: Tensor, branch: Tensor, qweight: Tensor, wscales: Tensor, up: Tensor | None,
    bias: Tensor | None, nonlinearity: str,
) -> Tensor:  # fmt: skip
    """`reference.product`: the layer's float32 outputs [M, N] from what `codes` gives."""
    y = product(codes, scales, qweight, wscales, bias)
    if up is not None:
        y.addmm_(branch.float(), up.float().T)
    return gelu_tanh_(y) if nonlinearity == "gelu_tanh" else reference.nonlinear(y, nonlinearity)


def linear(
    x: Tensor, qweight: Tensor, wscales: Tensor, smooth: Tensor | None, down: Tensor | None, up: Tensor | None,
    bias: Tensor | None, activation: str, shift: float, nonlinearity: str,
) -> Tensor:  # fmt: skip
    """x [M, K] float -> float32 [M, N]: both halves."""
    made = codes(x, None, smooth, down, activation, shift, None)
    return of_codes(*made, qweight, wscales, up, bias, nonlinearity)
