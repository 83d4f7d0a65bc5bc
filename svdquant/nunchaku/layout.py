"""Layouts of the tensors of a 4-bit layer in Nunchaku and diffusers' `nunchaku_lite`, from and to plain tensors.

n is an output row, k an input, r a rank. Their files hold what each lane of a tensor-core instruction reads, so
every index below is a permutation of the digits of n, k and r; rows in brackets run slowest to fastest:

    qweight     32-bit words of 8 inputs  [n/128, k/64, n/16 % 8, n % 8, k/8 % 4, n/8 % 2, k/32 % 2]  low nibble first
    wscales     and vectors (one group)   [n/128, group, n/16 % 8, n/2 % 4, n/8 % 2, n % 2]
    proj_up     B[n, r]                   [n/16, r/16, n % 8, r/2 % 4, n/8 % 2, r/8 % 2, r % 2]
    proj_down   A[r, k]                   [k/16, r/16, r % 8, k/2 % 4, r/8 % 2, k/8 % 2, k % 2]
    NVFP4 scales, s = k/16                [n/128, s/4, n % 8, n/8 % 4, n/32 % 4, s % 4]
    AWQ qweight 16-bit words              [n/4, k/64, n % 4, k/32 % 2, k % 8]   nibble k/8 % 4, lowest first

The shapes of their buffers are nominal: flat order is all that counts. Both sides of a pair hold the same elements
and functions move them without converting. N and K are multiples of 128, R of 16.
Wrong sizes, dtypes and codes raise UserError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UserError


def pack_qweight(codes: Tensor, signed: bool = True) -> Tensor:
    """codes [N, K], int8 in [-8, 7] or with signed=False uint8 (e2m1) in [0, 15] -> qweight int8 [N, K/2]."""
    _check("weight codes", codes, (128, 128), torch.int8, torch.uint8)
    _check_range(codes, *((-8, 7) if signed else (0, 15)))
    words = _join_nibbles(codes).view(torch.int32)
    return _permute(words, *_qweight_digits(*codes.shape)).view(torch.int8).view(len(codes), -1)


def unpack_qweight(qweight: Tensor, signed: bool = True) -> Tensor:
    """qweight int8 [N, K/2] -> codes [N, K], int8 in [-8, 7] or with signed=False uint8 in [0, 15]."""
    _check("qweight", qweight, (128, 64), torch.int8, torch.uint8)
    n, k = len(qweight), 2 * qweight.shape[1]
    words = _restore(qweight.contiguous().view(torch.int32), *_qweight_digits(n, k)).view(n, -1)
    nibbles = _split_nibbles(words.view(torch.uint8))
    return (nibbles ^ 8).view(torch.int8) - 8 if signed else nibbles


def pack_scales(scales: Tensor) -> Tensor:
    """scales [N, K/64] -> wscales [K/64, N]."""
    _check("scales", scales, (128, 1))
    n, groups = scales.shape
    return _permute(scales, *_scale_digits(n, groups)).view(groups, n)


def unpack_scales(wscales: Tensor) -> Tensor:
    """wscales [K/64, N] -> scales [N, K/64]."""
    _check("wscales", wscales, (1, 128))
    groups, n = wscales.shape
    return _restore(wscales, *_scale_digits(n, groups)).view(n, groups)


def pack_vector(vector: Tensor) -> Tensor:
    """bias, wcscales [N] or smooth_factor [K] -> the same shape in the layout of the files."""
    _check("a vector", vector, (128,))
    return _permute(vector, *_scale_digits(len(vector), 1)).view(-1)


def unpack_vector(vector: Tensor) -> Tensor:
    """The inverse of `pack_vector`."""
    _check("a vector", vector, (128,))
    return _restore(vector, *_scale_digits(len(vector), 1)).view(-1)


def pack_down(a: Tensor) -> Tensor:
    """A [R, K] -> proj_down [K, R]. The files hold A / smooth_factor: their low-rank branch reads x, not x / s."""
    _check("the low-rank A", a, (16, 16))
    r, k = a.shape
    return _permute(a, *_down_digits(r, k)).view(k, r)


def unpack_down(proj_down: Tensor) -> Tensor:
    """proj_down [K, R] -> A [R, K], with the division by smooth_factor still in it."""
    _check("proj_down", proj_down, (16, 16))
    k, r = proj_down.shape
    return _restore(proj_down, *_down_digits(r, k)).view(r, k)


def pack_up(b: Tensor) -> Tensor:
    """B [N, R] -> proj_up [N, R]."""
    _check("the low-rank B", b, (16, 16))
    return _permute(b, *_up_digits(*b.shape)).view(b.shape)


def unpack_up(proj_up: Tensor) -> Tensor:
    """proj_up [N, R] -> B [N, R]."""
    _check("proj_up", proj_up, (16, 16))
    return _restore(proj_up, *_up_digits(*proj_up.shape)).view(proj_up.shape)


def pack_nvfp4_scales(scales: Tensor) -> Tensor:
    """scales float8_e4m3fn [N, K/16] -> wscales float8_e4m3fn [K/16, N]."""
    _check("NVFP4 scales", scales, (128, 4), torch.float8_e4m3fn)
    n, groups = scales.shape
    return _permute(scales, *_nvfp4_digits(n, groups)).view(groups, n)


def unpack_nvfp4_scales(wscales: Tensor) -> Tensor:
    """wscales float8_e4m3fn [K/16, N] -> scales float8_e4m3fn [N, K/16]."""
    _check("NVFP4 wscales", wscales, (4, 128), torch.float8_e4m3fn)
    groups, n = wscales.shape
    return _restore(wscales, *_nvfp4_digits(n, groups)).view(n, groups)


def pack_awq_qweight(codes: Tensor) -> Tensor:
    """codes uint8 or int8 [N, K] in [0, 15] -> AWQ qweight int32 [N/4, K/2]. w = code * wscales + wzeros."""
    _check("AWQ codes", codes, (4, 64), torch.uint8, torch.int8)
    _check_range(codes, 0, 15)
    n, k = codes.shape
    return _join_nibbles(_permute(codes, *_awq_digits(n, k))).view(n // 4, -1).view(torch.int32)


def unpack_awq_qweight(qweight: Tensor) -> Tensor:
    """AWQ qweight int32 [N/4, K/2], or the same as int16 [N/4, K] -> codes uint8 [N, K] in [0, 15]."""
    columns = 64 if qweight.dtype == torch.int16 else 32
    _check("AWQ qweight", qweight, (1, columns), torch.int32, torch.int16)
    n, k = 4 * len(qweight), qweight.shape[1] // columns * 64
    nibbles = _split_nibbles(qweight.contiguous().view(torch.uint8))
    return _restore(nibbles, *_awq_digits(n, k)).view(n, k)


def interleave_adanorm_rows(tensor: Tensor, splits: int, dim: int = 0) -> Tensor:
    """The rows of an AdaLN layer in the order of Nunchaku's FLUX files: output j of chunk c becomes j * splits + c.

    dim is where tensor has its N rows: 0 for weight codes [N, K] and bias [N], 1 for wscales and wzeros [G, N];
    splits is 6 (AdaLayerNormZero) or 3 (single block). Those files also hold the bias of the scale chunks, the second
    and the last but one (with 3 the same), plus 1: that is the caller's. `nunchaku_lite` files do neither.
    """
    _check_splits(tensor, splits, dim)
    dim %= tensor.ndim
    return tensor.unflatten(dim, (splits, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def deinterleave_adanorm_rows(tensor: Tensor, splits: int, dim: int = 0) -> Tensor:
    """The inverse of `interleave_adanorm_rows`."""
    _check_splits(tensor, splits, dim)
    dim %= tensor.ndim
    return tensor.unflatten(dim, (-1, splits)).transpose(dim, dim + 1).flatten(dim, dim + 1)


# Digits: (the sizes a plain tensor is split into, where each of them goes).


def _qweight_digits(n, k):
    return (n // 128, 8, 2, 8, k // 64, 2, 4), (0, 4, 1, 3, 6, 2, 5)


def _scale_digits(n, groups):
    return (n // 128, 8, 2, 4, 2, groups), (0, 5, 1, 3, 2, 4)


def _down_digits(r, k):
    return (r // 16, 2, 8, k // 16, 2, 4, 2), (3, 0, 2, 5, 1, 4, 6)


def _up_digits(n, r):
    return (n // 16, 2, 8, r // 16, 2, 4, 2), (0, 3, 2, 5, 1, 4, 6)


def _nvfp4_digits(n, groups):
    return (n // 128, 4, 4, 8, groups // 4, 4), (0, 4, 3, 2, 1, 5)


def _awq_digits(n, k):
    return (n // 4, 4, k // 64, 2, 4, 8), (0, 2, 1, 3, 5, 4)


def _permute(plain: Tensor, sizes: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """The elements of `plain`, split into digits of `sizes`, in the order of the files; contiguous."""
    return plain.reshape(sizes).permute(order).contiguous()


def _restore(buffer: Tensor, sizes: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """The inverse of `_permute`."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return buffer.reshape([sizes[i] for i in order]).permute(back).contiguous()


def _join_nibbles(codes: Tensor) -> Tensor:
    """8-bit codes [..., 2 m] -> uint8 [..., m] of their low nibbles, the first of a pair in the low half."""
    nibbles = codes.contiguous().view(torch.uint8) & 15
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def _split_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., m] -> uint8 [..., 2 m] in [0, 15]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _check(name: str, tensor: Tensor, multiples: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if tensor.ndim != len(multiples) or any(size % m for size, m in zip(tensor.shape, multiples, strict=True)):
        wanted = ", ".join(f"a multiple of {m}" if m > 1 else "any" for m in multiples)
        raise UserError(f"{name}: the layout needs the shape [{wanted}]; got {list(tensor.shape)}.")
    if dtypes and tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UserError(f"{name}: the dtype is {wanted}; got {str(tensor.dtype).removeprefix('torch.')}.")


def _check_range(codes: Tensor, low: int, high: int) -> None:
    least, most = (int(v) for v in torch.aminmax(codes))
    if least < low or most > high:
        raise UserError(f"4-bit codes lie in [{low}, {high}] here; got codes from {least} to {most}.")


def _check_splits(tensor: Tensor, splits: int, dim: int) -> None:
    if tensor.shape[dim] % splits:
        raise UserError(f"{tensor.shape[dim]} rows do not divide into {splits} chunks.")
