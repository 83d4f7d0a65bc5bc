"""Noise drawn in float32 while a pipeline is sampled, whatever the dtype of its model.

Older PyTorch (and 2.13 for sizes that are no multiple of 16) draws other numbers from a seeded CPU generator in
float16 than in float32, so that one seed would start another picture in each dtype and same-seed comparisons would
mean nothing. Pipelines and schedulers of diffusers draw through the name `randn_tensor` of their own module, which no
argument of theirs reaches: it is wrapped there, while somebody samples. The wrapper looks at a context variable, so
threads that do not sample through it draw as ever. (A TorchFunctionMode would be as local and replace nothing, but
it costs time at each operation of the network, and compiles compiled networks anew.)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .denoiser import schedulers_of

_in_float32: ContextVar[bool] = ContextVar("_in_float32", default=False)


@dataclass
class _Borrowed:
    """A module's own randn_tensor, and how many are sampling with the wrapper in its place."""

    own: Callable
    users: int = 0


_borrowed: dict[ModuleType, _Borrowed] = {}
_guard = threading.Lock()


@contextmanager
def float32_noise(pipe) -> Iterator[None]:
    """In this thread a pipeline and its schedulers draw noise in float32, and round it to the dtype they ask for."""
    parts = [pipe, *schedulers_of(pipe).values()]
    names = {c.__module__ for part in parts for c in type(part).__mro__} & sys.modules.keys()
    modules = [sys.modules[name] for name in names if hasattr(sys.modules[name], "randn_tensor")]
    for module in modules:
        _borrow(module)
    token = _in_float32.set(True)
    try:
        yield
    finally:
        _in_float32.reset(token)
        for module in modules:
            _give_back(module)


def _borrow(module: Any) -> None:
    with _guard:
        if module not in _borrowed:
            _borrowed[module] = _Borrowed(module.randn_tensor)
            module.randn_tensor = _wrapped(module.randn_tensor)
        _borrowed[module].users += 1


def _give_back(module: Any) -> None:
    with _guard:
        _borrowed[module].users -= 1
        if not _borrowed[module].users:
            module.randn_tensor = _borrowed.pop(module).own


def _wrapped(randn_tensor: Callable) -> Callable:
    def draw(shape, generator=None, device=None, dtype=None, **rest):
        if not _in_float32.get():
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype, **rest)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32, **rest)
        return noise.to(dtype or torch.float32)

    return draw
