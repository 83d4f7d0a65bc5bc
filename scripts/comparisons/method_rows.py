"""The rows of the table of all methods. A new method adds a file to rows/, and its function to FAMILIES below: its
baselines, itself, its ablations and controls.

    Row("Mine W4A8", "method", lambda: MineConfig())
    Row("Mine W4A8, idea taken out", "ablation", lambda: MineConfig(idea=False), of="Mine W4A8")
    Row("Mine W4A8, shuffled", "shuffled", lambda: MineConfig(), of="Mine W4A8", packed=my_control)

Beside every method stand full precision, round to nearest at the same bits, and round to nearest at the same stored
bytes (for W8A8 those are one row).
"""

from __future__ import annotations

from rows.allocated import measured_allocation
from rows.codebooks import codebooks
from rows.eight_bits import eight_bits, hessian_rounding
from rows.four_bits import four_bits
from rows.low_rank import low_rank
from rows.post_group import post_group
from rows.prediction import prediction_difference, trained_prediction
from rows.progressive import progressive_bits
from rows.rotations import rotations
from rows.row import KINDS, Row
from rows.sign_planes import sign_planes
from rows.splits import split_inputs, split_values
from rows.trained import trained_blocks
from rows.two_widths import important_rows, salient_rows

__all__ = ["FAMILIES", "KINDS", "Row", "all_rows"]

FAMILIES = (
    eight_bits, hessian_rounding, four_bits, important_rows, salient_rows, low_rank, rotations, prediction_difference,
    trained_blocks, trained_prediction, progressive_bits, post_group, sign_planes, measured_allocation, split_inputs,
    split_values, codebooks,
)  # fmt: skip
"""In the order in which they are printed."""


def all_rows() -> list[Row]:
    """The rows of all families."""
    return [row for family in FAMILIES for row in family()]
