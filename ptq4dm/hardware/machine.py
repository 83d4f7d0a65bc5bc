"""What a tiling depends on - the product, the array, its buffers and port, costs - and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

OUTPUT_BITS = 16


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
