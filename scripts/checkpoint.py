"""A training state in one safetensors file, so that a stopped run goes on as if it had never stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ptq4dm.errors import UserError
from ptq4dm.files import replacing


@dataclass
class Progress:
    """Optimizer steps taken, and seconds trained (the warm-up steps that compile are not counted)."""

    step: int = 0
    seconds: float = 0.0


def _flat(prefix: str, state: dict) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def _part(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


def save_checkpoint(
    path: str | Path,
    nets: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    recipe: dict,
    device: torch.device,
) -> None:
    """Write nets, optimizer state, progress and the random state; under a temporary name, then renamed."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    for name, net in nets.items():
        tensors |= _flat(name, net.state_dict())
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= _flat(f"optimizer.{index}", state)
    # Safetensors wants plain strides; load_checkpoint puts channels_last back.
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {"progress": json.dumps(asdict(progress)), "recipe": json.dumps(recipe, sort_keys=True)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_checkpoint(
    path: str | Path,
    nets: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    recipe: dict,
    device: torch.device,
) -> Progress:
    """Put a saved state back into nets, optimizer and random generators; returns the progress.

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
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in _part("optimizer", tensors).items():
        index, name = key.split(".")
        states.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                # Fused AdamW walks parameter and moments side by side in memory: the strides must be the same.
                state[name] = torch.empty_like(parameter).copy_(value)
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    return Progress(**json.loads(metadata["progress"]))
