"""Cycles and energy of layers on a design, modelled: array, tiling and traffic, dequantization included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .costs import FREQUENCY, Costs
from .designs import BUFFERS, GROUP, PORT, Design, Widths, element_power, product_energy, side_by_side, widths_of
from .machine import Machine, SearchCosts, Shape, Traffic
from .switches import Switches
from .tiling import best_tiling
from .work import Work

PARTS = ("static", "dram", "buffers", "array")


@dataclass(frozen=True)
class Modelled:
    """One layer on a design, all of its `count` times: cycles, those of them that wait, and pJ by part."""

    work: Work
    cycles: float
    stalls: float
    energy: dict[str, float]

    @property
    def milliseconds(self) -> float:
        return self.cycles / FREQUENCY * 1e3

    @property
    def millijoules(self) -> float:
        return sum(self.energy.values()) * 1e-9


def simulate(works: Sequence[Work], design: Design, costs: Costs, switches: Switches) -> list[Modelled]:
    """What each layer takes on a design, in the order given, with its dequantization."""
    blocks = list(dict.fromkeys(work.block for work in works if work.block))
    found = []
    for work in works:
        widths = widths_of(design, work, blocks, switches)
        parts = [_product(work, design, widths, costs, switches)]
        if not work.edge and work.weights:
            parts.append(_dequantization(work, design, widths, costs, switches))
        energy = {part: work.count * sum(one[2][part] for one in parts) for part in PARTS}
        cycles, stalls = work.count * sum(one[0] for one in parts), work.count * sum(one[1] for one in parts)
        found.append(Modelled(work, cycles, stalls, energy))
    return found


Part = tuple[float, float, dict[str, float]]


def _product(work: Work, design: Design, widths: Widths, costs: Costs, switches: Switches) -> Part:
    """Cycles, stalls and energy of a matrix product on the array."""
    power = element_power(design, widths, costs, switches) if costs.power else (0.0, 0.0)
    elements = design.rows * design.columns
    machine = Machine(
        design.rows * side_by_side(design, widths.inputs),
        design.columns * side_by_side(design, widths.weights),
        (design.rows, design.columns),
        BUFFERS,
        PORT,
    )
    dram = costs.search_dram if switches.search_costs else costs.dram
    search = SearchCosts(costs.inputs, costs.weights, costs.outputs, dram, power[0] * elements)
    traffic = best_tiling(_shape(work, widths, switches), machine, search)
    energy = _moving(traffic, costs)
    if costs.power:
        busy = traffic.cycles - traffic.stalls
        energy["array"] = elements * (busy * power[0] + traffic.cycles * power[1])
    else:
        energy["array"] = work.products * product_energy(design, widths, costs)
    return traffic.cycles, traffic.stalls, energy


def _shape(work: Work, widths: Widths, switches: Switches) -> Shape:
    size = (work.batch, work.height, work.width, work.channels, work.outputs, work.kernel, work.stride)
    return Shape(*size, widths.inputs, widths.weights, switches.unfolded, switches.unbounded)


def _moving(traffic: Traffic, costs: Costs) -> dict[str, float]:
    buffers = 0.0
    for name in ("inputs", "weights", "outputs"):
        read, write = getattr(costs, name)
        buffers += traffic.buffer_read[name] * read + traffic.buffer_write[name] * write
    dram = traffic.dram_read * costs.dram[0] + traffic.dram_write * costs.dram[1]
    return {"static": traffic.cycles * costs.static, "dram": dram, "buffers": buffers, "array": 0.0}


def _dequantization(work: Work, design: Design, widths: Widths, costs: Costs, switches: Switches) -> Part:
    """What becomes of the scales: after a group's product on MixPE, of every weight before the product elsewhere.

    Published: one more matrix product, an eighth of the outputs wide, or of 1/8 of the inputs and 1/128 of the
    outputs. Corrected: a multiplication for each output and group (T2), or for each weight each time it passes the
    array (T10), on all elements of the array at once, with nothing moved: our assumption.
    """
    after = design.mixes == "all"
    wide = Widths(design.high, design.high)
    if switches.cheap_scaling if after else switches.dear_weights:
        return _product(_as_product(work, after), design, wide, costs, switches)
    passes = -(-work.rows // (design.rows * side_by_side(design, widths.inputs)))
    groups = -(-work.inputs // GROUP)
    count = work.rows * work.outputs * groups if after else work.inputs * work.outputs * passes
    elements = design.rows * design.columns
    cycles = -(-count // elements)
    energy = {"static": cycles * costs.static, "dram": 0.0, "buffers": 0.0}
    if costs.power:
        energy["array"] = elements * cycles * sum(costs.power[design.power])
    else:
        energy["array"] = count * _scaling_energy(design, after, costs)
    return cycles, 0.0, energy


def _as_product(work: Work, after: bool) -> Work:
    """The product that the released simulator has in the place of a dequantization."""
    if after:
        return replace(work, channels=max(1, work.channels // 8), outputs=max(1, work.outputs // GROUP))
    return replace(work, outputs=max(1, work.outputs // 8))


def _scaling_energy(design: Design, after: bool, costs: Costs) -> float:
    """pJ: a float32 multiplication and addition for a group's sum; for a weight a multiplication of the array."""
    operations = costs.operations
    if after:
        return operations.multiply_fp32 + operations.add_fp32
    return operations.multiply_fp16 if design.floating else operations.multiply8
