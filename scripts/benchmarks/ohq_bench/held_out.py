"""The error of a choice of formats, measured on calls of other seeds, tuple by tuple."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from ohq_bench.kept import Kept
from ohq_bench.subject import Subject
from ptq4dm.budgets.table import Table
from ptq4dm.calibration.evidence import squared_error, substituted
from ptq4dm.calibration.record import answers, samples_of
from ptq4dm.pipelines.denoiser import evaluation_mode

CONFIDENCE = (0.025, 0.975)
DIGITS = 7  # of what is kept of an error


class HeldOut:
    """A model in full precision on its other calls. batch: tuples of one run. kept: errors that are known already."""

    def __init__(self, subject: Subject, table: Table, batch: int, kept: Kept):
        self.model, self.names, self.kept = subject.model, table.layers, kept
        self.batches = list(subject.other.batches(batch))
        self.layers = [{}, *subject.formats.values()]
        self.exact: list[torch.Tensor] = []

    def quantized(self, picks) -> dict:
        """The layers of some picks."""
        rows = zip(self.names, map(int, picks), strict=True)
        return {name: self.layers[pick][name] for name, pick in rows if name in self.layers[pick]}

    def errors(self, picks) -> np.ndarray:
        """[tuples, 2]: squared difference and squared reference of each."""
        key = hashlib.sha256(",".join(str(int(pick)) for pick in picks).encode()).hexdigest()[:16]
        return np.array(self.kept.once(f"errors of {key}", lambda: self._measured(picks)))

    def _measured(self, picks) -> list[list[float]]:
        self.exact = self.exact or [self._run(batch) for batch in self.batches]
        with substituted(self.model, self.quantized(picks)):
            found = [self._run(batch) for batch in self.batches]
        pairs = [pair for a, b in zip(found, self.exact, strict=True) for pair in zip(a, b, strict=True)]
        numbers = ((squared_error(a, b), squared_error(b, torch.zeros_like(b))) for a, b in pairs)
        return [[float(f"{value:.{DIGITS}g}") for value in two] for two in numbers]

    def error(self, picks) -> float:
        wrong, right = self.errors(picks).sum(0)
        return float(wrong / right)

    def interval(self, picks, other=None, draws: int = 2000) -> list[float]:
        """95 % interval over tuples of the error, or of its ratio to that of other picks on the same tuples."""
        draw = np.random.default_rng(0)
        ours = self.errors(picks)
        rows = draw.integers(len(ours), size=(draws, len(ours)))
        values = ours[rows].sum(1)
        share = values[:, 0] / values[:, 1]
        if other is not None:
            theirs = self.errors(other)[rows].sum(1)
            share = share / (theirs[:, 0] / theirs[:, 1])
        return [float(v) for v in np.quantile(share, CONFIDENCE)]

    @torch.no_grad()
    def _run(self, batch) -> torch.Tensor:
        with evaluation_mode(self.model):
            return samples_of(answers(self.model, batch)[0], batch)
