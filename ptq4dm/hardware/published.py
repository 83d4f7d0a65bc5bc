"""The figures of the released simulator's results file, beside what is modelled here; and what each fault changes.

python -m ptq4dm.hardware.published
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .comparison import Totals, compare, mean_over, ratios, turned_pairs
from .costs import AUTHORS_28NM, TABLES, Costs
from .designs import DESIGNS
from .nets import NETS, batch_of, works_of_net
from .simulator import PARTS
from .switches import LABELS, MODES, PUBLISHED, Switches, meaning, turned

# The last section of results/mixpe_res.csv of github.com/yuzhang712/mixpe_simulator; columns as DESIGNS, over FP16.
TIMES = {
    "vit-b": (0.15, 0.61, 0.70, 0.82, 0.53, 1.00),
    "vit-h": (0.12, 0.47, 0.67, 0.82, 0.32, 1.00),
    "opt-6.7b": (0.10, 0.40, 0.68, 0.86, 0.19, 1.00),
    "llama2-13b": (0.10, 0.40, 0.68, 0.86, 0.19, 1.00),
}
MEAN_TIMES = (0.12, 0.47, 0.68, 0.84, 0.31, 1.00)
ENERGIES = {
    "static": {
        "vit-b": (0.04, 0.15, 0.17, 0.20, 0.13, 0.24),
        "vit-h": (0.03, 0.11, 0.15, 0.19, 0.07, 0.23),
        "opt-6.7b": (0.02, 0.09, 0.15, 0.19, 0.04, 0.22),
        "llama2-13b": (0.02, 0.09, 0.15, 0.19, 0.04, 0.22),
    },
    "dram": {
        "vit-b": (0.02, 0.03, 0.04, 0.05, 0.05, 0.07),
        "vit-h": (0.01, 0.03, 0.03, 0.07, 0.03, 0.12),
        "opt-6.7b": (0.01, 0.03, 0.03, 0.05, 0.02, 0.13),
        "llama2-13b": (0.01, 0.03, 0.03, 0.06, 0.02, 0.13),
    },
    "buffers": {
        "vit-b": (0.09, 0.10, 0.12, 0.12, 0.17, 0.23),
        "vit-h": (0.06, 0.08, 0.11, 0.11, 0.12, 0.23),
        "opt-6.7b": (0.05, 0.07, 0.11, 0.11, 0.10, 0.23),
        "llama2-13b": (0.05, 0.07, 0.11, 0.12, 0.10, 0.23),
    },
    "array": {
        "vit-b": (0.11, 0.11, 0.15, 0.14, 0.18, 0.46),
        "vit-h": (0.08, 0.08, 0.14, 0.13, 0.10, 0.43),
        "opt-6.7b": (0.06, 0.06, 0.14, 0.14, 0.06, 0.42),
        "llama2-13b": (0.06, 0.06, 0.14, 0.14, 0.06, 0.42),
    },
}
MEAN_ENERGIES = {
    "static": (0.14, 0.11, 0.13, 0.11, 0.14, 0.16),
    "dram": (0.04, 0.05, 0.05, 0.03, 0.05, 0.05),
    "buffers": (0.14, 0.12, 0.12, 0.09, 0.12, 0.14),
    "array": (0.20, 0.17, 0.18, 0.10, 0.12, 0.14),
}
SUPERSEDED_W4A8 = {"vit-b": 0.20, "vit-h": 0.19, "opt-6.7b": 0.19, "llama2-13b": 0.19}
"""Times of MixPE-W4A8 in the section that the abstract's 2.6 is from (T7)."""


def totals_of_net(name: str, switches: Switches, costs: Costs = AUTHORS_28NM) -> Totals:
    """The designs' totals on one of the four nets, for one image or sequence."""
    batch = batch_of(switches)
    return compare(works_of_net(name, batch, switches), 1 / batch, costs, switches)


def part_ratios(totals: Totals, part: str) -> list[float]:
    """One part of each design's energy over the whole energy of FP16, as the results file has it."""
    return [one.parts[part] / totals["FP16"].energy for one in totals.values()]


def mean_parts(found: Mapping[str, Totals], switches: Switches) -> dict[str, list[float]]:
    """Part of energy -> its mean over nets for each design.

    As published (T4) the array's last two columns are means of the buffers, besides what `mean_over` says.
    """
    rows = {part: [part_ratios(totals, part) for totals in found.values()] for part in PARTS}
    means = {part: mean_over(nets, switches, energy=True) for part, nets in rows.items()}
    if switches.wrong_means:
        means["array"][-2:] = means["buffers"][-2:]
    return means


def _pair(modelled: Sequence[float], published: Sequence[float]) -> str:
    return " | ".join(f"{one:.3f} ({other:.2f})" for one, other in zip(modelled, published, strict=True))


def report() -> str:
    """Markdown tables: modelled (published), and the mean over the four nets with each fault turned by itself.

    Means of the second kind are geometric in all rows but T4's, which has them as the results file does.
    """
    names = [design.name for design in DESIGNS]
    head = " | ".join(names)
    found = {net: totals_of_net(net, PUBLISHED) for net in NETS}
    over = {net: ratios(totals) for net, totals in found.items()}
    lines = [f"| modelled (published) | {head} |", "|---" * (len(names) + 1) + "|"]
    times = {net: [time for time, _ in pairs.values()] for net, pairs in over.items()}
    lines += [f"| modelled: time, {NETS[net].name} | {_pair(times[net], TIMES[net])} |" for net in NETS]
    lines.append(f"| modelled: time, mean | {_pair(mean_over(list(times.values()), PUBLISHED, False), MEAN_TIMES)} |")
    for net in NETS:
        sums = [sum(ENERGIES[part][net][k] for part in PARTS) for k in range(len(names))]
        energies = [energy for _, energy in over[net].values()]
        lines.append(f"| modelled: energy, {NETS[net].name} | {_pair(energies, sums)} |")
    gaps = [
        abs(one - other)
        for part in PARTS
        for net in NETS
        for one, other in zip(part_ratios(found[net], part), ENERGIES[part][net], strict=True)
    ]
    lines.append(f"\nmodelled: the largest gap of {len(gaps)} parts of energies to the published: {max(gaps):.4f}")
    for name, costs in TABLES.items():
        lines += ["", f"| modelled, {name}: time / energy, mean over the nets | {head} | order |"]
        lines.append("|---" * (len(names) + 2) + "|")
        plain = turned(PUBLISHED, "T4")
        before = _means(plain, costs)
        lines.append(_row("as published", before, before))
        for label in LABELS:
            lines.append(_row(f"{label}: {meaning(label)}", _means(turned(plain, label), costs), before))
        corrected = MODES["corrected"]
        lines.append(_row("corrected but for T3", _means(turned(corrected, "T3"), costs), before))
        lines.append(_row("corrected", _means(corrected, costs), before))
    return "\n".join(lines)


Means = tuple[list[float], list[float]]


def _means(switches: Switches, costs: Costs) -> Means:
    """Means over the four nets of times and of energies over FP16, as the switches say (T4)."""
    found = [list(ratios(totals_of_net(net, switches, costs)).values()) for net in NETS]
    times, energies = ([[pair[k] for pair in net] for net in found] for k in (0, 1))
    return mean_over(times, switches, energy=False), mean_over(energies, switches, energy=True)


def _row(what: str, means: Means, before: Means) -> str:
    names = [design.name for design in DESIGNS]
    cells = [f"{time:.3f} / {energy:.3f}" for time, energy in zip(*means, strict=True)]
    turns = []
    for word, old, new in zip(("faster", "thriftier"), before, means, strict=True):
        pairs = turned_pairs(dict(zip(names, old, strict=True)), dict(zip(names, new, strict=True)))
        turns += [f"{one} {word} than {other}" for one, other in pairs]
    return f"| modelled: {what} | {' | '.join(cells)} | {', '.join(turns) or 'the same'} |"


if __name__ == "__main__":
    print(report())
