"""A recorded call written out as a function of Python: memory, launches and operations one after the other.

    def repeated(args, stream, p0, p1, ...):        # addresses of the arguments
        m0 = kept(args[2], key)                     # what is prepared of a weight
        if m0 is None: return MISSING
        y0 = empty((64, 3072), (3072, 1), bfloat16) # the result
        room = empty((12583168,), (1,), uint8)      # all else that the call takes
        launch0(132, 1, 1, stream, ..., p0, m0_at, room_at + 512, ...)
        launch1(...)
        return y0

Python has no faster way to call with sixty arguments of which fifty are constants. `Written.source` shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .prepared import kept
from .recording import GIVEN, MADE, PREPARED, TAKEN, Called, Launched, Recording, Source
from .workspace import ALIGNMENT

MISSING = object()  # what a written call returns where it must run as it was before


class Unrepeatable(ValueError):
    """A call that cannot be repeated; the message says why."""


def written(now: Recording, result: Any, device: torch.device) -> Callable:
    """(args, stream, addresses of the tensors among args) -> result of the recorded call on them, or MISSING."""
    if now.lost:
        raise Unrepeatable(now.lost)
    if torch.is_autocast_enabled(device.type) and any(isinstance(event, Called) for event in now.events):
        raise Unrepeatable("it calls operations of torch under autocast")
    return _Writer(now, result, device).function()


class _Writer:
    def __init__(self, now: Recording, result: Any, device: torch.device):
        self.now, self.device = now, device
        self.results = [result] if isinstance(result, Tensor) else list(result)
        self.single = isinstance(result, Tensor)
        self.names: dict[str, Any] = {"kept": kept, "MISSING": MISSING, "empty": _empty(device), "uint8": torch.uint8}
        self.lines: list[str] = []
        self.tensors = [i for i, arg in enumerate(now.args) if isinstance(arg, Tensor)]
        self.addressed: set[str] = set()
        self.rooms = self._rooms()

    def function(self) -> Callable:
        steps = {id(event): event.step(event.sources) for event in self.now.events if isinstance(event, Launched)}
        if steps:
            self.names["hooked"] = next(iter(steps.values())).hooked
            self.lines.append("if hooked(): return MISSING")
        if any(isinstance(event, Called) for event in self.now.events):  # what autocast does to it was not recorded
            self.names["autocast"] = torch.is_autocast_enabled
            self.lines.append(f"if autocast({self.device.type!r}): return MISSING")
        for i, (owner, key, others) in enumerate(self.now.prepared):
            of = ", ".join([self._first(owner), self._constant(key), *map(self._first, others)])
            self.lines += [f"m{i} = kept({of})", f"if m{i} is None: return MISSING"]
        for event in self.now.events:
            if isinstance(event, Called):
                self._call(event)
            else:
                self._launch(steps[id(event)])
        results = ", ".join(map(self._tensor, self.results))
        self.lines.append(f"return {results if self.single else f'({results},)'}")
        given = ", ".join(f"p{i}" for i in range(len(self.tensors)))
        source = f"def repeated(args, stream, {given}):\n    " + "\n    ".join([*self.rooms, *self.lines])
        exec(compile(source, "<a recorded call>", "exec"), self.names)  # of our own lines and numbers alone
        repeated = self.names["repeated"]
        repeated.source = source
        return repeated

    def _rooms(self) -> list[str]:
        """Lines that take memory. Results, and what operations of torch see, have tensors of their own."""
        taken = self.now.first[TAKEN]
        returned = [self.now.source(one) for one in self.results]
        for one, source in zip(self.results, returned, strict=True):
            if (
                source is None
                or source.kind in (GIVEN, PREPARED)
                or source.offset
                or not _fills(one, self._of(source))
            ):
                raise Unrepeatable("it returns what is not the whole of some memory that it took")
        if len({(source.kind, source.number) for source in returned}) < len(returned):
            raise Unrepeatable("it returns some memory twice")
        operands = [
            one
            for event in self.now.events
            if isinstance(event, Called)
            for one in (*event.args, *event.kwargs.values())
        ]
        seen = {self.now.source(one) for one in operands if isinstance(one, Tensor)}
        seen_numbers = {source.number for source in seen if source.kind == TAKEN}
        self.like: dict[int, Tensor] = {number: taken[number] for number in seen_numbers}
        for one, source in zip(self.results, returned, strict=True):
            if source.kind == TAKEN:
                self.like.setdefault(source.number, one)
        lines = [
            f"t{number} = empty({tuple(one.shape)}, {tuple(one.stride())}, {self._constant(one.dtype)})"
            for number, one in self.like.items()
        ]
        self.places, room = {}, 0
        for number, one in enumerate(taken):
            if number not in self.like:
                self.places[number] = room
                room += math.ceil(one.untyped_storage().nbytes() / ALIGNMENT) * ALIGNMENT
        if room:
            lines += [f"room = empty(({room},), (1,), uint8)", "room_at = room.data_ptr()"]
        return lines

    def _of(self, source: Source) -> Tensor:
        return self.now.first[source.kind][source.number]

    def _first(self, source: Source) -> str:
        """The tensor that is the number-th of its kind."""
        if source.kind == GIVEN:
            return f"args[{self.tensors[source.number]}]"
        return {PREPARED: "m", TAKEN: "t", MADE: "o"}[source.kind] + str(source.number)

    def _tensor(self, tensor: Tensor) -> str:
        """A tensor of the recording, as the call has it now."""
        source = self.now.source(tensor)
        like = self.like[source.number] if source.kind == TAKEN else self._of(source)
        first = self._first(source)
        same = like.dtype == tensor.dtype
        if same and not source.offset and like.shape == tensor.shape and like.stride() == tensor.stride():
            return first
        if not same or source.offset % tensor.itemsize:
            raise Unrepeatable("an operation of torch sees a tensor as one of another type")
        shape, strides, more = tuple(tensor.shape), tuple(tensor.stride()), source.offset // tensor.itemsize
        return f"{first}.as_strided({shape}, {strides}, {first}.storage_offset() + {more})"

    def _address(self, source: Source) -> str:
        if source.kind == TAKEN and source.number in self.places:
            return f"room_at + {self.places[source.number] + source.offset}"
        if source.kind == GIVEN:
            name = f"p{source.number}"
        else:
            name = f"{self._first(source)}_at"
            if name not in self.addressed:
                self.addressed.add(name)
                self.lines.append(f"{name} = {self._first(source)}.data_ptr()")
        return f"{name} + {source.offset}" if source.offset else name

    def _call(self, event: Called) -> None:
        values = [self._value(one) for one in event.args]
        values += [f"{name}={self._value(one)}" for name, one in event.kwargs.items()]
        call = f"{self._constant(event.operation)}({', '.join(values)})"
        self.lines.append(call if event.made is None else f"o{event.made} = {call}")

    def _value(self, value: Any) -> str:
        return self._tensor(value) if isinstance(value, Tensor) else self._constant(value)

    def _launch(self, step: Any) -> None:
        arguments = []
        for one in step.arguments:
            if isinstance(one, Source):
                arguments.append(self._address(one))
            elif hasattr(one, "kept"):
                arguments.append(self._descriptor(one))
            else:
                arguments.append("stream" if getattr(one, "__name__", "") == "Stream" else self._constant(one))
        self.lines.append(f"{self._constant(step.launch)}({', '.join(arguments)})")

    def _descriptor(self, one: Any) -> str:
        where = self._address(one.source)
        return f"{self._constant(one.kept.get)}({where}) or {self._constant(one.make)}({where})"

    def _constant(self, value: Any) -> str:
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name


def _fills(tensor: Tensor, memory: Tensor) -> bool:
    """Whether a tensor has an element at every place of the memory that was taken for it, and at its last one."""
    if tensor.numel() == 0:  # a branch of rank 0
        return memory.untyped_storage().nbytes() == 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize == memory.untyped_storage().nbytes()


def _empty(device: torch.device) -> Callable:
    """(shape, strides, dtype) -> an empty tensor on a device, the current one: as torch.compile's code makes them."""
    if device.type == "cuda":
        return torch._C._dynamo.guards._empty_strided_cuda
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)
