"""The products of a model's W8A8 layers as cases to time, and operands for them, made on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats import fp8, int8
from ..w8a8.quantize import quantize
from ..w8a8.window import Window
from .stopwatch import COLD

DEVICE = "cuda"
CODES = {"int8": torch.int8, "fp8": fp8.DTYPE}


@dataclass(frozen=True)
class Case:
    """A layer's product: window, input channels, outputs; count: how many layers of the model do it."""

    window: Window
    channels: int
    outputs: int
    count: int = 1

    @property
    def linear(self) -> bool:
        return self.window.h * self.window.w == 1

    @property
    def rows(self) -> int:
        return self.window.batch * self.window.output[0] * self.window.output[1]

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.outputs * self.window.taps * self.channels

    @property
    def floor_bytes(self) -> float:
        """A bf16 input read once, a bf16 output written once."""
        w = self.window
        return 2.0 * (w.batch * w.h * w.w * self.channels + self.rows * self.outputs)

    @property
    def name(self) -> str:
        w = self.window
        where = f"{self.rows} rows" if self.linear else f"{w.kernel[0]}x{w.kernel[1]}/{w.stride[0]} at {w.h}x{w.w}"
        return f"{self.channels}->{self.outputs} {where}"


def cases_of(model: nn.Module, run: Callable[[], object], batch: int) -> list[Case]:
    """Every different product of a model's Linear and Conv2d layers, at `batch` images; run: calls it with one."""
    seen: dict[Case, int] = {}

    def record(layer, args, _):
        x = args[0]
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            case = Case(Window(len(x) * batch, *x.shape[2:], *geometry), layer.in_channels, layer.out_channels)
        else:
            case = Case(Window(x.numel() // x.shape[-1] * batch, 1, 1), layer.in_features, layer.out_features)
        seen[case] = seen.get(case, 0) + 1

    handles = [module.register_forward_hook(record) for module in model.modules() if _served(module)]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    every = [replace(case, count=count) for case, count in seen.items()]
    return sorted(every, key=lambda case: -case.operations * case.count)


def _served(module: nn.Module) -> bool:
    """Say whether the W8A8 kernels serve it: not grouped convolutions, nor padding that is no zeros."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and isinstance(module.padding, tuple)
    return type(module) is nn.Linear


@dataclass
class Operands:
    """inputs: several, so that none is found in a cache; as layers get them (channels_last images or tokens)."""

    inputs: list[Tensor]
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, case: Case, copies: int | None = None, seed: int = 0) -> Operands:
        """copies: of the inputs; as many as no cache holds, unless given."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        w = case.window
        size = (w.batch, case.channels, w.h, w.w)
        copies = copies or max(2, min(32, int(COLD / (2 * w.batch * case.channels * w.h * w.w))))

        def images() -> Tensor:
            x = F.silu(torch.randn(size, generator=generator, device=DEVICE)).bfloat16()
            return x.flatten(1) if case.linear else x.contiguous(memory_format=torch.channels_last)

        shape = (case.outputs, case.channels) + (() if case.linear else w.kernel)
        weight = torch.randn(shape, generator=generator, device=DEVICE) * (w.taps * case.channels) ** -0.5
        bias = torch.randn(case.outputs, generator=generator, device=DEVICE).bfloat16()
        return cls([images() for _ in range(copies)], weight, bias)

    def quantized(self, form: str, static: bool = True) -> tuple:
        """(qweight, weight_scale, bias, input_scale, input_zero_point): the operands of the W8A8 ops."""
        if form == "int8":
            scale = self.weight.flatten(1).abs().amax(1) / int8.weight_limit(8)
            codes = int8.quantize_weight(self.weight, scale)
        else:
            scale = fp8.scale_of(self.weight, tuple(range(1, self.weight.ndim)))
            codes, scale = fp8.quantize(self.weight, scale), scale.flatten()
        if self.weight.ndim == 4:
            codes = codes.contiguous(memory_format=torch.channels_last)
        low, high = (float(end) for end in torch.aminmax(self.inputs[0].float()))
        if not static:
            grid = (None, None)
        elif form == "int8":
            s, z = int8.affine_parameters(low, high)
            grid = (torch.tensor(s, device=DEVICE), torch.tensor(z, dtype=torch.int32, device=DEVICE))
        else:
            grid = (torch.tensor(max(-low, high) / fp8.LIMIT, device=DEVICE), None)
        return codes, scale, self.bias, *grid


def encoded(case: Case, operands: tuple, x: Tensor) -> Tensor:
    """The codes of one input, as the quantize kernel writes them."""
    x = x[:, :, None, None] if case.linear else x
    return quantize(x, *operands[3:], 8, operands[0].dtype, case.window.padding)
