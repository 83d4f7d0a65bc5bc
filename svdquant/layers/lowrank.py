"""The low-rank branch: the part of a weight that 4 bits cannot hold, in r singular directions.

top_factors is a truncated SVD without the SVD: through the Gram matrix of the smaller side, or, where that is large,
by randomised subspace iteration (Halko et al., arXiv:0909.4061, algorithm 4.4).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

GRAM_LIMIT = 1024  # the smaller side up to which an eigendecomposition is cheaper
OVERSAMPLING = 16
POWER_STEPS = 3


def top_factors(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(up [N, r], down [r, K]) with up @ down the best approximation of rank r of matrix [N, K] float32.

    All singular values are in `up`, whose columns are orthogonal; the rows of `down` are orthonormal.
    """
    if min(matrix.shape) <= max(GRAM_LIMIT, rank + OVERSAMPLING):
        wide = matrix.shape[0] > matrix.shape[1]
        tall = matrix.double() if wide else matrix.double().T  # the smaller side last
        _, vectors = torch.linalg.eigh(tall.T @ tall)
        basis = vectors[:, -rank:].flip(1).to(matrix.dtype)  # largest first
        if wide:
            return matrix @ basis, basis.T.contiguous()
        down = torch.linalg.qr((basis.T @ matrix).T).Q.T  # its rows are orthogonal already, but not of length 1
        return matrix @ down.T, down.contiguous()
    q = torch.linalg.qr(matrix @ _start(matrix.shape[1], rank + OVERSAMPLING, seed).to(matrix)).Q
    for _ in range(POWER_STEPS):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
    small = q.T @ matrix
    _, vectors = torch.linalg.eigh((small @ small.T).double())
    left = q @ vectors[:, -rank:].flip(1).to(matrix.dtype)
    down = torch.linalg.qr((left.T @ matrix).T).Q.T
    return matrix @ down.T, down.contiguous()


@lru_cache(maxsize=8)
def _start(columns: int, width: int, seed: int) -> Tensor:
    """The random start [columns, width], of the CPU's generator on every device. Drawing it takes milliseconds, as
    all of a decomposition does on a GPU, and a group of layers is decomposed thirty times from the same."""
    with torch.inference_mode(False):
        return torch.randn(columns, width, generator=torch.Generator("cpu").manual_seed(seed))


def moved(matrix: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down) as `top_factors` gives them for a matrix [N, K] near to one whose `down` [r, K] is known: by one
    step of subspace iteration from there."""
    q = torch.linalg.qr(matrix @ down.T).Q
    down = torch.linalg.qr((q.T @ matrix).T).Q.T
    return matrix @ down.T, down.contiguous()
