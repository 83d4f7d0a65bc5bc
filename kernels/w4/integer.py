"""W4A8 layers in integers on a GPU: which launches serve them, and running them.

    triton-w4a8-progressive     progressive weights: prepare (tokens_triton.py), then the product that widens weights
                                in its main loop; or, where that was measured faster, int8 weights in memory and an
                                8-bit product of them
    triton-w4a8-channel         one scale an output: the same
    triton-w4a8-grouped         scales of groups: prepare, then the product that scales the sums of groups
    triton-w4a8-codebook        levels of a codebook for codes: the product of one scale an output, or that of groups
    triton-w4a8-row-mix         that of groups with rows of 8 bits among those of 4, two nibbles a code, in one launch
    reference                   without a GPU: the formulas of progressive.py, grouped.py and row_mix.py; the truth

Sums of codes are exact, and the same in all of them. Settings in tuned/: "progressive.product", for one scale an
output too, and "grouped.product".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats.int4 import GROUP
from ..runtime.integers import cdiv
from ..runtime.late import late
from ..runtime.settings import best_config, multiprocessors, remembered, served
from ..runtime.workspace import Piece, Workspace

if TYPE_CHECKING:
    from . import progressive_triton, tokens_triton
    from .products import product_grouped, product_progressive, product_w4a8
else:
    late(
        globals(), "progressive_triton", "tokens_triton", product_grouped="products.product_grouped",
        product_progressive="products.product_progressive", product_w4a8="products.product_w4a8",
    )  # fmt: skip

REFERENCE, PROGRESSIVE, CHANNEL, GROUPED, ROW_MIX, CODEBOOK = (
    "reference", "triton-w4a8-progressive", "triton-w4a8-channel", "triton-w4a8-grouped", "triton-w4a8-row-mix",
    "triton-w4a8-codebook",
)  # fmt: skip
INT32, FLOAT = torch.int32, torch.float32
WIDEST = 256  # rows, and outputs, that a tile may have


known_to_serve = remembered(served)  # not where torch.compile traces: it warns of what is cached


@remembered
def _room(m: int, n: int, k: int, groups: int, sums: bool, factors: bool, scales: bool, w8: bool) -> Workspace:
    """Room for tokens, with their sums or not; for tables of factors and of scales; and for int8 weights."""
    wide = -(-k // GROUP) * GROUP
    tokens = [((m, wide), torch.int8), ((m,), FLOAT), ((m if sums else 0,), INT32)]
    tables = [((groups if factors else 0, n), INT32), ((groups if scales else 0, n), FLOAT)]
    return Workspace(*tokens, *tables, ((n if w8 else 0, wide), torch.int8))


def table_width(n: int, rows: int) -> int:
    """Numbers of a group in tables of n outputs in so many stored rows: where there are more, all tiles end in it."""
    return n if rows == n else rows - n + cdiv(n, WIDEST) * WIDEST


def room_of_two_widths(x: Tensor, n: int, high: int, config: dict) -> list[Piece]:
    """Slots of n outputs, counts of tiles, and sums of so many rows of `high` halves, for x [M, K] and a product."""
    return _wide_room(len(x), n, high, _parts(x.device, len(x), n, high, config)).take(x)


def _parts(device: torch.device, m: int, n: int, high: int, config: dict) -> int:
    """Tiles that each tile of high halves is split into.

    Three where the others all run at once, of which three fit a multiprocessor, and whole ones were a second wave.
    """
    if "PARTS" in config:
        return config["PARTS"]
    down, at_once = cdiv(m, config["BM"]), 3 * multiprocessors(device)
    others = down * cdiv(n, config["BN"])
    return 3 if others <= at_once < others + down * cdiv(high, config["BN"]) else 1


@remembered
def _wide_room(m: int, n: int, high: int, parts: int) -> Workspace:
    return Workspace(((n,), INT32), ((m,), INT32), ((parts, high, cdiv(m, WIDEST) * WIDEST), FLOAT))


def progressive_through(
    x: Tensor, qweight: Tensor, wsteps: Tensor, wzeros: Tensor | None, wscales: Tensor, bias: Tensor | None,
    config: dict | None = None,
) -> Tensor:  # fmt: skip
    """`progressive.progressive_linear` of x [M, K], M and N above 0; config: not the usual one."""
    return _exact_sums(x, qweight, wsteps, wzeros, wscales, bias, "steps", wsteps.shape[1], config)


def grouped_through(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, bias: Tensor | None,
    config: dict | None = None, levels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`grouped.grouped_linear` of x [M, K], M and N above 0; config: not the usual one."""
    n, groups = wscales.shape
    levels = _contiguous(levels)
    if groups == 1:
        kind = "rows" if levels is None else "levels"
        return _exact_sums(x, qweight, None, wzeros, wscales.reshape(n), bias, kind, 1, config, levels)
    return _scaled_sums(x, qweight, wscales, wzeros, None, bias, config, levels)


def row_mix_through(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, wide: Tensor, bias: Tensor | None,
    config: dict | None = None,
) -> Tensor:  # fmt: skip
    """`row_mix.row_mix_grouped` of x [M, K], M and the number of `wide` rows above 0; config: not the usual one."""
    return _scaled_sums(x, qweight, wscales, wzeros, wide, bias, config)


def _scaled_sums(
    x, qweight, wscales, wzeros, wide: Tensor | None, bias, config: dict | None, levels: Tensor | None = None
) -> Tensor:
    """The products whose sums of groups are whole numbers; wide: of rows of two widths, else None."""
    x = _rows(x)
    (m, k), (n, groups) = x.shape, wscales.shape
    config = config or best_config("grouped.product", x.device, m, n, k)
    rows, offset = len(qweight), wide is not None or wzeros is not None
    codes, scale, _, factors, scales, _ = _room(m, table_width(n, rows), k, groups, False, offset, True, False).take(
        x
    )
    slots = ready = sums = None
    if wide is not None:
        slots, ready, sums = room_of_two_widths(x, n, rows - n, config)
    qweight, wscales, wzeros, wide = (_contiguous(one) for one in (qweight, wscales, wzeros, wide))
    tables = (factors if offset else None), scales
    out = x.new_empty(m, n)
    tokens_triton.prepare(
        x, (codes, scale, None), None, wzeros, wscales, tables, (rows, groups), (wide, slots, ready)
    )
    wide_rows = slots, ready, sums
    product_grouped.product((codes, scale), qweight, tables, bias, out, k // groups, config, wide_rows, levels)
    return out


def _exact_sums(
    x, qweight, wsteps, wzeros, wscales, bias, kind: str, groups: int, config: dict | None,
    levels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The products whose sums over all of K are whole numbers; kind: as in product_progressive.py."""
    x = _rows(x)
    (m, k), n = x.shape, len(qweight)
    config = config or best_config("progressive.product", x.device, m, n, k)
    unpacks, summed = config.get("UNPACK", False), kind == "rows"
    factored = not unpacks and levels is None
    pieces = _room(m, n, k, groups, summed and not unpacks, factored, False, unpacks).take(x)
    codes, scale, sums, factors, _, w8 = pieces
    qweight, wsteps, wzeros, wscales = (_contiguous(one) for one in (qweight, wsteps, wzeros, wscales))
    out = x.new_empty(m, n)
    if not factored:
        tokens_triton.prepare(x, (codes, scale, None), None, None, None, (None, None), (n, 0))
    else:
        tokens = codes, scale, (sums if summed else None)
        tokens_triton.prepare(x, tokens, wsteps, wzeros, None, (factors, None), (n, groups))
    tokens = codes, scale, (sums if summed else None)
    weight, made = (qweight, wsteps, wzeros, wscales), ((factors if factored else None), w8)
    return _product(tokens, weight, made, bias, out, kind, (groups, k), config, levels)


def _product(
    tokens, weight, made, bias, out, kind: str, sizes: tuple[int, int], config: dict, levels: Tensor | None = None,
    nonlinearity: str = "",
) -> Tensor:  # fmt: skip
    """made: tables of factors, filled, and room for int8 weights; sizes: groups of K inputs, and K."""
    (qweight, wsteps, wzeros, wscales), (factors, w8), (groups, k) = weight, made, sizes
    if config.get("UNPACK", False):
        progressive_triton.codes(qweight, wsteps, wzeros, groups, k, w8, levels)
        product_w4a8.product((*tokens[:2], out[:, :0]), (w8, wscales), None, bias, out, config, nonlinearity)
        return out
    size = k // groups if groups > 1 else 0
    how = (kind, size, config, levels, nonlinearity)
    product_progressive.product(tokens, qweight, factors, wscales, bias, out, *how)
    return out


def tokens_through(x: Tensor) -> tuple[Tensor, Tensor]:
    """`from_tokens.w4a8_tokens` of x [M, K], M above 0."""
    x = _rows(x)
    m, k = x.shape
    codes = x.new_empty(m, -(-k // GROUP) * GROUP, dtype=torch.int8)
    scale = x.new_empty(m, dtype=FLOAT)
    tokens_triton.prepare(x, (codes, scale, None), None, None, None, (None, None), (0, 0))
    return codes, scale


def progressive_of_tokens(
    codes: Tensor, scale: Tensor, qweight: Tensor, wsteps: Tensor, wzeros: Tensor | None, wscales: Tensor,
    bias: Tensor | None, k: int, dtype: torch.dtype, nonlinearity: str = "",
) -> Tensor:  # fmt: skip
    """`from_tokens.progressive_product` of codes [M, K'], M and N above 0."""
    m, (n, groups) = len(codes), wsteps.shape
    config = best_config("progressive.product", codes.device, m, n, k)
    unpacks = config.get("UNPACK", False)
    *_, factors, _, w8 = _room(0, n, k, groups, False, not unpacks, False, unpacks).take(codes)
    weight = tuple(_contiguous(one) for one in (qweight, wsteps, wzeros, wscales))
    if not unpacks:
        tokens_triton.factors(codes, scale, *weight[1:3], factors)
    out = codes.new_empty(m, n, dtype=dtype)
    made, sizes = (factors, w8), (groups, k)
    return _product((codes, scale, None), weight, made, bias, out, "steps", sizes, config, None, nonlinearity)


def _rows(x: Tensor) -> Tensor:
    """x as the first launch reads it."""
    x = x.float() if x.dtype == torch.float64 else x
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
