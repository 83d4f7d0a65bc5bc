"""What a choice of rows came to: shares of 8-bit rows by type of layer, salience by time; as JSON, as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.plot import pyplot, save_figure
from ..files.atomic import replacing
from .salient_rows import Salience, predicted_error

TYPES = 12  # of layers in a picture, those of the most salience


def layer_type(name: str) -> str:
    """What a layer is called in all blocks: the last two parts of its name that are no numbers."""
    return ".".join([part for part in name.split(".") if not part.isdigit()][-2:])


@dataclass
class ChosenRows:
    """Rows of 8 bits, and why.

    rows: layer -> their numbers, of all layers that were asked about. share: of all rows, as it was asked for.
    weights: the share of these layers' weights that lies in the chosen rows; rows of many inputs have larger scores,
        so that it is the larger share where layers differ in inputs. bits: the mean width, without scales.
    """

    salience: Salience
    rows: dict[str, list[int]]
    share: float
    weights: float
    bits: float

    def shares(self) -> dict[str, dict[str, Any]]:
        """Type of layer -> "layers", "rows", "wide", and "share", of its rows that have 8 bits; the largest first."""
        found: dict[str, dict[str, Any]] = {}
        for name, score in self.salience.scores.items():
            one = found.setdefault(layer_type(name), {"layers": 0, "rows": 0, "wide": 0})
            one["layers"] += 1
            one["rows"] += score.shape[1]
            one["wide"] += len(self.rows[name])
        for one in found.values():
            one["share"] = one["wide"] / one["rows"]
        return dict(sorted(found.items(), key=lambda item: -item[1]["share"]))

    @property
    def error_left(self) -> float:
        """The sum of the scores of rows of 4 bits over that of all rows; of gauss-newton, a share of the error."""
        total = self.salience.total
        everything = predicted_error(total, {})
        return predicted_error(total, self.rows) / everything if everything else 0.0

    def text(self) -> str:
        """A line for reports."""
        whole = sum(one["rows"] for one in self.shares().values())
        wide = sum(map(len, self.rows.values()))
        by_type = ", ".join(f"{name} {one['share']:.0%}" for name, one in self.shares().items() if one["wide"])
        return (
            f"rows of 8 bits: {wide} of {whole} ({wide / whole:.1%}), {self.weights:.1%} of the weights, "
            f"{self.bits:.2f} bits a weight, by {self.salience.importance}: {by_type or 'none'}"
        )

    def found(self) -> dict[str, Any]:
        """What a report of quantization has of it."""
        return {
            "text": self.text(),
            "share": self.share,
            "weights": self.weights,
            "bits": self.bits,
            "error_left": self.error_left,
            "types": self.shares(),
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: `found`, the rows, and the salience of all rows by time."""
        by_time = {"by_layer": self.salience.by_layer(), "overlap": self.salience.overlap(self.share)}
        return {**self.found(), "rows": self.rows, **by_time, "salience": self.salience.to_dict()}

    def save(self, path: str | Path) -> None:
        """Write `to_dict` into a JSON file. Raises UserError if it cannot be written."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False))

    def draw(self, path: str | Path) -> None:
        """Draw which rows matter when: the share of each type of layer in the salience of each timestep bin, and how
        many of the rows that one bin would choose another would choose, too.

        Raises UserError: matplotlib is missing, or the file cannot be written.
        """
        plt = pyplot()
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2))
        parts = by_type(self.salience.by_layer())
        most = sorted(parts, key=lambda name: -sum(parts[name]))
        kept, shares = most[:TYPES], self.shares()
        centres = [100 * (a + b) / 2 for a, b in zip(self.salience.edges, self.salience.edges[1:], strict=False)]
        bands = [parts[name] for name in kept]
        labels = [f"{name} ({shares[name]['share']:.0%} of rows)" for name in kept]
        if rest := most[TYPES:]:
            bands.append([sum(values) for values in zip(*(parts[name] for name in rest), strict=True)])
            labels.append(f"{len(rest)} others")
        bottom = [0.0] * len(centres)
        for place, (band, label) in enumerate(zip(bands, labels, strict=True)):
            colour = plt.get_cmap("tab20")(place)
            left.bar(centres, band, 95 / len(centres), bottom=bottom, label=label, color=colour)
            bottom = [a + b for a, b in zip(bottom, band, strict=True)]
        left.set_xlabel("time, % of the way to pure noise")
        left.set_ylabel(f"share of the salience ({self.salience.importance})")
        left.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), title="layers (rows of 8 bits)")
        empty = [not any(values) for values in zip(*bands, strict=True)]  # times that no tuple has: white
        for centre in (at for at, none in zip(centres, empty, strict=True) if none):
            left.text(centre, 0.5, "no tuples", rotation=90, ha="center", va="center", color="grey")
        overlap = [
            [math.nan if one or other else value for value, other in zip(values, empty, strict=True)]
            for values, one in zip(self.salience.overlap(self.share), empty, strict=True)
        ]
        image = right.imshow(overlap, vmin=0, vmax=1, origin="lower", extent=(0, 100) * 2)
        right.set_xlabel("time, %")
        right.set_ylabel("time, %")
        right.set_title(f"rows that both times choose, of {self.share:.0%}", fontsize=10)
        figure.colorbar(image, ax=right)
        save_figure(figure, path)


def by_type(layers: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Type of layer -> sums of the values of its layers."""
    found: dict[str, list[float]] = {}
    for name, values in layers.items():
        kind = layer_type(name)
        found[kind] = [a + b for a, b in zip(found.get(kind, [0.0] * len(values)), values, strict=True)]
    return found
