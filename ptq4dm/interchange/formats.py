"""What a layer of a safetensors file may be -> our layers; the same codes and scales, to the bit.

    comfy float8_e4m3fn    weight [N, K] e4m3, weight_scale one; input_scale one, or none: dynamic
    comfy int8_tensorwise  weight [N, K] int8, weight_scale one or [N]; convrot: of rotated inputs
    comfy convrot_w4a4     weight [N, K/2] int8, the even input in the low half, weight_scale [N]; of rotated inputs
    comfy nvfp4            weight [N, K/2] uint8 of e2m1, the even input in the high half; weight_scale e4m3, one for
                           each 16 inputs, in cuBLAS' tiles; weight_scale_2 one
    comfy awq_w4a16        weight [N, K/2] int8 of [0, 15]; weight_scale, weight_zeros [K/G, N]: w = (q - 8) s + o
    bfl fp8r               weight [N, K] e4m3, weight_scale [N]
    bfl nvfp4              as ModelOpt has it: the even input in the low half, weight_scale [N, K/16] as it is

"bfl" are the files of Black Forest Labs, by diffusers' name for them. Sources: ComfyUI comfy/ops.py, comfy-kitchen,
diffusers/quantizers/bfl; for tiles, cuBLAS' "1D block scaling factors layout".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.formats.blocks import pack
from ..layers.blocks.layer import BlocksPlan
from ..layers.int4_ops import packed_rows
from ..layers.plan import LayerPlan
from ..layers.rotated.formats import RotatedInt4Plan, RotatedInt8Plan
from ..svdquant.layers.nvfp4 import GROUP, NVFP4Plan, pack_e2m1
from .rows import Rows
from .stored_layer import FLOATS, StoredLayer, UnknownFormatError

E4M3 = torch.float8_e4m3fn
TURNED = 256  # inputs that ConvRot turns together where a file does not say
TILE = (128, 4)  # rows and columns of scales that lie together


def float8(layer: StoredLayer) -> Rows:
    """With `full_precision_matrix_mult` inputs stay floats. A weight without any scale has scale 1."""
    weight = layer.matrix(E4M3)
    n, k = weight.shape
    scales = layer.scales(n) if layer.has("weight_scale") else torch.ones(n)
    given = layer.one("input_scale") if layer.has("input_scale") else None
    shared = {} if given is None else {"input_scale": torch.tensor(given)}
    if layer.option("full_precision_matrix_mult", False):
        return Rows(BlocksPlan(codes="e4m3", size=None), k, {"qweight": weight, "wscales": scales[:, None]})
    return Rows(LayerPlan(format="fp8", input_scale=given), k, {"qweight": weight, "weight_scale": scales}, shared)


def int8(layer: StoredLayer) -> Rows:
    weight = layer.matrix(torch.int8)
    plan = LayerPlan()
    if layer.option("convrot", False):
        plan = RotatedInt8Plan(hadamard_group=layer.option("convrot_groupsize", TURNED))
    return Rows(plan, weight.shape[1], {"qweight": weight, "weight_scale": layer.scales(len(weight))})


def int4(layer: StoredLayer) -> Rows:
    """Inputs get 8 bits, whatever `linear_dtype` says: those of 4 lose more, and take no less time here."""
    if layer.option("linear_dtype", "int4") not in ("int4", "int8"):
        raise ValueError(f"its linear_dtype is {layer.config['linear_dtype']!r}")
    weight = layer.matrix(torch.int8, torch.uint8)
    codes = nibbles(weight, even_first=True).view(torch.int8)
    codes = packed_rows((codes ^ 8) - 8)  # two's complement of 4 bits
    plan = RotatedInt4Plan(hadamard_group=layer.option("convrot_groupsize", TURNED))
    return Rows(plan, 2 * weight.shape[1], {"qweight": codes, "wscales": layer.scales(len(weight))[:, None]})


def awq(layer: StoredLayer) -> Rows:
    weight = layer.matrix(torch.int8, torch.uint8)
    n, k = len(weight), 2 * weight.shape[1]
    size = layer.option("group_size", 64)
    if size < 1 or k % size:
        raise ValueError(f"its {k} inputs do not divide into groups of {size}")
    scales, offsets = (layer.take(key, *FLOATS, shape=(k // size, n)).T for key in ("weight_scale", "weight_zeros"))
    plan = BlocksPlan(codes="int4", size=size, zero=8, offsets=True)
    codes = pack(nibbles(weight, even_first=True))
    return Rows(plan, k, {"qweight": codes, "wscales": scales, "woffsets": offsets})


def comfy_nvfp4(layer: StoredLayer) -> Rows:
    if layer.has("pre_quant_scale"):
        raise UnknownFormatError(
            "nvfp4 of inputs that are scaled first (pre_quant_scale), which our layers do not do"
        )
    weight = layer.matrix(torch.uint8)
    tiled = layer.take("weight_scale", E4M3, torch.uint8).view(E4M3)
    n, groups = len(weight), 2 * weight.shape[1] // GROUP
    if tiled.numel() != _up(n, TILE[0]) * _up(groups, TILE[1]):
        raise ValueError(f"its weight_scale holds {tiled.numel()} scales and should hold those of whole tiles")
    return _nvfp4(layer, nibbles(weight, even_first=False), untiled(tiled, n, groups))


def bfl_nvfp4(layer: StoredLayer) -> Rows:
    weight = layer.matrix(torch.uint8)
    scales = layer.take("weight_scale", E4M3, shape=(len(weight), 2 * weight.shape[1] // GROUP))
    return _nvfp4(layer, nibbles(weight, even_first=True), scales)


def _nvfp4(layer: StoredLayer, codes: Tensor, scales: Tensor) -> Rows:
    """Inputs are rounded as our NVFP4 layers do it, by their own scales: a file's input_scale is not needed."""
    n, k = codes.shape
    if layer.has("input_scale"):
        layer.one("input_scale")
    outer = torch.full((n,), layer.one("weight_scale_2"))
    tensors = {"qweight": pack_e2m1(codes), "wscales": scales, "outer": outer}
    return Rows(NVFP4Plan(rank=0), k, tensors, {"smooth": torch.ones(k, dtype=torch.float16)})


READERS: dict[str, Callable[[StoredLayer], Rows]] = {
    "float8_e4m3fn": float8,
    "int8_tensorwise": int8,
    "convrot_w4a4": int4,
    "nvfp4": comfy_nvfp4,
    "awq_w4a16": awq,
}


def nibbles(weight: Tensor, even_first: bool) -> Tensor:
    """Codes [N, K] uint8 of bytes [N, K/2]. even_first: whether the even input is in the low half."""
    raw = weight.view(torch.uint8)
    halves = [raw & 15, raw >> 4]
    return torch.stack(halves if even_first else halves[::-1], -1).flatten(1)


def in_bytes(codes: Tensor, even_first: bool) -> Tensor:
    """The inverse of `nibbles`: codes [N, K] in [0, 15], any integer type -> uint8 [N, K/2]."""
    halves = codes.to(torch.uint8).unflatten(1, (-1, 2))
    low, high = halves.unbind(-1) if even_first else halves.unbind(-1)[::-1]
    return low | high << 4


def _up(count: int, tile: int) -> int:
    return -(-count // tile) * tile


def untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales [rows, columns] of tiles of 128 rows by 4 columns; row r of one is at byte 16 (r % 32) + 4 (r // 32)."""
    down, across = _up(rows, TILE[0]) // TILE[0], _up(columns, TILE[1]) // TILE[1]
    tiles = scales.reshape(down, across, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down * TILE[0], across * TILE[1])[:rows, :columns]


def tiled(scales: Tensor) -> Tensor:
    """The inverse of `untiled`: [rows, columns] -> [rows, columns] of whole tiles, filled up with zeros."""
    rows, columns = scales.shape
    whole = scales.new_zeros(_up(rows, TILE[0]), _up(columns, TILE[1]))
    whole[:rows, :columns] = scales
    down, across = whole.shape[0] // TILE[0], whole.shape[1] // TILE[1]
    return whole.view(down, 4, 32, across, 4).permute(0, 3, 2, 1, 4).reshape(whole.shape)
