"""Noise drawn in float32 while a pipeline is sampled, whatever the dtype of its model.

Older PyTorch (and 2.13 for sizes that are no multiple of 16) draws other numbers from a seeded CPU generator in
float16 than in float32, so that one seed would start another picture in each dtype and same-seed comparisons would
mean nothing. Pipelines and schedulers of diffusers draw through the name `randn_tensor` of their own module, which no
argument of theirs reaches. So the pipeline at hand and its schedulers become, for as long as they sample, of a
subclass whose functions see another `randn_tensor` (subclass.py); classes and modules stay as they are. The other
`randn_tensor` looks at a context variable: a thread that calls the same pipeline itself draws as ever. (A
TorchFunctionMode would be as local, but it costs time at each operation of the network, and compiles compiled
networks anew.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ..interrupts import uninterrupted
from .denoiser import pipelines_in, schedulers_of
from .subclass import subclass_where

_in_float32: ContextVar[bool] = ContextVar("_in_float32", default=False)


@contextmanager
def float32_noise(pipe) -> Iterator[None]:
    """In this thread a pipeline and its schedulers draw noise in float32, and round it to the dtype they ask for.

    For who has the turn at the pipeline (`turns`): objects are changed for a while. What a pipeline of several holds
    counts, too.
    """
    parts = {id(part): part for one in pipelines_in(pipe) for part in (one, *schedulers_of(one).values())}.values()
    before = [(part, type(part)) for part in parts]
    token = _in_float32.set(True)
    try:
        for part, kind in before:
            object.__setattr__(part, "__class__", subclass_where(kind, "randn_tensor", _in_float32_where_asked))
        yield
    finally:
        with uninterrupted():
            for part, kind in before:
                object.__setattr__(part, "__class__", kind)
            _in_float32.reset(token)


def _in_float32_where_asked(randn_tensor: Callable) -> Callable:
    def draw(shape, generator=None, device=None, dtype=None, **rest):
        if not _in_float32.get():
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype, **rest)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32, **rest)
        return noise.to(dtype or torch.float32)

    return draw
