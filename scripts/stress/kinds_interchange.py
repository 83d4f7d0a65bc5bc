"""Files of ComfyUI and GGUF files, as `load_quantized_file` reads them into a tiny model."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from stress.kinds import kind
from stress.kinds_packed import wrong_packed
from stress.leaves import Leaves
from stress.models import KEPT, tiny_dit
from torch import nn

import ptq4dm

BLOCKS, FLOATS = 8, 0  # Q8_0 and F32, as GGUF numbers them


def _comfy(folder: Path) -> None:
    pipe = tiny_dit()
    recipe = ptq4dm.RTNConfig(activations="dynamic", transforms=("hadamard:64",), modules_to_not_convert=KEPT)
    ptq4dm.quantize(pipe, recipe)
    ptq4dm.export_comfy(pipe, folder / "model.safetensors")


def _gguf(folder: Path) -> None:
    """Weights of Linear layers in blocks of 32 under one float16 scale, all else in float32."""
    model = tiny_dit().transformer
    blocks = {f"{name}.weight" for name, one in model.named_modules() if type(one) is nn.Linear}
    infos, data = b"", b""
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        raw = _blocks(value) if name in blocks else value.astype(np.float32).tobytes()
        sizes = struct.pack(f"<I{value.ndim}Q", value.ndim, *value.shape[::-1])
        infos += _text(name) + sizes + struct.pack("<IQ", BLOCKS if name in blocks else FLOATS, len(data))
        data += raw + bytes(-len(raw) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(model.state_dict()), 1)
    head += _text("general.architecture") + struct.pack("<I", 8) + _text("dit") + infos
    (folder / "model.gguf").write_bytes(head + bytes(-len(head) % 32) + data)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _blocks(value: np.ndarray) -> bytes:
    runs = value.reshape(-1, 32)
    scales = (np.abs(runs).max(1, keepdims=True) / 127).astype(np.float16)
    codes = np.rint(runs / np.maximum(scales.astype(np.float32), 1e-9)).clip(-127, 127).astype(np.int8)
    return np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], 1).tobytes()


def _loaded(file: Path) -> dict:
    model = ptq4dm.load_quantized_file(tiny_dit().transformer, file)
    return {"tensors": model.state_dict(), "plan": ptq4dm.quantization_config(model).plan.to_dict()}


@kind("comfy", _comfy, wrong=wrong_packed, weight=2)
def load_comfy(folder: Path, _: Any) -> dict:
    return _loaded(folder / "model.safetensors")


def _wrong_blocks(found: Leaves, right: Leaves) -> str:
    """As of what is packed; but in GGUF a block of zeros has scale 0, and some writers' scales are below."""
    return wrong_packed(
        *({name: one for name, one in leaves.items() if "wscales" not in name} for leaves in (found, right))
    )


@kind("gguf", _gguf, wrong=_wrong_blocks, weight=2)
def load_gguf(folder: Path, _: Any) -> dict:
    return _loaded(folder / "model.gguf")
