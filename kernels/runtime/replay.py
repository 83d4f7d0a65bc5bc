"""An op's call that repeats an earlier one: its launches with other addresses, and nothing else.

Between an op and its launches lie choices, settings, rooms and descriptors, which take the host longer than many
kernels run. They depend on the *form* of the arguments alone: of tensors the shape, strides, type, device and the
address modulo 16, of the rest the value. The first call of a form runs as it is written. The second is recorded
(recording.py): which memory it took and what it launched on which addresses. Later calls take that memory, in two
allocations at most for each that a call returns and all others together, put the addresses in and launch.

What a call did besides, any operation of torch but views and empty tensors, cannot be repeated so; such forms run as
they are written for ever. `Replay.why` says so for each form. Nothing is repeated while kernels are looked at or sent
elsewhere (hooks of Triton's profiler, `settings.target`), and settings that change drop what was recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import settings
from .prepared import kept
from .recording import Recording, current
from .workspace import ALIGNMENT

TENSORS = (Tensor, nn.Parameter)
ATTEMPTS = 3  # of recording: a prepared form of a weight may have to be made anew just then
MOST = 2048  # forms of an op; more are forgotten together
on_gpu = Tensor.is_cuda.__get__
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # a PyTorch without CUDA has none


class Replay:
    """`function`, of a tensor and more, on the current device of its first argument."""

    def __init__(self, function: Callable):
        self.function = function
        self.known: dict[tuple, Recorded | list[str]] = {}
        settings.REMEMBERED.append(self)

    def __call__(self, *args):
        x = args[0]
        if not on_gpu(x):
            return self.function(*args)
        key: list = []
        pool: list[int] = []
        for arg in args:
            if type(arg) in TENSORS:
                pool.append(address := arg.data_ptr())
                key += arg.shape, arg.stride(), arg.dtype, arg.get_device(), address & 15
            elif type(arg) is list:
                key.append(tuple(arg))
            else:
                key.append(arg)
        found = self.known.get(form := tuple(key))
        if type(found) is Recorded and settings.TARGET is None and current() is None:
            return found(self.function, args, pool)
        return self._written(form, found, args)

    def _written(self, form: tuple, found, args: tuple):
        """The call as it is written, recorded if it is the second one of this form or the last try failed."""
        if found is None:
            if len(self.known) >= MOST:
                self.known.clear()
            if not any(isinstance(value, Tensor) for value in form):  # of a class of its own: kept, it would live on
                self.known[form] = []
            return self.function(*args)
        if type(found) is Recorded or len(found) >= ATTEMPTS or settings.TARGET is not None or current() is not None:
            return self.function(*args)
        with Recording(args) as now:
            result = self.function(*now.args)
        try:
            self.known[form] = Recorded(now, result, args[0].device)
        except ValueError as error:
            found.append(str(error))
        return result

    def why(self) -> dict[str, int]:
        """How many forms are "repeated", "seen once", or why they are not repeated."""
        said: dict[str, int] = {}
        for found in self.known.values():
            text = "repeated" if type(found) is Recorded else found[-1] if found else "seen once"
            said[text] = said.get(text, 0) + 1
        return said

    def cache_clear(self) -> None:
        """Forget what was recorded; `settings.forget` calls it."""
        self.known.clear()


class Recorded:
    """What a recorded call took and launched, on addresses that are numbers in a pool.

    The pool: arguments, prepared forms of them, results, and the room for all else that the call takes.

    Raises ValueError for a call that cannot be repeated.
    """

    def __init__(self, now: Recording, result, device: torch.device):
        if now.lost:
            raise ValueError(now.lost)
        self.device, self.single = device, isinstance(result, Tensor)
        results = [result] if self.single else list(result)
        self.outputs = [(tuple(one.shape), one.stride(), one.dtype) for one in results]
        first = {"given": 0, "prepared": len(now.given)}
        places = {}
        for i, one in enumerate(results):
            kind, number, offset = now.source(one) or ("", 0, 0)
            last = sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True))
            whole = one.numel() and (last + 1) * one.dtype.itemsize == now.taken[number] if kind == "taken" else False
            if not whole or offset or number in places:
                raise ValueError("it returns what is not the whole of some memory that it took")
            places[number] = (len(now.given) + len(now.prepared) + i, 0)
        self.room = 0
        for number, size in enumerate(now.taken):
            if number not in places:
                places[number] = (len(now.given) + len(now.prepared) + len(results), self.room)
                self.room += math.ceil(size / ALIGNMENT) * ALIGNMENT

        def place(source: tuple[str, int, int] | None) -> tuple[int, int] | None:
            if source is None:
                return None
            kind, number, offset = source
            start, more = places[number] if kind == "taken" else (first[kind] + number, 0)
            return start, more + offset

        self.prepared = [
            (place(owner)[0], key, [place(other)[0] for other in others]) for owner, key, others in now.prepared
        ]
        self.steps = [step(tensors, [place(one) for one in sources]) for step, tensors, sources in now.launches]

    def __call__(self, function: Callable, args: tuple, pool: list[int]):
        if self.steps and self.steps[0].hooked():
            return function(*args)
        if self.prepared:
            tensors = [arg for arg in args if type(arg) in TENSORS]
            for owner, key, others in self.prepared:
                made = kept(tensors[owner], key, *[tensors[other] for other in others])
                if made is None:  # of a weight that was not here before, or has changed
                    return function(*args)
                tensors.append(made)
                pool.append(made.data_ptr())
        results = []
        for shape, strides, dtype in self.outputs:
            results.append(result := torch.empty_strided(shape, strides, dtype=dtype, device=self.device))
            pool.append(result.data_ptr())
        if self.room:
            room = torch.empty(self.room, dtype=torch.uint8, device=self.device)
            pool.append(room.data_ptr())
        stream = raw_stream(self.device.index)
        for step in self.steps:
            step(pool, stream)
        return results[0] if self.single else tuple(results)
