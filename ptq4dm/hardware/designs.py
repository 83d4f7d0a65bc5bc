"""The designs that are compared: arrays of processing elements, as data, and the widths that a layer has on each.

All have an output-stationary array, a port of 1024 bits a cycle to DRAM and buffers of 256, 128 and 128 KiB. The
published arrays are of equal area by their authors' statement: where INT8 has 32 x 32 elements, W4A8 has room for 64
x 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .costs import Costs
from .switches import Switches
from .work import Work

BUFFERS = (256 * 1024, 128 * 1024, 128 * 1024)
PORT = 1024
GROUP = 128
FLOAT_SIGNIFICAND = 11
SUPERSEDED_BITS = 6  # the mean of 4 and 8, by which older lists tag both operands (T7)


@dataclass(frozen=True)
class Design:
    """An array of rows x columns elements, each of which takes operands of `high` bits, or several of `low` bits.

    power: its row in a table of power. arithmetic: "shift" adds shifted activations for 4-bit weights, "multiply" has
    multipliers. floating: activations are float16. mixes: who gets 4 bits, "all", "none", "most blocks" (all but
    every fifth, ANT) or "some outputs" (the projections after attention of every second block, BitFusion).
    """

    name: str
    rows: int
    columns: int
    high: int
    low: int
    power: str
    arithmetic: Literal["shift", "multiply"]
    mixes: Literal["all", "none", "most blocks", "some outputs"]
    floating: bool = False


DESIGNS = (
    Design("MixPE-W4A8", 64, 64, 8, 4, "8,4", "shift", "all"),
    Design("ANT", 32, 32, 8, 4, "8,4", "multiply", "most blocks"),
    Design("BitFusion", 32, 40, 8, 4, "8,4", "multiply", "some outputs"),
    Design("INT8", 32, 32, 8, 4, "8,4", "multiply", "none"),
    Design("MixPE-W4A16", 32, 32, 16, 8, "16,8", "shift", "all", floating=True),
    Design("FP16", 32, 28, 16, 16, "16,16", "multiply", "none", floating=True),
)
BASELINE = "FP16"


@dataclass(frozen=True)
class Widths:
    """Bits of a layer's inputs and weights as they are stored and moved; shift: whether no multiplier is needed."""

    inputs: int
    weights: int
    shift: bool = False


def widths_of(design: Design, work: Work, blocks: list[str], switches: Switches) -> Widths:
    """The widths of a layer. `blocks`: all repeated blocks of the network, in their order.

    Which blocks ANT and BitFusion choose their authors draw at random; here they are spread evenly, so that a run can
    be made again. Their number is the published one.
    """
    wide = Widths(design.high, design.high)
    if work.edge or not work.weights or design.mixes == "none":
        return wide
    if design.mixes == "all":
        if switches.superseded and not design.floating:
            return Widths(SUPERSEDED_BITS, SUPERSEDED_BITS, shift=True)
        return Widths(design.high // 2 if switches.narrow_inputs else design.high, *_weights(design, switches))
    place = blocks.index(work.block) if work.block in blocks else -1
    if design.mixes == "most blocks":
        return wide if place in _spread(len(blocks), len(blocks) // 5) else Widths(4, 4)
    chosen = work.writes_attention and place in _spread(len(blocks), len(blocks) // 2)
    return Widths(4, 4) if chosen else wide


def _weights(design: Design, switches: Switches) -> tuple[int, bool]:
    return (design.high // 2 if switches.narrow_inputs else 4), True


def _spread(total: int, chosen: int) -> set[int]:
    """`chosen` of 0 ... total - 1, evenly spread."""
    return {(2 * k + 1) * total // (2 * chosen) for k in range(chosen)}


def side_by_side(design: Design, bits: int) -> int:
    """Operands of so many bits that an element takes in the place of one of its widest."""
    return design.high // max(bits, design.low)


def product_energy(design: Design, widths: Widths, costs: Costs) -> float:
    """pJ of one product and its accumulation by the table's operations.

    Integers: a multiplication, or three additions of the activation's and the weight's bits, and a 32-bit addition.
    Floats: a float16 multiplication, or three additions of the significand with 4 bits more and an addition to the
    exponent of 5 bits; and a float16 addition. What the sums of shifted terms are made of is our assumption.
    """
    operations = costs.operations
    if design.floating:
        shifts = 3 * operations.add(FLOAT_SIGNIFICAND + 4) + operations.add(5)
        return (shifts if widths.shift else operations.multiply_fp16) + operations.add_fp16
    shifts = 3 * operations.add(widths.inputs + 4)
    product = shifts if widths.shift else operations.multiply(widths.inputs, widths.weights)
    return product + operations.add32


def array_area(design: Design, costs: Costs) -> float:
    """mm2 of an array by the table's areas of operations: one product for each element, no registers."""
    operations = costs.operations
    bits = FLOAT_SIGNIFICAND + 4 if design.floating else design.high + 4
    shifts = 3 * operations.area_add8 * bits / 8
    if design.floating:
        shifts += operations.area_add8 * 5 / 8
    multiplier = operations.area_multiply_fp16 if design.floating else operations.area_multiply8
    accumulator = operations.area_add_fp16 if design.floating else operations.area_add32
    element = (shifts if design.arithmetic == "shift" else multiplier) + accumulator
    return design.rows * design.columns * element * 1e-6


def element_power(design: Design, widths: Widths, costs: Costs, switches: Switches) -> tuple[float, float]:
    """(dynamic, leakage) pJ a cycle of one element.

    T3 corrected: an element that shifts and adds takes, for each product that it makes in a cycle, the dynamic energy
    of the multiplying one of its width, times the ratio of their products' energies by the 45 nm operations (our
    assumption: the authors give no power of it). Leakage stays the row's.
    """
    dynamic, leakage = costs.power[design.power]
    if switches.shared_power or not widths.shift:
        return dynamic, leakage
    whole = costs.power["16,16" if design.floating else "8,4"][0]
    wide = Widths(design.high, design.high)
    ratio = product_energy(design, widths, costs) / product_energy(design, wide, costs)
    made = side_by_side(design, widths.inputs) * side_by_side(design, widths.weights)
    return whole * ratio * made, leakage
