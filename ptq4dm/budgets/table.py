"""What every layer costs in every format, and what that does to the model's prediction: all that a choice looks at.

A choice is `picks` [L]: of each layer the number of its format. Costs of layers add up:

    step  = outside + sum of times         microseconds; outside: what the model does beside its layers
    bytes = rest + sum of bytes            rest: tensors that are of no layer
    error = sum of errors                  of |eps_q - eps|^2 / |eps|^2
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError

KEEP = "keep"
NOTHING = 0.01  # of a step


@dataclass
class Table:
    """Costs of L layers in F formats.

    layers: names. labels: names of the formats; the first is KEEP, full precision.
    times, spreads: [L, F] microseconds of a step, median and distance of the quartiles.
    bytes: [L, F], of stored tensors, those of the model's dtype in 16 bits.
    errors: [L, F] what the format of this layer alone adds to the prediction's error.
    allowed: [L, F] bool: whether a layer can have the format. KEEP is always allowed.
    widths: [L, F] bits of a weight.
    activations: of each layer and format what inputs are rounded to, as a word.
    ties: groups of layers, by number, that share an input: they take one activation format.
    step: microseconds of the model's step in full precision; total: its bytes in 16 bits.
    outside, rest: as above. device: where it was measured. forwards: of the model, for the errors, by tuples.
    """

    layers: list[str]
    labels: list[str]
    times: np.ndarray
    spreads: np.ndarray
    bytes: np.ndarray
    errors: np.ndarray
    allowed: np.ndarray
    widths: np.ndarray
    activations: list[list[str]]
    ties: list[list[int]]
    step: float
    outside: float
    total: float
    rest: float
    device: str = ""
    forwards: int = 0
    measured: dict[str, float] = field(default_factory=dict)
    """label -> microseconds of the step with that format in all layers, where it was measured."""
    scatter: float = 0.0
    """Distance of the quartiles of the full-precision step's times, as a share of their median."""
    rounds: int = 0
    """Times of that step that were taken."""
    stands: np.ndarray | None = None
    """[L, F] of a format that a layer cannot have, the one that stands for it: KEEP, or an equal one."""

    def __post_init__(self) -> None:
        shape = len(self.layers), len(self.labels)
        for name in ("times", "bytes", "errors"):
            values = getattr(self, name)
            if values.shape != shape or not np.isfinite(values[self.allowed]).all():
                raise UserError(f"a layer's {name} are no finite numbers: nothing can be chosen by them.")

    def _sum(self, values: np.ndarray, picks: np.ndarray) -> float:
        return float(values[np.arange(len(self.layers)), picks].sum())

    def time(self, picks: np.ndarray) -> float:
        """Predicted microseconds of a step."""
        return self.outside + self._sum(self.times, picks)

    def latency(self, picks: np.ndarray) -> float:
        """The same as a share of the step in full precision."""
        return self.time(picks) / self.step

    def size(self, picks: np.ndarray) -> float:
        """Bytes as a share of those of the model in 16 bits."""
        return (self.rest + self._sum(self.bytes, picks)) / self.total

    def error(self, picks: np.ndarray) -> float:
        """Predicted error of the prediction, relative."""
        return self._sum(self.errors, picks)

    def uniform(self, label: str) -> np.ndarray:
        """Picks of one format for all layers that can have it, and of what stands for it for the others."""
        if label not in self.labels:
            raise UserError(f"the table has no format '{label}'; it has {', '.join(self.labels)}.")
        column = self.labels.index(label)
        stands = np.zeros_like(self.widths) if self.stands is None else self.stands
        return np.where(self.allowed[:, column], column, stands[:, column])

    def fits(self, picks: np.ndarray, latency: float | None, size: float | None, slack: float = 1e-6) -> bool:
        """Whether picks are allowed, tied as they should be, and within the budgets."""
        rows = np.arange(len(self.layers))
        if not self.allowed[rows, picks].all():
            return False
        for group in self.ties:
            if len({self.activations[layer][picks[layer]] for layer in group}) > 1:
                return False
        within = latency is None or self.latency(picks) <= latency * (1 + slack)
        return bool(within and (size is None or self.size(picks) <= size * (1 + slack)))

    @property
    def narrow_gain(self) -> float:
        """What weights of fewer than 8 bits can save of a step, as a share of it: each layer in its quickest format
        of all, against its quickest of 8 bits and more."""
        times = np.where(self.allowed, self.times, np.inf)
        wide = np.where(self.widths >= 8, times, np.inf)
        return float((wide.min(1) - times.min(1)).sum() / self.step)

    @property
    def gain(self) -> float:
        """What formats can save of a step, as a share of it: each layer in its quickest, or in full precision."""
        times = np.where(self.allowed, self.times, np.inf)
        return float((self.times[:, 0] - times.min(1)).sum() / self.step)

    @property
    def eight_bits_fastest(self) -> bool:
        """Whether 8 bits in all layers that can have them save some of a step, and fewer next to nothing more."""
        eight = np.where(self.allowed & (self.widths == 8), self.times, np.inf).min(1)
        saved = np.where(np.isfinite(eight), self.times[:, 0] - eight, 0).sum() / self.step
        return bool((self.allowed & (self.widths < 8)).any() and self.narrow_gain <= NOTHING < saved)

    @property
    def full_precision_fastest(self) -> bool:
        """Whether no format in all layers makes a step shorter."""
        formats = self.labels[1:]
        return bool(formats) and all(self.latency(self.uniform(label)) >= 1 for label in formats)
