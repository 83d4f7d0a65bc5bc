"""One launch of a recorded call: what Triton's launcher is given, with addresses open.

Where the launcher is the one of Triton 3.6, its function in C is called: what Triton does around it in Python, for
every descriptor of every call, is done once. Elsewhere the launcher is called as Triton does. Descriptors of TMA are
kept by address: PyTorch's allocator gives the same few again and again, and weights stay where they are.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

from triton import knobs
from triton.backends.nvidia import driver

from .recording import Source

MOST = 4096  # descriptors of an argument; more are forgotten together


def hooked() -> bool:
    """Whether Triton's profiler wants to see launches."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


class Stream:
    """Stands for the current stream among a launcher's arguments."""


class At:
    """Stands for the memory from an address on, where Triton asks a tensor for it."""

    __slots__ = ("address",)

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


@dataclass
class Descriptor:
    """What a launcher takes for a descriptor of the memory at a source; `kept`: by address."""

    source: Source
    like: Any  # one of Triton's, without its base
    kind: Any  # as Triton describes it to the function in C; None: the launcher takes Triton's own
    in_c: bool
    kept: dict[int, Any] = field(default_factory=dict)

    def make(self, address: int) -> Any:
        """That of an address, made and kept."""
        one = object.__new__(type(self.like))
        one.__dict__.update(vars(self.like), base=At(address))
        made = driver.make_tensordesc_arg(one, self.kind)[0] if self.in_c else one
        if len(self.kept) >= MOST:
            self.kept.clear()
        self.kept[address] = made
        return made


class Step:
    """The launch of a compiled kernel on a grid: `launch`, and its `arguments`: values, sources and descriptors.

    values: the kernel's arguments, with None for tensors; places: of the tensors among them, sources in this order;
    descriptors: of some of the tensors {number: a Triton descriptor without its base}.
    """

    hooked = staticmethod(hooked)

    def __init__(self, compiled, grid, values: list, places: list[int], descriptors: dict, sources: list):
        run, metadata = compiled.run, compiled.packed_metadata
        function = in_c(run)
        self.arguments: list[Any] = [*grid, Stream, compiled.function]
        if function is None:
            self.launch, kinds = run, {}
            self.arguments += [metadata, None, None, None]
        else:
            self.launch, kinds = function
            self.arguments += [run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, None, None, None]
        numbers = {place: i for i, place in enumerate(places)}
        for place, value in enumerate(values):
            i = numbers.get(place)
            if i is None or sources[i] is None:
                self.arguments.append(value)
            elif i not in descriptors:
                self.arguments.append(sources[i])
            else:
                like = descriptors[i]
                self.arguments.append(Descriptor(sources[i], like, kinds.get(place), function is not None))
                if function is not None:
                    self.arguments += [*like.shape, *like.strides]


def in_c(run) -> tuple | None:
    """(function in C of Triton 3.6's launcher, {place of a descriptor: its kind}); None for any other launcher."""
    launch = getattr(run, "launch", None)
    if type(run) is not driver.CudaLauncher or hasattr(run, "kernel_signature"):
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None  # memory that Triton allocates at each launch
    if isinstance(launch, types.BuiltinFunctionType):
        return launch, {}
    if not isinstance(launch, types.FunctionType):
        return None
    cells = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
    if cells.keys() != {"launcher", "tensordesc_indices", "tensordesc_meta"}:
        return None
    places, kinds = sorted(cells["tensordesc_indices"].cell_contents), cells["tensordesc_meta"].cell_contents
    if None in kinds:
        return None
    return cells["launcher"].cell_contents, dict(zip(places, kinds, strict=True))
