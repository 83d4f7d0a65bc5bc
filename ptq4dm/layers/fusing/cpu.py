"""What fused modules compute on a CPU: codes from one product to the next, in a CPU's own kernels.

    ResnetBlock2D   norm + SiLU + codes | conv1 | time embedding + norm + SiLU + codes | conv2 + shortcut
    Attention       norm + codes, once for query, key and value | products | attention | codes | product + residual
    Upsample2D      codes | nearest neighbour of them | conv

Norms and codes are kernels/cpu/codes.py's, products oneDNN's. `between` is the dtype in which the rest passes from
one kernel to the next inside a module: float32, or bfloat16 where the processor multiplies in it. A module takes and
gives what it did before, so modules beside it need not know.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import shown
from ...errors import UserError
from ...kernels.cpu import library
from ...kernels.cpu.codes import cpu_codes, cpu_group_norm
from ...kernels.w8a8 import layer as w8a8
from ...kernels.w8a8.onednn import conv2d_of_codes, linear_of_codes
from ..base import QuantizedLayer
from ..w8a8 import Int8Conv2d, Int8Linear

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_between(precision: Any) -> torch.dtype:
    """The dtype of this name, of `PRECISIONS`. Raises UserError for others."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise UserError(f"precision is one of {', '.join(PRECISIONS)}; got {shown(precision)}.")
    return PRECISIONS[precision]


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def runs_fused_on_cpu(model: nn.Module) -> bool:
    """Whether some of a model's modules are fused for kernels on a CPU, those here or of other rooms (`on_cpu`)."""
    others = (module for module in model.modules() if hasattr(type(module), "on_cpu"))
    return has_between(model) or any(module.on_cpu() for module in others)


def has_between(model: nn.Module) -> bool:
    """Whether values pass from one kernel to the next in a dtype of `PRECISIONS` in some of a model's modules."""
    return any("between" in vars(module) for module in model.modules())


def serves(module: nn.Module) -> bool:
    """Whether the kernels here are for where a module is, and for all of its quantized layers."""
    first = next((one.device for one in (*module.parameters(), *module.buffers())), torch.device("meta"))
    layers = [one for one in module.modules() if isinstance(one, QuantizedLayer)]
    return all(type(one) in (Int8Conv2d, Int8Linear) for one in layers) and kernels_for(first)


def kernels_for(device: torch.device) -> bool:
    """Whether fused modules have their kernels there, as far as the device decides."""
    return device.type == "cpu" and w8a8.kernel_name(device) == w8a8.ONEDNN and library.available()


def runs_fused(x: Tensor, *layers: nn.Module) -> bool:
    """Whether these layers can compute on codes of x by the kernels here."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # the compiler sees into the plain modules
        return False
    plain = x.dtype in PRECISIONS.values() and x.numel() > 0 and not (torch.is_grad_enabled() and x.requires_grad)
    return plain and all(type(layer) in (Int8Conv2d, Int8Linear) for layer in layers) and kernels_for(x.device)


def grid_of(layer: Any) -> tuple[float, int, int]:
    """(scale, zero point, bits) of a layer's static input."""
    zero = layer.input_zero_point
    return layer.input_scale.item(), 0 if zero is None else int(zero.item()), layer.plan.activation_bits


def resnet(block: Any, x: Tensor, temb: Tensor | None, between: torch.dtype) -> Tensor:
    """A ResnetBlock2D of one scale and SiLU."""
    shift = None
    if block.time_emb_proj is not None:
        shift = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
    y = convolution(norm_codes(block.norm1, block.conv1, x, None, True), block.conv1, between)
    codes = norm_codes(block.norm2, block.conv2, y, shift, True)
    if block.conv_shortcut is None:
        y = convolution(codes, block.conv2, torch.float32)
        return y.add_(x) if x.dtype == torch.float32 else (y + x).to(x.dtype)
    shortcut = block.conv_shortcut(x).float().contiguous(memory_format=torch.channels_last)
    return convolution(codes, block.conv2, torch.float32, shortcut).to(x.dtype)


def upsampled(conv: Any, x: Tensor) -> Tensor:
    """A convolution of x doubled in size, each pixel four times."""
    codes = cpu_codes(x.contiguous(memory_format=torch.channels_last), *grid_of(conv))
    return convolution(F.interpolate(codes, scale_factor=2.0, mode="nearest"), conv, x.dtype)


def self_attention(attn: Any, x: Tensor, between: torch.dtype) -> Tensor:
    """Attention over the pixels of x [B, C, H, W], whose query, key and value have one grid, and x added to it."""
    batch, channels, h, w = x.shape
    codes = norm_codes(attn.group_norm, attn.to_q, x, None, False)
    codes = codes.permute(0, 2, 3, 1).view(batch, h * w, channels)
    y = attention_of_codes(attn, codes, between, torch.float32)
    return y.view(batch, h, w, channels).permute(0, 3, 1, 2).add_(x).to(x.dtype)


def attention_of_codes(attn: Any, codes: Tensor, between: torch.dtype, dtype: torch.dtype) -> Tensor:
    """codes [B, T, C] of what query, key and value read -> [B, T, C] in dtype, after the output's product."""
    layers = (attn.to_q, attn.to_k, attn.to_v)
    parts = [product(codes, layer, between).unflatten(-1, (attn.heads, -1)) for layer in layers]
    y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
    y = y.transpose(1, 2).flatten(2)
    out = attn.to_out[0]
    return product(cpu_codes(y, *grid_of(out)), out, dtype)


def norm_codes(norm: nn.GroupNorm, layer: Any, x: Tensor, added: Tensor | None, silu: bool) -> Tensor:
    """Codes of the norm of x + added [B, C], as the layer reads them; channels_last."""
    added = None if added is None else added.float()
    parameters = (norm.weight, norm.bias, norm.num_groups, norm.eps)
    return cpu_group_norm(x, added, *parameters, silu, torch.uint8, *grid_of(layer))


def product(
    codes: Tensor,
    layer: Any,
    dtype: torch.dtype,
    activation: tuple[str, str] = ("none", ""),
    reader: Any = None,
) -> Tensor:
    """A Linear's [..., N] of codes [..., K]. reader: the layer whose codes are given in place of values in dtype."""
    scale, zero, _ = grid_of(layer)
    more: tuple = (dtype, activation)
    if reader is not None:
        step, origin, _ = grid_of(reader)
        more = (torch.uint8, activation, (step, origin + 128))
    bias = None if layer.added is None else layer.added.float()
    rows = codes.reshape(-1, codes.shape[-1])
    y = linear_of_codes(rows, layer.qweight, layer.weight_scale, bias, scale, zero + 128, *more)
    return y.view(*codes.shape[:-1], -1)


def convolution(codes: Tensor, layer: Any, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """A Conv2d of codes, channels_last; added to `into` where that is given, in its place."""
    scale, zero, _ = grid_of(layer)
    bias = None if layer.added is None else layer.added.float()
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    codes = codes.contiguous(memory_format=torch.channels_last)
    return conv2d_of_codes(codes, layer.qweight, layer.weight_scale, bias, scale, zero + 128, geometry, dtype, into)
