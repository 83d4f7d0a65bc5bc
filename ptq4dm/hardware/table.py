"""The comparison as text, every line of which says that it is modelled, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..calibration.plot import pyplot, save_figure
from ..errors import UserError
from .comparison import Totals, ratios, turned_pairs
from .costs import HOROWITZ_45NM
from .designs import BASELINE, DESIGNS, array_area

WORD = "modelled"
NOTE = "modelled by arrays, tilings and tables of costs; no figure is a measurement"


def table(modes: Mapping[str, Totals]) -> str:
    """A Markdown table: a line for each design; time and energy of an image in each mode, and over the baseline's.

    mm2: of the array by the areas of operations at 45 nm.
    """
    head = [f"{WORD}: design", "array", "mm2"]
    for mode in modes:
        head += [f"{mode}: ms", f"x {BASELINE}", "mJ", f"x {BASELINE}"]
    lines = [_line(head), "|---" * len(head) + "|"]
    over = {mode: ratios(totals) for mode, totals in modes.items()}
    for design in DESIGNS:
        area = array_area(design, HOROWITZ_45NM)
        cells = [f"{WORD}: {design.name}", f"{design.rows} x {design.columns}", f"{area:.2f}"]
        for mode, totals in modes.items():
            one, (time, energy) = totals[design.name], over[mode][design.name]
            cells += [_number(one.time), f"{time:.3f}", _number(one.energy), f"{energy:.3f}"]
        lines.append(_line(cells))
    return "\n".join(lines)


def changes(name: str, before: Totals, after: Totals) -> str:
    """A sentence: which pairs of designs change their order, by time and by energy."""
    texts = []
    for what in ("time", "energy"):
        figures = [{design: getattr(one, what) for design, one in totals.items()} for totals in (before, after)]
        pairs = turned_pairs(*figures)
        better = {"time": "faster", "energy": "thriftier"}[what]
        texts += [f"{one} is now {better} than {other}" for one, other in pairs]
    return f"{WORD}: {name}: {'; '.join(texts) if texts else 'no pair of designs changes its order'}"


def _number(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(title: str, totals: Totals, path: Path) -> bool:
    """Bars of modelled time and energy of an image by layer type, one a design; False without matplotlib."""
    try:
        plt = pyplot()
    except UserError:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    names = list(totals)[::-1]
    kinds = list(next(iter(totals.values())).milliseconds)
    for axis, what, unit in zip(axes, ("milliseconds", "millijoules"), ("ms", "mJ"), strict=True):
        left = [0.0] * len(names)
        for kind in kinds:
            values = [getattr(totals[name], what)[kind] for name in names]
            axis.barh(names, values, left=left, label=kind)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axis.set_xlabel(f"{WORD} {unit} an image")
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle(f"{title}: {NOTE}", fontsize=10)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path)
    return True
