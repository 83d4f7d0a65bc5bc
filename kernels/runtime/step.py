"""One launch of a recorded call: everything in place but the addresses.

Where Triton's launcher is the one of 3.6, its function in C is called: what Triton does around it in Python, for
every descriptor of every call, is done once. Elsewhere the launcher is called as Triton does. Descriptors of TMA are
kept by address: PyTorch's allocator gives the same few again and again, and weights stay where they are.
"""

from __future__ import annotations

import types

from triton import knobs
from triton.backends.nvidia import driver

MOST = 4096  # descriptors of an argument; more are forgotten together


def hooked() -> bool:
    """Whether Triton's profiler wants to see launches."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


class At:
    """Stands for the memory from an address on, where Triton asks a tensor for it."""

    __slots__ = ("address",)

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class Step:
    """The launch of a compiled kernel on a grid; `values`: its arguments, with None where an address goes.

    places: of the addresses among them; sources (number in the pool, offset) of all tensors, in this order;
    descriptors: of some of the tensors {number: a Triton descriptor without its base}.
    """

    def __init__(self, compiled, grid, values: list, places: list[int], descriptors: dict, sources: list):
        run, metadata = compiled.run, compiled.packed_metadata
        function_in_c = in_c(run)
        if function_in_c is None:
            self.launch = run
            before = [*grid, None, compiled.function, metadata, None, None, None]
            kinds = {}
        else:
            self.launch, kinds = function_in_c
            options = run.launch_cooperative_grid, run.launch_pdl
            before = [*grid, None, compiled.function, *options, None, None, metadata, None, None, None]
        numbers = {place: i for i, place in enumerate(places)}
        self.values: list = before
        self.addresses: list[tuple[int, int, int]] = []  # place among the values, source, offset
        self.descriptors: list[tuple] = []  # the same; descriptors by address; how to make one
        for place, value in enumerate(values):
            i = numbers.get(place)
            if i is None or sources[i] is None:
                self.values.append(value)
                continue
            source, offset = sources[i]
            if i not in descriptors:
                self.addresses.append((len(self.values), source, offset))
                self.values.append(None)
                continue
            make = _maker(descriptors[i], kinds.get(place), function_in_c is not None)
            self.descriptors.append((len(self.values), source, offset, {}, make))
            self.values.append(None)
            if function_in_c is not None:
                self.values += [*descriptors[i].shape, *descriptors[i].strides]

    hooked = staticmethod(hooked)

    def __call__(self, pool: list[int], stream: int) -> None:
        values = self.values.copy()
        values[3] = stream
        for place, source, offset in self.addresses:
            values[place] = pool[source] + offset
        for place, source, offset, made, make in self.descriptors:
            address = pool[source] + offset
            descriptor = made.get(address)
            if descriptor is None:
                if len(made) >= MOST:
                    made.clear()
                descriptor = made[address] = make(address)
            values[place] = descriptor
        self.launch(*values)


def _maker(descriptor, kind: dict | None, in_c: bool):
    """address -> what the launcher takes for a descriptor there."""

    def make(address: int):
        one = object.__new__(type(descriptor))
        one.__dict__.update(vars(descriptor), base=At(address))
        return driver.make_tensordesc_arg(one, kind)[0] if in_c else one

    return make


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
