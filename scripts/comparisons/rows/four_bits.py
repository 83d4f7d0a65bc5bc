"""Rows of 4-bit weights under inputs of 8 bits, one scale a row or a group."""

from __future__ import annotations

from functools import partial

from ptq4dm import PTQ4DMConfig, RTNConfig
from rows.row import Row, shuffled_rounding


def four_bits() -> list[Row]:
    """4-bit weights as a format of its own, inputs in 8 bits: one scale per row, and one per group; affine ones."""
    rows = []
    choices = {"per row": {}, "g64": {"group_size": 64}, "g64 affine": {"group_size": 64, "affine": True}}
    for label, choice in choices.items():
        four = {"weight_bits": 4, **choice}
        name, gptq = f"PTQ4DM W4A8 {label}, gptq", partial(PTQ4DMConfig, rounding="gptq", **four)
        rows += [
            Row(f"RTN W4A8 {label}", "baseline", partial(RTNConfig, **four), name),
            Row(name, "method", gptq),
            Row(f"PTQ4DM W4A8 {label}", "ablation", partial(PTQ4DMConfig, **four), name),
            Row(f"{name}, dynamic", "ablation", partial(gptq, activations="dynamic"), name),
            *shuffled_rounding(name, gptq),
        ]
    row, after = (
        {"weight_bits": 4, "objective": "output"},
        {"weight_bits": 4, "rounding": "gptq", "prefix": "quantized"},
    )
    return [
        *rows,
        Row("PTQ4DM W4A8 per row, output ranges", "ablation", partial(PTQ4DMConfig, **row), rows[1].name),
        Row("PTQ4DM W4A8 per row, output ranges, gptq", "ablation", partial(PTQ4DMConfig, rounding="gptq", **row),
            rows[1].name),
        Row("PTQ4DM W4A8 per row, gptq, after quantized blocks", "ablation", partial(PTQ4DMConfig, **after),
            rows[1].name),
    ]  # fmt: skip
