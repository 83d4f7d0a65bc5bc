"""SVDQuant layers: 4-bit codes, group scales, smoothing divisors and a low-rank branch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...handed.value import Handed, encoded
from ...inference.unpacked import KeepsUnpacked
from ...kernels import dispatch
from ...kernels.formats.int4 import dequantize_groups, pack_int4, unpack_int4
from ...kernels.w4 import from_codes as svdq_codes
from ...kernels.w4 import layer as svdq_linear
from ...kernels.w4 import reference as svdq
from ...layers.base import QuantizedLayer, frozen
from ...layers.registry import finite
from .data_free import decompose
from .lender import fetched_down
from .plan import SVDQPlan
from .projected import projected_codes

HALVES = (torch.float16, torch.bfloat16)


@dataclass
class Codes:
    """An input [..., K] that is quantized already, for layers that share it (see kernels/w4/from_codes.py).

    Attention processors and feed-forward parts, which hand their inputs to layers unread, take it for a tensor.
    """

    codes: Tensor
    scales: Tensor
    branch: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the outputs

    @property
    def ndim(self) -> int:
        return len(self.shape)


class _SVDQLayer(KeepsUnpacked, QuantizedLayer):
    """Common part of SVDQLinear and SVDQConv2d (1x1); K inputs, N outputs.

    bias     [N] in the model's dtype, or None
    qweight  [N, K/2] uint8, as kernels.int4.pack_int4 has it
    wscales  [N, K/G]  \\
    smooth   [K]        | 16-bit floats, whatever the model is converted to. Weight-only layers have no smooth, layers
    down     [r, K]     | of rank 0 no down and up; of layers that share an input the first has `down` for all.
    up       [N, r]    /
    lora_down [q, K], lora_up [N, q]: of fused LoRA adapters, as trained, in the order of plan.adapters; or None
    """

    plan: SVDQPlan
    scales = ("wscales",)

    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        return HALVES if name in self.kept else super().stored_dtypes(name)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        check_divisors(tensors, "smooth")

    def _allocate(self, layer: nn.Module, plan: SVDQPlan, device):
        self.plan = plan
        outputs, inputs = self.weight_shape[:2]
        # A layer whose inputs are shifted has a bias even where the original has none: it takes the shift back.
        self._allocate_bias(layer, layer.bias is not None or bool(plan.shift), device)
        self._bias_is_added = layer.bias is None

        def new(*size: int, dtype: torch.dtype = torch.float16) -> nn.Parameter:
            return frozen(*size, dtype=dtype, device=device)

        self.qweight = new(outputs, inputs // 2, dtype=torch.uint8)
        self.wscales = new(outputs, inputs // plan.group_size)
        self.smooth = None if plan.activation == "none" else new(inputs)
        self.down = new(plan.rank, inputs) if plan.rank and not plan.lender else None
        self.up = new(outputs, plan.rank) if plan.rank else None
        self._lender = ()
        fused = sum(rank for rank, _ in plan.adapters.values())
        self.lora_down = new(fused, inputs) if fused else None
        self.lora_up = new(outputs, fused) if fused else None

    def borrow_from(self, lender: nn.Module) -> None:
        """Use another layer's down projection (in a tuple, so that it does not become a child of this one)."""
        self._lender = (lender,)

    def pack(self, weight: Tensor, name: str, evidence=None) -> None:
        """Codes and branch from the weight alone, by a plan without evidence: decompose(weight, plan, dtype)."""
        if self.plan.evidence != "none":
            raise UserError(
                f"layer '{name}' of the plan is SVDQuant's, which looks at layers together; load the model in full "
                "precision, then call ptq4dm.quantize with SVDQuantConfig."
            )
        dtype = weight.dtype if weight.dtype in HALVES else torch.float16
        split = decompose(self.plan.turned(finite(weight, name).flatten(1)), self.plan, dtype)
        self.put(qweight=pack_int4(split.codes, self.plan.group_size), wscales=split.scales)
        if self.smooth is not None:
            self.put(smooth=torch.ones_like(self.smooth, dtype=dtype, device=weight.device))
        if split.down is not None and split.up is not None:
            self.plan = replace(self.plan, rank=len(split.down))  # a narrow weight has less than it was planned
            self.put(down=self.plan.turned(split.down).to(dtype), up=split.up)

    @property
    def branch(self) -> tuple[Tensor | None, Tensor | None]:
        """(down [r, K], up [N, r]), the ranks of fused LoRA adapters among them; or (None, None)."""
        return self._branch_down(), self._branch_up()

    def _own_down(self) -> Tensor | None:
        """The down projection of the branch, without that of adapters."""
        return fetched_down(self._lender[0], self.qweight.device) if self._lender else self.down

    def _branch_down(self) -> Tensor | None:
        down = self._own_down()
        if self.lora_down is None:
            return down
        return self.lora_down if down is None else torch.cat([down, self.lora_down])

    def _branch_up(self) -> Tensor | None:
        if self.lora_up is None:
            return self.up
        parts = self.lora_up.split([rank for rank, _ in self.plan.adapters.values()], 1)
        strengths = [strength for _, strength in self.plan.adapters.values()]
        scaled = [part if c == 1 else c * part for part, c in zip(parts, strengths, strict=True)]
        return torch.cat(scaled if self.up is None else [self.up, *scaled], 1)

    @property
    def kept(self) -> tuple[str, ...]:
        names = ("wscales", "smooth", "down", "up", "lora_down", "lora_up")
        return tuple(name for name in names if getattr(self, name) is not None)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, K] (1x1: [N, K, 1, 1]) that codes, smoothing and branch stand for."""
        weight = dequantize_groups(unpack_int4(self.qweight, self.plan.group_size), self.wscales)
        if self.smooth is not None:
            weight = weight / self.smooth.float()
        weight = self.plan.turned(weight)
        if self.plan.projects:
            own = self._own_down().float()
            weight = weight - (weight @ own.T) @ own
        down, up = self.branch
        if down is not None:
            weight = weight + up.float() @ down.float()
        return self._shaped(weight)

    def dequantized(self) -> nn.Module:
        layer = super().dequantized()
        if self._bias_is_added:
            layer.bias = None
        elif self.plan.shift:  # the bias makes up for the shift of the inputs, which a float layer does not have
            weight = dequantize_groups(unpack_int4(self.qweight, self.plan.group_size), self.wscales)
            lifted = self.plan.shift * (weight / self.smooth.float()).sum(1)
            layer.bias = nn.Parameter((self.bias.float() + lifted).to(self.bias.dtype))
        return layer

    def why_not_fused(self) -> str:
        if self.plan.activation == "none":
            return "quantizes its weight alone"
        if self.plan.projects:
            return "leaves the branch's directions out of its inputs, which fused kernels do not"
        return "" if self.plan.group_size == 64 else f"has groups of {self.plan.group_size}: fused kernels take 64"

    multiplies_floats = True  # also where `codes` are none that a fused block takes

    def why_not_in_blocks(self) -> str:
        return self.why_not_fused()

    def has_block_kernels(self) -> bool:
        """Whether kernels serve fused blocks where the layer is: those of a GPU, and of a CPU."""
        return self.kernel_name() != svdq_linear.REFERENCE

    def kernel_name(self) -> str:
        return self._kernel_name(self.qweight.device)

    def kernels(self) -> dict[str, str]:
        """The kernels by the rows of an input: weight-only layers of many rows are unpacked for cuBLAS."""
        plan = self.plan
        return dispatch.report(
            dispatch.Query("int4", plan.activation, plan.group_size, branch=True, device=self.qweight.device)
        )

    def _kernel_name(self, device: torch.device) -> str:
        return svdq_linear.known_name(device, self.plan.activation, self.plan.group_size)

    @property
    def takes_norms(self) -> bool:  # type: ignore[override]
        """A norm goes into the kernel that makes the codes, where that reads the input as it comes."""
        return not self.plan.projects

    def codes_key(self) -> nn.Module | Tensor | None:
        """The layer whose smoothing and branch it uses; under adapters, theirs."""
        if self.plan.activation == "none" or self.plan.group_size != 64:
            return None
        if self.lora_down is not None:
            return self.lora_down
        return self._lender[0] if self._lender else self

    def encode(self, x: Tensor, norm: tuple | None, dtype: torch.dtype, gate: tuple | None = None) -> Codes:
        if gate is not None:
            return replace(self.input_codes(x, gate[0], gate=gate[1]), dtype=dtype)
        return replace(self.input_codes(x, norm=norm), dtype=dtype)

    def input_codes(
        self, x: Tensor, more: Tensor | None = None, norm: tuple | None = None, gate: str = ""
    ) -> Codes:  # fmt: skip
        """x [..., K], quantized for this layer and for those that share its smoothing and its branch.

        more [..., K']: the input's last columns, where x has only the first. norm: (scale [B, K], shift [B, K], eps)
        of an adaptive layer norm that x [B, ..., K] goes through first, or with a form of norm as fourth. gate: of
        `svdq.NONLINEARITIES`; x is multiplied by that of `more` first.
        """
        plan, (*rows, columns) = self.plan, x.shape
        if plan.projects:
            branches = self._branch_down(), self._own_down()
            on_kernels = svdq_linear.on_gpu(self._kernel_name(x.device))
            return Codes(*projected_codes(x, *branches, self.smooth, plan, on_kernels), tuple(x.shape), x.dtype)
        gain, offset, eps, *form = norm or (None, None, 0.0)
        after = (gain, offset, eps, *(form or ["adaptive"]), gate, plan.rotation, plan.rotation_kind)
        columns += 0 if more is None or gate else more.shape[-1]
        made = svdq_codes.svdq_codes(x, more, self.smooth, self._branch_down(), plan.activation, plan.shift, *after)
        return Codes(*made, (*rows, columns), x.dtype)

    def multiply(self, x: Tensor | Codes | Handed, nonlinearity: str = "") -> Tensor:
        """The layer, and one of `svdq.NONLINEARITIES` on its sums."""
        plan, eight = self.plan, self.eight_bits()
        codes, x = encoded(self, x)
        x = x if codes is None else codes
        if isinstance(x, Codes):
            y = svdq_codes.svdq_product(
                x.codes, x.scales, x.branch, self.qweight, self.wscales, self._branch_up(), self.bias,
                plan.activation, nonlinearity, x.dtype, *eight,
            )  # fmt: skip
            return y.view(*x.shape[:-1], y.shape[1])
        operands = (
            x, self.qweight, self.wscales, self.smooth, *self.branch, self.bias, plan.activation, plan.shift,
            nonlinearity,
        )  # fmt: skip
        if self._kernel_name(x.device) == svdq_linear.REFERENCE:
            own = self._own_down() if plan.projects else None
            return svdq.svdq_linear(*operands, plan.rotation, plan.rotation_kind, own)
        if plan.projects or plan.rotation:
            return self.multiply(self.input_codes(x), nonlinearity)
        return svdq_linear.svdq_linear(*operands, *eight)


class SVDQLinear(_SVDQLayer, nn.Linear):
    """x [..., K] float, or its Codes -> [..., N] in x's dtype."""

    in_blocks = True

    def __init__(self, linear: nn.Linear, plan: SVDQPlan, device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._allocate(linear, plan, device)

    def forward(self, input: Tensor | Codes) -> Tensor:
        return self.multiply(input)

    def _shaped(self, weight: Tensor) -> Tensor:
        return weight

    def _float_layer(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.plan}"


class SVDQConv2d(_SVDQLayer, nn.Conv2d):
    """1x1 convolution, stride 1: x [B, K, H, W] float -> [B, N, H, W] in x's dtype."""

    def __init__(self, conv: nn.Conv2d, plan: SVDQPlan, device=None):
        nn.Module.__init__(self)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(conv, name))
        self.padding_mode = "zeros"
        self._allocate(conv, plan, device)

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _shaped(self, weight: Tensor) -> Tensor:
        return weight[:, :, None, None]

    def _float_layer(self) -> nn.Conv2d:
        return nn.Conv2d(self.in_channels, self.out_channels, 1, bias=False, device="meta")

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, 1x1, {self.plan}"


def check_divisors(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises ValueError where a file's smoothing divisors, if there are any, hold a zero."""
    if name in tensors and not bool((tensors[name] != 0).all()):
        raise ValueError(f"'{name}' holds 0, and inputs are divided by it")
