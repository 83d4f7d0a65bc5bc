"""Group-wise Hadamard rotations of what a product reads: each `group` of inputs times one orthogonal matrix.

    x -> x diag(H, ..., H),    H H = I,    H = H^T, [G, G]          (x H)(W H)^T = x W^T

    sylvester    H_2 = [[1, 1], [1, -1]] / sqrt(2),  H = H_2 (x) ... (x) H_2            G a power of two
    regular      H_4 = (J - 2 P) / 2,                H = H_4 (x) ... (x) H_4            G a power of four

J is all ones, P the reversed identity. (x): Kronecker's product. All rows and columns of a regular matrix have one
sum, sqrt(G) / sqrt(G) = 1: an input that is the same in a whole group stays as it is, where Sylvester's first column
gathers it in one value. "ConvRot: Rotation-Based Plug-and-Play 4-bit Quantization for Diffusion Transformers",
arXiv 2512.03673. What is large in one input is spread over its group: QuaRot, arXiv 2404.00456.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .hadamard import hadamard

KINDS = ("regular", "sylvester")
GROUPS = (16, 32, 64, 128, 256)
"""The sizes of groups that layers have; a regular matrix has 16, 64 or 256."""


def groups_of(kind: str) -> tuple[int, ...]:
    """The sizes of GROUPS that a kind has. Raises ValueError for a kind that is not in KINDS."""
    if kind not in KINDS:
        raise ValueError(f"a rotation is {' or '.join(KINDS)}, not '{kind}'.")
    return tuple(size for size in GROUPS if kind == "sylvester" or size.bit_length() % 2)


def check_rotation(group: float, kind: str) -> None:
    """Raises ValueError for a group or a kind that there is not."""
    if group not in groups_of(kind):
        sizes = [str(size) for size in groups_of(kind)]
        raise ValueError(f"a {kind} rotation has groups of {', '.join(sizes[:-1])} or {sizes[-1]}, not {group:g}.")


def matrix(group: int, kind: str) -> Tensor:
    """The orthogonal, symmetric matrix H [group, group] float64 of a kind; its own inverse.

    Raises ValueError for a group or a kind that there is not.
    """
    check_rotation(group, kind)
    return _power(group, kind)


def factors(group: int, kind: str) -> tuple[Tensor, Tensor]:
    """(H [group / 16, group / 16], H [16, 16]) float64, whose Kronecker product is the matrix of a group.

    Raises ValueError for a group or a kind that there is not.
    """
    check_rotation(group, kind)
    return _power(group // 16, kind), _power(16, kind)


def _power(size: int, kind: str) -> Tensor:
    if kind == "sylvester":
        return hadamard(size)
    first = (1 - 2 * torch.eye(4, dtype=torch.float64).flip(0)) / 2
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.kron(H, first)
    return H


def rotate(x: Tensor, group: int, kind: str) -> Tensor:
    """x [..., K] float with each `group` of the last axis times H, in x's dtype; its own inverse.

    Sums are in float32, of float64 in float64. Raises ValueError where K is no multiple of group, and for a group or
    a kind that there is not.
    """
    check_rotation(group, kind)
    if x.shape[-1] % group:
        raise ValueError(f"{x.shape[-1]} inputs do not divide into groups of {group}.")
    wide = torch.promote_types(x.dtype, torch.float32)
    turned = x.to(wide).unflatten(-1, (-1, group)) @ _matrix(group, kind, wide, x.device)
    return turned.flatten(-2).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _matrix(group: int, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return matrix(group, kind).to(device, dtype)
