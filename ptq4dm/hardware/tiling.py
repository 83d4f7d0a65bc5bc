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

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np

from ..errors import UserError

OUTPUT_BITS = 16
AXES = ("batch", "height", "width", "channels", "outputs")
MOVES = {  # which loops change what a buffer holds
    "inputs": {"batch", "height", "width", "channels"},
    "weights": {"channels", "outputs"},
    "outputs": {"batch", "height", "width", "outputs"},
}


@dataclass(frozen=True)
class Machine:
    """What a tiling depends on: array rows and columns as the widths see them, buffers and the port to memory.

    rows, columns: products that the array makes side by side: its own, times how many narrow operands fit a wide one.
    buffers: bytes of (inputs, weights, outputs), both halves. port: bits of DRAM a cycle.
    """

    rows: int
    columns: int
    array: tuple[int, int]
    buffers: tuple[int, int, int]
    port: int


@dataclass(frozen=True)
class Shape:
    """A product and the widths of its operands.

    unfolded: overlapping windows of a convolution are copied out in DRAM. unbounded: tiles of outputs may be larger
    than their buffer, and the last of them leave it in no time. Both as published.
    """

    batch: int
    height: int
    width: int
    channels: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    input_bits: int
    weight_bits: int
    unfolded: bool = True
    unbounded: bool = True


@dataclass(frozen=True)
class SearchCosts:
    """What equally fast tilings are compared by: (read, write) pJ a bit of the buffers and of DRAM.

    array: pJ of the whole array for a cycle in which it computes.
    """

    inputs: tuple[float, float]
    weights: tuple[float, float]
    outputs: tuple[float, float]
    dram: tuple[float, float]
    array: float


@dataclass(frozen=True)
class Traffic:
    """Cycles, and bits moved. `stalls` are those of `cycles` in which the array waits."""

    cycles: int
    stalls: int
    dram_read: int
    dram_write: int
    buffer_read: dict[str, int]
    buffer_write: dict[str, int]


@lru_cache(maxsize=4096)
def best_tiling(shape: Shape, machine: Machine, costs: SearchCosts) -> Traffic:
    """The traffic of the fastest tiling. Raises UserError where no tile fits the buffers."""
    tiles = _tilings(shape, machine)
    if not len(tiles["batch"]):
        raise UserError(f"no tile of a layer with kernel {shape.kernel} fits the modelled accelerator's buffers.")
    cut = [axis for axis in AXES if bool((_number(tiles, shape, axis) > 1).any())]
    best: tuple[int, float] | None = None
    found: Traffic | None = None
    for order in permutations(cut):
        counted = _count(shape, machine, tiles, order)
        energy = _energy(counted, costs)
        cycles = counted["cycles"]
        fewest = int(cycles.min())
        ties = np.flatnonzero(cycles == fewest)
        at = ties[int(energy[ties].argmin())]
        if best is None or (fewest, float(energy[at])) < best:
            best, found = (fewest, float(energy[at])), _traffic(counted, int(at))
    assert found is not None
    return found


def _powers(size: int) -> list[int]:
    """1, 2, 4, ... below `size`, and `size`."""
    return [*(1 << k for k in range(size.bit_length()) if 1 << k < size), size]


def _up(a: Any, b: Any) -> Any:
    return -(-a // b)


def _number(tiles: dict[str, np.ndarray], shape: Shape, axis: str) -> np.ndarray:
    return _up(getattr(shape, axis), tiles[axis])


def _tilings(shape: Shape, machine: Machine) -> dict[str, np.ndarray]:
    """Axis -> sizes of tiles, int64 [T], of all tilings whose inputs and weights fit half of their buffers."""
    sides = max(len(_powers(shape.height)), len(_powers(shape.width)))
    pairs = [(min(1 << k, shape.height), min(1 << k, shape.width)) for k in range(sides)]
    sizes = (_powers(shape.batch), range(sides), _powers(shape.channels), _powers(shape.outputs))
    grid = np.array(np.meshgrid(*sizes, indexing="ij")).reshape(4, -1).astype(np.int64)
    side = np.array(pairs, dtype=np.int64)[grid[1]]
    tiles = {"batch": grid[0], "height": side[:, 0], "width": side[:, 1], "channels": grid[2], "outputs": grid[3]}
    held = _held(shape, machine, tiles)
    names = ("inputs", "weights") if shape.unbounded else tuple(MOVES)
    rooms = dict(zip(MOVES, machine.buffers, strict=True))
    fits = np.all([held[name] <= rooms[name] * 4 for name in names], axis=0)
    return {axis: size[fits] for axis, size in tiles.items()}


def _held(shape: Shape, machine: Machine, tiles: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bits of one tile in each buffer. Depth is padded to what the array takes side by side, as published."""
    taps = shape.kernel[0] * shape.kernel[1]
    depth: np.ndarray = taps * tiles["channels"]
    pixels = tiles["batch"] * tiles["height"] * tiles["width"]
    across = machine.columns // machine.array[1] * machine.array[0]
    down = machine.rows // machine.array[0] * machine.array[1]
    overlapping = shape.kernel[0] > shape.stride[0] or shape.kernel[1] > shape.stride[1]
    if shape.unfolded or not overlapping:
        inputs = pixels * _up(depth, down) * down
    else:
        high: np.ndarray = (tiles["height"] - 1) * shape.stride[0] + shape.kernel[0]
        wide: np.ndarray = (tiles["width"] - 1) * shape.stride[1] + shape.kernel[1]
        inputs = tiles["batch"] * high * wide * tiles["channels"]
    return {
        "inputs": inputs * shape.input_bits,
        "weights": _up(depth, across) * across * tiles["outputs"] * shape.weight_bits,
        "outputs": pixels * tiles["outputs"] * OUTPUT_BITS,
    }


def _count(shape: Shape, machine: Machine, tiles: dict[str, np.ndarray], order: tuple[str, ...]) -> dict:
    """Cycles and bits of all tilings for loops in this order, the outermost first."""
    numbers = {axis: _number(tiles, shape, axis) for axis in AXES}
    held = _held(shape, machine, tiles)
    moved, kept = {}, {}
    for name, room in zip(MOVES, machine.buffers, strict=True):
        moved[name], kept[name] = _promoted(held[name], room * 4, [(a, numbers[a]) for a in order[::-1]], name)
    if shape.unbounded:  # published: set to nothing by the first loop over outputs, one of a single tile included
        kept["outputs"] = _left(held["outputs"], machine.buffers[2] * 4, numbers, order)
    total = np.prod([numbers[axis] for axis in AXES], axis=0)
    pixels = tiles["batch"] * tiles["height"] * tiles["width"]
    depth: np.ndarray = shape.kernel[0] * shape.kernel[1] * tiles["channels"]
    made = total * pixels * tiles["outputs"]
    compute = total * _up(pixels, machine.rows) * _up(tiles["outputs"], machine.columns) * depth
    dram_read, dram_write = moved["inputs"] + moved["weights"], moved["outputs"]
    first = kept["inputs"] + kept["weights"]
    last = kept["outputs"] if shape.unbounded else held["outputs"]
    middle = _up(dram_read + dram_write - first - last, machine.port)
    stalls = np.maximum(0, middle - compute) + _up(first, machine.port) + _up(last, machine.port)
    return {
        "cycles": compute + stalls,
        "stalls": stalls,
        "dram_read": dram_read,
        "dram_write": dram_write,
        "inputs": (made * depth * shape.input_bits, moved["inputs"]),
        "weights": (made * depth * shape.weight_bits, moved["weights"]),
        "outputs": (moved["outputs"] + made * OUTPUT_BITS, made * OUTPUT_BITS),
    }


def _promoted(
    held: np.ndarray, room: int, loops: list[tuple[str, np.ndarray]], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Bits moved in all, and bits that the buffer holds at the end of its growth; `loops` from the innermost out.

    While there is room, a loop that does not change what is held costs nothing, and one that does is held whole.
    From where there is none, every further loop moves all again.
    """
    moved, kept = held.copy(), held.copy()
    grows: np.ndarray = np.ones(len(held), bool)
    for axis, number in loops:
        if axis in MOVES[name]:
            moved = moved * number
            fits = moved <= room
            kept = np.where(grows & fits, moved, kept)
            grows &= fits
        else:
            moved = np.where(grows, moved, moved * number)
    return moved, kept


def _left(held: np.ndarray, room: int, numbers: dict[str, np.ndarray], order: tuple[str, ...]) -> np.ndarray:
    """Bits of outputs that the published search lets leave last: none where the innermost loop over outputs fits."""
    inner = [axis for axis in order[::-1] if axis in MOVES["outputs"]]
    idle = len(inner) < len(MOVES["outputs"])  # a loop of one tile can stand innermost
    tile = held if idle else held * numbers[inner[0]]
    return np.where(tile <= room, 0, held)


def _energy(counted: dict, costs: SearchCosts) -> np.ndarray:
    total = (counted["cycles"] - counted["stalls"]) * costs.array
    total = total + counted["dram_read"] * costs.dram[0] + counted["dram_write"] * costs.dram[1]
    for name in MOVES:
        read, write = counted[name]
        per_read, per_write = getattr(costs, name)
        total = total + read * per_read + write * per_write
    return total


def _traffic(counted: dict, at: int) -> Traffic:
    plain = {name: int(counted[name][at]) for name in ("cycles", "stalls", "dram_read", "dram_write")}
    read = {name: int(counted[name][0][at]) for name in MOVES}
    write = {name: int(counted[name][1][at]) for name in MOVES}
    return Traffic(**plain, buffer_read=read, buffer_write=write)
