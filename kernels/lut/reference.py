"""The formula of binary-coded Linear layers, and the weight that they stand for: the truth.

y[m, n] = sum_g ( sum_i alpha[n, g, i] sum_{k in g} b_i[n, k] x[m, k]  +  z[n, g] sum_{k in g} x[m, k] )  +  b[n]
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.bcq import MOST_BITS, TILE, WORD, BinaryGrid, rows_of, unpack

SIZES = (32, 64, 128)


def weight_of(qweight: Tensor, alphas: Tensor, offsets: Tensor | None, outputs: int, inputs: int) -> Tensor:
    """The float32 weight [N, K] that words and scales of tiles stand for (formats/bcq.py)."""
    grid = BinaryGrid(rows_of(alphas, outputs), None if offsets is None else rows_of(offsets, outputs))
    return grid.values(unpack(qweight, outputs, inputs))


def reference(
    x: Tensor, qweight: Tensor, alphas: Tensor, offsets: Tensor | None, bias: Tensor | None, outputs: int
) -> Tensor:
    """x [M, K] float -> float32 [M, N]; float64 inputs give float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = weight_of(qweight, alphas, offsets, outputs, x.shape[1]).to(wide)
    return F.linear(x.to(wide), weight, None if bias is None else bias.to(wide))


@functools.lru_cache(maxsize=4096)
def check(
    qweight: torch.Size, alphas: torch.Size, offsets: torch.Size | None, bias: torch.Size | None, outputs: int,
    inputs: int,
) -> None:  # fmt: skip
    """Raise ValueError for shapes that do not belong together; right ones are looked at once."""
    tiles, words = -(-outputs // TILE), -(-inputs // WORD)
    bits = qweight[2] if len(qweight) == 4 else 0
    if tuple(qweight) != (tiles, words, bits, TILE) or not 1 <= bits <= MOST_BITS:
        raise ValueError(
            f"{outputs} outputs of {inputs} inputs are packed as [{tiles}, {words}, bits, {TILE}] words, with 1 to "
            f"{MOST_BITS} bits; got {list(qweight)}."
        )
    groups = alphas[1] if len(alphas) == 4 else 0
    if groups != 1 and (not groups or inputs % groups or inputs // groups not in SIZES):
        raise ValueError(f"{inputs} inputs have 1 group, or groups of 32, 64 or 128; got {groups} groups.")
    right = {
        "scales": (alphas, (tiles, groups, bits, TILE)), "offsets": (offsets, (tiles, groups, TILE)),
        "bias": (bias, (outputs,)),
    }  # fmt: skip
    for name, (given, shape) in right.items():
        if given is not None and tuple(given) != shape:
            raise ValueError(
                f"{name} of {outputs} outputs in {groups} groups have the shape {shape}; got {tuple(given)}."
            )
