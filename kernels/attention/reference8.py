"""The formula of attention on 8-bit codes in torch, in blocks of tokens: the truth, and what a CPU runs.

    x[m, n] = a[m] b[n] sum_j qc[m, j] kc[n, j]          (formats/attention8.py; a holds log2(e); b, c: of n's block)
    p[m, n] = 2^(x[m, n] + log2 c[n] - peak_m + TOP),    l_m = sum_n p[m, n] / c[n]
    y[m, j] = sum_n e4m3(p[m, n]) vc[n, j] / l_m + mean[j]

Block by block from the last, with the largest x + log2 c so far as peak_m, which is corrected where a later block has
a larger one. p is at most 2^TOP = 256, of 448 that e4m3 has: what is 2^14 times smaller is a full code still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.attention8 import BLOCK, ORDER, TYPES, Codes8

TOP = 8.0


def attention(codes: Codes8, rows: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Codes of `rows` queries and `tokens` keys -> y [B, H, M, d] in dtype."""
    q, blocks = codes.q.float() * codes.q_scales.unsqueeze(-1), codes.k_scales.shape[-1]
    back = torch.argsort(torch.tensor(ORDER))
    y = q.new_zeros(q.shape)
    peak = q.new_full((*q.shape[:-1], 1), -torch.inf)
    total = torch.zeros_like(peak)
    for block in reversed(range(blocks)):
        where = slice(block * BLOCK, (block + 1) * BLOCK)
        k = codes.k[..., where, :].float() * codes.k_scales[..., block, None, None]
        v = codes.v[..., where].float().unflatten(-1, (-1, 16))[..., back].flatten(-2)
        x = q @ k.mT
        if where.stop > tokens:
            x[..., tokens - where.stop :] = -torch.inf
        v_log = codes.v_logs[..., block, None, None]
        x = x + v_log
        above = torch.maximum(peak, x.amax(-1, keepdim=True))
        p, correction = torch.exp2(x - above + TOP), torch.exp2(peak - above)
        total = total * correction + p.sum(-1, keepdim=True) * torch.exp2(-v_log)
        y = y * correction + p.to(TYPES["e4m3"]).float() @ v.mT
        peak = above
    y = y / total + codes.v_means.unsqueeze(-2)
    return y[..., :rows, :width].to(dtype)
