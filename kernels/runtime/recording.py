"""What a call of an op does, written down while it runs: memory it takes, addresses it launches kernels on.

Tensors are followed by who they are, not by where they lie: the call gets an alias of each argument, so that an
argument which is given twice, or overlaps another, still has one source. An operation of torch that is neither a view
nor an empty tensor ends the following; the call goes on, and its result is as good as any.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HERE = threading.local()
aten = torch.ops.aten
EMPTY = {
    aten.new_empty.default, aten.new_empty_strided.default, aten.empty.memory_format, aten.empty_like.default,
    aten.empty_strided.default,
}  # fmt: skip


def current() -> Recording | None:
    """The recording that this thread is in."""
    return getattr(HERE, "recording", None)


def tensors_of(args: tuple) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


class Recording(TorchDispatchMode):
    """One call of function(*args). Sources: (kind, number, offset in bytes), kind "given", "prepared" or "taken"."""

    def __init__(self, args: tuple):
        super().__init__()
        self.given = tensors_of(args)
        aliases = iter([one.detach() for one in self.given])
        self.args = tuple(next(aliases) if isinstance(arg, Tensor) else arg for arg in args)
        self.held: list[Tensor] = []  # as long as an id stands for a tensor, the tensor lives
        self.sources: dict[int, tuple[str, int, int]] = {}
        self.prepared: list[tuple] = []  # (source of the tensor, key, sources of the others)
        self.taken: list[int] = []  # bytes
        self.launches: list[tuple] = []
        self.lost = ""  # why the call cannot be repeated
        self.building = 0
        for i, alias in enumerate(tensors_of(self.args)):
            self._follow(alias, ("given", i, 0))

    def __enter__(self):
        HERE.recording = self
        return super().__enter__()

    def __exit__(self, *error):
        HERE.recording = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.building:
            return out
        if func in EMPTY:
            self._follow(out, ("taken", len(self.taken), 0))
            self.taken.append(out.untyped_storage().nbytes())
        elif func.is_view:
            for view in (out,) if isinstance(out, Tensor) else out:
                kind, number, offset = self.source(args[0]) or ("", 0, 0)
                if kind:
                    self._follow(view, (kind, number, offset + view.data_ptr() - args[0].data_ptr()))
        else:
            self.lost = self.lost or f"it calls {func}"
        return out

    def _follow(self, tensor: Tensor, source: tuple[str, int, int]) -> None:
        self.held.append(tensor)
        self.sources[id(tensor)] = source

    def source(self, tensor: Tensor) -> tuple[str, int, int] | None:
        return self.sources.get(id(tensor))

    def original(self, tensor: Tensor) -> Tensor:
        """The argument itself, where this is its alias."""
        kind, number, _ = self.source(tensor) or ("", 0, 0)
        alias = kind == "given" and tensors_of(self.args)[number] is tensor
        return self.given[number] if alias else tensor

    def _whole(self, tensor: Tensor) -> bool:
        """Whether this is an argument, or something prepared, and no view of it: those come and go with the call."""
        kind, _, _ = self.source(tensor) or ("", 0, 0)
        return kind == "prepared" or self.original(tensor) is not tensor

    def is_prepared(self, made: Tensor, tensor: Tensor, key, others: tuple[Tensor, ...]) -> None:
        """`made` is what `prepared` keeps of a tensor, or the tensor itself where that is in the form already."""
        parts = [self.source(one) if self._whole(one) else None for one in (tensor, *others)]
        if None in parts:
            self.lost = self.lost or "it prepares what is no argument"
        elif made.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            kind, number, offset = parts[0]
            self._follow(made, (kind, number, offset + made.data_ptr() - tensor.data_ptr()))
        elif made.storage_offset():
            self.lost = self.lost or "what it prepares begins amid its memory"
        else:
            self._follow(made, ("prepared", len(self.prepared), 0))
            self.prepared.append((parts[0], key, tuple(parts[1:])))

    def launched(self, step: Callable[[list], Any] | None, tensors) -> None:
        """A kernel was launched on these; step makes a `Step` of their sources, None where it cannot be repeated."""
        sources = []
        for one in tensors:
            if one is None:
                sources.append(None)
                continue
            offset = 0 if isinstance(one, Tensor) else one.layout.offset
            source = self.source(one if isinstance(one, Tensor) else one.buffer)
            if source is None:
                self.lost = self.lost or "a kernel reads what is neither given nor taken"
                return
            sources.append((source[0], source[1], source[2] + offset))
        if step is None:
            self.lost = self.lost or "a kernel is launched in a way of Triton's own"
        else:
            self.launches.append((step, tensors, sources))
