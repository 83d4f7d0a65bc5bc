"""The 8-bit integer format: symmetric weights per output channel, affine activations per tensor.

    weight      w ~ s_n * q,            q in [-(2^(b-1)-1), 2^(b-1)-1]
    activation  x ~ s * (q - z),        q = clamp(round(x / s) + z, -2^(b-1), 2^(b-1)-1)

Codes are int8 tensors. b < 8 keeps the codes of a narrower grid in int8 containers: the arithmetic is that of b
bits, the bytes are those of 8; the library calls such a layer `simulated`.
"""

from __future__ import annotations

import functools
import threading
import warnings

import torch
from torch import Tensor

HAS_QUANTIZE_PER_TENSOR = hasattr(torch, "quantize_per_tensor")
_guard = threading.Lock()


def weight_limit(bits: int) -> int:
    """The largest weight code: 127 for 8 bits."""
    return 2 ** (bits - 1) - 1


def quantize_weight(weight: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """weight [N, ...] float, scale [N] float32 -> int8 codes [N, ...]."""
    limit = weight_limit(bits)
    scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return (weight.float() / scale).round_().clamp_(-limit, limit).to(torch.int8)


def dequantize_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [N, ...] int8, scale [N] float32 -> float32 [N, ...]."""
    return codes.float() * scale.reshape(-1, *[1] * (codes.ndim - 1))


def affine_parameters(low: float, high: float, bits: int = 8, symmetric: bool = False) -> tuple[float, int]:
    """The scale (a float32 value) and zero point of an activation grid that covers [low, high] and zero.

    A range of nothing but zeros gets scale 1: every code is then exact.
    """
    scale, zero = affine_grids(*torch.tensor([[low], [high]], dtype=torch.float64), bits, symmetric)
    return float(scale), int(zero)


def affine_grids(low: Tensor, high: Tensor, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """The same of many ranges: ends [R] float64 -> (scales, zero points), [R] float64 each."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (-low).maximum(high) / weight_limit(bits) if symmetric else (high - low) / (2**bits - 1)
    scale = scale.float().double()
    nothing = scale < torch.finfo(torch.float32).tiny
    zero = torch.zeros_like(scale) if symmetric else (-low / scale).round_() - 2 ** (bits - 1)
    return scale.masked_fill(nothing, 1.0), zero.masked_fill(nothing, 0.0)


def quantize_activation(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8) -> Tensor:
    """x any shape, scale and zero_point broadcast against it -> int8 codes of x's shape.

    The plain formula; NaN, which has no code, counts as zero.
    """
    limit = 2 ** (bits - 1)
    steps = torch.round(x.float() * inverse(scale)).nan_to_num_(0.0, float("inf"), -float("inf"))
    codes = steps + zero_point
    return codes.clamp_(-limit, limit - 1).to(torch.int8)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, float32, rounded once: in compiled code, too, where a quotient of float32 is an approximate one.

    A quotient of float32 values in float64 has digits enough that rounding it again changes nothing.
    """
    return (1.0 / scale.double()).float()


def quantize_activation_uint8(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """The 8-bit codes of `quantize_activation` plus 128, as uint8: the input format of oneDNN's int8 kernels.

    x is float32 on the CPU. torch.quantize_per_tensor does it in one vectorised pass, six times faster than the
    formula in tensor operations (a value within float rounding of a tie, one in 100,000, may get the other
    neighbour); where a later torch no longer has it, the formula runs.
    """
    if not HAS_QUANTIZE_PER_TENSOR:
        codes = torch.round(x * (1.0 / torch.tensor(scale))).add_(zero_point + 128)
        return codes.clamp_(0, 255).to(torch.uint8)
    _hear_out()
    quantized = torch.quantize_per_tensor(x, scale, zero_point + 128, torch.quint8)
    # int_repr() would copy at a seventh of the speed: look at the same bytes as uint8 instead
    view = torch.empty(0, dtype=torch.uint8)
    return view.set_(quantized.untyped_storage(), 0, quantized.size(), quantized.stride())


@functools.cache
def _hear_out() -> None:
    """Let torch say, once in a process, that quint8 tensors come to an end (2.13). Filters of warnings are the whole
    process's: they are changed here, and not at each call, where threads would put back each other's."""
    with _guard, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


def dynamic_scale(x: Tensor, dims: tuple[int, ...], bits: int = 8) -> Tensor:
    """Symmetric scales max|x| / (2^(b-1)-1) over `dims` (kept as size 1), float32; an all-zero slice gets 1."""
    scale = x.abs().amax(dim=dims, keepdim=True).float() / weight_limit(bits)
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
