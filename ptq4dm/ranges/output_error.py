"""The range objective of the layer's output: what clipping does to X W^T, not to X or W alone.

    weights     argmin_c  ||X (W - Q_c(W))^T||^2      row by row (group by group, as if no other were rounded)
    inputs      argmin_c  ||(X - Q_c(X)) W^T||^2      each end of the range in turn, the other one kept

X are rows of what the layer is fed in calibration. "output-checked" is the search of MixLLM (arXiv:2412.14590), as
its authors' code has it: 80 to 100 % of the range of each group in steps of 2 %; where the output of all rows is then
no better than without clipping, for errors of groups add up, nothing is clipped.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..evidence import LayerEvidence
from .inputs import InputValues
from .registry import register_objective
from .search import WEIGHT_STEPS, least_of
from .weights import WeightRows

ROWS = 512  # of the input, on which its ranges are scored
STEPS = 24  # fractions of the full range that each end is tried at
TURNS = 2


@register_objective("output", needs=frozenset({"rows"}))
class OutputError:
    """The least squared error of the layer's output."""

    @staticmethod
    def weight(
        rows: WeightRows, parameter: None, evidence: LayerEvidence, search: tuple[float, int] = (0.5, WEIGHT_STEPS)
    ) -> Tensor:
        hessian = evidence.hessian.to(rows.rows.device, torch.float32)
        size = hessian.shape[0] // rows.groups
        blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)])

        def error(scale: Tensor) -> Tensor:
            wrong = (rows.errors(scale) * scale[:, None]).view(-1, rows.groups, size)
            return torch.einsum("ngi,gij,ngj->ng", wrong, blocks, wrong).flatten()

        return least_of(rows, error, *search)

    @staticmethod
    def input(inputs: InputValues, parameter: None, evidence: LayerEvidence) -> tuple[float, int]:
        rows = cast(Tensor, evidence.rows)  # there are some: `needs` says so
        x = rows[:: max(1, len(rows) // ROWS)]
        weight = cast(Tensor, inputs.weight).to(x)  # there is one where there is evidence

        def error(ends: tuple[float, float]) -> float:
            rounded = inputs.rounded(x, *inputs.grid(*ends))
            return float(((x - rounded) @ weight.T).square_().sum(dtype=torch.float64))

        fractions = [step / STEPS for step in range(STEPS, 0, -1)]
        low, high = inputs.low, inputs.high
        if inputs.symmetric:
            bound = max(-low, high)
            return inputs.grid(*min(((-bound * f, bound * f) for f in fractions), key=error))
        best = (low, high)
        for _ in range(TURNS):
            best = min(((best[0], high * f) for f in fractions), key=error) if high > 0 else best
            best = min(((low * f, best[1]) for f in fractions), key=error) if low < 0 else best
        return inputs.grid(*best)


@register_objective("output-checked", needs=frozenset({"rows"}))
class CheckedOutputError(OutputError):
    """The least squared error of the layer's output, or no clipping; inputs as by "output"."""

    @staticmethod
    def weight(rows: WeightRows, parameter: None, evidence: LayerEvidence, *_: object) -> Tensor:
        hessian = evidence.hessian.to(rows.rows.device, torch.float32)
        clipped = OutputError.weight(rows, None, evidence, (0.8, 10))

        def error(scale: Tensor) -> float:
            wrong = (rows.errors(scale) * scale[:, None]).view(-1, len(hessian))
            return float((wrong @ hessian * wrong).sum(dtype=torch.float64))

        return clipped if error(clipped) < error(rows.full) else rows.full
