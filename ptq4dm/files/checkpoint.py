"""A training state in one safetensors file, so that a stopped run goes on as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import UserError
from .atomic import replacing


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
    # Safetensors wants plain strides; load_checkpoint puts channels_last back.
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {"progress": json.dumps(progress), "recipe": json.dumps(recipe, sort_keys=True)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_checkpoint(
    path: str | Path,
    nets: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    recipe: dict,
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Put a saved state back into nets and optimizers; returns the progress and all tensors (for `more`).

    Raises:
        UserError: no checkpoint at path, a broken file, or one of a run with another recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path} to resume; leave --resume out to start a new run.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable checkpoint: {error}.") from error
    saved = json.loads(metadata["recipe"])
    if saved != recipe:
        changed = sorted(k for k in saved.keys() | recipe.keys() if saved.get(k) != recipe.get(k))
        raise UserError(f"{path} is of a run with other settings ({', '.join(changed)}); resume with the same.")
    for name, net in nets.items():
        net.load_state_dict(_part(name, tensors))
    for name, optimizer in optimizers.items():
        _restore(optimizer, _part(name, tensors))
    return json.loads(metadata["progress"]), tensors


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
