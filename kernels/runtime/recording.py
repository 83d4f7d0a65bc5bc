"""What a call of an op does, noted while it runs: memory it takes, kernels it launches, operations of torch it calls.

Tensors are followed by who they are, not by where they lie: the call gets an alias of each argument, so that an
argument which is given twice, or overlaps another, still has one source. What cannot be done again from other
arguments is noted as `lost`; the call goes on, and its result is as good as any.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HERE = threading.local()
GIVEN, PREPARED, TAKEN, MADE = "given", "prepared", "taken", "made"
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


@dataclass(frozen=True)
class Source:
    """Where a tensor begins: `offset` bytes into the number-th tensor of this kind."""

    kind: str
    number: int
    offset: int = 0

    def further(self, bytes_: int) -> Source:
        return Source(self.kind, self.number, self.offset + bytes_)


@dataclass
class Launched:
    """A kernel's launch; step makes a `Step` of the sources of its tensors, None for an argument that is None."""

    step: Callable[[list[Source | None]], Any]
    sources: list[Source | None]


@dataclass
class Called:
    """An operation of torch; it makes the made-th tensor, or None where it writes into one."""

    operation: Any
    args: tuple
    kwargs: dict
    made: int | None


class Recording(TorchDispatchMode):
    """One call of a function on these arguments: run it on `args` while this is entered."""

    def __init__(self, args: tuple):
        super().__init__()
        self.given = tensors_of(args)
        aliases = iter([one.detach() for one in self.given])
        self.args = tuple(next(aliases) if isinstance(arg, Tensor) else arg for arg in args)
        self.held: list[Tensor] = []  # as long as an id stands for a tensor, the tensor lives
        self.sources: dict[int, Source] = {}
        self.first: dict[str, list[Tensor]] = {kind: [] for kind in (GIVEN, PREPARED, TAKEN, MADE)}
        self.prepared: list[tuple[Source, Any, list[Source]]] = []  # of what, key, of what else
        self.events: list[Launched | Called] = []
        self.lost = ""  # why the call cannot be repeated
        self.building = 0
        for alias in tensors_of(self.args):
            self._begins(alias, GIVEN)

    def __enter__(self):
        HERE.recording = self
        return super().__enter__()

    def __exit__(self, *error):
        HERE.recording = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.building:
            return out
        if func in EMPTY:
            self._begins(out, TAKEN)
        elif func.is_view and not _copied(out, args[0]):
            source = self.source(args[0])
            for view in (out,) if isinstance(out, Tensor) else out:
                if source is not None:
                    self._follow(view, source.further(view.data_ptr() - args[0].data_ptr()))
        else:
            self._called(func, args, kwargs, out)
        return out

    def _called(self, func, args: tuple, kwargs: dict, out: Any) -> None:
        values = [*args, *kwargs.values()]
        into = func._schema.is_mutable
        if into:
            source = self.source(out) if isinstance(out, Tensor) and out is args[0] else None
            fits = source is not None and source.kind in (TAKEN, MADE) and not kwargs.keys() & {"out"}
        else:
            fits = type(out) is Tensor and out.layout == torch.strided
        known = all(self.source(one) is not None for one in values if isinstance(one, Tensor))
        nested = any(isinstance(one, (list, tuple)) and any(map(_is_tensor, one)) for one in values)
        if not fits or not known or nested or func.namespace != "aten":
            self.lost = self.lost or f"it calls {func}"
            return
        self.events.append(Called(func, args, kwargs, None if into else len(self.first[MADE])))
        if not into:
            self._begins(out, MADE)

    def _begins(self, tensor: Tensor, kind: str) -> None:
        self._follow(tensor, Source(kind, len(self.first[kind])))
        self.first[kind].append(tensor)

    def _follow(self, tensor: Tensor, source: Source) -> None:
        self.held.append(tensor)
        self.sources[id(tensor)] = source

    def source(self, tensor: Tensor) -> Source | None:
        return self.sources.get(id(tensor))

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether this is itself an argument, something prepared, taken or made, and no view of it."""
        source = self.source(tensor)
        return source is not None and self.first[source.kind][source.number] is tensor

    def original(self, tensor: Tensor) -> Tensor:
        """The argument itself, where this is its alias."""
        source = self.source(tensor)
        if source is None or source.kind != GIVEN or not self.is_whole(tensor):
            return tensor
        return self.given[source.number]

    def is_prepared(self, made: Tensor, tensor: Tensor, key, others: tuple[Tensor, ...]) -> None:
        """`made` is what `prepared` keeps of a tensor, or the tensor itself where that is in the form already."""
        parts = [self.source(one) for one in (tensor, *others) if self.is_whole(one)]
        kept = all(part is not None and part.kind in (GIVEN, PREPARED) for part in parts)
        if len(parts) <= len(others) or not kept:
            self.lost = self.lost or "it prepares what is no argument"
        elif made.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            self._follow(made, parts[0].further(made.data_ptr() - tensor.data_ptr()))
        elif made.storage_offset():
            self.lost = self.lost or "what it prepares begins amid its memory"
        else:
            self._begins(made, PREPARED)
            self.prepared.append((parts[0], key, parts[1:]))

    def launched(self, step: Callable | None, tensors) -> None:
        """A kernel was launched on these; step: as in `Launched`, None where it cannot be repeated."""
        sources: list[Source | None] = []
        for one in tensors:
            source = None
            if one is not None:
                source = self.source(one if isinstance(one, Tensor) else one.buffer)
                if source is None:
                    self.lost = self.lost or "a kernel reads what is neither given nor taken"
                    return
                source = source if isinstance(one, Tensor) else source.further(one.layout.offset)
            sources.append(source)
        if step is None:
            self.lost = self.lost or "a kernel is launched in a way of Triton's own"
        else:
            self.events.append(Launched(step, sources))


def _copied(out: Any, tensor: Tensor) -> bool:
    """Whether an operation that may give a view, such as `reshape` or `to`, has copied.

    Such ones come here whole below autograd: in code of torch.compile, in inference mode. Elsewhere their parts do.
    """
    return isinstance(out, Tensor) and out.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
