"""The progressive 4-bit weight: 8 bits a row first, then 4 bits in groups of inputs under whole-number steps.

    first       w8 = round(w / s0),      s0 = max|w| / 119 of a row, in bfloat16,    w8 in [-119, 119]
    second      w8 ~ s1 (q - z),         s1 = round((max w8 - min w8) / 15),         whole, in [1, 16]
                                         z  = round(-min w8 / s1) - 8,               in [-8, 7]
    codes       q  = round(w / (s0 s1)) + z,                                         in [-8, 7]

s0 is one of each row; s1 and z are int8, one of each group. The operand s1 (q - z) is an int8 without any rounding,
and a product of 8-bit codes takes it as it is: that is what the format is for. 119 is the largest first range under
which nearest codes never leave [-128, 127].

"QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", Lin et al., arXiv 2405.04532, 4.1.
Our own: s0 is bfloat16 and not float16, which small weights would leave; min and max of a group reach to zero, which
then has a code; codes are rounded once, from the weight and not from w8; and where one of the 16 codes would leave
int8 the zero point is moved until all fit, since Hessian rounding takes codes beyond the ends of a group. No nearest
code stands for another value by that (a test goes through all).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .exact import over
from .grid import Grid

LIMIT = 119
"""The largest magnitude of w8."""
MOST = 16
"""The largest step: round(2 * 119 / 15)."""


@dataclass
class ProgressiveGrid(Grid):
    """A uniform grid of scales s0 s1 and zero points z, whose s0 and s1 are known.

    channel: s0 [N, 1] float32; steps: s1 [N, G], whole numbers in float32.
    """

    channel: Tensor
    whole: Tensor

    @classmethod
    def over(cls, channel: Tensor, steps: Tensor, zeros: Tensor) -> ProgressiveGrid:
        """The grid of s0 [N, 1] bfloat16, s1 [N, G] and z [N, G], whole numbers."""
        return cls(channel.float() * steps, zeros.int(), -8, 7, channel, steps)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for, float32 [N, K]: the int8 operand times s0, rounded once."""
        columns = codes.shape[1]
        whole = (codes.float() - self._wide(self.zeros, columns)) * self._wide(self.whole, columns)  # type: ignore[arg-type]
        return whole * self.channel.float()

    def with_scales(self, scales: Tensor) -> ProgressiveGrid:
        """The grid itself, for its own scales. Raises ValueError for others: they are no whole steps of a row."""
        if not torch.equal(scales, self.scales):
            raise ValueError("the scales of a progressive grid are whole steps and cannot be changed one by one.")
        return self

    @classmethod
    def stacked(cls, grids: list) -> ProgressiveGrid:
        """One grid of the outputs of several."""
        names = ("scales", "zeros", "channel", "whole")
        return replace(grids[0], **{name: torch.cat([getattr(one, name) for one in grids]) for name in names})


def first_scales(weight: Tensor) -> Tensor:
    """s0 [N, 1] bfloat16 of a weight [N, K] float; 1 of a row of nothing but zeros."""
    peak = weight.float().abs().amax(1, keepdim=True)
    scales = over(peak, LIMIT).bfloat16()
    return torch.where(scales < torch.finfo(torch.bfloat16).tiny, 1.0, scales)


def whole_steps(steps: Tensor) -> Tensor:
    """s1: the whole number in [1, 16] nearest to each step, float32."""
    return steps.round().clamp_(1, MOST)


def zero_points(low: Tensor, steps: Tensor) -> Tensor:
    """z in [-8, 7], float32, of groups that begin at w8 = low <= 0, such that all codes stay in int8."""
    places = (-low / steps).round()
    return places.clamp(min=15 - (127 / steps).floor()).minimum((128 / steps).floor()).clamp_(0, 15) - 8


def leaves_int8(steps: Tensor, zeros: Tensor) -> Tensor:
    """Where one of the 16 codes stands for a number out of [-128, 127], bool; int8 steps and zero points."""
    wide, zeros = steps.int(), zeros.int()
    return ((7 - zeros) * wide > 127) | ((-8 - zeros) * wide < -128)


def operand(codes: Tensor, steps: Tensor, zeros: Tensor | None) -> Tensor:
    """s1 (q - z), int8 [N, K], of codes int8 [N, K] under int8 steps and zero points [N, G]; None: these are 0."""
    grouped = codes.unflatten(1, (steps.shape[1], -1))
    grouped = grouped if zeros is None else grouped - zeros[:, :, None]
    return (grouped * steps[:, :, None]).flatten(1)
