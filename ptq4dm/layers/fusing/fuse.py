"""Fused forward passes of a quantized model: what lies between two products runs inside the kernels beside it.

Of any model: norms that quantized layers read, and inputs that several of them share (ptq4dm/handed/). Of UNets with
W8A8 layers, here; of transformers whose layers quantize their inputs in the call, in blocks.py.

    ResnetBlock2D   norm + SiLU + quantize | conv1 + time embedding | norm + SiLU + quantize | conv2 + shortcut
    Attention       norm + quantize, once for query, key and value | ... | output product + residual
    Upsample2D      quantize + nearest neighbour | conv
    the output      norm + SiLU | conv_out

Only forward passes change: modules, parameters and their names stay, so a fused model saves, loads and takes adapters
as before, and a loaded one is fused again by calling `fuse`. A fused module computes unfused wherever fusing does not
apply: on a CPU without the kernels (cpu.py), in training, when one of its layers has an adapter or a hook.
Results differ from the unfused ones by rounding alone: on a GPU fused steps are in float32, unfused ones round to the
model's dtype after each; on a CPU what lies between is in `precision`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ...handed.find import hand_over, hands_over, take_back
from ...hooks import unhooked
from ...pipelines.denoiser import denoisers_by_prefix, turn_at
from ...undo import whole_or_not
from . import blocks, cpu, unet
from .caches import known_to_caches
from .report import FuseReport, why_left
from .transformer import FusedInt8TransformerBlock
from .unet import (
    LAYERS,
    FusedAttnProcessor,
    FusedResnetBlock2D,
    FusedUpsample2D,
    GroupNormSiLU,
    is_static,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def fuse(target: DiffusionPipeline | nn.Module, precision: str = "float32") -> FuseReport:
    """Fuse what can be fused in a pipeline's denoisers, or a model, in place.

    precision: "float32" or "bfloat16", in which values pass from one kernel to the next in a module on a CPU.

    Returns the names of the modules, as a list that also says what was left and why: `print(ptq4dm.fuse(pipe))`.
    Raises UserError for another precision, and for what is no pipeline or model.
    """
    between = cpu.dtype_between(precision)
    models = denoisers_by_prefix(target, "what is fused")
    with turn_at(target):
        return whole_or_not(models.values(), lambda gate: _fuse_all(models, between))


def _fuse_all(models: dict[str, nn.Module], between: torch.dtype) -> FuseReport:
    report = FuseReport()
    for prefix, model in models.items():
        fused = len(report)
        for name, module in model.named_modules():
            _fuse(module, f"{prefix}{name}", report, between)
        hand_over(model, prefix, [name for name, one in model.named_modules() if _is_whole(one)], report)
        if names := report[fused:]:
            parts = {name: model.get_submodule(name.removeprefix(prefix)).modules() for name in names}
            first = next(model.parameters(), None)
            on_gpu = first is not None and unet.on_kernels(first)
            hooked = [name for name, part in parts.items() if not unhooked(*part)]
            idle = [name for name in names if _is_idle(model.get_submodule(name.removeprefix(prefix)), on_gpu)]
            report.note(model, hooked, on_gpu or cpu.runs_fused_on_cpu(model), idle)
    return report


def _fuse(module: nn.Module, name: str, report: FuseReport, between: torch.dtype) -> None:
    plain = type(module)
    on_cpu = ON_CPU.get(plain)
    if on_cpu is not None and cpu.serves(module) and on_cpu.fits(module):
        module.__class__, module.between = on_cpu, between
        known_to_caches(on_cpu, plain)
        report.add(name, plain.__name__)
    elif plain in FUSED:
        if FUSED[plain].fits(module):
            module.__class__ = FUSED[plain]
            known_to_caches(FUSED[plain], plain)
            if hasattr(module, "between") and cpu.serves(module):
                module.between = between
            report.add(name, plain.__name__)
        else:
            kind = FUSED[plain]
            why = blocks.why_not(module, kind) if plain in blocks.KINDS else why_left(module, kind.serves)
            report.leave(name, plain.__name__, why)
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
        if is_static(module.conv_out):
            module.conv_norm_out.__class__ = GroupNormSiLU
            module.conv_act = nn.Identity()
            report.add(norm, kind)
        else:
            report.leave(norm, kind, why_left(module.conv_out, LAYERS))


def _is_idle(module: nn.Module, on_gpu: bool) -> bool:
    """Whether a fused module computes as before where it is, for kernels do not serve all of its layers."""
    if type(module) in blocks.KINDS.values():
        return not blocks.served(module)
    return not on_gpu and hands_over(module)


def _is_whole(module: nn.Module) -> bool:
    """Whether a module is fused with all that is inside."""
    return is_fused(module) or isinstance(getattr(module, "processor", None), FusedAttnProcessor)


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
    for model in models.values():
        take_back(model)


# plain class -> its fused one, with `fits(module)`: whether what the module is made of allows it; those of UNets with
# `serves`: the classes of layers that it is fused around
FUSED: dict[type, Any] = {ResnetBlock2D: FusedResnetBlock2D, Upsample2D: FusedUpsample2D, **blocks.KINDS}
ON_CPU: dict[type, Any] = {
    BasicTransformerBlock: FusedInt8TransformerBlock
}  # where a CPU has the kernels, before FUSED


def is_fused(module: nn.Module) -> bool:
    """Whether a module is one that `fuse` has fused as a whole."""
    return type(module) in (*FUSED.values(), *ON_CPU.values())


def _norm_before_output(module: nn.Module) -> bool:
    parts = [type(getattr(module, name, None)) for name in ("conv_norm_out", "conv_act")]
    return parts == [nn.GroupNorm, nn.SiLU] and isinstance(getattr(module, "conv_out", None), nn.Module)


def _why_attention(attn: Attention) -> str:
    if isinstance(attn.processor, FusedAttnProcessor):
        return "it is fused already"
    if type(attn.processor) is not AttnProcessor2_0:
        return f"its processor is {type(attn.processor).__name__}"
    return why_left(attn, LAYERS)
