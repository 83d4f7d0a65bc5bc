"""Our quantized layers -> what ComfyUI's files hold of them (formats.py has the layouts).

A layer becomes rows, since a file may join several layers in one weight; what must be one number for all rows is
looked at when they are joined.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.formats.blocks import unpack
from ..svdquant.layers.nvfp4 import unpack_e2m1
from .formats import in_bytes, tiled
from .rows import Rows


def written(layer: nn.Module) -> Rows:
    """What a file holds of a Linear layer, its `plan` the JSON.

    Raises ValueError, the end of a sentence, for what no format of ComfyUI holds.
    """
    write = WRITERS.get(layer.plan.format)
    if write is None or getattr(layer.plan, "simulated", False):
        raise ValueError(f"is {layer.plan}, which no format of ComfyUI holds")
    return write(layer)


def stored(rows: Rows) -> dict[str, Tensor]:
    """The tensors of a weight by the ends of their names. Raises ValueError as `written` does."""
    found = dict(rows.tensors)
    for name in ("weight_scale_2", "input_scale", *(["weight_scale"] if rows.plan["format"] in ONE_SCALE else ())):
        if name in found:
            if bool((found[name] != found[name][0]).any()):
                raise ValueError(f"has several scales where ComfyUI's {rows.plan['format']} has one ({name})")
            found[name] = found[name][0].clone()
    if rows.plan["format"] == "nvfp4":
        found["weight_scale"] = tiled(found["weight_scale"])
    for name in ("weight_scale", "weight_zeros") if rows.plan["format"] == "awq_w4a16" else ():
        found[name] = found[name].T
    text = json.dumps(rows.plan).encode()
    return {**found, "comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}


ONE_SCALE = ("float8_e4m3fn",)


def _rows(layer: nn.Module, config: dict[str, Any], **tensors: Tensor) -> Rows:
    found = {name: one.detach().cpu() for name, one in tensors.items()}
    return Rows(config, layer.in_features, found)


def _float8(layer: nn.Module) -> Rows:
    found = {"weight": layer.qweight, "weight_scale": layer.weight_scale}
    if layer.plan.static:
        found["input_scale"] = layer.input_scale.expand(layer.out_features)
    return _rows(layer, {"format": "float8_e4m3fn"}, **found)


def _int8(layer: nn.Module) -> Rows:
    if layer.plan.static:
        raise ValueError(f"is {layer.plan}, and ComfyUI's int8 has dynamic inputs alone: take activations='dynamic'")
    return _rows(layer, {"format": "int8_tensorwise"}, weight=layer.qweight, weight_scale=layer.weight_scale[:, None])


def _turned(layer: nn.Module) -> dict[str, int]:
    if layer.plan.hadamard_kind != "regular":
        raise ValueError(f"is {layer.plan}, and ComfyUI rotates by regular Hadamard matrices alone")
    return {"convrot_groupsize": layer.plan.hadamard_group}


def _int8_rotated(layer: nn.Module) -> Rows:
    rows = _int8(layer)
    rows.plan |= {"convrot": True, **_turned(layer)}
    return rows


def _int4_rotated(layer: nn.Module) -> Rows:
    plan = layer.plan
    if plan.group_size is not None or plan.affine or plan.static or plan.activation_bits != 8:
        raise ValueError(f"is {plan}, and ComfyUI's convrot_w4a4 has one scale a row, and dynamic inputs")
    weight = in_bytes(layer.codes().cpu() & 15, even_first=True).view(torch.int8)
    config = {"format": "convrot_w4a4", "linear_dtype": "int8", **_turned(layer)}
    return _rows(layer, config, weight=weight, weight_scale=layer.wscales[:, 0])


def _blocks(layer: nn.Module) -> Rows:
    plan = layer.plan
    if plan.codes == "e4m3" and plan.size is None and not plan.offsets:
        config = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        return _rows(layer, config, weight=layer.qweight, weight_scale=layer.wscales[:, 0].float())
    if (plan.codes, plan.zero, plan.offsets, plan.nested) == ("int4", 8, True, 0):
        weight = in_bytes(unpack(layer.qweight.cpu()), even_first=True).view(torch.int8)
        config = {"format": "awq_w4a16", "group_size": plan.size}
        return _rows(layer, config, weight=weight, weight_scale=layer.wscales, weight_zeros=layer.woffsets)
    raise ValueError(f"is {plan}, which no format of ComfyUI holds")


def _nvfp4(layer: nn.Module) -> Rows:
    if layer.plan.rank or bool((layer.smooth != 1).any()):
        raise ValueError(f"is {layer.plan} with smoothing or a branch, which ComfyUI's nvfp4 has not")
    weight = in_bytes(unpack_e2m1(layer.qweight.cpu()), even_first=False)
    return _rows(layer, {"format": "nvfp4"}, weight=weight, weight_scale=layer.wscales, weight_scale_2=layer.outer)


WRITERS: dict[str, Callable[[Any], Rows]] = {
    "fp8": _float8,
    "int8": _int8,
    "int8-rotated": _int8_rotated,
    "int4-rotated": _int4_rotated,
    "blocks": _blocks,
    "nvfp4": _nvfp4,
}
