"""W4A8 layers in integers on a GPU: which launches serve progressive and grouped weights, and running them.

    triton-w4a8-progressive     prepare (tokens_triton.py), then the product that widens weights in its main loop; or,
                                where that was measured faster, int8 weights in memory and an 8-bit product of them
    triton-w4a8-grouped         prepare, then the product that scales the sums of groups
    reference                   without a GPU: the formulas of progressive.py and grouped.py; the truth

Sums of codes are exact and the same in all of them. Settings in tuned/: "progressive.product",
"grouped.product", and "channel.product" for one scale an output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats.int4 import GROUP
from ..runtime.late import late
from ..runtime.settings import best_config, capability, remembered
from ..runtime.workspace import Workspace

if TYPE_CHECKING:
    from . import progressive_triton, tokens_triton
    from .products import product_grouped, product_progressive, product_w4a8
else:
    late(
        globals(), "progressive_triton", "tokens_triton", product_grouped="products.product_grouped",
        product_progressive="products.product_progressive", product_w4a8="products.product_w4a8",
    )  # fmt: skip

REFERENCE, PROGRESSIVE, GROUPED = "reference", "triton-w4a8-progressive", "triton-w4a8-grouped"
INT32, FLOAT = torch.int32, torch.float32


def kernel_name(device: torch.device, name: str) -> str:
    """`name`, PROGRESSIVE or GROUPED, where that kernel runs; else REFERENCE."""
    return name if device.type == "cuda" and capability(device) >= (8, 0) else REFERENCE


serves = remembered(lambda device: kernel_name(device, PROGRESSIVE) == PROGRESSIVE)


@remembered
def _room(m: int, n: int, k: int, groups: int, sums: bool, factors: bool, scales: bool, w8: bool) -> Workspace:
    """Room for tokens, with their sums or not; for tables of factors and of scales; and for int8 weights."""
    wide = -(-k // GROUP) * GROUP
    tokens = [((m, wide), torch.int8), ((m,), FLOAT), ((m if sums else 0,), INT32)]
    tables = [((groups if factors else 0, n), INT32), ((groups if scales else 0, n), FLOAT)]
    return Workspace(*tokens, *tables, ((n if w8 else 0, wide), torch.int8))


def progressive_through(
    x: Tensor, qweight: Tensor, wsteps: Tensor, wzeros: Tensor | None, wscales: Tensor, bias: Tensor | None,
    config: dict | None = None,
) -> Tensor:  # fmt: skip
    """`progressive.progressive_linear` of x [M, K], M and N above 0; config: not the usual one."""
    x = _rows(x)
    (m, k), (n, groups) = x.shape, wsteps.shape
    config = config or best_config("progressive.product", x.device, m, n, k)
    unpacks = config.get("UNPACK", False)
    codes, scale, _, factors, _, w8 = _room(m, n, k, groups, False, not unpacks, False, unpacks).take(x)
    wsteps, wzeros, qweight, wscales = (_contiguous(one) for one in (wsteps, wzeros, qweight, wscales))
    out = x.new_empty(m, n)
    if unpacks:
        tokens_triton.prepare(x, (codes, scale, None), None, None, None, (None, None), (n, 0))
        progressive_triton.codes(qweight, wsteps, wzeros, k, w8)
        product_w4a8.product((codes, scale, out[:, :0]), (w8, wscales), None, bias, out, config)
        return out
    tokens_triton.prepare(x, (codes, scale, None), wsteps, wzeros, None, (factors, None), (n, groups))
    size = k // groups if groups > 1 else 0
    product_progressive.product((codes, scale, None), qweight, factors, wscales, bias, out, "steps", size, config)
    return out


def grouped_through(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, bias: Tensor | None,
    config: dict | None = None,
) -> Tensor:  # fmt: skip
    """`grouped.grouped_linear` of x [M, K], M and N above 0; config: not the usual one."""
    x = _rows(x)
    (m, k), (n, groups) = x.shape, wscales.shape
    row = groups == 1  # one scale an output
    config = config or best_config("channel.product" if row else "grouped.product", x.device, m, n, k)
    offsets = row or wzeros is not None
    codes, scale, sums, factors, scales, _ = _room(m, n, k, groups, row, offsets, not row, False).take(x)
    wscales, wzeros, qweight = (_contiguous(one) for one in (wscales, wzeros, qweight))
    tables = (factors if offsets else None), (None if row else scales)
    out = x.new_empty(m, n)
    tokens = codes, scale, (sums if row else None)
    tokens_triton.prepare(x, tokens, None, wzeros, None if row else wscales, tables, (n, groups))
    if row:
        product_progressive.product(tokens, qweight, factors, wscales.view(n), bias, out, "rows", 0, config)
    else:
        product_grouped.product(tokens[:2], qweight, tables, bias, out, k // groups, config)
    return out


def _rows(x: Tensor) -> Tensor:
    """x as the first launch reads it."""
    x = x.float() if x.dtype == torch.float64 else x
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
