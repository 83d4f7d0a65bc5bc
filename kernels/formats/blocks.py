"""Weights in blocks of inputs, as files of other tools have them: codes under scales, with offsets or without.

    w[n, k] = s[n, g] (q[n, k] - z) + o[n, g]                  g the block of k; z one whole number
    s[n, g] = S[n, b] t[n, g],   o[n, g] = O[n, b] m[n, g]     nested: t, m whole numbers, b a run of blocks

    q   4 bits, [0, 15], two in a byte (`pack`); 8 bits, int8; or e4m3

GGUF's Q8_0, Q4_0 and Q4_1 are plain, its Q4_K, Q5_K and Q6_K nested. Products of t and S are exact in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .int4 import pack_int4, unpack_int4

PACKED = 32
"""Codes of 4 bits that are packed together: byte j of a run is q[j] + 16 q[j + 16]."""


def pack(codes: Tensor) -> Tensor:
    """Codes [N, K] in [0, 15], integers -> uint8 [N, K / 2]. Raises ValueError where K is no multiple of 32."""
    return pack_int4(codes.to(torch.int8) - 8, PACKED)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: int8 [N, K]."""
    return unpack_int4(packed, PACKED) + 8


def spread(codes: Tensor, outer: Tensor | None) -> Tensor:
    """Scales or offsets [N, G] float32: as they are stored, or codes [N, G] times the outer ones [N, B]."""
    if outer is None:
        return codes.float()
    return (codes.float().unflatten(1, (outer.shape[1], -1)) * outer.float()[:, :, None]).flatten(1)


def values(codes: Tensor, scales: Tensor, offsets: Tensor | None, zero: int = 0) -> Tensor:
    """w [N, K] float32 of codes [N, K] (int8 or e4m3), scales and offsets [N, G] float32."""
    blocks = (codes.float() - zero).unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]
    return (blocks if offsets is None else blocks + offsets[:, :, None]).flatten(1)
