"""How far a training run came, and its random state: what a checkpoint holds besides nets and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ptq4dm.files import checkpoint
from ptq4dm.files.outside import outside

RANDOM = ("random.cpu", "random.cuda")


@dataclass
class Progress:
    """Optimizer steps taken, and seconds trained (the warm-up steps that compile are not counted)."""

    step: int = 0
    seconds: float = 0.0


def save_checkpoint(
    path: str | Path,
    nets: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    recipe: dict,
    device: torch.device,
) -> None:
    """Write nets, optimizer state, progress and the random state; under a temporary name, then renamed."""
    random = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["random.cuda"] = torch.cuda.get_rng_state(device)
    checkpoint.save_checkpoint(path, nets, {"optimizer": optimizer}, asdict(progress), recipe, random)


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
    values, tensors = checkpoint.load_checkpoint(path, nets, {"optimizer": optimizer}, recipe, RANDOM)
    progress = checkpoint.progress_as(Progress, values, path)
    with outside(path, checkpoint.ANEW):
        torch.set_rng_state(tensors["random.cpu"])
        if device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], device)
    return progress
