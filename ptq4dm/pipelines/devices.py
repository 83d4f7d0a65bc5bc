"""Where a pipeline computes and in what: devices and dtypes, as text or as PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import shown
from ..errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def dtype_of(dtype: Any, what: str = "dtype", allowed: tuple[str, ...] = DTYPES) -> torch.dtype:
    """The dtype that is meant by torch.float16, by "float16" or by "torch.float16", as diffusers writes it.

    Raises UserError, which lists those that are allowed, for anything else: pipelines compute in no other.
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else ""
    if name not in allowed:
        given = str(dtype) if isinstance(dtype, torch.dtype) else shown(dtype)
        raise UserError(f"{what} must be {', '.join(allowed[:-1])} or {allowed[-1]}; got {given}.")
    return getattr(torch, name)


def check_device(device: str | torch.device | int) -> torch.device:
    """The device, if this machine has it: text ("cuda:1"), a torch.device, or the number of a GPU.

    Raises:
        UserError: the name is no device, PyTorch sees no such device here, or it holds no values ("meta").
    """
    said = f"device {str(device)!r}" if isinstance(device, (str, torch.device)) else f"device {shown(device)}"
    if isinstance(device, bool) or not isinstance(device, (str, torch.device, int)):
        raise UserError(f"{said} is none; give a text such as 'cpu' or 'cuda:1', a torch.device, or a GPU's number.")
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise UserError(f"{said} holds shapes and no values, so nothing can be computed on it; take cpu or cuda.")
        torch.ones(1, device=found).item()  # a value goes there and comes back
    except UserError:
        raise
    # PyTorch says no in as many ways as it has backends: some lack a module, some were never compiled.
    except (RuntimeError, AssertionError, ImportError, TypeError, ValueError, OverflowError) as e:
        raise UserError(f"{said} cannot be used here; try --device cpu.") from e
    return found
