"""What operations and bits cost: two tables, each with its source. Energies are in pJ.

28nm: what the released simulator of MixPE uses: power of one processing element at 500 MHz as its authors synthesised
it in 28 nm (nW / 500 MHz), CACTI's energies of the buffers' banks, and DRAM. 45nm: energy per operation, M. Horowitz,
"Computing's energy problem (and what we can do about it)", ISSCC 2014. An operation of other widths than the table's
is scaled: an addition by its bits, a multiplication by the product of both widths; that is our assumption, and so is
what an element is made of (`designs.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Operations:
    """pJ of an operation: integer additions and multiplications of 8 and 32 bits, and floating ones; and areas."""

    add8: float = 0.03
    add32: float = 0.1
    multiply8: float = 0.2
    multiply32: float = 3.1
    add_fp16: float = 0.4
    multiply_fp16: float = 1.1
    add_fp32: float = 0.9
    multiply_fp32: float = 3.7
    area_add8: float = 36  # square micrometres
    area_add32: float = 137
    area_multiply8: float = 282
    area_add_fp16: float = 1360
    area_multiply_fp16: float = 1640

    def add(self, bits: int) -> float:
        return self.add8 * bits / 8

    def multiply(self, one: int, other: int) -> float:
        return self.multiply8 * one * other / 64


HOROWITZ = Operations()


@dataclass(frozen=True)
class Costs:
    """A table. Bits of a buffer: (read, write) pJ a bit; static: pJ a cycle of all that is not the array.

    power: an element's (dynamic, leakage) pJ a cycle by its row in the table; empty where `operations` are what
    counts. search_dram: what the released simulator compares tilings by (T5).
    """

    name: str
    source: str
    inputs: tuple[float, float]
    weights: tuple[float, float]
    outputs: tuple[float, float]
    dram: tuple[float, float]
    search_dram: tuple[float, float]
    static: float
    power: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    operations: Operations = HOROWITZ


FREQUENCY = 500_000_000
TO_PICOJOULES = 1e-9 / FREQUENCY * 1e12  # nW -> pJ a cycle


def _row(dynamic: float, leakage: float) -> tuple[float, float]:
    return dynamic * TO_PICOJOULES, leakage * TO_PICOJOULES


AUTHORS_28NM = Costs(
    name="28nm",
    source="MixPE's released simulator: 28 nm, 500 MHz, synthesis; CACTI for buffers",
    inputs=(17.7688 / 512, 24.8866 / 512),  # a bank of 8 KB that gives 64 bytes
    weights=(16.8924 / 512, 20.3422 / 512),  # 4 KB, 64 bytes
    outputs=(0.294945 / 32, 0.415925 / 32),  # 128 bytes, 4 bytes
    dram=(644.304 / 1024, 784.104 / 1024),
    search_dram=(1182.94 / 1024, 1477.97 / 1024),
    static=969.23,  # 484.615 mW of DRAM
    power={
        "8,4": _row(279960, 64314),
        "16,8": _row(544982, 128458),
        "16,16": _row(839982, 192942),
    },
)
HOROWITZ_45NM = Costs(
    name="45nm",
    source="M. Horowitz, ISSCC 2014: 45 nm, energy per operation; no leakage, no static power",
    inputs=(10 / 64, 10 / 64),  # a cache of 8 KB, 64 bits
    weights=(10 / 64, 10 / 64),
    outputs=(10 / 64, 10 / 64),
    dram=(1950 / 64, 1950 / 64),  # the middle of 1.3 to 2.6 nJ for 64 bits
    search_dram=(1950 / 64, 1950 / 64),
    static=0.0,
)
TABLES = {costs.name: costs for costs in (AUTHORS_28NM, HOROWITZ_45NM)}
