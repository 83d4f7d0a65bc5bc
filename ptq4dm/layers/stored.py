"""What a file holds for a quantized layer, before the layer takes it: tensors of the dtypes and shapes that its
format and its plan say, scales that are finite and above zero, the input's grid that the plan names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # a model's dtypes


def check_stored(layer: Any, tensors: Mapping[str, Tensor], codes: bool = True, prefix: str = "") -> None:
    """Raises ValueError, naming the tensor behind `prefix`, where tensors are not what an empty layer takes.

    tensors: all that the file has for the layer, by their names in it; `like` may be missing, as in old files.
    codes: whether codes are looked at, too, which is a pass over all of them.
    """
    try:
        _check(layer, tensors)
        layer.check_values(tensors)
        if codes:
            layer.check_codes(tensors)
    except ValueError as error:
        raise ValueError(str(error).replace("'", f"'{prefix}", 1)) from None


def _check(layer: Any, tensors: Mapping[str, Tensor]) -> None:
    room = dict(layer.named_parameters(recurse=False))
    if unknown := sorted(tensors.keys() - room.keys()):
        raise ValueError(f"'{unknown[0]}' is in it, which the layer has not")
    if missing := sorted(room.keys() - tensors.keys() - {"like"}):
        raise ValueError(f"no '{missing[0]}' in it, which the layer needs")
    for name, tensor in tensors.items():
        kinds = FLOATS if name in ("bias", "like") else layer.stored_dtypes(name)
        if tensor.dtype not in kinds:
            raise ValueError(f"'{name}' is {_short(tensor.dtype)} and should be {' or '.join(map(_short, kinds))}")
        if tensor.shape != room[name].shape:
            raise ValueError(f"'{name}' has shape {list(tensor.shape)} and should have {list(room[name].shape)}")
        if not name.startswith("qweight") and tensor.is_floating_point():
            check_numbers(tensor, name, above_zero=name in layer.scales)


def check_numbers(tensor: Tensor, name: str, above_zero: bool = False) -> None:
    """Raises ValueError where a floating tensor holds NaN, infinity or, where asked, what is not above zero."""
    if not tensor.numel():
        return
    low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"'{name}' holds NaN or infinity")
    if above_zero and not low > 0:
        raise ValueError(f"'{name}' holds {low.item():g}, and scales are above zero")


def check_integers(tensor: Tensor, name: str, low: int, high: int) -> None:
    """Raises ValueError where an integer tensor holds a value out of [low, high]."""
    if tensor.numel():
        least, most = (int(value) for value in torch.aminmax(tensor))
        if least < low or most > high:
            raise ValueError(f"'{name}' holds {least if least < low else most}, out of [{low}, {high}]")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
