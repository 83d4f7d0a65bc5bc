"""Bytes of a model, by one definition: those of the tensors that its file holds, each once.

Parameters count, and buffers that are saved; tables that a model computes anew when it is made do not. Budgets and
reports have shares of 16 bits: both the model and its full-precision form with their floating tensors in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from .base import is_quantized


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all tensors that a file of the module holds, scales and biases included, in the types they have."""
    return sum(tensor.nbytes for tensor, _ in _stored(module))


def bytes_in_16_bits(module: nn.Module) -> int:
    """The same, were floating tensors of 16 bits, but for those that a quantized layer keeps as they are."""
    return sum(tensor.numel() * _width(tensor, kept) for tensor, kept in _stored(module))


def full_bytes(module: nn.Module, sixteen: bool = False) -> int:
    """Bytes of the module in full precision: of a quantized layer, those of a float weight and bias.

    sixteen: all floating tensors in 16 bits; else in the types they have, or had.
    """
    layers = [layer for layer in module.modules() if is_quantized(layer)]
    others = [tensor for tensor, _ in _stored(module, {part for layer in layers for part in layer.modules()})]
    total = sum(tensor.numel() * (_width(tensor, False) if sixteen else tensor.element_size()) for tensor in others)
    for layer in layers:
        numbers = math.prod(layer.weight_shape) + (0 if layer.bias is None else len(layer.bias))
        total += numbers * (2 if sixteen else layer.model_dtype.itemsize)
    return total


def text_of(stored: int, now: int, full: int) -> str:
    """Bytes in words: those of the file, and the share of 16 bits, `now` of `full`."""
    share = f"{now / full:.3f} of the full-precision model's" if full else "none of the full-precision model's"
    return f"{stored / 1e6:.2f} MB in its file; with floats in 16 bits {now / 1e6:.2f} MB, {share}"


def _stored(module: nn.Module, leave: set[nn.Module] | frozenset = frozenset()) -> Iterator[tuple[Tensor, bool]]:
    """Each tensor of a module's file once, and whether a quantized layer keeps its type. leave: modules without."""
    seen: set[int] = set()
    for owner in module.modules():
        if owner in leave:
            continue
        kept, computed = getattr(owner, "kept", ()), owner._non_persistent_buffers_set
        buffers = [(name, one) for name, one in owner.named_buffers(recurse=False) if name not in computed]
        for name, tensor in [*owner.named_parameters(recurse=False), *buffers]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor, name in kept


def _width(tensor: Tensor, kept: bool) -> int:
    wide = tensor.is_floating_point() and tensor.element_size() > 2 and not kept
    return 2 if wide else tensor.element_size()
