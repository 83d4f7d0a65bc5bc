"""Fused modules of UNets with W8A8 layers (fuse.py): on a GPU by kernels/w8a8, on a CPU by cpu.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ...hooks import unhooked
from ...kernels.cpu.codes import cpu_group_norm
from ...kernels.w8a8.from_codes import group_norm_silu, w8a8_conv2d_codes, w8a8_group_norm, w8a8_quantize
from ...kernels.w8a8.layer import w8a8_linear
from ..w8a8 import Fp8Conv2d, Fp8Linear, Int8Conv2d, Int8Linear
from . import cpu

LAYERS = (Int8Conv2d, Int8Linear, Fp8Conv2d, Fp8Linear)


class FusedResnetBlock2D(ResnetBlock2D):
    serves = LAYERS
    between = torch.float32

    @staticmethod
    def fits(block: ResnetBlock2D) -> bool:
        plain = block.upsample is None and block.downsample is None and block.output_scale_factor == 1.0
        norms = all(type(norm) is nn.GroupNorm and norm.affine for norm in (block.norm1, block.norm2))
        simple = block.time_embedding_norm == "default" and isinstance(block.nonlinearity, nn.SiLU)
        return plain and norms and simple and is_static(block.conv1) and is_static(block.conv2)

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.training or not _runs_fused(input_tensor, self.conv1, self.conv2):
            return super().forward(input_tensor, temb, *args, **kwargs)
        if cpu.runs_fused(input_tensor, self.conv1, self.conv2):
            return cpu.resnet(self, input_tensor, temb, self.between)
        shift = None
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        x = _norm_conv(self.norm1, self.conv1, input_tensor, shift, None)
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return _norm_conv(self.norm2, self.conv2, x, None, shortcut)


class FusedUpsample2D(Upsample2D):
    serves = LAYERS

    @staticmethod
    def fits(module: Upsample2D) -> bool:
        plain = module.norm is None and not module.use_conv_transpose and module.interpolate
        return plain and module.use_conv and module.name == "conv" and is_static(module.conv)

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_size is not None or not _runs_fused(hidden_states, self.conv):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        if cpu.runs_fused(hidden_states, self.conv):
            return cpu.upsampled(self.conv, hidden_states)
        conv, (batch, _, h, w) = self.conv, hidden_states.shape
        codes = w8a8_quantize(hidden_states, *_grid(conv), conv.padding, 2)
        return _conv(codes, (batch, 2 * h, 2 * w), conv, None, None, hidden_states.dtype)


class GroupNormSiLU(nn.GroupNorm):
    """The last norm with the activation after it; `conv_act` passes on what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        if cpu.runs_fused(x):
            parameters = (self.weight, self.bias, self.num_groups, self.eps)
            return cpu_group_norm(x, None, *parameters, True, x.dtype, 1.0, 0, 8)
        if not on_kernels(x):
            return F.silu(super().forward(x))
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, True)


class FusedAttnProcessor(AttnProcessor2_0):
    """Self-attention over the pixels of an image. Query, key and value read the same codes."""

    def __init__(self, between: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.between = between

    @staticmethod
    def fits(attn: Attention) -> bool:
        layers = [attn.to_q, attn.to_k, attn.to_v]
        plain = type(attn.processor) is AttnProcessor2_0 and attn.rescale_output_factor == 1.0
        bare = all(getattr(attn, part, None) is None for part in ("spatial_norm", "norm_q", "norm_k"))
        if not (plain and bare and type(attn.group_norm) is nn.GroupNorm and attn.residual_connection):
            return False
        if not all(is_static(layer) for layer in [*layers, attn.to_out[0]]):
            return False
        grids = [[float(part) for part in _grid(layer)[:2] if part is not None] for layer in layers]
        return all(grid == grids[0] for grid in grids)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        given = encoder_hidden_states is not None or attention_mask is not None or hidden_states.ndim != 4
        layers = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
        if given or attn.training or not _runs_fused(hidden_states, *layers):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        if cpu.runs_fused(hidden_states, *layers):
            return cpu.self_attention(attn, hidden_states, self.between)
        batch, channels, h, w = hidden_states.shape
        norm, out = attn.group_norm, attn.to_out[0]
        codes = w8a8_group_norm(
            hidden_states, norm.weight, norm.bias, norm.num_groups, norm.eps, False, *_grid(attn.to_q), (0, 0)
        )

        def heads(layer: nn.Module) -> Tensor:
            y = _conv(codes, (batch, h, w), layer, None, None, hidden_states.dtype)
            return y.permute(0, 2, 3, 1).view(batch, h * w, attn.heads, -1).transpose(1, 2)

        y = F.scaled_dot_product_attention(*(heads(layer) for layer in layers[:3]))
        y = y.transpose(1, 2).reshape(batch, h * w, -1)
        pixels = hidden_states.permute(0, 2, 3, 1).reshape(batch, h * w, channels)
        y = w8a8_linear(y, *out.operands, pixels)
        return y.view(batch, h, w, channels).permute(0, 3, 1, 2)


def is_static(layer: Any) -> bool:
    return type(layer) in LAYERS and layer.plan.static and getattr(layer, "groups", 1) == 1


def on_kernels(x: Tensor) -> bool:
    return x.is_cuda


def _runs_fused(x: Tensor, *layers: nn.Module) -> bool:
    """Whether nothing hangs on the layers that expects their own forward pass to be called."""
    served = on_kernels(x) and all(type(layer) in LAYERS for layer in layers) or cpu.runs_fused(x, *layers)
    return served and unhooked(*layers)


def _grid(layer: nn.Module) -> tuple[Tensor, Tensor | None, int, torch.dtype]:
    """How the layer's input is turned into codes."""
    return layer.input_scale, layer.input_zero_point, layer.plan.activation_bits, layer.code


def _norm_conv(
    norm: nn.GroupNorm, conv: nn.Module, x: Tensor, shift: Tensor | None, residual: Tensor | None
) -> Tensor:
    """conv(SiLU(norm(x))) + shift + residual."""
    batch, _, h, w = x.shape
    codes = w8a8_group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, True, *_grid(conv), conv.padding)
    return _conv(codes, (batch, h, w), conv, shift, residual, x.dtype)


def _conv(
    codes: Tensor,
    image: tuple[int, int, int],
    layer: nn.Module,
    shift: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """A convolution, or a Linear on pixels, of codes."""
    geometry = [getattr(layer, name, plain) for name, plain in (("stride", (1, 1)), ("padding", (0, 0)))]
    operands = (layer.qweight, layer.weight_scale, layer.bias, layer.input_scale, layer.input_zero_point)
    dilation = getattr(layer, "dilation", (1, 1))
    return w8a8_conv2d_codes(codes, image, *operands, *geometry, dilation, shift, residual, dtype)
