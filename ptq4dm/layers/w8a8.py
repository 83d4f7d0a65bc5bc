"""Layers with 8-bit weights and activations: formats "int8" and "fp8"."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..evidence import LayerEvidence
from ..handed.rows import QuantizesRows
from ..handed.value import Handed, RowCodes, encoded
from ..kernels.formats import fp8
from ..kernels.formats.grid import Fp8Grid, Grid
from ..kernels.formats.int8 import dequantize_weight, weight_limit
from ..kernels.w8a8 import from_codes, layer
from ..ranges.weights import weight_grid
from .base import QuantizedConv2d, QuantizedLinear, frozen
from .plan import LayerPlan
from .registry import register_format
from .rounded import RoundedLayer
from .stored import check_integers, check_numbers


class W8A8Layer(RoundedLayer):
    """What layers with 8-bit weights and activations share; N outputs.

    bias              [N] in the model's dtype, or None
    qweight           [N, ...] int8 or e4m3, symmetric per output channel
    weight_scale      [N] float32
    input_scale       [] float32    static layers only
    input_zero_point  [] int32      static int8 layers only
    """

    plan: LayerPlan
    kept: tuple[str, ...] = ("weight_scale", "input_scale")
    scales: tuple[str, ...] = ("weight_scale", "input_scale")
    code: torch.dtype = torch.int8
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        self.qweight = frozen(*shape, dtype=self.code, device=device)
        self.weight_scale = frozen(shape[0], dtype=torch.float32, device=device)
        allocate_input_grid(self, self.plan, self.code == torch.int8, device)

    def grid(self, matrix: Tensor, evidence: LayerEvidence | None) -> Grid | Fp8Grid:
        plan = self.plan
        return weight_grid(matrix, plan.weight_bits, plan.objective, plan.objective_parameter, evidence=evidence)

    def fill(self, codes: Tensor, grid: Grid | Fp8Grid) -> None:
        self.put(qweight=codes.view(self.weight_shape), weight_scale=grid.scales[:, 0].contiguous())
        put_input_grid(self, self.plan, codes.device)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        check_input_grid(self.plan, tensors)

    def check_codes(self, tensors: Mapping[str, Tensor]) -> None:
        limit = weight_limit(self.plan.weight_bits)
        check_integers(tensors["qweight"], "qweight", -limit, limit)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, ...] that the codes stand for, made anew in each call."""
        return self.shaped(dequantize_weight(self.qweight, self.weight_scale).flatten(1))

    def kernel_name(self) -> str:
        """The kernel that serves this layer where its codes are now."""
        groups = getattr(self, "groups", 1)
        return layer.kernel_name(self.qweight.device, self.plan.activation_bits, groups, self.code)

    def why_not_fused(self) -> str:
        if not self.plan.static:
            return "has dynamic inputs: fused kernels take static ones, from a calibration store"
        return "is a grouped convolution" if getattr(self, "groups", 1) != 1 else ""

    @property
    def operands(self) -> tuple:
        """The arguments of the W8A8 ops after x: weight, its scales, bias, the input's grid and its bits."""
        return (
            self.qweight, self.weight_scale, self.added, self.input_scale, self.input_zero_point,
            self.plan.activation_bits,
        )  # fmt: skip


def allocate_input_grid(module: nn.Module, plan: LayerPlan, affine: bool, device: torch.device | str | None) -> None:
    """Room for the static grid of a layer's input: input_scale [] float32, input_zero_point [] int32; or None."""
    module.input_scale = frozen(dtype=torch.float32, device=device) if plan.static else None
    module.input_zero_point = frozen(dtype=torch.int32, device=device) if plan.static and affine else None


def put_input_grid(module: nn.Module, plan: LayerPlan, device: torch.device | str | None) -> None:
    """Fill what `allocate_input_grid` made from the plan."""
    if plan.static:
        module.put(input_scale=torch.tensor(plan.input_scale, dtype=torch.float32, device=device))
    if module.input_zero_point is not None:
        module.put(input_zero_point=torch.tensor(plan.input_zero_point, dtype=torch.int32, device=device))


def check_input_grid(plan: LayerPlan, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a file has another static grid than the plan."""
    for name, tensor in tensors.items():
        if name in ("input_scale", "input_zero_point"):
            planned = torch.tensor(getattr(plan, name), dtype=tensor.dtype)
            if not torch.equal(tensor, planned):
                raise ValueError(f"'{name}' is {tensor.item():g} and in the plan {planned.item():g}")


class W8A8Linear(QuantizesRows, W8A8Layer, QuantizedLinear):
    """y = x W^T + b on 8-bit codes: x [..., K] float -> [..., N] in x's dtype."""

    @property
    def takes_norms(self) -> bool:  # type: ignore[override]
        """Dynamic codes of 8 bits are made by the kernel that takes norms over, of whole runs of 32 inputs."""
        return not self.plan.static and self.plan.activation_bits == 8 and self.in_features % 32 == 0

    def codes_key(self) -> tuple | None:
        """The grid of its inputs."""
        if self.qweight.is_cuda and not from_codes.triton_serves(self.qweight.device, self.code):
            return None
        return self.code, self.plan.activation_bits, self.plan.input_scale, self.plan.input_zero_point

    def codes_of_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        bits = self.plan.activation_bits
        if not self.plan.static:
            return from_codes.w8a8_tokens(rows, bits, self.code)
        codes = from_codes.static_codes(rows, self.code, self.input_scale, self.input_zero_point, bits)
        return codes, self.input_scale

    def why_not_in_blocks(self) -> str:
        if self.plan.static:
            return "has static inputs, whose codes torch.compile makes in the kernel before"
        return "" if self.takes_norms else "has inputs of other than 8 bits, or not of runs of 32"

    def has_block_kernels(self) -> bool:
        """Whether kernels serve fused blocks where the layer is: those of a GPU."""
        return self.qweight.is_cuda and from_codes.triton_serves(self.qweight.device, self.code)

    def of_codes(self, given: RowCodes, nonlinearity: str = "") -> Tensor:
        weight = self.input_zero_point, self.qweight, self.weight_scale, self.added
        y = from_codes.w8a8_product(given.codes, given.scale, *weight, nonlinearity, given.dtype)
        return y.view(*given.shape[:-1], self.out_features)

    def forward(self, input: Tensor | Handed | RowCodes) -> Tensor:
        given, x = (input, None) if isinstance(input, RowCodes) else encoded(self, input)
        return from_codes.linear(x, *self.operands) if given is None else self.of_codes(given)


class W8A8Conv2d(W8A8Layer, QuantizedConv2d):
    """Zero-padded convolution on 8-bit codes: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return layer.w8a8_conv2d(input, *self.operands, self.stride, self.padding, self.dilation, self.groups)


class _Fp8(W8A8Layer):
    """What makes a W8A8 layer one of e4m3 codes; torch counts them as floats, so they are kept from conversion."""

    kept = ("qweight", "weight_scale", "input_scale")
    code = fp8.DTYPE

    def check_codes(self, tensors: Mapping[str, Tensor]) -> None:
        check_numbers(tensors["qweight"], "qweight")

    def grid(self, matrix: Tensor, evidence: LayerEvidence | None) -> Fp8Grid:
        return Fp8Grid(fp8.scale_of(matrix, (1,)))


class Int8Linear(W8A8Linear):
    """A Linear of format "int8"."""

    in_blocks = True


class Int8Conv2d(W8A8Conv2d):
    """A Conv2d of format "int8"."""


class Fp8Linear(_Fp8, W8A8Linear):
    """A Linear of format "fp8"."""

    in_blocks = True


class Fp8Conv2d(_Fp8, W8A8Conv2d):
    """A Conv2d of format "fp8"."""


register_format("int8", plan=LayerPlan, layers={nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d})
register_format("fp8", plan=LayerPlan, layers={nn.Linear: Fp8Linear, nn.Conv2d: Fp8Conv2d}, grid="e4m3")
