"""The noise that the rounding kernel adds, as a formula in torch: sixteen bits of Philox 4x32-10 for each value.

    noise[r, c] = (k + 1/2) 2^-16,   k = half j of the four words philox(seed, 32 (r // 256) + r % 32, c),
                                     j = r % 256 // 32

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) is a function of a seed and a counter:
the same seed gives the same codes, however the work is shared out. One call of it has noise for eight rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 32
"""Rows of a tile; a counter's bits serve this row and the seven that lie so many further each."""
HALVES = 8
LOW = 0xFFFFFFFF


def noise_of(seed: Tensor, rows: int, channels: int) -> Tensor:
    """float32 [rows, channels] in (0, 1), on the seed's device; seed int64 []."""
    r, c = (torch.arange(size, device=seed.device) for size in (rows, channels))
    span = ROWS * HALVES
    words = philox(int(seed), (r // span * ROWS + r % ROWS)[:, None], c[None, :])
    half = (r % span // ROWS)[:, None]
    bits = torch.stack(words, -1).gather(2, (half // 2).expand(-1, channels)[..., None])[..., 0]
    return (bits >> half % 2 * 16 & 0xFFFF).float().add_(0.5).mul_(2.0**-16)


def philox(seed: int, first: Tensor, second: Tensor, rounds: int = 10) -> list[Tensor]:
    """Four words below 2^32, int64, for each counter (first, second, 0, 0)."""
    words = [*torch.broadcast_tensors(first, second), *[torch.zeros_like(first + second)] * 2]
    keys = [seed & LOW, seed >> 32 & LOW]
    for _ in range(rounds):
        one, two = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57  # whole products of 64 bits, which may wrap round
        words = [(two >> 32 & LOW) ^ words[1] ^ keys[0], two & LOW, (one >> 32 & LOW) ^ words[3] ^ keys[1], one & LOW]
        keys = [(keys[0] + 0x9E3779B9) & LOW, (keys[1] + 0xBB67AE85) & LOW]
    return words
