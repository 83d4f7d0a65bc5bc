"""What a loader gave, as one flat dict, and how two of them differ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Leaves = dict[str, Any]  # path -> tensor, number, text, None


def leaves(value: Any, path: str = "") -> Leaves:
    """Every value within dicts, lists and tuples, by its path; of a dict with the place of its entry."""
    if isinstance(value, dict):
        found: Leaves = {f"{path}#": list(map(str, value))}
        for key, one in value.items():
            found |= leaves(one, f"{path}/{key}")
        return found
    if isinstance(value, (list, tuple)):
        found = {f"{path}#": len(value)}
        for number, one in enumerate(value):
            found |= leaves(one, f"{path}/{number}")
        return found
    if isinstance(value, np.ndarray):
        return {path: torch.from_numpy(np.array(value)) if value.dtype.kind in "fiub" else value.tolist()}
    return {path: value.detach().clone() if isinstance(value, Tensor) else value}


def same(one: Any, other: Any) -> bool:
    """Whether two leaves are the same to the bit, and of one type."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(_bits(one), _bits(other))
    return type(one) is type(other) and repr(one) == repr(other)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def differences(found: Leaves, right: Leaves) -> list[str]:
    """The paths of leaves that are not the same in both."""
    return [name for name in {**right, **found} if name not in found or name not in right
            or not same(found[name], right[name])]  # fmt: skip


def strange(found: Leaves, right: Leaves) -> str:
    """A few words on leaves that no right file gives: another type, NaN, infinity; "" where there is none."""
    for name, one in found.items():
        if isinstance(one, float) and not math.isfinite(one):
            return f"{name} is {one}"
        if isinstance(one, Tensor) and one.is_floating_point() and not _as_finite(one, right.get(name)):
            return f"{name} holds NaN or infinity"
        if name not in right or name.endswith("#"):
            continue
        other = right[name]
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype != other.dtype:
            return f"{name} is {one.dtype} and not {other.dtype}"
        if _kind(one) != _kind(other) and None not in (one, other):
            return f"{name} is {type(one).__name__} and not {type(other).__name__}"
    return ""


def _as_finite(one: Tensor, other: Any) -> bool:
    if bool(one.float().isfinite().all()):
        return True
    return isinstance(other, Tensor) and not bool(other.float().isfinite().all())


def _kind(value: Any) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__
