"""The faults of the released simulator, each a switch: "as published" has them, "corrected" has none.

T1 to T7 are faults of its lists, tables and reports. T8 to T11 we add: they were found when the simulator was built
again, and they matter for shapes of diffusion models. What each one changes is in README.md of this folder.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import UserError
from ..options import option


@dataclass(frozen=True)
class Switches:
    """True: as in the released simulator. False: corrected."""

    narrow_inputs: bool = option(True, "T1: MixPE's inputs are as narrow as its weights, their traffic too")
    cheap_scaling: bool = option(True, "T2: MixPE's scales are charged for an eighth of the outputs and groups")
    shared_power: bool = option(True, "T3: an element that shifts and adds takes the power of one that multiplies")
    wrong_means: bool = option(True, "T4: the mean over nets is arithmetic; that of energies reads wrong columns")
    search_costs: bool = option(True, "T5: tilings are compared by other costs of DRAM than the report's")
    half_filled: bool = option(True, "T6: 64 rows at once, where W4A8 has room for 128")
    superseded: bool = option(False, "T7: W4A8 is that of the older section of the results, 6 bits for both operands")
    plain_llama: bool = option(True, "T8: Llama2-13B has OPT's feed-forward, 4 x 5120, and not its own of 3 x 13824")
    unfolded: bool = option(True, "T9: a convolution's windows are copied out in DRAM, a pixel for each use")
    dear_weights: bool = option(True, "T10: designs that dequantize weights first do it once for every 8 rows")
    unbounded: bool = option(True, "T11: tiles of outputs may be larger than their buffer, and leave it in no time")


LABELS = {item.metadata["help"].partition(":")[0]: item.name for item in fields(Switches)}
"""T1 -> narrow_inputs, and so on."""

PUBLISHED = Switches()
CORRECTED = Switches(**{name: False for name in LABELS.values()})
MODES = {"published": PUBLISHED, "corrected": CORRECTED}


def meaning(label: str) -> str:
    """Return what a switch says of the released simulator."""
    items: dict[str, Any] = {item.name: item for item in fields(Switches)}
    return items[LABELS[label]].metadata["help"].partition(": ")[2]


def turned(switches: Switches, label: str) -> Switches:
    """The same with one switch the other way. Raises UserError for a label that is none."""
    if label not in LABELS:
        raise UserError(f"'{label}' is no fault of the simulator; choose from {', '.join(LABELS)}.")
    name = LABELS[label]
    return replace(switches, **{name: not getattr(switches, name)})
