"""Linear layers with binary-coded weights and inputs as they come: format "bcq" (kernels/formats/bcq.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...evidence import LayerEvidence
from ...kernels.formats.bcq import MOST_BITS, ROUNDS, TILE, WORD, BinaryGrid, fit, from_uniform, pack, tiled, unpack
from ...kernels.lut import layer as lut
from ...kernels.lut.reference import weight_of
from ...ranges.registry import objective_parameter
from ...ranges.weights import weight_grid
from ...rounding.refit import refitted
from ...rounding.registry import ROUNDERS
from ..base import QuantizedLinear, frozen
from ..choices import check_groups
from ..plan import FLOAT_INPUTS, GROUP_SIZES, LayerPlan
from ..registry import register_format
from ..rounded import RoundedLayer

MOST_EMPHASIS = 4
SIXTEEN = (torch.float16, torch.bfloat16)


@dataclass
class BCQPlan(LayerPlan):
    """How one layer gets a binary-coded weight.

    weight_bits: sign planes, 1 to 4. activation_bits: 16; inputs are not rounded.
    group_size: inputs under one set of scales, 32, 64 or 128; None gives each output one.
    rounds: of least squares and nearest sums, after the greedy start; 0 leaves that as it is.
    emphasis: squared errors of weights count by |w|^emphasis in them; 0 counts all alike.
    uniform: the planes and offsets of an affine uniform grid instead; the objective is its.
    refits: rounds after rounding in which scales, with an offset, and codes are fitted to the layer's output.
    """

    format: str = "bcq"
    weight_bits: int = 3
    activation_bits: int = FLOAT_INPUTS
    group_size: int | None = None
    rounds: int = ROUNDS
    emphasis: float = 1.0
    uniform: bool = False
    refits: int = 0

    def check(self) -> None:
        if not 1 <= self.weight_bits <= MOST_BITS or self.activation_bits != FLOAT_INPUTS:
            raise ValueError(
                f"bcq has weights of 1 to {MOST_BITS} bits under inputs of {FLOAT_INPUTS}, not {self.weight_bits} "
                f"and {self.activation_bits}"
            )
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size is none, 32, 64 or 128, not {self.group_size}")
        if self.rounds < 0:
            raise ValueError(f"rounds is {self.rounds} and counts from 0")
        if self.refits < 0:
            raise ValueError(f"refits is {self.refits} and counts from 0")
        if not 0 <= self.emphasis <= MOST_EMPHASIS:
            raise ValueError(f"emphasis is {self.emphasis} and lies in [0, {MOST_EMPHASIS}]")
        if (self.input_scale, self.input_zero_point) != (None, None):
            raise ValueError("inputs of 16 bits stay floats and have no grid")
        objective_parameter(self.objective, self.objective_parameter)
        if self.objective != "max" and not self.uniform:
            raise ValueError(f"the objective '{self.objective}' is of uniform grids; binary ones are fitted")
        if "rows" not in ROUNDERS.find(self.rounding).needs and self.refits:
            raise ValueError(f"refits look at what layers are fed, and the rounding '{self.rounding}' does not")

    @property
    def offset(self) -> bool:
        """Whether groups have an offset."""
        return self.uniform or self.refits > 0

    def check_layer(self, layer: nn.Module) -> None:
        check_groups(layer, self.group_size or 1)

    @property
    def simulated(self) -> bool:
        return False

    @property
    def groups_text(self) -> str:
        groups = "" if self.group_size is None else f" g{self.group_size}"
        greedy = "" if self.rounds or self.uniform else " greedy"
        refitted = " refitted" if self.refits else ""
        return f" bcq{groups}{greedy}" + (" uniform" if self.uniform else "") + refitted


class BCQLinear(RoundedLayer, QuantizedLinear):
    """y = x W^T + b, W of sign planes: x [..., K] float -> [..., N] in x's dtype.

    T = N / 64 and W = K / 32, rounded up.

    bias      [N] in the model's dtype, or None
    qweight   [T, W, q, 64] int32: signs of 32 inputs a word
    wscales   [T, G, q, 64] float16, or bfloat16 where they are too small or too large for it
    woffsets  [T, G, 64] of wscales' dtype, where the plan is uniform or has refits
    """

    plan: BCQPlan
    kept = ("wscales", "woffsets")
    wscales: Tensor
    woffsets: Tensor | None

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        outputs, inputs = shape
        tiles, bits = -(-outputs // TILE), self.plan.weight_bits
        groups = 1 if self.plan.group_size is None else inputs // self.plan.group_size
        self.qweight = frozen(tiles, -(-inputs // WORD), bits, TILE, dtype=torch.int32, device=device)
        self.wscales = frozen(tiles, groups, bits, TILE, dtype=torch.float16, device=device)
        self.woffsets = None
        if self.plan.offset:
            self.woffsets = frozen(tiles, groups, TILE, dtype=torch.float16, device=device)

    def grid(self, matrix: Tensor, evidence: LayerEvidence | None) -> BinaryGrid:
        """The grid of a float32 weight [N, K], by the plan, with scales as they are stored."""
        plan = self.plan
        bits, size = plan.weight_bits, plan.group_size
        if plan.uniform:
            objective = plan.objective, plan.objective_parameter
            grid = from_uniform(weight_grid(matrix, bits, *objective, size, affine=True, evidence=evidence))
        else:
            grid = fit(matrix, bits, size, plan.rounds, plan.emphasis)
            if plan.offset:
                grid.offsets = torch.zeros_like(grid.alphas[..., 0])
        kind = _kind(grid)
        return BinaryGrid(grid.alphas.to(kind), None if grid.offsets is None else grid.offsets.to(kind))

    def rounded(
        self, weight: Tensor, rounding: str, evidence: LayerEvidence | None = None
    ) -> tuple[Tensor, BinaryGrid]:
        codes, grid = super().rounded(weight, rounding, evidence)
        if not self.plan.refits:
            return codes, grid
        assert evidence is not None  # the plan's rounding needs it, too
        return refitted(self.matrix(weight).float(), codes, grid, evidence, self.plan.refits)

    def fill(self, codes: Tensor, grid: BinaryGrid) -> None:
        self.put(qweight=pack(codes, grid.bits), wscales=tiled(grid.alphas))
        if grid.offsets is not None:
            self.put(woffsets=tiled(grid.offsets))

    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        return SIXTEEN if name in ("wscales", "woffsets") else super().stored_dtypes(name)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        if (tensors["wscales"] < 0).any():
            raise ValueError("'wscales' holds numbers below 0, and scales of planes are not")

    def codes(self) -> Tensor:
        """The codes [N, K], int8, unpacked in each call: bit i is the sign of plane i."""
        return unpack(self.qweight, *self.weight_shape)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, K] that the codes stand for, made anew in each call."""
        return weight_of(self.qweight, self.wscales, self.woffsets, *self.weight_shape)

    def kernel_name(self) -> str:
        """The kernel that serves this layer, of one row, where its codes are now."""
        return lut.kernel_name(self.qweight.device, 1)

    def kernels(self) -> dict[str, str]:
        return lut.kernel_names(self.qweight.device)

    def forward(self, input: Tensor) -> Tensor:
        return lut.bcq_linear(input, self.qweight, self.wscales, self.woffsets, self.bias, self.out_features)


def _kind(grid: BinaryGrid) -> torch.dtype:
    """float16, or bfloat16 where the largest scale of a group is too small or too large for it."""
    half, largest = torch.finfo(torch.float16), grid.alphas.amax(-1)
    most = largest.max() if grid.offsets is None else torch.maximum(largest.max(), grid.offsets.abs().max())
    least = torch.where(largest > 0, largest, 1.0).min()
    return torch.float16 if least >= half.tiny and most <= half.max else torch.bfloat16


register_format("bcq", plan=BCQPlan, layers={nn.Linear: BCQLinear}, grid="binary")
