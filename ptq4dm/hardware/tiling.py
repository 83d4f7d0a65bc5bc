"""The best tiling of a product on an output-stationary array: the exhaustive search of the published simulator.

A product has five loops: batch, the height and the width of the output, input channels, output channels. Each is cut
into tiles of a power of two (the kernel's taps are never cut; height and width are cut alike), and the loops over
tiles stand in any order. A buffer holds a tile, and goes on holding what inner loops bring as long as half of it has
room (the other half is being filled): then outer loops that do not change it read nothing. Counted are

    compute  = tiles * ceil(rows of a tile / array rows) * ceil(outputs of a tile / array columns) * inputs of a tile
    first    = bits that must come before the array can begin, last = bits that leave after it has ended
    stalls   = ceil(first / port) + ceil(last / port) + max(0, ceil((all DRAM bits - first - last) / port) - compute)

and the tiling with the fewest cycles is taken, of those the one with the least energy. The published search goes
through tilings one by one; here all tilings of an order are one array, and loops with one tile are not permuted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations

import numpy as np

from ..errors import UserError
from .machine import Machine, SearchCosts, Shape, Traffic
from .traffic import AXES, Tilings


@lru_cache(maxsize=4096)
def best_tiling(shape: Shape, machine: Machine, costs: SearchCosts) -> Traffic:
    """The traffic of the fastest tiling. Raises UserError where no tile fits the buffers."""
    tilings = _tilings(shape, machine)
    if not len(tilings.tiles["batch"]):
        raise UserError(f"no tile of a layer with kernel {shape.kernel} fits the modelled accelerator's buffers.")
    best: tuple[int, float] | None = None
    found: Traffic | None = None
    for order in _orders(tilings):
        counted = tilings.counted(order)
        fewest = int(counted.cycles.min())
        if best is not None and fewest > best[0]:
            continue
        ties = counted.at(np.flatnonzero(counted.cycles == fewest))
        energies = ties.energy(costs)
        least = int(energies.argmin())
        if best is None or (fewest, float(energies[least])) < best:
            best, found = (fewest, float(energies[least])), ties.traffic(least)
    assert found is not None
    return found


def _orders(tilings: Tilings) -> Iterator[tuple[str, ...]]:
    """All orders of the loops with several tiles. Height and width of a square are cut alike: either may lead."""
    cut = [axis for axis in AXES if bool((tilings.numbers[axis] > 1).any())]
    square = {"height", "width"} <= set(cut) and tilings.shape.height == tilings.shape.width
    for order in permutations(cut):
        if not square or order.index("height") < order.index("width"):
            yield order


def _powers(size: int) -> list[int]:
    """1, 2, 4, ... below `size`, and `size`."""
    return [*(1 << k for k in range(size.bit_length()) if 1 << k < size), size]


def _tilings(shape: Shape, machine: Machine) -> Tilings:
    """All tilings whose inputs and weights fit half of their buffers; the outputs, too, where they are bounded."""
    sides = max(len(_powers(shape.height)), len(_powers(shape.width)))
    pairs = [(min(1 << k, shape.height), min(1 << k, shape.width)) for k in range(sides)]
    sizes = (_powers(shape.batch), range(sides), _powers(shape.channels), _powers(shape.outputs))
    grid = np.array(np.meshgrid(*sizes, indexing="ij")).reshape(4, -1).astype(np.int64)
    side = np.array(pairs, dtype=np.int64)[grid[1]]
    tiles = {"batch": grid[0], "height": side[:, 0], "width": side[:, 1], "channels": grid[2], "outputs": grid[3]}
    every = Tilings(shape, machine, tiles)
    names = ("inputs", "weights") if shape.unbounded else ("inputs", "weights", "outputs")
    fits = np.all([every.held[name] <= every.room[name] for name in names], axis=0)
    return Tilings(shape, machine, {axis: size[fits] for axis, size in tiles.items()})
