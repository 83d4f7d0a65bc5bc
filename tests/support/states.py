"""All that a model is, to compare it with what it was; and an interrupt at a chosen line of the library."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ptq4dm
import ptq4dm.kernels
import ptq4dm.samplers
import ptq4dm.svdquant

_ROOMS = (ptq4dm, ptq4dm.kernels, ptq4dm.samplers, ptq4dm.svdquant)  # not their checkout: .venv may lie in it
ROOTS = tuple(f"{Path(path).resolve()}{os.sep}" for room in _ROOMS for path in [*room.__path__][:1])
SIGNAL_FILE = str(Path(ptq4dm.__file__).with_name("interrupts.py").resolve())


def state_of(one: Any) -> dict[str, Any]:
    """Name -> value of everything that a model (or a pipeline, a scheduler) is made of.

    Tensors by their bits, modules by class and identity, all else by identity, or by value where it is a container.
    """
    modules = dict(one.named_modules()) if isinstance(one, nn.Module) else {"": one}
    found: dict[str, Any] = {}
    for name, module in modules.items():
        found[f"{name} class"] = id(module), type(module)
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = _seen(value)
        if hasattr(config := vars(module).get("_internal_dict"), "__dict__"):
            found[f"{name} config"] = {key: _seen(value) for key, value in vars(config).items()}
    return found


def _seen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        shown = value.detach().contiguous().flatten().view(torch.uint8) if value.numel() else value.detach()
        return type(value), value.dtype, tuple(value.shape), value.requires_grad, shown.numpy().tobytes()
    if isinstance(value, dict):
        return [(key, _seen(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_seen(item) for item in value]
    if dataclasses.is_dataclass(value):
        return type(value), [(key, _seen(item)) for key, item in vars(value).items()]
    return value if value is None or isinstance(value, (bool, int, float, str)) else id(value)


def lines_of(work: Callable[[], Any]) -> int:
    """How many lines of the library are run by work()."""
    return _traced(work, 0)


def interrupted_at(number: int, work: Callable[[], Any]) -> bool:
    """Run work(), with Ctrl-C at the library's line of this number (from 1). Whether KeyboardInterrupt came out."""
    gradients = torch.is_grad_enabled()
    try:
        _traced(work, number)
    except KeyboardInterrupt:
        assert torch.is_grad_enabled() == gradients, f"after line {number} gradients are on or off for good"
        return True
    return False


def _traced(work: Callable[[], Any], number: int) -> int:
    count = 0

    def line(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == number:
                signal.raise_signal(signal.SIGINT)
        return line

    def call(frame: Any, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        return line if file.startswith(ROOTS) and file != SIGNAL_FILE else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        work()
    finally:
        sys.settrace(before)
    return count
