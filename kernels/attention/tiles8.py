"""Which tiles of queries, and which blocks of their keys, a program of product8_hopper.py walks over.

sizes: (M, L, H, q_tiles, k_tiles, tiles, whole, share). `tiles` tiles are dealt to PROGRAMS programs in turn. With
share > 0 a program has `whole` of them, and those that are left when all have as many are shared: `share` blocks of
keys for each program. With HAND > 0 none is shared, and a tile is done in parts of HAND blocks, from the last on.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def count(sizes, HAND: gl.constexpr, PROGRAMS: gl.constexpr):
    """How many items a program has: tiles, or parts of tiles."""
    M, L, H, q_tiles, k_tiles, tiles, whole, share = sizes
    program = gl.program_id(0)
    if HAND > 0:
        return (tiles - program + PROGRAMS - 1) // PROGRAMS * ((k_tiles + HAND - 1) // HAND)
    elif share == 0:
        return (tiles - program + PROGRAMS - 1) // PROGRAMS
    else:
        left = (tiles - whole * PROGRAMS) * k_tiles
        start = program * share
        end = gl.minimum(start + share, left)
        return whole + gl.where(start < end, (end - 1) // k_tiles - start // k_tiles + 1, 0)


@gluon.jit
def item(i, sizes, HAND: gl.constexpr, PROGRAMS: gl.constexpr):
    """Of a program's i-th item (which of its tiles, that tile, its first block of keys, the one after its last)."""
    M, L, H, q_tiles, k_tiles, tiles, whole, share = sizes
    program = gl.program_id(0)
    if HAND > 0:
        parts = (k_tiles + HAND - 1) // HAND
        high = k_tiles - i % parts * HAND
        return i // parts, program + i // parts * PROGRAMS, gl.maximum(high - HAND, 0), high
    start = program * share
    end = gl.minimum(start + share, (tiles - whole * PROGRAMS) * k_tiles)
    part = (share > 0) & (i >= whole)
    tile = start // k_tiles + i - whole
    low = gl.maximum(start - tile * k_tiles, 0)
    high = gl.minimum(end - tile * k_tiles, k_tiles)
    tile = gl.where(part, whole * PROGRAMS + tile, program + i * PROGRAMS)
    return i, tile, gl.where(part, low, 0), gl.where(part, high, k_tiles)
