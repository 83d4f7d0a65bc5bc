"""L1 normalization on a CPU (shift/l1_formula.py), compiled: a row stays in a core's cache to its result.

Codes and what stochastic rounding draws are those of the formula; floats are off by their own rounding. The same bits
come whatever the number of threads: sums over rows are of parts that the shape alone decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library

STATS = 5  # as l1_formula.py has them
PARTS = 64  # of rows, whose gradients by gamma and beta are added up apart


def serves(device: torch.device) -> bool:
    """Whether the compiled kernel runs there; on a CPU the first who asks has it built."""
    return device.type == "cpu" and library.available()


def normalize(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, number: int, floor: float, ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What shift_l1_norm returns of x [R, P, C], not empty; floor: eps's root."""
    given = x.float().contiguous()
    gamma = given.new_ones(x.shape[2]) if gamma is None else gamma.float().contiguous()
    beta = given.new_zeros(x.shape[2]) if beta is None else beta.float().contiguous()
    y, codes = torch.empty_like(given), torch.empty_like(given, dtype=torch.int8)
    stats = given.new_empty(STATS, len(x), number)
    if library.found().kernels.ptq4dm_l1_norm(
        given.data_ptr(), gamma.data_ptr(), beta.data_ptr(), y.data_ptr(), codes.data_ptr(), stats.data_ptr(),
        *x.shape, number, floor, ratio,
    ):  # fmt: skip
        raise MemoryError(f"no memory for sums of {x.shape[2]} channels.")
    return y.to(x.dtype), codes, stats


def gradient(dy: Tensor, codes: Tensor, stats: Tensor, gamma: Tensor | None, seed: Tensor) -> tuple[Tensor, Tensor]:
    """What shift_l1_gradient returns of dy [R, P, C], not empty."""
    given, parts = dy.float().contiguous(), min(len(dy), PARTS)
    factors = given.new_ones(dy.shape[2]) if gamma is None else gamma.float().contiguous()
    dx, sums = torch.empty_like(given), given.new_zeros(parts, 2, dy.shape[2])
    if library.found().kernels.ptq4dm_l1_gradient(
        given.data_ptr(), codes.data_ptr(), stats.data_ptr(), factors.data_ptr(), int(seed), dx.data_ptr(),
        sums.data_ptr(), *dy.shape, stats.shape[2], parts,
    ):  # fmt: skip
        raise MemoryError(f"no memory for the codes of a row of {dy.shape[1]} x {dy.shape[2]}.")
    return dx.to(dy.dtype), given.new_zeros(2, dy.shape[2]) if gamma is None else sums.sum(0)
