"""A training state in one safetensors file, so that a stopped run goes on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..errors import UserError
from .crc import checksum
from .outside import TensorFile, checked_object, described, finite, outside, read_tensors
from .tensors import write_tensors

ANEW = "bring back the file that was written, or start a new run in another folder"
COUNTED = (torch.float32, torch.float64)  # an optimizer's steps
FAR = 2**53  # iterations or seconds that no run comes to
Kind = TypeVar("Kind")


def _flat(prefix: str, state: dict) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def _part(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


def save_checkpoint(
    path: str | Path,
    nets: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    progress: dict,
    recipe: dict,
    more: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write nets, optimizer states, progress (plain values) and `more` tensors under a temporary name, then rename.

    Args:
        nets, optimizers: by name; no name may begin another one followed by a dot.
        recipe: settings of the run, plain values; `load_checkpoint` refuses the file to a run with other ones.
    """
    tensors = dict(more or {})
    for name, net in nets.items():
        tensors |= _flat(name, net.state_dict())
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= _flat(f"{name}.{index}", state)
    # With plain strides, as they are written; load_checkpoint puts channels_last back.
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    checks = {name: checksum(tensor) for name, tensor in tensors.items()}
    values = {"progress": progress, "recipe": recipe, "checks": checks}
    metadata = {name: json.dumps(value, sort_keys=True) for name, value in values.items()}
    write_tensors(path, tensors, metadata)


def load_checkpoint(
    path: str | Path,
    nets: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    recipe: dict,
    more: Collection[str] = (),
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Put a saved state back into nets and optimizers; returns the progress and all tensors.

    more: names that `more` of `save_checkpoint` may have. Nothing is changed where the file cannot be taken.

    Raises:
        UserError: no checkpoint at path, or one of a run with another recipe.
        DamagedFile: a file that is not what was written: other tensors, NaN or infinity, another checksum.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path} to resume; leave --resume out to start a new run.")

    def whole(file: TensorFile) -> tuple[dict, dict[str, torch.Tensor]]:
        saved = checked_object(file.json("recipe"), {})
        if saved != recipe:
            changed = sorted(k for k in saved.keys() | recipe.keys() if saved.get(k) != recipe.get(k))
            raise UserError(f"{path} is of a run with other settings ({', '.join(changed)}); resume with the same.")
        progress, tensors = checked_object(file.json("progress"), {}), file.tensors()
        _check(tensors, nets, optimizers, more)
        if "checks" in file.header:  # not in those of 0.1.0
            checks = checked_object(file.json("checks"), {})
            for name in tensors.keys() | checks.keys():
                if name not in tensors or checksum(tensors[name]) != checks[name]:
                    raise ValueError(f"'{name}' is not what was written")
        return progress, tensors

    progress, tensors = read_tensors(path, whole, ANEW)
    with outside(path, ANEW):
        for name, net in nets.items():
            net.load_state_dict(_part(name, tensors))
        for name, optimizer in optimizers.items():
            _restore(optimizer, _part(name, tensors))
    return progress, tensors


def progress_as(kind: type[Kind], values: dict, path: str | Path) -> Kind:
    """A dataclass of counts (int) and seconds (float) from the progress in a checkpoint. Raises DamagedFile."""
    with outside(path, ANEW):
        defaults = asdict(kind())  # type: ignore[call-overload]
        if values.keys() != defaults.keys():
            raise ValueError(f"its progress tells of {', '.join(sorted(values)) or 'nothing'}")
        for name, default in defaults.items():
            value = values[name]
            if type(value) not in (int, type(default)) or not 0 <= value < FAR:
                raise ValueError(f"its progress says {described(value)} for '{name}'")
    return kind(**values)


def _check(
    tensors: dict[str, torch.Tensor],
    nets: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    more: Collection[str],
) -> None:
    """Raises ValueError unless these are the tensors of these nets and optimizers, and finite."""
    for name, tensor in tensors.items():
        finite(tensor, name)
    left = set(tensors) - set(more)
    for role, net in nets.items():
        for name, value in _flat(role, net.state_dict()).items():
            found = tensors.get(name)
            if found is None or found.shape != value.shape or found.dtype != value.dtype:
                shape = None if found is None else f"{list(found.shape)} {found.dtype}"
                raise ValueError(f"'{name}' is {shape or 'missing'}, and should be {list(value.shape)} {value.dtype}")
            left.discard(name)
    for role, optimizer in optimizers.items():
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        kinds: dict[str, set[str]] = {}
        for name in _part(role, tensors):
            index, _, kind = name.partition(".")
            if not index.isdecimal() or int(index) >= len(parameters):
                raise ValueError(f"'{role}' has no parameter '{index}'")
            found, parameter = tensors[f"{role}.{name}"], parameters[int(index)]
            if found.shape and found.shape != parameter.shape:
                raise ValueError(f"'{role}.{name}' is {list(found.shape)}, which is not its parameter's shape")
            if found.dtype not in ((parameter.dtype,) if found.shape else COUNTED):
                raise ValueError(f"'{role}.{name}' is {found.dtype}, which no optimizer keeps for {parameter.dtype}")
            kinds.setdefault(index, set()).add(kind)
            left.discard(f"{role}.{name}")
        if len({frozenset(one) for one in kinds.values()}) > 1:
            raise ValueError(f"a part of the state of '{role}' is missing")
    if left:
        raise ValueError(f"'{min(left)}' does not belong in it")


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        states.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                # Fused AdamW walks parameter and moments side by side in memory: the strides must be the same.
                state[name] = torch.empty_like(parameter).copy_(value)
