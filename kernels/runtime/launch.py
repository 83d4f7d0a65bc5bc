"""A Triton kernel launched again: what Triton worked out at the first call serves the later ones.

Every `kernel[grid](...)` has Triton bind the arguments, ask each for its specialization and look the compiled kernel
up by a text of all that, which takes as long as many kernels run. A `Launch` fixes grid, numbers and constants. Of
what Triton specializes on, only the tensors are open then: which are None, their types, and whether they begin at a
multiple of 16 bytes. A call that agrees in that with an earlier one hands its compiled kernel to the driver.

Triton's own way is taken by the first such call and, always, where
- a hook wants to see launches (Triton's profiler): it is given what is prepared there;
- Triton interprets kernels, or compiles them for others than Nvidia's GPUs, where it specializes on more.
Options that change while a program runs, such as Triton's debug mode, count at the first call.

This rests on parts of Triton that no document promises: the arguments of a compiled kernel's `run`, the fields of
descriptors, what arguments are specialized on. Seen so in Triton 3.6 (with PyTorch 2.11) and 3.9 (2.13);
tests/kernels/test_pinned.py holds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import settings
from .recording import current
from .step import Step, hooked
from .workspace import Piece


def planned(build: Callable[..., Launch]) -> Callable[..., Launch]:
    """Keep what build(config, *sizes) returns; config is a dict of settings, the sizes are hashable."""

    @settings.remembered
    def kept(config, *sizes):
        return build(dict(config), *sizes)

    return functools.wraps(build)(lambda config, *sizes: kept(tuple(config.items()), *sizes))


class Launch:
    """kernel[grid](..., **fixed), called with tensors (or None) for the arguments not in `fixed`, in their order.

    fixed: numbers, constants, options such as num_warps. blocks: {argument: size} of tensors that TMA moves in blocks
    of this size: the kernel gets descriptors.
    """

    def __init__(self, kernel, grid: tuple[int, ...], blocks: dict[str, tuple[int, ...]] | None = None, **fixed):
        names = kernel.arg_names
        self.kernel, self.grid, self.fixed = kernel, (*grid, 1, 1)[:3], fixed
        self.interpreted = not isinstance(kernel, JITFunction)
        self.values = [fixed.get(name) for name in names]
        self.open = [name for name in names if name not in fixed]
        self.places = [names.index(name) for name in self.open]
        self.blocks = [(self.open.index(name), size) for name, size in (blocks or {}).items()]
        self.known = {}  # signature -> a compiled kernel's way to the driver, and its descriptors but for the tensors
        self.compiled = {}  # signature -> the compiled kernel

    def __call__(self, *tensors: Tensor | Piece | None) -> None:
        recording = current()
        if self.interpreted or settings.TARGET is not None:
            self.through_triton(tensors)
            if recording is not None:
                recording.launched(None, tensors)
            return
        device = driver.active.get_current_device()
        key, addresses = signature(device, tensors)
        if recording is not None:
            recording.launched(functools.partial(self.step, key, tensors) if key in self.known else None, tensors)
        if key not in self.known or hooked():
            compiled, descriptors = self.through_triton(tensors)
            if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
                self.known[key] = compiled.run, compiled.function, compiled.packed_metadata, descriptors
                self.compiled[key] = compiled
            return
        run, function, metadata, descriptors = self.known[key]
        values = self.values.copy()
        for place, address in zip(self.places, addresses, strict=True):
            values[place] = address
        for i, kind, fields in descriptors:  # without the checks of their class: the driver checks again
            tensor, values[self.places[i]] = tensors[i], (descriptor := object.__new__(kind))
            descriptor.__dict__.update(fields, base=tensor, shape=tensor.shape, strides=tensor.stride())
        run(*self.grid, driver.active.get_current_stream(device), function, metadata, None, None, None, *values)

    def step(self, key: tuple, tensors, sources: list) -> Step:
        """This launch on tensors of the signature `key`, to be repeated on others from these sources."""
        descriptors = {}
        for i, kind, fields in self.known[key][3]:
            descriptors[i] = one = object.__new__(kind)
            one.__dict__.update(fields, shape=tuple(tensors[i].shape), strides=tuple(tensors[i].stride()))
        return Step(self.compiled[key], self.grid, self.values, self.places, descriptors, sources)

    def through_triton(self, tensors) -> tuple:
        """(compiled kernel, of each descriptor the number of its tensor, its class and its other fields)."""
        arguments = [tensor.tensor() if isinstance(tensor, Piece) else tensor for tensor in tensors]
        descriptors = []
        for i, size in self.blocks:
            if tensors[i] is not None:
                arguments[i] = made = _descriptor(self.kernel, arguments[i], size)
                descriptors.append((i, type(made), {**vars(made), "base": None}))
        given = dict(zip(self.open, arguments, strict=True)) | self.fixed
        if settings.TARGET is not None:
            return settings.TARGET.launch(self.kernel, given), descriptors
        compiled = self.kernel[self.grid](**given)
        return compiled, descriptors


def signature(device: int, tensors: tuple[Tensor | Piece | None, ...]) -> tuple[tuple, list[int | None]]:
    """(what Triton specializes on, addresses). Devices too: addresses of another memory must not pass unseen.

    Pieces are aligned, and where the tensors are that they belong to.
    """
    key, addresses = [device], []
    for tensor in tensors:
        if tensor is None:
            key.append(None)
            addresses.append(None)
        elif type(tensor) is Piece:
            addresses.append(tensor.address)
            key.append(tensor.layout.dtype)
        else:
            addresses.append(address := tensor.data_ptr())
            key += tensor.dtype, tensor.get_device(), address % 16 == 0
    return tuple(key), addresses


def _descriptor(kernel, tensor: Tensor, size: tuple[int, ...]):
    if isinstance(kernel, JITFunction) and kernel.is_gluon():
        from .hopper import blocks  # a Triton without Gluon has no such kernels

        return blocks(tensor, *size)
    return TensorDescriptor.from_tensor(tensor, list(size))
