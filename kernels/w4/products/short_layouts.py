"""Where elements of tensors lie in product_short_hopper.py: in registers, lanes and warps.

ONE, TWO, FOUR    of a thread, [warps, 8, 4, ..]: the thread of output pair r and inputs t is lane 4 r + t
READ              words in shared memory [16, 8 warps]: two words of outputs 2 r and 2 r + 1 of each lane
SPREAD, THINLY    copies of words and of scales
GATHER, MEET      the sums of all warps, as they are read, and as they are then added up [warps, rows, 16]

A warp that adds up has 16 outputs of a row, or 8, side by side, and stores them as a sector of memory or half of one.
"""

from __future__ import annotations

import functools

from triton.experimental.gluon import language as gl


@functools.cache
def layouts(warps: int, columns: int, scales: int) -> dict:
    """The layouts above, by name, for a program of so many warps (4, 8 or 16) and columns times 8 rows of inputs.

    scales: how many of an output are copied together, at most.
    """
    lanes = [(0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 2, 0), (0, 4, 0)]
    powers = [1 << i for i in range(warps.bit_length() - 1)]

    def threads(*registers: int) -> gl.DistributedLinearLayout:
        more = [0] * bool(registers)
        size = 2 ** len(registers)
        return gl.DistributedLinearLayout(
            [[0, 0, 0, one] for one in registers], [[*lane, *more] for lane in lanes],
            [[power, 0, 0, *more] for power in powers], [], [warps, 8, 4, *([size] * bool(registers))],
        )  # fmt: skip

    read = gl.DistributedLinearLayout(
        [[0, 1], [1, 0]], [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]], [[0, 8 * power] for power in powers], [],
        [16, 8 * warps],
    )  # fmt: skip
    across, thin = min(32, 2 * warps), min(32, max(1, warps // scales))
    return dict(
        ONE=threads(), TWO=threads(1), FOUR=threads(1, 2), READ=read,
        SPREAD=gl.BlockedLayout([1, 4], [32 // across, across], [warps, 1], [1, 0]),
        THINLY=gl.BlockedLayout([1, min(scales, warps)], [32 // thin, thin], [warps, 1], [1, 0]),
        **_meeting(warps, columns),
    )  # fmt: skip


def _meeting(warps: int, columns: int) -> dict:
    """GATHER and MEET: the same threads, before and after the order of shared memory is that of rows and outputs.

    Where threads are more than places, 2^share of them that lie side by side read the sums of other warps for one.
    """
    powers = [1 << i for i in range(warps.bit_length() - 1)]
    places = [([0, 1 << i], [0, 0, 1 << i]) for i in range(4)]  # outputs; then rows
    places += [([0, 16], [0, 1, 0]), ([1, 0], [0, 2, 0])]
    places += [([2 * warps << i, 0], [0, 4 << i, 0]) for i in range(columns)]
    each = [([2 * power, 0], [power, 0, 0]) for power in powers]  # warp whose sums are read
    share = max(0, len(each) - 1 - columns)
    lanes, places = places[: 5 - share] + each[:share], places[5 - share :]
    across, left = places[: len(powers)], places[len(powers) :] + each[share:]

    def layout(which: int, size: list[int]) -> gl.DistributedLinearLayout:
        return gl.DistributedLinearLayout(*([one[which] for one in part] for part in (left, lanes, across)), [], size)

    return dict(GATHER=layout(0, [4 * warps * columns, 32]), MEET=layout(1, [warps, 8 * columns, 16]))
