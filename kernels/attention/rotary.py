"""Queries and keys as FLUX makes them: an RMS norm of each head, then a rotary embedding by the place of the token.

    x'[j] = x[j] / sqrt(mean_j x[j]^2 + eps) * w[j]
    y[2 i] = x'[2 i] cos[n, i] - x'[2 i + 1] sin[n, i],    y[2 i + 1] = x'[2 i + 1] cos[n, i] + x'[2 i] sin[n, i]

Tokens of a text, with norms of their own, come before those of the image. "RoFormer: Enhanced Transformer with Rotary
Position Embedding", Su et al., arXiv:2104.09864. `joined` computes it in torch; turned8.py in the kernels of codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm


class Rotary(NamedTuple):
    """q_norm, k_norm [d] of the image's tokens; cos, sin [T + M, d] float32, the same for both channels of a pair.

    words: of a text, queries, keys and values [B, H, T, d], and the norms of the first two; or None.
    """

    q_norm: Tensor
    k_norm: Tensor
    cos: Tensor
    sin: Tensor
    eps: float
    words: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    @property
    def tokens(self) -> int:
        """T, of the text."""
        return 0 if self.words is None else self.words[0].shape[2]

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raises ValueError for sizes that do not fit queries and keys [B, H, M, d]."""
        width, tokens = q.shape[-1], q.shape[2] + self.tokens
        due = tokens, width
        if k.shape != q.shape or tuple(self.cos.shape) != due or tuple(self.sin.shape) != due or width % 2:
            raise ValueError(
                f"a rotary embedding of {tokens} queries and as many keys of {width} channels has cos and sin "
                f"[{tokens}, {width}]; got {list(self.cos.shape)} and {list(self.sin.shape)}, keys {list(k.shape)}."
            )
        if self.words is not None and any(x.shape != self.words[0].shape for x in self.words[:3]):
            raise ValueError("queries, keys and values of the text are not of one shape.")

    def parts(self) -> tuple:
        """(queries, keys and values of the text or None, four norms, cos and sin, T, eps)."""
        places = self.cos.contiguous(), self.sin.contiguous()
        if self.words is None:
            return None, (self.q_norm, self.k_norm, None, None), places, 0, self.eps
        q, k, v, q_norm, k_norm = self.words
        return (q, k, v), (self.q_norm, self.k_norm, q_norm, k_norm), places, q.shape[2], self.eps


def rotary_of(
    q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, *words
) -> Rotary | None:
    """Of an op's arguments; None where they are None."""
    if q_norm is None:
        return None
    return Rotary(q_norm, k_norm, cos, sin, eps, None if words[0] is None else words)


def joined(q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, H, M, d] -> [B, H, T + M, d] in their type, in torch, as diffusers computes them."""
    q, k = (normed(x, weight, rotary.eps) for x, weight in ((q, rotary.q_norm), (k, rotary.k_norm)))
    if rotary.words is not None:
        words_q, words_k, words_v, *norms = rotary.words
        words_q, words_k = (normed(x, w, rotary.eps) for x, w in zip((words_q, words_k), norms, strict=True))
        q, k, v = (torch.cat(pair, 2) for pair in ((words_q, q), (words_k, k), (words_v, v)))
    return _by_places(q, rotary), _by_places(k, rotary), v


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] by its root mean square."""
    return rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def _by_places(x: Tensor, rotary: Rotary) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-odd, even], -1).flatten(-2)
    return (x.float() * rotary.cos + across.float() * rotary.sin).to(x.dtype)
