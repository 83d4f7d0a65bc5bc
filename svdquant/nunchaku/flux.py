"""Reading Nunchaku's own INT4 checkpoints of FLUX, one safetensors file. Against diffusers' model they have

    blocks          qkv of either stream in one layer, rows [q; k; v], with one proj_down
    single blocks   proj_out cut by inputs into out_proj (attention) and mlp_fc2 (GELU): our SplitLinear
    after GELU      unsigned codes of x + 0.171875; the bias has the correction, the file does not say so
    AdaLN           AWQ, output j of chunk c in row j * chunks + c, the bias of the scale chunks plus 1
    names           those of the table below and of the tensors (v1), or Nunchaku's later ones (v2)

and metadata: `config` (JSON, the model's), `quantization_config`, `model_class`. smooth_orig is for converting LoRA
weights and is left out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from ...checks import checked
from ...errors import UserError
from ...pipelines.devices import dtype_of
from ...pipelines.loading import loading
from ...undo import whole_or_not
from ..layers.split import SplitLinear
from . import layout
from .model import Checkpoint, empty_model, install, linear_of, read_files, read_json
from .tensors import Plain, svdq_layer, take_awq, take_svdq

GELU_SHIFT = 0.171875
BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.(.+)\.(\w+)")

# v1 -> v2, of a module within its block
NORMS = {name: f"attn.{name}" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
MODULES = NORMS | {
    "qkv_proj": "attn.to_qkv",
    "qkv_proj_context": "attn.add_qkv_proj",
    "out_proj": "attn.to_out.0",
    "out_proj_context": "attn.to_add_out",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
    "mlp_context_fc1": "ff_context.net.0.proj",
    "mlp_context_fc2": "ff_context.net.2",
}
SINGLE_MODULES = NORMS | {"qkv_proj": "attn.to_qkv", "out_proj": "attn.to_out"}
TENSORS = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}


@checked
@loading()
def load_nunchaku_flux(
    file: str | os.PathLike, model: nn.Module | None = None, dtype: torch.dtype | str = torch.bfloat16
) -> FluxTransformer2DModel:
    """Load `svdq-int4_r32-flux.1-dev.safetensors` and its like.

    Args:
        file: the safetensors file.
        model: a FluxTransformer2DModel in full precision, of the same config, changed in place; its device and dtype
            stay. Without one it is made of the file's metadata, on the CPU in `dtype`.

    Returns:
        The model. Its `save_pretrained` writes our own format.

    Raises:
        UserError: no INT4 checkpoint of FLUX, or a tensor, by name, that is missing, left over or does not fit; a
            model that was given is then as it was.
    """
    file, dtype = Path(file).expanduser(), dtype_of(dtype)
    checkpoint = read_files(file, [file])
    _check_kind(checkpoint)
    checkpoint.tensors = _rename(checkpoint)
    if model is None:
        if "config" not in checkpoint.metadata:
            raise UserError(f"{file} has no model config in its metadata; pass a FluxTransformer2DModel.")
        config = read_json(checkpoint.metadata["config"], f"the model config of {file}")
        model = empty_model(FluxTransformer2DModel, config, dtype)
    if not isinstance(model, FluxTransformer2DModel):
        raise UserError(f"{file} is for a FluxTransformer2DModel; got {type(model).__name__}.")
    layers: dict[str, nn.Module] = {}
    for i in range(len(model.transformer_blocks)):
        layers |= _double_block(model, checkpoint, f"transformer_blocks.{i}")
    for i in range(len(model.single_transformer_blocks)):
        layers |= _single_block(model, checkpoint, f"single_transformer_blocks.{i}")
    whole_or_not([model], lambda gate: install(model, layers, checkpoint))
    return model


def _double_block(model: nn.Module, checkpoint: Checkpoint, block: str) -> dict[str, nn.Module]:
    layers = _qkv(model, checkpoint, f"{block}.attn.to_qkv", [f"{block}.attn.to_{x}" for x in "qkv"])
    names = [f"{block}.attn.add_{x}_proj" for x in "qkv"]
    layers |= _qkv(model, checkpoint, f"{block}.attn.add_qkv_proj", names)
    for name in ("attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff_context.net.0.proj"):
        layers |= _linear(model, checkpoint, f"{block}.{name}")
    for name in ("ff.net.2", "ff_context.net.2"):
        layers |= _linear(model, checkpoint, f"{block}.{name}", GELU_SHIFT)
    for name in ("norm1.linear", "norm1_context.linear"):
        layers |= _adanorm(model, checkpoint, f"{block}.{name}", 6)
    return layers


def _single_block(model: nn.Module, checkpoint: Checkpoint, block: str) -> dict[str, nn.Module]:
    layers = _qkv(model, checkpoint, f"{block}.attn.to_qkv", [f"{block}.attn.to_{x}" for x in "qkv"])
    mlp, out = linear_of(model, f"{block}.proj_mlp"), linear_of(model, f"{block}.proj_out")
    n, hidden = out.out_features, mlp.out_features
    layers[f"{block}.proj_mlp"] = svdq_layer(mlp, _take(checkpoint, f"{block}.mlp_fc1", hidden, mlp.in_features))
    parts = []
    for name, k, shift in (("attn.to_out", out.in_features - hidden, 0.0), ("mlp_fc2", hidden, GELU_SHIFT)):
        # The original has one bias: mlp_fc2 carries it, and out_proj zeros or none.
        bias = bool(shift) or f"{block}.{name}.bias" in checkpoint.tensors
        plain = _take(checkpoint, f"{block}.{name}", n, k, bias)
        like = nn.Linear(k, n, bias=plain.bias is not None, device="meta", dtype=out.weight.dtype)
        parts.append(svdq_layer(like, plain, shift=shift).to(_device(out)))
    layers[f"{block}.proj_out"] = SplitLinear.join(out, parts)
    return layers | _adanorm(model, checkpoint, f"{block}.norm.linear", 3)


def _qkv(model: nn.Module, checkpoint: Checkpoint, fused: str, names: list[str]) -> dict[str, nn.Module]:
    """One fused layer -> three that share the first one's down projection."""
    linears = [linear_of(model, name) for name in names]
    sizes = [linear.out_features for linear in linears]
    plain = _take(checkpoint, fused, sum(sizes), linears[0].in_features)
    layers, start = {}, 0
    for name, linear, size in zip(names, linears, sizes, strict=True):
        lender = "" if name == names[0] or not plain.rank else names[0]
        layers[name] = svdq_layer(linear, plain.rows(slice(start, start + size)), lender)
        start += size
    return layers


def _linear(model: nn.Module, checkpoint: Checkpoint, name: str, shift: float = 0.0) -> dict[str, nn.Module]:
    linear = linear_of(model, name)
    plain = _take(checkpoint, name, linear.out_features, linear.in_features)
    return {name: svdq_layer(linear, plain, shift=shift)}


def _adanorm(model: nn.Module, checkpoint: Checkpoint, name: str, chunks: int) -> dict[str, nn.Module]:
    linear = linear_of(model, name)
    plain = take_awq(checkpoint, name, linear.out_features, linear.in_features)
    codes, scales, bias = (
        layout.deinterleave_adanorm_rows(tensor, chunks) for tensor in (plain.codes, plain.scales, plain.bias.float())
    )
    rows = bias.view(chunks, -1)
    rows[list({1, chunks - 2})] -= 1  # the scale chunks; of three the second is the last but one as well
    return {name: svdq_layer(linear, Plain(codes, scales, bias=bias))}


def _take(checkpoint: Checkpoint, name: str, n: int, k: int, bias: bool = True) -> Plain:
    """An svdq layer, of whatever rank its own proj_down has."""
    down = checkpoint.tensors.get(f"{name}.proj_down")
    rank = 0 if down is None else down.shape[-1]
    if rank % 16:
        raise UserError(f"'{name}.proj_down' of {checkpoint.where} has rank {rank}; it should be a multiple of 16.")
    return take_svdq(checkpoint, name, n, k, rank, bias)


def _rename(checkpoint: Checkpoint) -> dict:
    """All tensors under their v2 names, without smooth_orig."""
    renamed = {}
    for key, tensor in checkpoint.tensors.items():
        name = key
        if match := BLOCK.fullmatch(key):
            block, module, leaf = match.groups()
            modules = SINGLE_MODULES if block.startswith("single") else MODULES
            name = f"{block}.{modules.get(module, module)}.{TENSORS.get(leaf, leaf)}"
        if name in renamed:
            raise UserError(f"{checkpoint.where} holds '{name}' under two names, one of them '{key}'.")
        if not name.endswith(".smooth_factor_orig"):
            renamed[name] = tensor
    return renamed


def _check_kind(checkpoint: Checkpoint) -> None:
    where, metadata = checkpoint.where, checkpoint.metadata
    if "flux" not in metadata.get("model_class", "flux").lower():
        raise UserError(f"{where} is a checkpoint of {metadata['model_class']}; only FLUX can be read.")
    kind = read_json(metadata.get("quantization_config", "{}"), f"the quantization_config of {where}")
    weight = kind.get("weight")
    dtype = weight.get("dtype", "int4") if isinstance(weight, dict) else "int4"
    if dtype != "int4" or any(tensor.dtype == torch.float8_e4m3fn for tensor in checkpoint.tensors.values()):
        raise UserError(f"{where} holds NVFP4 weights; of Nunchaku's FLUX files only INT4 ones can be read.")


def _device(linear: nn.Linear) -> torch.device:
    return torch.device("cpu") if linear.weight.is_meta else linear.weight.device
