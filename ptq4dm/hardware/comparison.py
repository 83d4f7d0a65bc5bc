"""Designs side by side on one model: modelled time and energy of an image by layer type, means, orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from ..errors import UserError
from .costs import FREQUENCY, Costs
from .designs import BASELINE, DESIGNS, Design
from .simulator import PARTS, simulate
from .switches import Switches
from .work import Work


@dataclass(frozen=True)
class Total:
    """One design on one model, modelled, for one image: ms and mJ by layer type, and mJ by part."""

    milliseconds: dict[str, float]
    millijoules: dict[str, float]
    parts: dict[str, float]

    @property
    def time(self) -> float:
        return sum(self.milliseconds.values())

    @property
    def energy(self) -> float:
        return sum(self.millijoules.values())


Totals = dict[str, Total]
"""Design name -> total, in the order of the designs."""

Workload = Callable[[Switches], tuple[Sequence[Work], float]]
"""Switches -> the layers of some images at once, and by what their cycles are multiplied to be those of one image."""


def compare(
    works: Sequence[Work], share: float, costs: Costs, switches: Switches, designs: Sequence[Design] = DESIGNS
) -> Totals:
    """The total of each design.

    share: steps of an image over images at once, so that the figures are of one image.

    Raises:
        UserError: there is no work.
    """
    if not works:
        raise UserError("there are no layers to model.")
    return {design.name: _total(works, share, costs, switches, design) for design in designs}


def _total(works: Sequence[Work], share: float, costs: Costs, switches: Switches, design: Design) -> Total:
    kinds = dict.fromkeys(work.kind for work in works)
    times, energies = (dict.fromkeys(kinds, 0.0) for _ in range(2))
    parts = dict.fromkeys(PARTS, 0.0)
    for one in simulate(works, design, costs, switches):
        times[one.work.kind] += one.cycles * share / FREQUENCY * 1e3
        energies[one.work.kind] += sum(one.energy.values()) * share * 1e-9
        for part, picojoules in one.energy.items():
            parts[part] += picojoules * share * 1e-9
    return Total(times, energies, parts)


def ratios(totals: Totals, baseline: str = BASELINE) -> dict[str, tuple[float, float]]:
    """Design name -> (time, energy) over those of the baseline."""
    whole = totals[baseline]
    return {name: (one.time / whole.time, one.energy / whole.energy) for name, one in totals.items()}


def turned_pairs(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pairs of designs whose order is another after than before: (the better one now, the better one before)."""
    pairs = []
    for one, other in combinations(before, 2):
        if (before[one] - before[other]) * (after[one] - after[other]) < 0:
            pairs.append((one, other) if after[one] < after[other] else (other, one))
    return pairs


def mean_over(nets: Sequence[Sequence[float]], switches: Switches, energy: bool) -> list[float]:
    """The mean over nets for each design; nets: [nets][designs] ratios.

    Geometric; as published (T4) arithmetic, and of energies read from a flat list in steps of one design too few.
    """
    count = len(nets[0])
    if not switches.wrong_means:
        return [math.exp(sum(math.log(net[k]) for net in nets) / len(nets)) for k in range(count)]
    flat, step = [value for net in nets for value in net], count - 1 if energy else count
    return [sum(flat[n * step + k] for n in range(len(nets))) / len(nets) for k in range(count)]
