"""Binary-coded weights: sums of sign planes, each times a scale of its group.

    w ~ sum_{i < q} alpha_i b_i  +  z,    b_i in {-1, 1},  alpha_i >= 0

over groups of inputs of a row, with q from 1 to 4 planes; z is an offset, or none. A code c in [0, 2^q) holds the
signs: b_i = 2 bit_i(c) - 1. "LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient Inference in
Large-Scale Generative Language Models", Park et al., arXiv:2206.09557, sections 3.1 and 3.2.

    fit       greedy: b_i the signs of what is left, alpha_i the mean of its magnitude; then rounds of least squares
              for alpha, given the signs, and of nearest sums for the signs, given alpha. No step raises the error.
              Least squares may count errors by |w|^emphasis, as an option of the authors' code does: plain ones make
              w shorter, by the share of its error, and large weights most.
    uniform   s (c - zero) is alpha_i = s 2^(i-1), z = s (2^q - 1) / 2 - s zero: the same codes, the same values.

Stored are tiles of 64 outputs:

    words    int32 [T, W, q, 64]    T = ceil(N / 64), W = ceil(K / 32); bit j + 16 h of a word is the
                                   sign of input 32 w + 2 j + h: kernels make two signs of two bits at a time
    alphas   [T, G, q, 64]          in 16 bits; offsets [T, G, 64]

Outputs and inputs beyond the last have bits and scales of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .grid import Grid

TILE, WORD = 64, 32
MOST_BITS = 4
ROUNDS = 15
"""Of least squares and nearest sums, as in the authors' code."""
CHUNK = 1 << 22  # weights that are worked on at a time


@dataclass
class BinaryGrid:
    """alphas: [N, G, q] float, not negative; offsets: [N, G] float, or None."""

    alphas: Tensor
    offsets: Tensor | None = None
    kind: ClassVar[str] = "binary"

    @property
    def bits(self) -> int:
        """The number of planes."""
        return self.alphas.shape[2]

    def sums(self) -> Tensor:
        """What codes 0 .. 2^q - 1 stand for, float32 [N, G, 2^q]."""
        codes = torch.arange(2**self.bits, device=self.alphas.device)
        sums = self.alphas.float() @ signs(codes, self.bits).T
        return sums if self.offsets is None else sums + self.offsets.float()[..., None]

    def codes(self, weight: Tensor) -> Tensor:
        """Codes int8 [N, K] of the sums nearest to weight [N, K] float; of a tie the smaller sum."""
        groups = weight.float().unflatten(1, (self.alphas.shape[1], -1))
        sums, order = self.sums().sort(dim=-1, stable=True)
        middles = (sums[..., 1:] + sums[..., :-1]) / 2
        place = torch.zeros_like(groups, dtype=torch.int64)
        for middle in middles.unbind(-1):
            place += groups > middle[..., None]
        return order.gather(2, place).to(torch.int8).flatten(1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for, float32 [N, K]."""
        return self.sums().gather(2, codes.long().unflatten(1, (self.alphas.shape[1], -1))).flatten(1)

    def columns(self, order: Tensor) -> BinaryGrid:
        """The grid of the inputs `order` [K], with scales for each: G = K."""
        group = order // (len(order) // self.alphas.shape[1])
        return BinaryGrid(self.alphas[:, group], None if self.offsets is None else self.offsets[:, group])

    def nearest(self, weight: Tensor, column: int) -> Tensor:
        """The value nearest to weight [N], float32, for one input of a grid with G = K."""
        one = BinaryGrid(
            self.alphas[:, column, None], None if self.offsets is None else self.offsets[:, column, None]
        )
        return one.values(one.codes(weight[:, None]))[:, 0]

    @classmethod
    def stacked(cls, grids: list[BinaryGrid]) -> BinaryGrid:
        """One grid of the outputs of several."""
        offsets = None if grids[0].offsets is None else torch.cat([one.offsets for one in grids])  # type: ignore[misc]
        return cls(torch.cat([one.alphas for one in grids]), offsets)

    def rows(self, chosen: slice) -> BinaryGrid:
        """The grid of some outputs."""
        return BinaryGrid(self.alphas[chosen], None if self.offsets is None else self.offsets[chosen])


def signs(codes: Tensor, bits: int) -> Tensor:
    """b_i of integer codes, any shape -> float32 [..., bits] of -1 and 1."""
    planes = torch.arange(bits, device=codes.device)
    return ((codes[..., None].int() >> planes & 1) * 2 - 1).float()


def fit(
    weight: Tensor, bits: int, group_size: int | None = None, rounds: int = ROUNDS, emphasis: float = 0.0
) -> BinaryGrid:
    """The grid, without offsets, of a weight [N, K] float: greedy, then so many rounds. Scales fall with the plane.

    group_size: inputs under one set of scales; None gives each output one. emphasis: squared errors count by
    |w|^emphasis. Raises ValueError where K is no multiple of the group.
    """
    groups = _groups(weight, group_size)
    step = max(1, CHUNK // groups.shape[1])
    parts = [_fit(part.float(), bits, rounds, emphasis) for part in groups.split(step)]
    return BinaryGrid(torch.cat(parts).view(len(weight), -1, bits))


def from_uniform(grid: Grid) -> BinaryGrid:
    """The binary grid of a uniform one of integer ends, whose code q it has as code q - low."""
    if not (isinstance(grid.low, int) and isinstance(grid.high, int)):
        raise ValueError("a binary grid has the same codes for all outputs.")
    count = grid.high - grid.low + 1
    bits = (count - 1).bit_length()
    scales = grid.scales.float()
    alphas = scales[..., None] * 2.0 ** (torch.arange(bits, device=scales.device) - 1)
    zeros = torch.zeros_like(scales) if grid.zeros is None else grid.zeros
    return BinaryGrid(alphas, scales * ((2**bits - 1) / 2 + grid.low - zeros))


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes int8 [N, K] -> words int32 [T, W, bits, 64]."""
    outputs, inputs = codes.shape
    planes, order = [], word_order(codes.device)
    for rows in codes.split(max(1, CHUNK // max(inputs, 1) // TILE) * TILE):
        rows = F.pad(rows, (0, -inputs % WORD, 0, -len(rows) % TILE))
        rows = rows.unflatten(1, (-1, WORD))[:, :, order].flatten(1)
        packed = [_bytes(rows >> plane & 1).view(torch.int32) for plane in range(bits)]
        planes.append(torch.stack(packed, -1).unflatten(0, (-1, TILE)).permute(0, 2, 3, 1))
    if not planes:
        return codes.new_zeros(0, -(-inputs // WORD), bits, TILE, dtype=torch.int32)
    return torch.cat(planes).contiguous()


def unpack(words: Tensor, outputs: int, inputs: int) -> Tensor:
    """The inverse of `pack`: codes int8 [N, K]."""
    places = word_order(words.device).argsort().int()
    parts = []
    for tiles in words.split(max(1, CHUNK // (words.shape[1] * WORD * TILE))):
        codes = torch.zeros((), dtype=torch.int8, device=words.device)
        for plane in range(words.shape[2]):
            bits = tiles[:, :, plane, :, None] >> places & 1
            codes = codes | (bits << plane).to(torch.int8)
        parts.append(codes.transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(parts)[:outputs, :inputs].contiguous()


def word_order(device: torch.device | None = None) -> Tensor:
    """The input of each bit of a word [32]."""
    return torch.arange(WORD, device=device).view(WORD // 2, 2).T.flatten()


def tiled(scales: Tensor) -> Tensor:
    """alphas [N, G, q] -> [T, G, q, 64]; offsets [N, G] -> [T, G, 64]."""
    padded = F.pad(scales, (0, 0) * (scales.ndim - 1) + (0, -len(scales) % TILE))
    return padded.unflatten(0, (-1, TILE)).movedim(1, -1).contiguous()


def rows_of(tiles: Tensor, outputs: int) -> Tensor:
    """The inverse of `tiled`."""
    return tiles.movedim(-1, 1).flatten(0, 1)[:outputs]


def _groups(weight: Tensor, group_size: int | None) -> Tensor:
    """[N, K] -> [N K / g, g]."""
    size = weight.shape[1] if group_size is None else group_size
    if weight.shape[1] % size:
        raise ValueError(f"{weight.shape[1]} columns do not divide into groups of {size}.")
    return weight.reshape(-1, size)


def _fit(rows: Tensor, bits: int, rounds: int, emphasis: float) -> Tensor:
    """alphas [R, bits] of rows [R, C] float32."""
    peaks = rows.abs().amax(1, keepdim=True)
    counts = torch.ones_like(rows) if not emphasis else (rows.abs() / peaks.where(peaks > 0, 1.0)) ** emphasis
    total = counts.sum(1)
    left, planes, alphas = rows, [], []
    for _ in range(bits):
        plane = torch.where(left >= 0, 1.0, -1.0)
        alpha = (counts * left.abs()).sum(1) / total.where(total > 0, 1.0)
        left = left - alpha[:, None] * plane
        planes.append(plane)
        alphas.append(alpha)
    signed, found = torch.stack(planes, 1), torch.stack(alphas, 1)
    for _ in range(rounds):
        found = _least_squares(signed, rows, counts, found).abs().sort(1, descending=True).values
        grid = BinaryGrid(found[:, None])
        signed = signs(grid.codes(rows), bits).transpose(1, 2).contiguous()
    return found.abs().sort(1, descending=True).values


def _least_squares(signed: Tensor, rows: Tensor, counts: Tensor, start: Tensor) -> Tensor:
    """alphas [R, q] of least |rows - alphas signed|, signed [R, q, C]: q steps of conjugate gradients in float64,
    which also serve planes that are alike."""
    counted = signed * counts[:, None]
    gram = (counted @ signed.transpose(1, 2)).double()
    found = start.double()
    rest = (counted @ rows[..., None])[..., 0].double() - (gram @ found[..., None])[..., 0]
    way, size = rest, rest.square().sum(1)
    for _ in range(signed.shape[1]):
        ahead = (gram @ way[..., None])[..., 0]
        curve = (way * ahead).sum(1)
        step = torch.where(curve > 0, size / curve.where(curve > 0, 1.0), 0.0)[:, None]
        found, rest = found + step * way, rest - step * ahead
        last, size = size, rest.square().sum(1)
        way = rest + torch.where(last > 0, size / last.where(last > 0, 1.0), 0.0)[:, None] * way
    return found.float()


def _bytes(bits: Tensor) -> Tensor:
    """bits [R, C] of 0 and 1 -> uint8 [R, C / 8], the first input in the lowest bit."""
    weights = 2 ** torch.arange(8, device=bits.device)
    return (bits.view(len(bits), -1, 8).to(torch.uint8) * weights.to(torch.uint8)).sum(-1, dtype=torch.uint8)
