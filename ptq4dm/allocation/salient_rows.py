"""Allocation by salience: a share of all output rows of a model gets 8 bits, those of the highest scores.

"MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient System Design",
Zheng et al., arXiv:2412.14590: scores of all rows of all layers are sorted together, so that layers get very
different shares. Which rows matter depends on the time, too: scores are kept by timestep bins, and their sums rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .importance import IMPORTANCE
from .row_task import RowTask


@dataclass
class Salience:
    """Scores of rows by time.

    importance: their name. edges: [B + 1] in [0, 1], 1 is pure noise; of scores that look at no calls one bin.
    tuples: [B], calibration tuples of each bin. scores: layer -> [B, N] float64, sums over these.
    """

    importance: str
    edges: list[float]
    tuples: list[int]
    scores: dict[str, Tensor]

    @property
    def total(self) -> dict[str, Tensor]:
        """Layer -> [N], sums over all bins: those that rank."""
        return {name: score.sum(0) for name, score in self.scores.items()}

    def by_layer(self) -> dict[str, list[float]]:
        """Layer -> [B], the share that it has of all scores of a bin; bins without tuples are 0."""
        whole = sum(score.sum(1) for score in self.scores.values())
        whole = torch.as_tensor(whole).clamp(min=torch.finfo(torch.float64).tiny)
        return {name: (score.sum(1) / whole).tolist() for name, score in self.scores.items()}

    def overlap(self, share: float) -> list[list[float]]:
        """[B, B]: of the rows that would be chosen by one bin alone, the share that another would choose, too; 0 of
        bins that have no score."""
        by_bin = [{name: score[b] for name, score in self.scores.items()} for b in range(len(self.tuples))]
        chosen = [chosen_rows(one, share) if any(s.any() for s in one.values()) else {} for one in by_bin]
        sets = [{(name, row) for name, rows in one.items() for row in rows} for one in chosen]
        return [[len(a & b) / max(1, len(a)) for b in sets] for a in sets]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, each row's scores in it."""
        return {
            "importance": self.importance,
            "edges": self.edges,
            "tuples": self.tuples,
            "scores": {name: score.tolist() for name, score in self.scores.items()},
        }


def salience(task: RowTask, importance: str, bins: int) -> Salience:
    """Scores of the task's rows in `bins` equal parts of the time that its calls lie in.

    Raises UserError where a score is NaN or infinite, or, as the score does, where there are no calls for it.
    """
    score = IMPORTANCE.find(importance)
    parts: list[RowTask] = [task]
    if score.needs and task.calls is not None:
        place = (task.calls.time.clamp(0, 1) * bins).long().clamp(max=bins - 1)
        chosen = [(place == b).nonzero()[:, 0] for b in range(bins)]
        parts = [task.part(task.calls[rows], task.seed * bins + b) for b, rows in enumerate(chosen)]
    tuples = [0 if part.calls is None else len(part.calls) for part in parts]
    empty = {view.name: torch.zeros(len(view.weight), dtype=torch.float64) for view in task.views}
    found = [score(part) if len(parts) == 1 or count else empty for part, count in zip(parts, tuples, strict=True)]
    scores = {name: torch.stack([one[name].double().cpu() for one in found]) for name in empty}
    if not all(one.isfinite().all() for one in scores.values()):
        raise UserError("the salience of rows is NaN or infinite: the model gives no finite numbers on calibration.")
    edges = [b / len(parts) for b in range(len(parts) + 1)]
    return Salience(importance, edges, tuples, scores)


def chosen_rows(scores: Mapping[str, Tensor], share: float) -> dict[str, list[int]]:
    """Layer -> numbers of its rows, rising, among the floor(share R) highest scores of all R rows.

    Rows of one score are taken in the layers' order. Rows count alike, however many weights they have: the paper's.
    """
    values = torch.cat([score.double().cpu() for score in scores.values()])
    count = math.floor(share * len(values) + 1e-9)
    taken = torch.zeros(len(values), dtype=torch.bool)
    taken[values.argsort(descending=True, stable=True)[:count]] = True
    parts = taken.split([len(score) for score in scores.values()])
    return {name: part.nonzero()[:, 0].tolist() for name, part in zip(scores, parts, strict=True)}


def predicted_error(scores: Mapping[str, Tensor], rows: Mapping[str, list[int]]) -> float:
    """The sum of the scores of all rows that stay narrow: of gauss-newton, what their rounding does to the output."""
    total = sum(float(score.sum()) for score in scores.values())
    return total - sum(float(scores[name][rows[name]].sum()) for name in rows if rows[name])
