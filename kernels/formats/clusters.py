"""Weights in clusters of values, as SplitQuant has them (arXiv:2501.12428): which cluster, and a code in it.

    codes      w ~ low[r, c] + step[r, c] q,    c the cluster of w, q in [0, 2^b - 1];  a codebook of C 2^b entries
    literal    w ~ sum_c step[r, c] (q_c - z[r, c]),    one tensor a cluster, whose other weights are exact zeros

r: the row that a grid is for, one for a whole tensor or one for each output. Clusters of codes reach from their least
to their largest weight; a tensor of the literal form covers zero, too, as zeros must be exact in it.

Memory, packed along each output's inputs: codes b bits a weight; clusters (up to 3) five to a byte, 3^5 = 243, so
1.6 bits where there are several. Three tensors take 3 b bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FIVE = 5  # numbers below 3 in a byte
MOST = 3  # clusters
POWERS = (1, 3, 9, 27, 81)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """codes [N, K] uint8 below 2^bits, bits 1 to 8 -> uint8 [N, ceil(K bits / 8)], the lowest bits first."""
    n, k = codes.shape
    places = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    flat = (codes[:, :, None] >> places & 1).reshape(n, k * bits)
    flat = F.pad(flat, (0, -flat.shape[1] % 8)).view(n, -1, 8)
    return (flat << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [N, inputs]."""
    flat = packed[:, :, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1
    flat = flat.flatten(1)[:, : inputs * bits].view(len(packed), inputs, bits)
    return (flat << torch.arange(bits, device=packed.device, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def pack_thirds(clusters: Tensor) -> Tensor:
    """Numbers below 3 [N, K] uint8 -> uint8 [N, ceil(K / 5)]."""
    n, k = clusters.shape
    fives = F.pad(clusters, (0, -k % FIVE)).view(n, -1, FIVE)
    return (fives * torch.tensor(POWERS, device=clusters.device, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def unpack_thirds(packed: Tensor, inputs: int) -> Tensor:
    """The inverse of `pack_thirds`: uint8 [N, inputs]."""
    powers = torch.tensor(POWERS, device=packed.device, dtype=torch.uint8)
    return (packed[:, :, None] // powers % MOST).flatten(1)[:, :inputs]


def code_values(codes: Tensor, clusters: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Form "codes": codes and clusters [N, K] uint8, low and step [R, C] -> the weight float32 [N, K], R = 1 or N."""
    where = clusters.long()
    rows = len(codes)
    low, step = (one.float().expand(rows, -1).gather(1, where) for one in (low, step))
    return low + step * codes.float()


def literal_values(codes: Tensor, zeros: Tensor, step: Tensor) -> Tensor:
    """Form "literal": codes [C, N, K] uint8, zeros [R, C] uint8, step [R, C] -> the weight float32 [N, K]."""
    zeros, step = (one.float().T[:, :, None] for one in (zeros, step))  # [C, R, 1]
    return ((codes.float() - zeros) * step).sum(0)
