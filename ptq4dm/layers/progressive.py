"""Layers with progressive 4-bit weights, whose operand in an 8-bit product is exact: format "progressive"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..evidence import LayerEvidence
from ..handed.rows import QuantizesRows
from ..handed.value import Handed, RowCodes, encoded
from ..kernels.formats import hadamard
from ..kernels.formats.int8 import dynamic_scale
from ..kernels.formats.progressive import MOST, ProgressiveGrid, leaves_int8
from ..kernels.formats.rotation import GROUPS
from ..kernels.w4 import from_tokens
from ..kernels.w4.progressive import progressive_codes
from ..ranges.progressive import progressive_grid
from . import int4_ops, progressive_ops
from .base import QuantizedConv2d, QuantizedLinear, frozen
from .choices import GroupedPlan, check_groups
from .int4 import channel_first, pixel_first
from .int4_ops import PACKED
from .registry import choices_need, register_format
from .rounded import RoundedLayer
from .stored import check_integers
from .w8a8 import allocate_input_grid, check_input_grid, put_input_grid

ROWS = 1024  # of the inputs, on which rotations are compared
WORTH = 0.9  # what a rotation, which costs time in every call, must make of the error (our assumption)


@dataclass
class ProgressivePlan(GroupedPlan):
    """How one layer gets 4-bit weights that are whole steps of 8-bit ones, under inputs of 8.

    weight_bits: 4.
    group_size: inputs under one step, 32, 64 or 128; None gives each output one. Of a convolution as in Int4Plan.
    rotation: inputs are turned by Hadamard matrices of this size in every call, and the weight with them; 0: they are
        not; None: the largest that divides the channels, up to 32, if it takes a tenth off the error of the output on
        calibration inputs, else 0; found while packing.
    """

    format: str = "progressive"
    group_size: int | None = 128
    rotation: int | None = 0

    def check(self) -> None:
        super().check()
        if self.weight_bits != 4:
            raise ValueError(f"progressive has weights of 4 bits, not {self.weight_bits}")
        block = self.rotation
        if block not in (None, 0) and (block not in range(2, hadamard.MOST + 1) or block & (block - 1)):
            raise ValueError(f"rotation is none, 0 or a power of two up to {hadamard.MOST}, not {block}")
        if block != 0 and self.static:
            raise ValueError("inputs that are turned are others than calibration saw, and have no static grid")

    def check_layer(self, layer: nn.Module) -> None:
        super().check_layer(layer)
        check_groups(layer, self.rotation or 1)

    @property
    def groups_text(self) -> str:
        return f"{super().groups_text} progressive" + (" rotated" if self.rotation else "")


class ProgressiveLayer(RoundedLayer):
    """What Linear and Conv2d with progressive weights share; N outputs of K inputs, in G groups (G = 1: whole rows).

    bias              [N] in the model's dtype, or None
    qweight           [N, K'/2] uint8, as `Int4Layer` has it
    wscales           [N] bfloat16, s0 of the outputs
    wsteps            [N, G] int8, s1 of the groups, in [1, 16]
    wzeros            [N, G] int8, z of the groups, in [-8, 7]
    input_scale       [] float32    static layers only
    input_zero_point  [] int32      static layers only
    """

    plan: ProgressivePlan
    kept = ("wscales", "input_scale")
    scales = ("wscales", "input_scale")
    scales_trained = False
    wscales: Tensor
    wsteps: Tensor
    wzeros: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        outputs, inputs = shape[0], math.prod(shape[1:])
        groups = 1 if self.plan.group_size is None else inputs // self.plan.group_size
        packed = -(-inputs // PACKED) * PACKED
        self.qweight = frozen(outputs, packed // 2, dtype=torch.uint8, device=device)
        self.wscales = frozen(outputs, dtype=torch.bfloat16, device=device)
        self.wsteps = frozen(outputs, groups, dtype=torch.int8, device=device)
        self.wzeros = frozen(outputs, groups, dtype=torch.int8, device=device)
        allocate_input_grid(self, self.plan, True, device)

    def grid(self, matrix: Tensor, evidence: LayerEvidence | None) -> ProgressiveGrid:
        """The grid of a float32 weight [N, K], by the plan."""
        plan = self.plan
        return progressive_grid(matrix, plan.objective, plan.objective_parameter, plan.group_size, evidence)

    def fill(self, codes: Tensor, grid: ProgressiveGrid) -> None:
        self.put(
            qweight=int4_ops.packed_rows(codes),
            wscales=grid.channel[:, 0].contiguous(),
            wsteps=grid.whole.to(torch.int8),
            wzeros=grid.zeros.to(torch.int8),
        )
        put_input_grid(self, self.plan, codes.device)

    def columns(self, weight: Tensor) -> Tensor:
        return pixel_first(weight)

    def matrix(self, weight: Tensor) -> Tensor:
        return hadamard.turned(pixel_first(weight), self.plan.rotation or 0)

    def fed(self, evidence: LayerEvidence) -> LayerEvidence:
        """The inputs after their rotation; of their peaks nothing is known then."""
        if not self.plan.rotation:
            return evidence
        return LayerEvidence(hadamard.turned(cast(Tensor, evidence.rows), self.plan.rotation))

    def shaped(self, matrix: Tensor) -> Tensor:
        return channel_first(hadamard.turned(matrix, self.plan.rotation or 0), self.weight_shape)

    def rounded(
        self, weight: Tensor, rounding: str, evidence: LayerEvidence | None = None
    ) -> tuple[Tensor, ProgressiveGrid]:
        """As RoundedLayer has it; completes the plan by the rotation."""
        if self.plan.rotation is not None:
            return super().rounded(weight, rounding, evidence)
        if evidence is None:
            raise UserError("whether inputs are turned is decided on what layers are fed; give a calibration store.")
        found, plan = [], self.plan
        for block, worth in {0: WORTH, hadamard.block_of(self.weight_shape[1]): 1.0}.items():
            self.plan = replace(plan, rotation=block)
            made = super().rounded(weight, rounding, evidence)
            found.append((self._error(weight, evidence, *made) * worth, self.plan, made))
        _, self.plan, made = min(found, key=lambda one: one[0])
        return made

    def _error(self, weight: Tensor, evidence: LayerEvidence, codes: Tensor, grid: ProgressiveGrid) -> float:
        """The squared error of the output on the evidence, of weight and inputs rounded, under the plan as it is.

        Of a convolution inputs get one scale for all rows, as they get one for a sample and not for a window.
        """
        values, total, first = grid.values(codes), 0.0, 0
        dims = (1,) if len(self.weight_shape) == 2 else (0, 1)
        for matrix, _, fed in self.parts(weight, evidence):
            x = fed.rows[:: max(1, len(fed.rows) // ROWS)]
            scale = dynamic_scale(x, dims, self.plan.activation_bits)
            own = values[first : first + len(matrix)]
            total += float(((x / scale).round() * scale @ own.T - x @ matrix.T).square().sum(dtype=torch.float64))
            first += len(matrix)
        return total

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        check_input_grid(self.plan, tensors)
        if self.plan.rotation is None:
            raise ValueError("its plan has no 'rotation', which a packed layer of format progressive has")
        check_integers(tensors["wsteps"], "wsteps", 1, MOST)
        check_integers(tensors["wzeros"], "wzeros", -8, 7)
        if leaves_int8(tensors["wsteps"], tensors["wzeros"]).any():
            raise ValueError("'wzeros' holds a zero point under whose step a code would leave int8")

    def codes(self) -> Tensor:
        """The codes [N, ...], int8, unpacked in each call."""
        codes = int4_ops.unpacked_rows(self.qweight, math.prod(self.weight_shape[1:]))
        return channel_first(codes, self.weight_shape)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, ...] that the codes stand for, made anew in each call."""
        inputs = math.prod(self.weight_shape[1:])
        whole = progressive_codes(self.qweight, self.wsteps, self.wzeros, inputs)
        return self.shaped(whole.float() * self.wscales.float()[:, None])

    def kernel_name(self) -> str:
        """The kernel that serves this layer where its codes are now."""
        plan, shape = self.plan, self.weight_shape
        return progressive_ops.kernel_name(
            self.qweight.device, len(shape) == 2, math.prod(shape[1:]), self.wsteps.shape[1], plan.static,
            plan.activation_bits, getattr(self, "groups", 1),
        )  # fmt: skip

    @property
    def operands(self) -> tuple:
        """The arguments of the ops after x: weight, its grid, bias, the input's grid, its bits and its rotation."""
        return (
            self.qweight, self.wsteps, self.wzeros, self.wscales, self.added, self.input_scale, self.input_zero_point,
            self.plan.activation_bits, self.plan.rotation or 0,
        )  # fmt: skip


class ProgressiveLinear(QuantizesRows, ProgressiveLayer, QuantizedLinear):
    """y = x W^T + b, W of 4 bits and x of 8: x [..., K] float -> [..., N] in x's dtype."""

    takes_norms = True
    in_blocks = True
    code = torch.int8

    @property
    def rotation(self) -> tuple[int, str]:
        return self.plan.rotation or 0, "sylvester"

    def turns_in_codes(self) -> bool:
        """Whether a kernel turns inputs while it rounds them: on a GPU. Elsewhere a product of torch does before."""
        return bool(self.plan.rotation) and self.qweight.is_cuda and self.codes_key() is not None

    def codes_key(self) -> tuple | None:
        """Tokens in 8 bits are the same for every layer of this kind that turns them alike."""
        by_kernels = self.qweight.is_cuda or self.plan.rotation
        if self.why_not_in_blocks() or (by_kernels and not self.has_block_kernels()):
            return None
        return "tokens", self.plan.rotation or 0

    def why_not_in_blocks(self) -> str:
        plan = self.plan
        if plan.static:
            return "has static inputs, whose scale no token decides"
        if plan.rotation and plan.rotation not in GROUPS:
            return f"turns its inputs in blocks of {plan.rotation}, which no kernel does while it rounds them"
        whole = plan.activation_bits == 8 and self.in_features % PACKED == 0
        return "" if whole else f"has inputs of other than 8 bits, or not of runs of {PACKED}"

    def has_block_kernels(self) -> bool:
        """Whether kernels serve fused blocks where the layer is: those of a GPU."""
        return progressive_ops.serves_tokens(self.qweight.device, self.in_features, self.wsteps.shape[1])

    def codes_of_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return from_tokens.w4a8_tokens(rows)

    def of_codes(self, given: RowCodes, nonlinearity: str = "") -> Tensor:
        weight = (self.qweight, self.wsteps, self.wzeros, self.wscales, self.added)
        sizes = self.in_features, given.dtype
        y = from_tokens.progressive_product(given.codes, given.scale, *weight, *sizes, nonlinearity)
        return y.reshape(*given.shape[:-1], self.out_features)

    def forward(self, input: Tensor | Handed | RowCodes) -> Tensor:
        if isinstance(input, RowCodes):
            return self.of_codes(input)
        given, x = encoded(self, input)
        if given is None and self.turns_in_codes() and x.dtype in int4_ops.HALVES:
            given = self.encode(x, None, x.dtype)
        return progressive_ops.stepped_linear(x, *self.operands) if given is None else self.of_codes(given)


class ProgressiveConv2d(ProgressiveLayer, QuantizedConv2d):
    """Zero-padded convolution with weights of 4 bits: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return progressive_ops.stepped_conv2d(input, *self.operands, *self.geometry)


def _needs(plan: ProgressivePlan) -> frozenset[str]:
    return choices_need(plan) | (frozenset({"rows"}) if plan.rotation is None else frozenset())


register_format(
    "progressive",
    plan=ProgressivePlan,
    layers={nn.Linear: ProgressiveLinear, nn.Conv2d: ProgressiveConv2d},
    needs=_needs,
)
