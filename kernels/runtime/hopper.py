"""Shared by the Gluon kernels for Hopper: descriptors for TMA, and names that differ between versions of Triton."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .settings import capability, remembered

TYPES = {
    torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16,
    torch.float32: gl.float32, torch.int8: gl.int8,
}  # fmt: skip
# Gluon is experimental: later versions of Triton have the first names, 3.6 the second.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
copy_ahead = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def blocks(tensor: Tensor | None, *size: int) -> TensorDescriptor | None:
    """A tensor as TMA loads or stores it, `size` at a time; None for None."""
    if tensor is None:
        return None
    return TensorDescriptor.from_tensor(tensor, list(size), _layout(size, tensor.dtype))


@functools.cache
def _layout(size: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Layout of a block in shared memory; kept, for working it out takes as long as the rest of a descriptor."""
    return gl.NVMMASharedLayout.get_default_for(list(size), TYPES[dtype])


@remembered
def check(
    dtype: torch.dtype, device: torch.device, types: tuple[torch.dtype, ...] = (torch.float8_e4m3fn,)
) -> None:  # fmt: skip
    """Raises ValueError unless these are of codes of such types on a GPU of compute capability 9. Asked once."""
    if dtype not in types or capability(device)[0] != 9:
        raise ValueError(
            f"settings with GLUON are for {' and '.join(map(str, types))} on Hopper, not for {dtype} on {device}."
        )
