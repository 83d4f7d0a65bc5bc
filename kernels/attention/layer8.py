"""The op of attention on 8-bit operands, and which kernels serve it.

gluon-attention8    Hopper, heads of 33 to 128 channels: loads and halves of queries in their own warps
                    (product8_hopper.py)
triton-attention8   other GPUs that multiply e4m3, from compute capability 8.9 on (product8.py)
reference           everywhere: the formula in torch (formats/attention8.py, reference8.py); the truth

A call makes the codes (codes8.py) and multiplies them; neither the 16-bit logits nor P ever are in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats import attention8 as formats
from ..runtime.late import late
from ..runtime.ops import op
from ..runtime.settings import capability, remembered
from . import reference8
from .rotary import Rotary, joined, rotary_of

if TYPE_CHECKING:
    from . import codes8, product8, product8_hopper
else:
    late(globals(), "codes8", "product8", "product8_hopper")

REFERENCE, TRITON, GLUON = "reference", "triton-attention8", "gluon-attention8"
WIDEST = 256
"""Channels of a head that kernels take; more do not fit beside their sums in registers."""


def kernel_name(device: torch.device, width: int) -> str:
    """The kernel that serves heads of so many channels on this device."""
    if device.type != "cuda" or width > WIDEST or capability(device) < (8, 9):
        return REFERENCE
    return GLUON if capability(device)[0] == 9 and formats.padded(width) in (64, 128) else TRITON


known_name = remembered(kernel_name)


def attention_op(compute: Callable[[Tensor, Tensor, Tensor, float, str, Rotary | None], Tensor]) -> Callable:
    """Decorator: a function (q, k, v, scale, kind, rotary) -> its result, as the op of its name.

    q [B, H, M, d], k and v [B, H, L, d] float -> [B, H, M, d] in q's dtype, laid out as [B, M, H, d].
    scale: of the logits. kind: "int8" or "e4m3", of the codes of queries and keys; P and values are in e4m3.
    q_norm to eps: queries and keys go through a norm and a rotary embedding first; words_...: of a text [B, H, T, d],
    whose tokens come before the image's (rotary.py). Then L is M, and all are T + M together.

    The op raises ValueError for shapes that do not fit together, or another kind.
    """

    @functools.wraps(compute, assigned=("__name__", "__doc__", "__module__"), updated=())
    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        kind: str,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        eps: float = 0.0,
        words_q: Tensor | None = None,
        words_k: Tensor | None = None,
        words_v: Tensor | None = None,
        words_q_norm: Tensor | None = None,
        words_k_norm: Tensor | None = None,
    ) -> Tensor:
        words = words_q, words_k, words_v, words_q_norm, words_k_norm
        rotary = rotary_of(q_norm, k_norm, cos, sin, eps, *words)
        check(q, k, v, kind, rotary)
        return compute(q, k, v, scale, kind, rotary)

    del attend.__wrapped__  # its arguments are the op's
    made = op(attend)
    made.register_fake(
        lambda q, k, v, scale, kind, q_norm=None, k_norm=None, cos=None, sin=None, eps=0.0, words_q=None, *words: (
            empty_like_result(q, words_q)
        )
    )
    return made


@attention_op
def attention8(q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str, rotary: Rotary | None) -> Tensor:
    """Attention on 8-bit operands, by the kernel that serves it; arguments as in `attention_op`."""
    if not q.numel():
        return laid_out(q, rotary).transpose(1, 2)
    return through(known_name(q.device, q.shape[-1]), q, k, v, scale, kind, rotary)


def through(
    name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str, rotary: Rotary | None = None
) -> Tensor:  # fmt: skip
    """What the op does, by the kernel of this name."""
    y, dtype = laid_out(q, rotary), formats.TYPES[kind]
    tokens = k.shape[2] + (0 if rotary is None else rotary.tokens)
    if name == REFERENCE:
        q, k, v = (q, k, v) if rotary is None else joined(q, k, v, rotary)
        codes = formats.quantize8(q, k, v, scale, dtype)
        y.transpose(1, 2).copy_(reference8.attention(codes, q.shape[2], tokens, q.shape[3], q.dtype))
    else:
        codes = codes8.quantize8(q, k, v, scale, dtype, rotary=rotary)
        (product8_hopper if name == GLUON else product8).attention(codes, y, tokens)
    return y.transpose(1, 2)


def empty_like_result(q: Tensor, words_q: Tensor | None) -> Tensor:
    """[B, H, T + M, d] laid out as [B, T + M, H, d], of nothing."""
    batch, heads, rows, width = q.shape
    rows += 0 if words_q is None else words_q.shape[2]
    return q.new_empty(batch, rows, heads, width).transpose(1, 2)


def laid_out(q: Tensor, rotary: Rotary | None) -> Tensor:
    """Room for the result, [B, T + M, H, d]."""
    return empty_like_result(q, None if rotary is None or rotary.words is None else rotary.words[0]).transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor, kind: str, rotary: Rotary | None = None) -> None:
    """Raises ValueError as the op does."""
    if kind not in formats.TYPES:
        known = " or ".join(f"'{name}'" for name in formats.TYPES)
        raise ValueError(f"codes of queries and keys are {known}, not '{kind}'.")
    batch, heads, _, width = q.shape
    due = batch, heads, k.shape[2], width
    if not k.shape[2] or tuple(k.shape) != due or tuple(v.shape) != due:
        raise ValueError(
            f"keys and values for queries {list(q.shape)} are [{batch}, {heads}, 1 or more, {width}]; got "
            f"{list(k.shape)} and {list(v.shape)}."
        )
    if rotary is not None:
        rotary.check(q, k)
