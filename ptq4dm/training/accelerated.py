"""Accelerate, set up for a training on one device."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from ..errors import UserError


def make_accelerator(precision: str, compiled: bool, device: torch.device) -> Accelerator:
    """Raises UserError where accelerate runs in this process already, in another precision or on another device.

    precision: "no", "bf16" or "fp16". compiled: models that it prepares go through torch.compile.
    """
    backend = "inductor" if compiled else "no"
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    try:
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision, dynamo_backend=backend)
    except ValueError as error:
        raise UserError(
            f"accelerate is set up in this process in another precision than '{precision}'; use a new process."
        ) from error
    if accelerator.device.type != device.type:
        raise UserError(
            f"the model is on {device.type}, but accelerate is set up in this process on {accelerator.device.type}."
        )
    return accelerator
