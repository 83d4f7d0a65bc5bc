"""GGUF's types of blocks -> our weights in blocks, to the bit (kernels/formats/blocks.py).

    Q8_0   d q                      d float16; 32 q int8
    Q4_0   d (q - 8)                d; 16 bytes, byte j is q[j] + 16 q[j + 16]: as ours are packed
    Q4_1   d q + m                  d, m; the same
    Q5_0   d (q - 16), Q5_1 d q + m the fifth bits of q in 4 bytes before the others
    Q4_K   D t q - M m              256 values in 8 blocks; D, M float16; t, m of 6 bits in 12 bytes; 128 bytes of q:
                                    of each 32 the low halves are one block and the high ones the next
    Q5_K   D t q - M m              the same, with 32 bytes of fifth bits: bit i is that of block i
    Q6_K   D t (q - 32)             256 values in 16 blocks; of q 128 bytes of low halves, 64 of high bits; t int8; D

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..files.gguf import GGUFFile
from ..kernels.formats.blocks import pack
from ..layers.blocks.layer import BlocksPlan
from .rows import Found, Rows

FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
SHAPE = "comfy.gguf.orig_shape."  # entries of ComfyUI-GGUF: the shape of a tensor that was flattened
NAMES = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
         20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
         40: "NVFP4"}  # fmt: skip


class Type(NamedTuple):
    """A type of blocks: inputs and bytes of one, the plan, and raw bytes [N, B, bytes] -> tensors of the layer."""

    name: str
    inputs: int
    bytes: int
    plan: BlocksPlan
    read: Callable[[Tensor], dict[str, Tensor]]


def read_gguf(path: str | os.PathLike) -> Found:
    """The weights and tensors of a file. Raises UserError for types of blocks that there are no layers for, by name,
    and DamagedFile where it is no whole GGUF file."""
    file = GGUFFile(path)
    found = Found(str(path), {}, {})
    for name, tensor in file.tensors.items():
        if tensor.kind not in FLOATS and tensor.kind not in TYPES:
            known = ", ".join(one.name for one in TYPES.values())
            kind = NAMES.get(tensor.kind, f"type {tensor.kind}")
            raise UserError(
                f"'{name}' of {path} is {kind}; what loads is {known} and floats: convert it to one of them."
            )
    for name, tensor in file.tensors.items():
        shape = file.entries.get(SHAPE + name)
        if tensor.kind in FLOATS:
            kind = FLOATS[tensor.kind]
            value = file.blocks(name, 1, kind.itemsize).view(kind).reshape(tensor.shape)
            found.tensors[name] = value if shape is None else _shaped(value, shape, f"'{name}' of {path}")
            continue
        if len(tensor.shape) != 2 or shape is not None:
            raise UserError(f"'{name}' of {path} is quantized and no matrix; only weights of Linear layers load so.")
        of = TYPES[tensor.kind]
        raw = file.blocks(name, of.inputs, of.bytes)
        found.weights[name] = Rows(of.plan, tensor.shape[1], of.read(raw))
    return found


def _shaped(value: Tensor, shape: object, what: str) -> Tensor:
    try:
        return value.reshape([int(one) for one in shape])  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{what} does not have the shape that the file says it had.") from None


def _half(raw: Tensor, start: int) -> Tensor:
    """The float16 at a byte of each block [N, B, bytes] -> [N, B]."""
    return raw[..., start : start + 2].contiguous().view(torch.float16)[..., 0]


def _whole(raw: Tensor, start: int, end: int) -> Tensor:
    """Bytes of the blocks of a row one after the other: [N, B (end - start)]."""
    return raw[..., start:end].flatten(1)


def _q8_0(raw: Tensor) -> dict[str, Tensor]:
    return {"qweight": _whole(raw, 2, 34).view(torch.int8), "wscales": _half(raw, 0)}


def _q4_0(raw: Tensor) -> dict[str, Tensor]:
    return {"qweight": _whole(raw, 2, 18), "wscales": _half(raw, 0)}


def _q4_1(raw: Tensor) -> dict[str, Tensor]:
    return {"qweight": _whole(raw, 4, 20), "wscales": _half(raw, 0), "woffsets": _half(raw, 2)}


def _fives(raw: Tensor, start: int) -> Tensor:
    """Codes of 5 bits [N, B, 32]: fifth bits in 4 bytes, the first value's lowest, then 16 bytes."""
    high = (raw[..., start : start + 4, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    low = raw[..., start + 4 : start + 20]
    return torch.cat([low & 15, low >> 4], -1) | high.flatten(-2) << 4


def _q5_0(raw: Tensor) -> dict[str, Tensor]:
    return {"qweight": _fives(raw, 2).to(torch.int8).flatten(1) - 16, "wscales": _half(raw, 0)}


def _q5_1(raw: Tensor) -> dict[str, Tensor]:
    codes = _fives(raw, 4).to(torch.int8).flatten(1)
    return {"qweight": codes, "wscales": _half(raw, 0), "woffsets": _half(raw, 2)}


def _sixes(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of 6 bits, 8 each in 12 bytes [N, B, 12] -> twice int8 [N, 8 B].

    Bytes 0 to 3 and 4 to 7: the first four of each, and above them the two high bits of the other four; 8 to 11: the
    four low bits of the others, of scales in the low halves.
    """
    scales, offsets, rest = raw.split(4, -1)
    t = torch.cat([scales & 63, rest & 15 | scales >> 6 << 4], -1)
    m = torch.cat([offsets & 63, rest >> 4 | offsets >> 6 << 4], -1)
    return t.to(torch.int8).flatten(1), m.to(torch.int8).flatten(1)


def _nested(raw: Tensor) -> dict[str, Tensor]:
    t, m = _sixes(raw[..., 4:16])
    return {"wscales": t, "woffsets": m, "outer_scales": _half(raw, 0), "outer_offsets": -_half(raw, 2)}


def _pairs(raw: Tensor) -> Tensor:
    """128 bytes [N, B, 128] -> codes [N, B, 8, 32]: of each 32 bytes low halves, then high ones."""
    bytes_ = raw.unflatten(-1, (4, 32))
    return torch.stack([bytes_ & 15, bytes_ >> 4], -2).flatten(-3, -2)


def _q4_k(raw: Tensor) -> dict[str, Tensor]:
    return {"qweight": pack(_pairs(raw[..., 16:144]).flatten(1)), **_nested(raw)}


def _q5_k(raw: Tensor) -> dict[str, Tensor]:
    high = raw[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    codes = _pairs(raw[..., 48:176]) | high << 4
    return {"qweight": codes.to(torch.int8).flatten(1), **_nested(raw)}


def _q6_k(raw: Tensor) -> dict[str, Tensor]:
    low = raw[..., :128].unflatten(-1, (2, 64))
    high = raw[..., 128:192].unflatten(-1, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    codes = torch.cat([low & 15, low >> 4], -1).unflatten(-1, (4, 32)) | high << 4
    scales = _whole(raw, 192, 208).view(torch.int8)
    return {"qweight": codes.to(torch.int8).flatten(1) - 32, "wscales": scales, "outer_scales": _half(raw, 208)}


TYPES = {
    2: Type("Q4_0", 32, 18, BlocksPlan(codes="int4", zero=8), _q4_0),
    3: Type("Q4_1", 32, 20, BlocksPlan(codes="int4", offsets=True), _q4_1),
    6: Type("Q5_0", 32, 22, BlocksPlan(), _q5_0),
    7: Type("Q5_1", 32, 24, BlocksPlan(offsets=True), _q5_1),
    8: Type("Q8_0", 32, 34, BlocksPlan(), _q8_0),
    12: Type("Q4_K", 256, 144, BlocksPlan(codes="int4", offsets=True, nested=8), _q4_k),
    13: Type("Q5_K", 256, 176, BlocksPlan(offsets=True, nested=8), _q5_k),
    14: Type("Q6_K", 256, 210, BlocksPlan(size=16, nested=16), _q6_k),
}
