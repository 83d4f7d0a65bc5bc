"""What many tilings of a product move, in one order of their loops: each figure an array with one entry a tiling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .machine import OUTPUT_BITS, Machine, SearchCosts, Shape, Traffic

AXES = ("batch", "height", "width", "channels", "outputs")
MOVES = {  # which loops change what a buffer holds
    "inputs": {"batch", "height", "width", "channels"},
    "weights": {"channels", "outputs"},
    "outputs": {"batch", "height", "width", "outputs"},
}
Arrays = dict[str, np.ndarray]


def up(a: Any, b: Any) -> Any:
    return -(-a // b)


@dataclass
class Tilings:
    """Tilings of a product, and what does not depend on the order of loops.

    tiles: axis -> sizes of tiles, int64 [T]. numbers: axis -> how many tiles. held: bits of one tile in each buffer;
    room: bits of half of it. made: results, unfinished sums too. compute: cycles. depth: inputs of a tile's result.
    """

    shape: Shape
    machine: Machine
    tiles: Arrays
    numbers: Arrays = field(init=False)
    held: Arrays = field(init=False)
    room: dict[str, int] = field(init=False)
    made: np.ndarray = field(init=False)
    compute: np.ndarray = field(init=False)
    depth: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shape, tiles = self.shape, self.tiles
        self.numbers = {axis: up(getattr(shape, axis), tiles[axis]) for axis in AXES}
        self.room = {name: size * 8 // 2 for name, size in zip(MOVES, self.machine.buffers, strict=True)}
        self.depth = shape.kernel[0] * shape.kernel[1] * tiles["channels"]
        pixels = tiles["batch"] * tiles["height"] * tiles["width"]
        self.held = self._held(pixels)
        total = np.prod([self.numbers[axis] for axis in AXES], axis=0)
        self.made = total * pixels * tiles["outputs"]
        columns = up(tiles["outputs"], self.machine.columns)
        self.compute = total * up(pixels, self.machine.rows) * columns * self.depth

    def _held(self, pixels: np.ndarray) -> Arrays:
        """Depth is padded to what the array takes side by side, as published; pixels that are used twice are not."""
        shape, tiles, machine = self.shape, self.tiles, self.machine
        across = machine.columns // machine.array[1] * machine.array[0]
        down = machine.rows // machine.array[0] * machine.array[1]
        overlapping = shape.kernel[0] > shape.stride[0] or shape.kernel[1] > shape.stride[1]
        if shape.unfolded or not overlapping:
            inputs = pixels * up(self.depth, down) * down
        else:
            high: np.ndarray = (tiles["height"] - 1) * shape.stride[0] + shape.kernel[0]
            wide: np.ndarray = (tiles["width"] - 1) * shape.stride[1] + shape.kernel[1]
            inputs = tiles["batch"] * high * wide * tiles["channels"]
        return {
            "inputs": inputs * shape.input_bits,
            "weights": up(self.depth, across) * across * tiles["outputs"] * shape.weight_bits,
            "outputs": pixels * tiles["outputs"] * OUTPUT_BITS,
        }

    def counted(self, order: tuple[str, ...]) -> Counted:
        """Cycles and bits for loops in this order, the outermost first."""
        promoted = {name: self._promoted(name, order) for name in MOVES}
        moved = {name: one[0] for name, one in promoted.items()}
        first = promoted["inputs"][1] + promoted["weights"][1]
        last = self._left(order) if self.shape.unbounded else self.held["outputs"]
        port = self.machine.port
        middle = up(moved["inputs"] + moved["weights"] + moved["outputs"] - first - last, port)
        stalls = np.maximum(0, middle - self.compute) + up(first, port) + up(last, port)
        products = self.made * self.depth
        results: np.ndarray = self.made * OUTPUT_BITS
        read = {
            "inputs": products * self.shape.input_bits,
            "weights": products * self.shape.weight_bits,
            "outputs": moved["outputs"] + results,
        }
        return Counted(self.compute + stalls, stalls, moved, read, {**moved, "outputs": results})

    def _promoted(self, name: str, order: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Bits moved in all, and bits that the buffer holds at the end of its growth.

        From the innermost loop out: while there is room, a loop that does not change what is held costs nothing, and
        one that does is held whole. From where there is none, every further loop moves all again.
        """
        moved, kept = self.held[name], self.held[name]
        grows: np.ndarray = np.ones(len(moved), bool)
        for axis in order[::-1]:
            if axis in MOVES[name]:
                moved = moved * self.numbers[axis]
                fits = moved <= self.room[name]
                kept = np.where(grows & fits, moved, kept)
                grows = grows & fits
            else:
                moved = np.where(grows, moved, moved * self.numbers[axis])
        return moved, kept

    def _left(self, order: tuple[str, ...]) -> np.ndarray:
        """Bits of outputs that the published search lets leave last: none where the innermost loop over them fits.

        Loops of one tile, which `order` leaves out, can stand innermost.
        """
        inner = [axis for axis in order[::-1] if axis in MOVES["outputs"]]
        tile = self.held["outputs"]
        whole = tile * self.numbers[inner[0]] if len(inner) == len(MOVES["outputs"]) else tile
        return np.where(whole <= self.room["outputs"], 0, tile)


@dataclass
class Counted:
    """Of each tiling cycles, stalls, bits of DRAM (moved), and bits read from and written to buffers."""

    cycles: np.ndarray
    stalls: np.ndarray
    moved: Arrays
    read: Arrays
    write: Arrays

    def at(self, places: np.ndarray) -> Counted:
        """The same of some tilings."""
        parts = [{name: bits[places] for name, bits in part.items()} for part in (self.moved, self.read, self.write)]
        return Counted(self.cycles[places], self.stalls[places], *parts)

    def energy(self, costs: SearchCosts) -> np.ndarray:
        total = (self.cycles - self.stalls) * costs.array
        total = total + (self.moved["inputs"] + self.moved["weights"]) * costs.dram[0]
        total = total + self.moved["outputs"] * costs.dram[1]
        for name in MOVES:
            read, write = getattr(costs, name)
            total = total + self.read[name] * read + self.write[name] * write
        return total

    def traffic(self, place: int) -> Traffic:
        moved, read, write = (
            {name: int(bits[place]) for name, bits in part.items()} for part in (self.moved, self.read, self.write)
        )
        dram_read = moved["inputs"] + moved["weights"]
        cycles, stalls = int(self.cycles[place]), int(self.stalls[place])
        return Traffic(cycles, stalls, dram_read, moved["outputs"], read, write)
