"""Damage of tensors in files that stay whole: safetensors files, and arrays of npz files."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import load, save
from stress.change import Case, Change
from stress.changes_json import split_safetensors
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)


def _some(tensor: Tensor, value: float, case: Case) -> Tensor:
    """Some or all of a tensor's elements set."""
    new = tensor.clone()
    if new.numel() and case.dice.random() < 0.6:
        new.view(-1)[case.dice.randrange(new.numel())] = value
    else:
        new.fill_(value)
    return new


def _set(value: float) -> Callable[[Tensor, Case], Tensor | None]:
    return lambda tensor, case: _some(tensor, value, case) if _takes(tensor, value) else None


def _takes(tensor: Tensor, value: float) -> bool:
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        return False  # not every float8 has each of them
    return tensor.is_floating_point() or (math.isfinite(value) and 0 <= value < 100)


def _huge(tensor: Tensor, case: Case) -> Tensor:
    if tensor.is_floating_point():
        return (
            _some(tensor, case.dice.choice((1e30, -1e30, 60000.0)), case)
            if tensor.dtype != torch.float16
            else tensor * 9
        )
    return _some(tensor, torch.iinfo(tensor.dtype).max if tensor.dtype != torch.bool else 1, case)


def _negative(tensor: Tensor, case: Case) -> Tensor | None:
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():  # torch negates no float8
        return (tensor.view(torch.uint8) ^ 128).view(tensor.dtype)
    return None if tensor.dtype in (torch.bool, torch.uint8) else -tensor


def _near(tensor: Tensor, case: Case) -> Tensor | None:
    """Values that could be right: nobody can see it without a checksum."""
    if not tensor.numel() or tensor.dtype == torch.bool:
        return None
    new = tensor.clone().view(-1)
    place = case.dice.randrange(new.numel())
    new[place] = new[place].float().mul(1.25).to(new.dtype) if new.is_floating_point() else new[place] + 1
    return new.view(tensor.shape)


def _dtype(tensor: Tensor, case: Case) -> Tensor:
    to = case.dice.choice([one for one in (*FLOATS, *OTHERS) if one != tensor.dtype])
    if case.dice.random() < 0.3 and to.itemsize == tensor.dtype.itemsize and to != torch.bool:
        return tensor.view(to)
    return tensor.float().nan_to_num().to(to) if tensor.dtype.itemsize == 1 else tensor.to(to)


def _shape(tensor: Tensor, case: Case) -> Tensor | None:
    choices = [tensor.reshape(-1), tensor[None], tensor[..., None], tensor.reshape(-1)[:0], tensor.flatten()[0:1]]
    if tensor.ndim and len(tensor) > 1:
        choices += [tensor[1:], tensor[:-1], torch.cat([tensor, tensor[:1]]), tensor.transpose(0, -1)]
    new = case.dice.choice(choices)
    return None if new.shape == tensor.shape else new


def _order(tensor: Tensor, case: Case) -> Tensor | None:
    return tensor.flip(0) if tensor.ndim and len(tensor) > 1 else None


ONE: dict[str, Callable[[Tensor, Case], Tensor | None]] = {
    "nan": _set(math.nan), "infinity": _set(math.inf), "minus infinity": _set(-math.inf), "zero": _set(0.0),
    "tiny": _set(1e-38), "huge": _huge, "negative": _negative, "near": _near, "dtype": _dtype, "shape": _shape,
    "order": _order,
}  # fmt: skip
WHICH = ("missing", "extra", "renamed", "exchanged", "other's")


def changed_tensors(case: Case, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]] | None:
    """(what was done, the new tensors)."""
    if not tensors:
        return None
    names, dice = sorted(tensors), case.dice  # safetensors gives them in any order
    name, other, what = dice.choice(names), dice.choice(names), dice.choice((*ONE, *ONE, *WHICH))
    new = dict(tensors)
    if what in ONE:
        made = ONE[what](tensors[name], case)
        if made is None:
            return None
        new[name] = made
    elif what == "missing":
        del new[name]
    elif what == "extra":
        new[dice.choice(("nonsense", f"{name}2", f"{name}.x", "", "é"))] = dice.choice(
            (torch.zeros(3), tensors[name])
        )
    elif what == "renamed":
        new[dice.choice((f"{name}_", name.rpartition(".")[2] or "x"))] = new.pop(name)
    elif what == "exchanged":
        new[name], new[other] = new[other], new[name]
    else:
        alike = [n for n in names if n != name and tensors[n].shape == tensors[name].shape] or [other]
        new[name] = tensors[dice.choice(alike)]
    return what, new


def safetensors_file(case: Case) -> Change | None:
    header = json.loads(split_safetensors(case.data)[0]).get("__metadata__")
    found = changed_tensors(case, load(case.data))
    if found is None:
        return None
    whole = {name: tensor.clone().contiguous() for name, tensor in found[1].items()}
    return case.changed(f"tensor {found[0]}", save(whole, header), formed=True)


def npz_file(case: Case) -> Change | None:
    with np.load(io.BytesIO(case.data)) as file:
        arrays = {name: file[name] for name in file.files}
    texts = {name: array for name, array in arrays.items() if array.dtype.kind not in "fiu"}
    numbers = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items() if name not in texts}
    found = changed_tensors(case, numbers)
    if found is None or "" in found[1]:
        return None
    made = {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in found[1].items()}
    file = io.BytesIO()
    np.savez(file, **made, **texts)
    return case.changed(f"tensor {found[0]}", file.getvalue(), formed=True)


TENSORS: dict[str, Callable[[Case], Change | None]] = {"safetensors": safetensors_file, "npz": npz_file}
