"""Writing diffusers' `nunchaku_lite` checkpoints (`nunchaku_lite` says what they are).

SVDQLinear with int4 inputs, groups of 64 and no shift goes to svdq_w4a4, all of one rank: the largest that a layer
has, fused LoRA adapters included; others are filled up with zeros. Weight-only SVDQLinear goes to awq_w4a16, with
code + 7 and wzeros = -7 * wscales. Everything else stays as it is, in 16 bits.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...checks import checked
from ...errors import UserError
from ...files.atomic import replacing
from ...kernels.formats.int4 import unpack_int4
from ...layers.base import is_quantized
from ...pipelines.devices import dtype_of
from ..layers.svdq import SVDQLinear
from . import layout
from .lite import WEIGHTS
from .model import FLOAT16S
from .tensors import AWQ_ZERO

GROUP = 64
RANKS = 16  # ranks come in multiples of it; a model without branches gets this many zeros


@checked
@torch.no_grad()
def export_nunchaku_lite(model: nn.Module, folder: str | os.PathLike, dtype: torch.dtype | str | None = None) -> None:
    """Write a model quantized by SVDQuantConfig for diffusers' own Nunchaku kernels.

    Args:
        model: a diffusers model; its 4-bit layers have group_size 64, int4 inputs without a shift (`unsigned=False`)
            and inputs and outputs in multiples of 128, or are weight-only. Layers in full precision stay so.
        folder: gets config.json and one safetensors file, with the very keys that diffusers' strict check wants (so
            with all buffers, too, and the down projection of layers that share one written for each).
        dtype: bfloat16 or float16, the compute_dtype and that of all floats in the file; that of the 4-bit layers'
            scales if not given. In another dtype scales and branches are rounded anew.

    Raises:
        UserError: what the format cannot hold, naming the layer; or the folder cannot be written or holds weights of
            another kind. Nothing is written before all layers have been converted.
    """
    layers = {name: module for name, module in model.named_modules() if is_quantized(module)}
    if not hasattr(model, "to_json_string") or not layers:
        raise UserError("only a quantized diffusers model can be written for nunchaku_lite.")
    for name, layer in layers.items():
        _check(name, layer)
    dtype = next(iter(layers.values())).wscales.dtype if dtype is None else dtype_of(dtype)
    if dtype not in FLOAT16S:
        raise UserError(f"nunchaku_lite computes in bfloat16 or float16; got {str(dtype).removeprefix('torch.')}.")
    svdq = {name: layer for name, layer in layers.items() if layer.plan.activation == "int4"}
    awq = {name: layer for name, layer in layers.items() if layer.plan.activation == "none"}
    ranks = [layer.branch[1].shape[1] for layer in svdq.values() if layer.branch[1] is not None]
    rank = -(-max(ranks, default=1) // RANKS) * RANKS
    tensors = _rest(model, tuple(f"{name}." for name in layers), dtype)
    tensors |= {f"{name}.{key}": t for name, layer in svdq.items() for key, t in _svdq(layer, rank, dtype).items()}
    tensors |= {f"{name}.{key}": t for name, layer in awq.items() for key, t in _awq(layer, dtype).items()}
    config = json.loads(model.to_json_string())
    config.pop("_name_or_path", None)
    config["quantization_config"] = _config(dtype, rank, list(svdq), list(awq))
    _write(Path(folder).expanduser(), config, tensors)


def _check(name: str, layer: nn.Module) -> None:
    if not isinstance(layer, SVDQLinear):
        raise UserError(
            f"'{name}' is {type(layer).__name__} ({layer.plan}); nunchaku_lite holds 4-bit Linear layers only: "
            f"give it another role, as in SVDQuantConfig(roles={{'{name}': 'keep'}})."
        )
    plan, (n, k) = layer.plan, (layer.out_features, layer.in_features)
    weight_only = plan.activation == "none"
    if plan.activation not in ("int4", "none") or plan.group_size != GROUP or (weight_only and plan.rank):
        raise UserError(
            f"'{name}' is {plan}; nunchaku_lite holds W4A4 g64 with a low-rank branch and W4A16 g64 without one."
        )
    if plan.rotation or plan.projects:
        raise UserError(
            f"'{name}' is {plan}; nunchaku_lite rounds inputs as they come: leave out transforms, subspace."
        )
    if plan.shift:
        raise UserError(f"'{name}' rounds its inputs as unsigned; nunchaku_lite holds signed ones (unsigned=False).")
    rows, columns = (4, GROUP) if weight_only else (128, 128)
    if n % rows or k % columns:
        raise UserError(
            f"'{name}' has {k} inputs and {n} outputs; nunchaku_lite needs multiples of {columns} and {rows}: "
            "give it the role keep."
        )


def _svdq(layer: SVDQLinear, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    k, n = layer.in_features, layer.out_features
    a, b = torch.zeros(rank, k, dtype=dtype), torch.zeros(n, rank, dtype=dtype)
    down, up = layer.branch
    if up is not None:
        a[: len(down)], b[:, : len(down)] = down.to(a), up.to(b)
    tensors = {
        "qweight": layout.pack_qweight(unpack_int4(layer.qweight.cpu(), GROUP)),
        "wscales": layout.pack_scales(layer.wscales.to("cpu", dtype)),
        "smooth_factor": layout.pack_vector(layer.smooth.to("cpu", dtype)),
        "proj_down": layout.pack_down(a),
        "proj_up": layout.pack_up(b),
    }
    if layer.bias is not None:
        tensors["bias"] = layout.pack_vector(layer.bias.to("cpu", dtype))
    return tensors


def _awq(layer: SVDQLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    codes = unpack_int4(layer.qweight.cpu(), GROUP) + AWQ_ZERO
    scales = layer.wscales.to("cpu", dtype).T.contiguous()
    tensors = {
        "qweight": layout.pack_awq_qweight(codes),
        "wscales": scales,
        "wzeros": (-AWQ_ZERO * scales.float()).to(dtype),
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias.to("cpu", dtype).clone()
    return tensors


def _rest(model: nn.Module, replaced: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """All other parameters and all buffers; floats in `dtype`, to which diffusers converts them anyway."""
    tensors = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not name.startswith(replaced):
            tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    return tensors


def _config(dtype: torch.dtype, rank: int, svdq: list[str], awq: list[str]) -> dict:
    config = {"quant_method": "nunchaku_lite", "compute_dtype": str(dtype).removeprefix("torch.")}
    shared = {"precision": "int4", "group_size": GROUP}
    if svdq:
        config["svdq_w4a4"] = {**shared, "rank": rank, "targets": svdq}
    if awq:
        config["awq_w4a16"] = {**shared, "targets": awq}
    return config


def _write(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in folder.glob("*.safetensors*") if path.name != WEIGHTS]
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}.") from error
    if others:
        raise UserError(f"{folder} holds other weights ({min(others)}); choose another folder.")
    with replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
