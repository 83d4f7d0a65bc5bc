"""Fused forward passes of a quantized model: what lies between two products runs inside the kernels beside it.

Of UNets with W8A8 layers, here; other rooms add theirs to FUSED.

    ResnetBlock2D   norm + SiLU + quantize | conv1 + time embedding | norm + SiLU + quantize | conv2 + shortcut
    Attention       norm + quantize, once for query, key and value | ... | output product + residual
    Upsample2D      quantize + nearest neighbour | conv
    the output      norm + SiLU | conv_out

Only forward passes change: modules, parameters and their names stay, so a fused model saves, loads and takes adapters
as before, and a loaded one is fused again by calling `fuse`. A fused module computes unfused wherever fusing does not
apply: on a CPU without the kernels (fuse_cpu.py), in training, when one of its layers has an adapter or a hook. Results
differ from the unfused ones by rounding alone: on a GPU fused steps are in float32, unfused ones round to the model's
dtype after each; on a CPU what lies between is in `precision`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ..checks import shown
from ..errors import UserError
from ..kernels.cpu.codes import cpu_group_norm
from ..kernels.w8a8.from_codes import group_norm_silu, w8a8_conv2d_codes, w8a8_group_norm, w8a8_quantize
from ..kernels.w8a8.layer import w8a8_linear
from ..hooks import unhooked
from ..pipelines.denoiser import denoisers_by_prefix, turn_at
from ..undo import whole_or_not
from . import fuse_cpu
from .fuse_report import FuseReport, why_left
from .fuse_transformer import FusedInt8TransformerBlock
from .w8a8 import Fp8Conv2d, Fp8Linear, Int8Conv2d, Int8Linear

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LAYERS = (Int8Conv2d, Int8Linear, Fp8Conv2d, Fp8Linear)


def fuse(target: DiffusionPipeline | nn.Module, precision: str = "float32") -> FuseReport:
    """Fuse what can be fused in a pipeline's denoisers, or a model, in place.

    precision: "float32" or "bfloat16", in which values pass from one kernel to the next in a module on a CPU.

    Returns the names of the modules, as a list that also says what was left and why: `print(ptq4dm.fuse(pipe))`.
    Raises UserError for another precision, and for what is no pipeline or model.
    """
    if precision not in BETWEEN:
        raise UserError(f"precision is one of {', '.join(BETWEEN)}; got {shown(precision)}.")
    models = denoisers_by_prefix(target, "what is fused")
    with turn_at(target):
        return whole_or_not(models.values(), lambda gate: _fuse_all(models, BETWEEN[precision]))


def _fuse_all(models: dict[str, nn.Module], between: torch.dtype) -> FuseReport:
    report = FuseReport()
    for prefix, model in models.items():
        fused = len(report)
        for name, module in model.named_modules():
            _fuse(module, f"{prefix}{name}", report, between)
        if names := report[fused:]:
            parts = {name: model.get_submodule(name.removeprefix(prefix)).modules() for name in names}
            first = next(model.parameters(), None)
            on_kernels = first is not None and (_on_kernels(first) or fuse_cpu.kernels_for(first.device))
            report.note(model, [name for name, part in parts.items() if not unhooked(*part)], on_kernels)
    return report


def _fuse(module: nn.Module, name: str, report: FuseReport, between: torch.dtype) -> None:
    plain = type(module)
    on_cpu = ON_CPU.get(plain)
    if on_cpu is not None and fuse_cpu.kernels_for(_device(module)) and on_cpu.fits(module):
        module.__class__, module.between = on_cpu, between
        report.add(name, plain.__name__)
    elif plain in FUSED:
        if FUSED[plain].fits(module):
            module.__class__ = FUSED[plain]
            if hasattr(module, "between"):
                module.between = between
            report.add(name, plain.__name__)
        else:
            report.leave(name, plain.__name__, why_left(module, FUSED[plain].serves))
    elif is_fused(module):
        report.leave(name, plain.__mro__[1].__name__, "it is fused already")
    elif isinstance(module, Attention) and module.group_norm is not None and module.residual_connection:
        if FusedAttnProcessor.fits(module):
            module.set_processor(FusedAttnProcessor(between))
            report.add(name, "Attention")
        else:
            report.leave(name, "Attention", _why_attention(module))
    if _norm_before_output(module):
        norm, kind = f"{name}.conv_norm_out".lstrip("."), "GroupNorm and SiLU before the output"
        if _static(module.conv_out):
            module.conv_norm_out.__class__ = GroupNormSiLU
            module.conv_act = nn.Identity()
            report.add(norm, kind)
        else:
            report.leave(norm, kind, why_left(module.conv_out, LAYERS))


def unfuse(target: DiffusionPipeline | nn.Module) -> None:
    """Take back what `fuse` did."""
    models = denoisers_by_prefix(target, "what is fused")
    with turn_at(target):
        whole_or_not(models.values(), lambda gate: _unfuse_all(models))


def _unfuse_all(models: dict[str, nn.Module]) -> None:
    back = {kind: plain for plain, kind in (*FUSED.items(), *ON_CPU.items())}
    for module in (module for model in models.values() for module in model.modules()):
        if type(module) in back:
            module.__class__ = back[type(module)]
            vars(module).pop("between", None)
        if isinstance(module, Attention) and isinstance(module.processor, FusedAttnProcessor):
            module.set_processor(AttnProcessor2_0())
        if isinstance(getattr(module, "conv_norm_out", None), GroupNormSiLU):
            module.conv_norm_out.__class__, module.conv_act = nn.GroupNorm, nn.SiLU()


class FusedResnetBlock2D(ResnetBlock2D):
    serves = LAYERS
    between = torch.float32

    @staticmethod
    def fits(block: ResnetBlock2D) -> bool:
        plain = block.upsample is None and block.downsample is None and block.output_scale_factor == 1.0
        norms = all(type(norm) is nn.GroupNorm and norm.affine for norm in (block.norm1, block.norm2))
        simple = block.time_embedding_norm == "default" and isinstance(block.nonlinearity, nn.SiLU)
        return plain and norms and simple and _static(block.conv1) and _static(block.conv2)

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.training or not _runs_fused(input_tensor, self.conv1, self.conv2):
            return super().forward(input_tensor, temb, *args, **kwargs)
        if fuse_cpu.runs_fused(input_tensor, self.conv1, self.conv2):
            return fuse_cpu.resnet(self, input_tensor, temb, self.between)
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
        return plain and module.use_conv and module.name == "conv" and _static(module.conv)

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_size is not None or not _runs_fused(hidden_states, self.conv):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        if fuse_cpu.runs_fused(hidden_states, self.conv):
            return fuse_cpu.upsampled(self.conv, hidden_states)
        conv, (batch, _, h, w) = self.conv, hidden_states.shape
        codes = w8a8_quantize(hidden_states, *_grid(conv), conv.padding, 2)
        return _conv(codes, (batch, 2 * h, 2 * w), conv, None, None, hidden_states.dtype)


class GroupNormSiLU(nn.GroupNorm):
    """The last norm with the activation after it; `conv_act` passes on what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        if fuse_cpu.runs_fused(x):
            parameters = (self.weight, self.bias, self.num_groups, self.eps)
            return cpu_group_norm(x, None, *parameters, True, x.dtype, 1.0, 0, 8)
        if not _on_kernels(x):
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
        if not all(_static(layer) for layer in [*layers, attn.to_out[0]]):
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
        if fuse_cpu.runs_fused(hidden_states, *layers):
            return fuse_cpu.self_attention(attn, hidden_states, self.between)
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


# plain class -> its fused one, with `fits(module)`: whether what the module is made of allows it, and `serves`: the
# classes of layers that it is fused around
FUSED: dict[type, Any] = {ResnetBlock2D: FusedResnetBlock2D, Upsample2D: FusedUpsample2D}
ON_CPU: dict[type, Any] = {BasicTransformerBlock: FusedInt8TransformerBlock}  # where a CPU has the kernels, before FUSED
BETWEEN = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def is_fused(module: nn.Module) -> bool:
    """Whether a module is one that `fuse` has fused as a whole."""
    return type(module) in (*FUSED.values(), *ON_CPU.values())


def _device(module: nn.Module) -> torch.device:
    return next((one.device for one in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _norm_before_output(module: nn.Module) -> bool:
    parts = [type(getattr(module, name, None)) for name in ("conv_norm_out", "conv_act")]
    return parts == [nn.GroupNorm, nn.SiLU] and isinstance(getattr(module, "conv_out", None), nn.Module)


def _why_attention(attn: Attention) -> str:
    if isinstance(attn.processor, FusedAttnProcessor):
        return "it is fused already"
    if type(attn.processor) is not AttnProcessor2_0:
        return f"its processor is {type(attn.processor).__name__}"
    return why_left(attn, LAYERS)


def _static(layer: Any) -> bool:
    return type(layer) in LAYERS and layer.plan.static and getattr(layer, "groups", 1) == 1


def _on_kernels(x: Tensor) -> bool:
    return x.is_cuda


def _runs_fused(x: Tensor, *layers: nn.Module) -> bool:
    """Whether nothing hangs on the layers that expects their own forward pass to be called."""
    served = _on_kernels(x) and all(type(layer) in LAYERS for layer in layers) or fuse_cpu.runs_fused(x, *layers)
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
