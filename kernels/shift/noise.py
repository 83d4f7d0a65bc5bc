"""The noise that the rounding kernel adds, as a formula in torch: sixteen bits for each value, from its place alone.

    noise[i] = (k + 1/2) 2^-16,    k = mix(mix(i ^ one) + two) >> 16
    one = mix(low + mix(high)),    two = mix(one + high)

low and high are the halves of a 64-bit seed, i the value's number in its tensor, and mix is Wellons' lowbias32: of a
change of one bit of what goes in, each bit that comes out changes with a chance of a half, nearly. So the same seed
gives the same codes, however the work is shared out, and no state is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
ONE, TWO = 0x7FEB352D, 0x846CA68B


def noise_of(seed: Tensor, number: int) -> Tensor:
    """float32 [number] in (0, 1), on the seed's device; seed int64 []."""
    low, high = seed & LOW, seed >> 32 & LOW
    one = mix(low + mix(high) & LOW)
    two = mix(one + high & LOW)
    bits = mix(mix(torch.arange(number, device=seed.device) & LOW ^ one) + two & LOW) >> 16
    return bits.float().add_(0.5).mul_(2.0**-16)


def mix(x: Tensor) -> Tensor:
    """Whole numbers below 2^32, int64, one to one."""
    x = (x ^ x >> 16) * ONE & LOW  # products may wrap round beyond 64 bits: the low 32 stay right
    x = (x ^ x >> 15) * TWO & LOW
    return x ^ x >> 16
